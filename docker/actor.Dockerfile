# The actor, amd64 and arm64: docker buildx build --platform linux/amd64,linux/arm64 -f docker/actor.Dockerfile .
# SIM=[sim] adds the twin.
FROM python:3.12-slim
ARG SIM=""
COPY . /src
RUN pip install --no-cache-dir "/src${SIM}"
ENV OPENBLAS_NUM_THREADS=1
WORKDIR /work
ENTRYPOINT ["tether"]
CMD ["actor", "--help"]
