# make bench | test | lint | gpu | train | clean; each creates .venv on first use.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
SOURCES := $(shell find csrc -type f) setup.py

.PHONY: bench bench-compare bench-gpu gpu test lint compile-gpu cuda-report train build clean

bench: build
	$(BIN)/python -m pytest benchmarks --benchmark-only

# The change between a revision and the working tree: make bench-compare BASE=HEAD~1
bench-compare: build
	$(BIN)/python -m benchmarks.compare $(BASE)

# On a GPU, ten minutes: attention, gating unit, selected and sparse attention against their peers.
bench-gpu: build
	$(BIN)/python -m benchmarks.device

# The first minutes on a GPU: build, tests, compute-sanitizer, tuning, benchmark, with a log each.
gpu: $(STAMP)
	$(BIN)/python -m benchmarks.first_run

# A worker a core, of one thread each; `.venv/bin/python -m pytest tests` is one process, for a debugger.
test: build
	$(BIN)/python -m pytest tests -n auto --maxprocesses 8 --dist worksteal -p no:benchmark

# Triton kernels for sm_80, sm_90 and sm_100, without a GPU: registers, spills, shared memory.
compile-gpu: build
	$(BIN)/python -m hierkernels.aot

# CUDA kernels, as compiled by the build where there is nvcc: registers, shared memory, spills.
cuda-report: build
	PYTHONPATH=. $(BIN)/python csrc/cuda/report.py

lint: $(STAMP)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

train: build
	$(BIN)/python -m python_models.train

build: $(VENV)/.built

$(VENV)/.built: $(STAMP) $(SOURCES)
	$(BIN)/python setup.py -q build_ext --inplace
	@touch $@

$(STAMP): requirements-dev.txt requirements-peers.txt
	@test -x $(BIN)/python || $(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("Python 3.11 or later is \
	needed, $(PYTHON) is " + sys.version.split()[0] + ": name another, as in make PYTHON=python3.12 test")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -r requirements-dev.txt
	$(BIN)/python -m pip install --no-deps -r requirements-peers.txt
	@touch $@

clean:
	rm -rf $(VENV) build dist runs *.egg-info hierkernels/_native*.so benchmarks/report
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
