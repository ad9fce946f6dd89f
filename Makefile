# `make demo` and `make test` do all the set-up on a fresh machine: a virtual environment, the locked
# dependencies, the package itself.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PYTEST := $(BIN)/python -m pytest --durations=30 --durations-min=1
# Processes that run tests.
JOBS ?= 2
PARALLEL := --numprocesses=$(JOBS) --dist=loadfile
SLOW := $(PYTEST) $(PARALLEL) -m "slow and not long"
DEPS := $(VENV)/.dependencies

export RAY_USAGE_STATS_ENABLED = 0
export PIP_DISABLE_PIP_VERSION_CHECK = 1
# The install compiles nothing: the first import does, and without its files every process would do it again.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: install demo test test-slow test-all lint format docs

# The lock is complete, and most of what it installs is never imported.
$(DEPS): requirements-dev.lock
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --no-deps --no-compile -r requirements-dev.lock
	touch $(DEPS)

# Strict editable mode links every file, so that type checkers find the renamed packages; new files need it again.
install: $(DEPS)
	$(BIN)/python -m pip install --quiet --no-deps --no-build-isolation -e . --config-settings editable_mode=strict

demo: install
	$(BIN)/python -m remask.benchmarks.tiny.demo

# The fast tier; a bare `pytest` runs it in one process.
test: install
	$(PYTEST) $(PARALLEL)

# What the fast tier leaves out: processes, Ray, and whatever takes longer than two seconds.
test-slow: install
	$(SLOW)

test-all: install
	$(PYTEST) $(PARALLEL)
	$(SLOW)

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

format: install
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: install
	$(BIN)/python -m sphinx -W --keep-going -n -b html docs docs/_build
