# One target a job; each is what the README names. PYTHON is the interpreter that makes the environment.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# One thread a process: the demo runs four ranks on two cores.
DEMO_ENV := OMP_NUM_THREADS=1

.PHONY: env demo test lint soak clean
.DEFAULT_GOAL := help

help:
	@echo "make demo          raw text to trained model on a CPU, under 5 minutes on 2 cores"
	@echo "make test          the test suite (no GPU, no network)"
	@echo "make lint          ruff, mypy, shellcheck"
	@echo "make soak          the long runs of the test suite"

env: $(VENV)/ready

# The marker is made last: an interrupted installation is done again.
$(VENV)/ready: pyproject.toml constraints.txt setup.py $(wildcard data_tools/native/*)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

test: env
	$(BIN)/python -m pytest tests --ignore=tests/cluster

soak: env
	$(BIN)/python -m pytest tests --ignore=tests/cluster -m soak

lint: env
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	git ls-files '*.sh' '*.sbatch' | xargs -r $(BIN)/shellcheck

clean:
	rm -rf demo build *.egg-info
