# `make demo` and `make test` are the whole set-up: each makes .venv if it is missing, installs, and runs.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
TASK ?= car-loop
SEEDS ?= 0 1 2 3 4

.PHONY: demo test test-slow bench curves accept get-up practice chaos fuzz link snapshots weights lint clean

demo: $(VENV)/demo
	$(BIN)/tether demo car

test: lint
	$(BIN)/python -m pytest -n 2 --dist loadfile

test-slow: $(VENV)/dev
	$(BIN)/python -m pytest -m slow

bench: $(VENV)/bench
	$(BIN)/python -m pytest -m bench
	$(BIN)/python -m tests.bench.run

# Learning curves of tether and of sbx on the same environment: a JSON a seed, a table, an SVG (tests/bench/curves.py).
curves: SEEDS = 0 1 2
curves: $(VENV)/bench
	$(BIN)/python -m tests.bench.curves --env $(or $(ENV),Hopper-v5) --algo $(or $(ALGO),rlpd) --seeds $(SEEDS) \
		$(if $(STEPS),--steps $(STEPS)) $(if $(PRESET),--preset $(PRESET)) $(foreach s,$(SET),--set '$(s)') \
		$(if $(PRIOR),--prior $(PRIOR)) $(if $(CORES),--cores $(CORES))

accept: $(VENV)/demo
	$(BIN)/python tests/accept.py --task $(TASK) --seeds $(SEEDS) $(if $(LENGTH),--length $(LENGTH)) $(if $(WIDTH),--width $(WIDTH))

# How surely the quadruped gets up from random fallen poses in the twin.
get-up: $(VENV)/demo
	$(BIN)/python tests/get_up.py --poses $(or $(POSES),200) --seed $(or $(SEED),0) $(if $(TERRAIN),--terrain $(TERRAIN))

# How surely the arm practises alone, at random and by script: hours in the twin, and who had to put the object back.
practice: $(VENV)/demo
	$(BIN)/python tests/practice.py --hours $(or $(HOURS),2) --seed $(or $(SEED),0)

# What the link survives: N faults, N malformed messages; what it costs and how fast it comes back.
chaos: $(VENV)/dev
	$(BIN)/python -m tests.chaos.campaign --faults $(or $(N),500) $(if $(SEED),--seed $(SEED))

fuzz: $(VENV)/dev
	$(BIN)/python -m tests.chaos.fuzz --messages $(or $(N),1000000) $(if $(SEED),--seed $(SEED))

link: $(VENV)/dev
	$(BIN)/python -m tests.chaos.measure

snapshots: $(VENV)/dev
	$(BIN)/python -m tests.chaos.snapshots --kills 200 --mutations 1000

weights: $(VENV)/dev
	$(BIN)/python -m tests.chaos.weights --payloads 10000

# The type checker cannot see through the installed mapping of folders; a tree of links can.
lint: $(VENV)/dev
	$(BIN)/ruff check .
	mkdir -p .typing/tether
	for room in agents robot_env drivers launch sim; do ln -sfn ../../$$room .typing/tether/$$room; done
	MYPYPATH=.typing $(BIN)/mypy --no-error-summary -p tether

$(VENV)/demo: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --editable '.[learner,sim]'
	touch $@

$(VENV)/dev: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --editable '.[learner,sim,dev]'
	touch $@

$(VENV)/bench: $(VENV)/dev
	$(BIN)/python -m pip install --quiet --editable '.[learner,sim,dev,bench]'
	touch $@

clean:
	rm -rf $(VENV) .typing build *.egg-info
