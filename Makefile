# One target a job; each is what the README names. PYTHON is the interpreter that makes the environment.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# The interpreter of a GPU machine, with the repository's dependencies; ours where none is named.
GPU_PYTHON ?= $(BIN)/python
# One thread a process: the demo runs four ranks on two cores.
DEMO_ENV := OMP_NUM_THREADS=1

.PHONY: env demo test lint soak bench-gpu clean
.DEFAULT_GOAL := help

help:
	@echo "make demo          raw text to trained model on a CPU, under 5 minutes on 2 cores"
	@echo "make test          the test suite (no GPU, no network)"
	@echo "make lint          ruff, mypy, shellcheck"
	@echo "make bench-gpu     tokens/s and its parts on one GPU against peers, under 9 minutes (GPU_PYTHON=python3)"
	@echo "make soak          the long runs of the test suite"

env: $(VENV)/ready

# Markers are made last: an interrupted installation is done again.
$(VENV)/ready: pyproject.toml constraints.txt setup.py $(wildcard data_tools/csrc/*)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e .
	touch $@

$(VENV)/ready-dev: $(VENV)/ready
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

# The main job at laptop size: text -> tokenizer -> rows -> segments -> indexed binaries -> training -> summary.
# Every stage continues where it was interrupted; `make clean` starts over.
demo: env
	$(BIN)/python -m data_tools.demo_corpus --output demo/raw
	$(BIN)/python data_tools/build_amber.py tokenize --input demo/raw --output demo/rows \
	    --tokenizer demo/raw/tokenizer.model --row-length 257
	$(BIN)/python data_tools/build_amber.py mix --input demo/rows --output demo/segments \
	    --num-segments 4 --held-out-per-source 32
	$(BIN)/python data_tools/build_amber.py index --input demo/segments --output demo/data
	$(BIN)/python data_tools/build_amber.py verify --input demo/data
	$(DEMO_ENV) $(BIN)/torchrun --standalone --nproc-per-node 4 -m megatron_patch train recipes/demo.yaml
	$(BIN)/python -m megatron_patch summary demo/run

test: $(VENV)/ready-dev
	$(BIN)/python -m pytest tests --ignore=tests/cluster

soak: $(VENV)/ready-dev
	$(BIN)/python -m pytest tests --ignore=tests/cluster -m soak

bench-gpu:
	$(GPU_PYTHON) -m benchmarks.gpu

lint: $(VENV)/ready-dev
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	git ls-files '*.sh' '*.sbatch' | xargs -r $(BIN)/shellcheck

clean:
	rm -rf demo build *.egg-info
