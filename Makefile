# One target a job; each is what the README names. PYTHON is the interpreter that makes the environment.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# The interpreter of a GPU machine, with the repository's dependencies; ours where none is named.
GPU_PYTHON ?= $(BIN)/python
# One thread a process: the demo runs four ranks on two cores.
demo demo-chat demo-vision: export OMP_NUM_THREADS := 1
# On the CPU where there is a GPU too, which four ranks could not share.
demo demo-chat demo-vision: export CUDA_VISIBLE_DEVICES :=

.PHONY: help env demo demo-chat demo-vision test test-ranks test-computing test-cluster test-gpu lint soak gpu-data gpu-session bench-gpu bench-data ladder-data ladder ladder-smoke asan emulate clean
.DEFAULT_GOAL := help

help:
	@echo "make demo          raw text to trained model on a CPU, under 5 minutes on 2 cores"
	@echo "make demo-chat     the demo's model tuned to answer questions, under 4 minutes more"
	@echo "make demo-vision   the demo's model taught to read scanned digits, under 6 minutes more"
	@echo "make test          the test suite (no GPU, no network)"
	@echo "make test-cluster  the sbatch templates on a real Slurm of 20 nodes in namespaces (root, Debian)"
	@echo "make test-gpu      the kernels' tests on one GPU (GPU_PYTHON=python3)"
	@echo "make lint          ruff, mypy, shellcheck"
	@echo "make bench-gpu     tokens/s and its parts on one GPU against peers, under 9 minutes (GPU_PYTHON=python3)"
	@echo "make gpu-session   a resume, kernels' tests, layouts and bench-gpu on one GPU, under 9 minutes (make gpu-data first)"
	@echo "make ladder        does one FFN for all layers pay? an answer at laptop size, about an hour (make ladder-data first)"
	@echo "make bench-data    the data tools against their peers, about 6 minutes on 2 cores"
	@echo "make asan          the C++ core's tests under AddressSanitizer and UBSan"
	@echo "make emulate       the same with AVX-512 emulated, for processors without (libsimde-dev)"
	@echo "make soak          the long runs of the test suite"
	@echo "make env           the environment alone, in .venv (PYTHON=python3.12 chooses its interpreter)"
	@echo "make clean         removes the demo and build leftovers: the demo then starts over"

env: $(VENV)/ready

# What pip would find out after downloading gigabytes. Any Python must be able to read this, the oldest too.
define MACHINE
import os, sys, sysconfig
if not (3, 11) <= sys.version_info[:2] <= (3, 13):
    sys.exit("Python 3.11, 3.12 or 3.13 is needed, $(PYTHON) is " + sys.version.split()[0] + ": make $(MAKECMDGOALS) PYTHON=python3.11")
if not os.path.exists(os.path.join(sysconfig.get_path("include"), "Python.h")):
    sys.exit("Python's headers are needed for the C++ core (Debian: apt-get install python3-dev)")
endef
export MACHINE

