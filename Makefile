# The way in: `make help`. Everything is installed into .venv; only python3 (3.11 or newer) is needed.

PYTHON ?= python3
JOBS ?= 2
VENV := .venv
PEERS := .venv-peers
BIN := $(VENV)/bin
# Python compiles what is imported; to compile everything takes a third of the installation.
PIP := $(BIN)/python -m pip install -qq --disable-pip-version-check --no-compile --constraint constraints.txt
PYTEST := $(BIN)/python -m pytest
# The tests start hundreds of processes; where this is set, each compiles the library anew.
unexport PYTHONDONTWRITEBYTECODE
CODE := s3queue_async pytest_s3queue.py tests $(wildcard benchmarks examples)

.DEFAULT_GOAL := help
.PHONY: help setup test test-unit test-parallel test-alone coverage guard lint format demo demo-s3 bench bench-peers newcomer cluster sim ablations storm lock clean

help: ## Show this list
	@awk 'BEGIN { FS = ":.*## " } /^[a-z0-9-]+:.*## / { printf "  make %-14s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: $(VENV)/.installed-all ## Install the library, the tests' and the checkers' needs into .venv

test: setup ## Everything that CI runs: lint and the regression guard side by side, then all tests
	$(MAKE) -j $(JOBS) lint guard
	$(MAKE) test-parallel
	$(MAKE) test-alone

test-parallel: setup ## Tests that may run side by side
	$(PYTEST) -m "not alone" -n $(JOBS) --dist loadfile

test-alone: setup ## Tests that measure time, one after the other
	@# Exit code 5 means that no test is marked so.
	$(PYTEST) -m alone || [ $$? -eq 5 ]

coverage: setup ## Branch coverage of the tests that may run side by side (they take twice as long so)
	$(PYTEST) -m "not alone" -n $(JOBS) --dist loadfile --cov --cov-report=term

guard: setup ## Requests, bytes, calls, instructions and allocations a message, beside benchmarks/baseline.json
	$(BIN)/python -m benchmarks.guard

test-unit: setup ## The fast tests only: no server, no processes
	$(PYTEST) -m "not alone and not integration" tests/unit

lint: setup ## ruff, mypy (strict), and import-linter for the floors
	$(BIN)/ruff check $(CODE)
	$(BIN)/ruff format --check $(CODE)
	$(BIN)/mypy $(CODE)
	$(BIN)/lint-imports

format: setup ## Format the code and repair what ruff can repair
	$(BIN)/ruff check --fix $(CODE)
	$(BIN)/ruff format $(CODE)

demo: $(VENV)/.installed-demo ## Index Python's standard library with two workers on one file; one is killed half-way
	$(BIN)/python -m examples.demo

demo-s3: $(VENV)/.installed-demo ## The same on a real S3 server (SeaweedFS, from a wheel)
	$(BIN)/python -m examples.demo --s3

bench: setup bench-peers ## Everything beside the bare loop and other queues: docs/performance.md (9 to 17 minutes)
	$(BIN)/python -m benchmarks.bench --docs
	$(BIN)/python -m benchmarks.memory

bench-peers: $(PEERS)/.installed ## Install what `make bench` compares with, into .venv-peers

newcomer: setup ## A newcomer's path, timed: clone, make demo, and every command of the README
	$(BIN)/python -m tests.newcomer

cluster: setup $(VENV)/.installed-bench ## Clusters of 1 to 1,000 workers on a modelled S3: docs/scaling.md (an hour or so)
	$(BIN)/python -m benchmarks.cluster --plot docs/scaling.png
	$(BIN)/python -m benchmarks.cluster --latency
	$(BIN)/python -m benchmarks.cluster --idle

SEEDS ?= 300
sim: setup ## Simulated clusters with faults: SEEDS=300 JOBS=2, or SEED=n to replay one (WITHOUT=safeguard)
	$(BIN)/python -m tests.simulation $(if $(SEED),--seed $(SEED) $(if $(WITHOUT),--without $(WITHOUT)),--seeds $(SEEDS) --jobs $(JOBS))

ablations: setup ## Remove each safeguard of the engine in turn: the table of docs/testing.md
	$(BIN)/python -m tests.simulation --ablations --seeds 20000 --jobs $(JOBS)

storm: setup ## Real processes on a real store, killed, stopped and cut off for five minutes
	$(BIN)/python -m tests.storm

lock: ## Take the newest versions of everything that setup installs, and write them down
	rm -rf $(VENV)/lock
	$(PYTHON) -m venv $(VENV)/lock
	$(VENV)/lock/bin/python -m pip install -qq --disable-pip-version-check ".[bench,demo,test,dev]"
	( sed -n '/^#/p' constraints.txt; \
	  $(VENV)/lock/bin/python -m pip freeze --disable-pip-version-check | grep -v '^s3queue' ) > constraints.new
	mv constraints.new constraints.txt
	rm -rf $(VENV)/lock

clean: ## Remove .venv, caches and build results
	rm -rf $(VENV) $(PEERS) benchmarks/results build dist htmlcov demo-data .coverage .coverage.* .hypothesis
	rm -rf .mypy_cache .pytest_cache .ruff_cache .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo 'Python 3.11 or newer is needed; try: make PYTHON=python3.12' >&2; exit 1; }
	@echo 'Making $(VENV) with $(PYTHON)'
	@$(PYTHON) -m venv $(VENV) \
		|| { rm -rf $(VENV); echo 'Python has no venv module; on Debian: apt-get install python3-venv' >&2; exit 1; }

# A stamp is older than what it depends on only when something has to be installed again.
$(VENV)/.installed-all: pyproject.toml constraints.txt | $(BIN)/python
	@echo 'Installing s3queue_async[demo,test,dev] into $(VENV) (about a minute the first time)'
	@$(PIP) --editable '.[demo,test,dev]'
	@touch $@ $(VENV)/.installed-demo

$(VENV)/.installed-bench: pyproject.toml constraints.txt | $(BIN)/python
	@echo 'Installing s3queue_async[bench] into $(VENV)'
	@$(PIP) --editable '.[bench]'
	@touch $@

# What is missing afterwards is skipped and named by the benchmark. jqueue asks for Python 3.12 and runs on 3.11.
$(PEERS)/.installed: benchmarks/requirements-peers.txt $(wildcard benchmarks/contenders/s3db/*.json benchmarks/contenders/s3db/recker/*)
	@echo 'Installing other queues into $(PEERS)'
	@$(PYTHON) -m venv $(PEERS)
	-@$(PEERS)/bin/python -m pip install -qq --disable-pip-version-check -r $<
	-@$(PEERS)/bin/python -m pip install -qq --disable-pip-version-check --no-deps --ignore-requires-python jqueue==1.0.0
	@rm -rf $(PEERS)/s3db && cp -r benchmarks/contenders/s3db $(PEERS)/s3db
	-@cd $(PEERS)/s3db && PATH="$(CURDIR)/$(PEERS)/bin:$$PATH" npm install --silent --legacy-peer-deps --no-audit --no-fund --ignore-scripts
	@command -v redis-server >/dev/null || echo 'No redis-server: SAQ and taskiq will be left out; on Debian: apt-get install redis-server' >&2
	@touch $@

$(VENV)/.installed-demo: pyproject.toml constraints.txt | $(BIN)/python
	@echo 'Installing s3queue_async[demo] into $(VENV)'
	@$(PIP) --editable '.[demo]'
	@touch $@
