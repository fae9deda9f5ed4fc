# One obvious command each: demo, test, lint, bench, matrix, sanitize, wheel, clean.
PYTHON   ?= python3
VENV     ?= .venv
# These three belong together. For torch 2.14: torch==2.14.1 torchrec==1.9.2 fbgemm-gpu-cpu==1.9.0
TORCH    ?= torch==2.13.0
TORCHREC ?= torchrec==1.8.0
FBGEMM   ?= fbgemm-gpu-cpu==1.8.0
# For `make matrix`: TORCH[/TORCHREC/FBGEMM][@PYTHON], and a folder for what it installs.
PAIRS    ?= 2.13.0/1.8.0/1.8.0
CACHE    ?= build/matrix

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check
export PATH := $(abspath $(BIN)):$(PATH)

CSRC := $(shell find csrc tests/csrc benchmarks -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh')

.PHONY: demo test test-all lint format bench bench-suite bench-compare matrix sanitize wheel clean

demo: $(VENV)/built
	$(BIN)/python -m examples.movielens

# On all cores, file by file; those that take longest come first (tests/conftest.py). What one process has
# compiled of Python, the others take.
test: export PYTHONDONTWRITEBYTECODE =
test: $(VENV)/built
	$(BIN)/python -m pytest -q -n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder

# The long tests too (many processes, kills), those of the benchmarks, each workload run once, and those of
# docs/recipes.md with Lightning, transformers and accelerate.
test-all: $(VENV)/recipes
	$(BIN)/python -m pytest -q -m "" tests benchmarks

lint: $(VENV)/linters
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $(CSRC)
	$(BIN)/mypy

format: $(VENV)/linters
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CSRC)

bench: export TORCH_EXTENSIONS_DIR ?= $(abspath build/torch_extensions)
bench: $(VENV)/peers
	$(BIN)/python -m benchmarks.report

# Throughput of every workload and peer, a table for each: make bench-suite [SUITE='-k "scalars and adam"']
bench-suite: export TORCH_EXTENSIONS_DIR ?= $(abspath build/torch_extensions)
bench-suite: $(VENV)/peers
	$(BIN)/python -m pytest benchmarks/test_throughput.py -q --benchmark-enable --benchmark-only $(SUITE)

# The work tree against another revision: make bench-compare BASE=HEAD~1 [COMPARE="--all"]
bench-compare: $(VENV)/built
	$(BIN)/python -m benchmarks.compare $(BASE) $(COMPARE)

# Builds and tests on other releases, each in an environment of its own; writes docs/compatibility.md:
# make matrix PAIRS="2.14.1/1.9.2/1.9.0 2.15.0@python3.12" [MATRIX="--tests tests/optim"]
matrix:
	$(PYTHON) -m tools.matrix --cache $(CACHE) $(MATRIX) $(PAIRS)

# Memory and undefined behaviour, then races: the C++ core by its own tests, and the extension by those of the
# step.
SANITIZED := memory_between_steps packed_states sparse rows threads interrupts
sanitize: $(VENV)/built
	cmake -S tests/csrc -B build/sanitize -DRECAP_SANITIZE=address,undefined
	cmake --build build/sanitize --parallel
	ctest --test-dir build/sanitize --output-on-failure --no-tests=error
	$(BIN)/python -m tests.support.under_sanitizers address,undefined $(SANITIZED:%=tests/optim/test_%.py)
	cmake -S tests/csrc -B build/sanitize-thread -DRECAP_SANITIZE=thread
	cmake --build build/sanitize-thread --parallel --target test_threads test_grad_norm test_rows test_sparse test_tuner
	ctest --test-dir build/sanitize-thread -R "cpu/test_(threads|grad_norm|rows|sparse|tuner)" --output-on-failure --no-tests=error
	$(BIN)/python -m tests.support.under_sanitizers thread tests/optim/test_threads.py

# Without torch's libraries, which it finds where it is installed; with the CUDA engine if there is nvcc.
wheel: $(VENV)/installed
	$(BIN)/python -m pip wheel --quiet --no-build-isolation --no-deps --wheel-dir dist .

clean:
	rm -rf build dist *.egg-info $(VENV) recap_fast_demo recap_fast/_C*.so recap_fast/_torch_version.py

# torch first and pinned: the extension is built against it, and nothing after it may replace it.
$(VENV)/installed: requirements/build.txt requirements/torchrec-cpu.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) "$(TORCH)"
	$(PIP) -r requirements/build.txt -r requirements/torchrec-cpu.txt
	$(PIP) --no-deps "$(TORCHREC)" "$(FBGEMM)"
	touch $@

# To try and to test, the CUDA engine is compiled for the GPU that there is, or else for one of the newest;
# `make wheel` and pip compile it for all. Tests look at the PTX that it keeps.
GPUS = $(shell nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2>/dev/null | grep -xE '7\.5|([89]|1[0-9])\.[0-9]' | sort -u)
$(VENV)/built: export TORCH_CUDA_ARCH_LIST ?= $(or $(GPUS),12.0)
$(VENV)/built: export CUDAFLAGS ?= --keep
$(VENV)/built: $(VENV)/installed setup.py pyproject.toml CMakeLists.txt $(wildcard csrc/*/*.cmake) $(CSRC)
	$(PIP) --no-build-isolation -e ".[demo,test]"
	touch $@

$(VENV)/linters: $(VENV)/built
	$(PIP) "recap-fast[lint]"
	touch $@

# DeepSpeed, a peer of the benchmarks: without it, they go on and say so.
$(VENV)/peers: $(VENV)/built
	$(PIP) --no-build-isolation "recap-fast[bench]" && touch $@ || echo "no DeepSpeed to compare with"

# What docs/recipes.md has recipes for: without it, the tests of these recipes are skipped.
$(VENV)/recipes: $(VENV)/built
	$(PIP) "recap-fast[recipes]" && touch $@ || echo "no Lightning, transformers and accelerate to test with"