# Markers are made last: an interrupted installation is done again. An environment of another Python is made anew.
$(VENV)/ready: pyproject.toml constraints.txt setup.py $(wildcard data_tools/index/csrc/*)
	@command -v $(PYTHON) >/dev/null || \
	    { echo "$(PYTHON) is not found: Python 3.11, 3.12 or 3.13 is needed (Debian: apt-get install python3-dev python3-venv; or name yours with PYTHON=)" >&2; exit 1; }
	@$(PYTHON) -c "$$MACHINE"
	@command -v "$${CXX:-c++}" >/dev/null || \
	    { echo "A C++17 compiler is needed for the C++ core (Debian: apt-get install g++; or name yours with CXX)" >&2; exit 1; }
	@test ! -e $(BIN)/python || test "$$($(BIN)/python -V 2>&1)" = "$$($(PYTHON) -V 2>&1)" || rm -rf $(VENV)/*
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e .
	touch $@

$(VENV)/ready-chat: $(VENV)/ready
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[chat]'
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
	$(BIN)/torchrun --standalone --local-addr 127.0.0.1 --nproc-per-node 4 -m megatron_patch train \
	    recipes/demo.yaml
	$(BIN)/python -m megatron_patch summary demo/run

# The demo's model tuned on questions and answers, which then answers those that were held out. The demo comes first, and
# is finished where it was interrupted.
demo-chat: $(VENV)/ready-chat
	grep -qs '"state": "completed"' demo/run/status.json || $(MAKE) demo
	$(BIN)/python -m data_tools.demo_conversations --output demo/conversations/library.jsonl
	$(BIN)/python data_tools/build_chat.py build --input demo/conversations --output demo/chat_data \
	    --tokenizer demo/raw/tokenizer.model --row-length 257 --held-out-rows 32
	$(BIN)/python data_tools/build_chat.py verify --input demo/chat_data
	$(BIN)/torchrun --standalone --local-addr 127.0.0.1 --nproc-per-node 4 -m megatron_patch train \
	    recipes/demo_chat.yaml run.initial_weights=demo/run/checkpoints/$$(cat demo/run/checkpoints/latest)
	$(BIN)/python -m megatron_patch summary demo/chat_run

$(VENV)/ready-vision: $(VENV)/ready
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[vision]'
	touch $@

# A tiny encoder trained with the demo's decoder, end to end, to read scanned digits. The demo comes first.
demo-vision: $(VENV)/ready-vision
	grep -qs '"state": "completed"' demo/run/status.json || $(MAKE) demo
	$(BIN)/python -m data_tools.demo_digits --output demo/digits
	$(BIN)/python data_tools/build_vision.py build --input demo/digits/digits.json --images demo/digits/images \
	    --output demo/digits_data --tokenizer demo/raw/tokenizer.model --image-tokens 16 --row-length 257 --held-out-rows 48
	$(BIN)/python data_tools/build_vision.py verify --input demo/digits_data
	$(BIN)/torchrun --standalone --local-addr 127.0.0.1 --nproc-per-node 2 -m megatron_patch train \
	    recipes/demo_vision.yaml run.initial_weights=demo/run/checkpoints/$$(cat demo/run/checkpoints/latest)
	$(BIN)/python -m megatron_patch summary demo/vision_run

# The two halves side by side, which keeps two cores busy. The output of the second comes when it ends.
COMPUTING := tests/data tests/data_tools tests/evaluate tests/kernels
RUNTIMES := tests/convert tests/devices
test: $(VENV)/ready-dev
	@$(MAKE) --no-print-directory --keep-going --jobs=2 test-ranks test-computing

test-ranks:
	$(BIN)/python -m pytest tests $(addprefix --ignore=,tests/cluster $(COMPUTING) $(RUNTIMES))

# The runtimes last and apart: the threads that they and gloo leave behind hang ranks that are forked later.
test-computing:
	@for tests in "$(COMPUTING)" "$(RUNTIMES)"; do \
	    $(BIN)/python -m pytest $$tests || failed=1; \
	done > $(VENV)/test-computing.log 2>&1; cat $(VENV)/test-computing.log; test -z "$$failed"

test-cluster: $(VENV)/ready-dev
	tests/cluster/install.sh
	PYTHON="$(CURDIR)/$(BIN)/python" tests/cluster/run

test-gpu:
	TESTS_ON_GPU=1 $(GPU_PYTHON) -m pytest tests/kernels

soak: $(VENV)/ready-dev
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[executorch]'
	$(BIN)/python -m pytest tests --ignore=tests/cluster -m soak

# Real text in rows of 2,049 ids, for gpu-session; it may be built elsewhere and copied.
gpu-data: demo/gpu/data/manifest.json

demo/gpu/data/manifest.json: | $(VENV)/ready
	$(BIN)/python -m data_tools.demo_corpus --output demo/raw
	$(BIN)/python data_tools/build_amber.py tokenize --input demo/raw --output demo/gpu/rows --tokenizer demo/raw/tokenizer.model
	$(BIN)/python data_tools/build_amber.py mix --input demo/gpu/rows --output demo/gpu/segments --num-segments 1
	$(BIN)/python data_tools/build_amber.py index --input demo/gpu/segments --output demo/gpu/data

# Text for the ladder: 110 MB of Debian's documentation (apt-get update first), documents held out whole.
ladder-data: demo/ladder/data/manifest.json

LADDER_BUILD := $(BIN)/python data_tools/build_amber.py
demo/ladder/data/manifest.json: | $(VENV)/ready
	$(BIN)/python -m data_tools.debian_corpus --packages demo/ladder/packages --output demo/ladder/raw
	for side in train held_out; do $(LADDER_BUILD) tokenize --config data_tools/debian.yaml --row-length 257 \
	    --tokenizer demo/ladder/raw/tokenizer.model --input demo/ladder/raw/$$side --output demo/ladder/rows/$$side || exit; done
	$(LADDER_BUILD) mix --config data_tools/debian.yaml --direct --num-segments 1 \
	    --input demo/ladder/rows/train --held-out demo/ladder/rows/held_out --output demo/ladder/data
	$(LADDER_BUILD) verify --input demo/ladder/data

# Small models that share their FFN against models that do not (docs/sharing.md); finished runs are not done again.
LADDER_SIZE ?= small
LADDER_WORKERS ?= 2
ladder: demo/ladder/data/manifest.json | $(VENV)/ready-dev
	$(BIN)/python -m benchmarks.ladder $(LADDER_SIZE) --workers $(LADDER_WORKERS)

ladder-smoke: demo/ladder/data/manifest.json | $(VENV)/ready-dev
	rm -rf demo/ladder/smoke
	$(BIN)/python -m benchmarks.ladder smoke --workers 2

gpu-session:
	$(GPU_PYTHON) -m benchmarks.gpu_session --data demo/gpu/data --out gpu_session

bench-gpu:
	$(GPU_PYTHON) -m benchmarks.gpu

bench-data: $(VENV)/ready-dev
	$(BIN)/python -W ignore benchmarks/index_speed.py
	$(BIN)/python -W ignore benchmarks/tokenize_speed.py
	$(BIN)/python -W ignore benchmarks/small_files_speed.py
	$(BIN)/python -W ignore benchmarks/loader_speed.py

# The same with the AVX-512 kernel emulated by SIMDe, for processors without AVX-512 (Debian: apt-get install libsimde-dev).
emulate: EMULATION := -include $(CURDIR)/tests/data_tools/avx512_emulation.h -mavx2 -mbmi -mbmi2 -mlzcnt -mpopcnt \
    -fno-sanitize=signed-integer-overflow  # which SIMDe's subtraction of bytes does
emulate: asan

# A copy, so that the core in use stays as it is. The sanitizers' libraries must be there before Python starts.
asan: $(VENV)/ready-dev
	rm -rf build/asan && mkdir -p build/asan/source build/asan/tests
	cp -r setup.py pyproject.toml README.md data_tools build/asan/source/
	rm -f build/asan/source/data_tools/index/_core*.so
	cp -r tests/__init__.py tests/data_tools build/asan/tests/
	AMBER_CXXFLAGS="-O1 -g -fsanitize=address,undefined -fno-sanitize-recover=all $(EMULATION)" \
	    $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --target build/asan build/asan/source
	cd build/asan && LD_PRELOAD="$$(gcc -print-file-name=libasan.so) $$(gcc -print-file-name=libstdc++.so)" \
	    ASAN_OPTIONS=detect_leaks=0 PYTHONMALLOC=malloc "$(CURDIR)/$(BIN)/python" -m pytest --noconftest -p no:cacheprovider \
	    tests/data_tools/index/test_row_parser.py tests/data_tools/test_fuzz_files.py

lint: $(VENV)/ready-dev
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	git ls-files '*.sh' '*.sbatch' | xargs -r $(BIN)/shellcheck

clean:
	rm -rf demo build *.egg-info
