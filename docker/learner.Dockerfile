# The learner on a GPU: docker build -f docker/learner.Dockerfile -t tether-learner .
FROM nvidia/cuda:13.0.1-cudnn-runtime-ubuntu24.04
RUN apt-get update && apt-get install -y --no-install-recommends python3-venv && rm -rf /var/lib/apt/lists/*
RUN python3 -m venv /opt/tether
COPY . /src
RUN /opt/tether/bin/pip install --no-cache-dir "/src[learner]" "jax[cuda13]"
WORKDIR /work
ENTRYPOINT ["/opt/tether/bin/tether"]
CMD ["learner", "--help"]
