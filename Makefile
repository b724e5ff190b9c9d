# What people type. Every target sets up .venv by itself, once; set PYTHON or TORCH to use others.
PYTHON ?= python3
TORCH ?= torch==2.13.0
JOBS ?= 2
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
# The tests want kernels of 64-byte vectors that run here.
EMULATED512 := $(if $(shell grep -s -m1 avx512vl /proc/cpuinfo),0,1)

.PHONY: demo test test-install test-torch bench lint cuda gpu clean

demo: $(READY)  ## train, judge and export a CNN on the embedded images; the report is runs/demo/report.md
	$(BIN)/cvfast demo

test: $(READY)  ## all tests
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) --dist worksteal tests

test-install: $(READY)  ## pip install in fresh environments, wheel and sdist (slow)
	$(BIN)/python -m pytest -s tests/install --install-tests $(INSTALL)

test-torch: $(READY)  ## this build, made with TORCH, under another torch: make test-torch OTHER=torch==2.14.1
	$(PYTHON) -m venv .venv-other  # the interpreter of Triton 3.6, which torch 2.11 brings, needs numpy < 2.4
	.venv-other/bin/pip install -q $(OTHER) expecttest matplotlib "numpy<2.4" onnx onnxruntime onnxscript pillow pytest \
	  pytest-xdist rich safetensors torchmetrics triton typer
	OMP_NUM_THREADS=1 PYTHONPATH=. .venv-other/bin/python -m pytest -n $(JOBS) \
	  tests/ops tests/nn tests/test_import.py tests/test_backend.py tests/engine/test_use.py

bench: $(READY)  ## compares cvfast with torch; figures in benchmarks/results; options: make bench BENCH="--repeats 5"
	$(BIN)/python -m benchmarks.run $(BENCH)

lint: $(READY)
	$(BIN)/ruff check . && $(BIN)/ruff format --check .

cuda: $(READY)  ## builds the CUDA part (needs nvcc, no GPU) and runs its tests on the CPU
	CVFAST_CUDA=1 CVFAST_EMULATED512=$(EMULATED512) $(BIN)/pip install -q --no-build-isolation --no-deps -e .
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) tests/cuda_on_cpu tests/triton

gpu: cuda  ## everything that needs a GPU; TORCH must name a CUDA build: make gpu TORCH=torch
	TRITON_INTERPRET=0 $(BIN)/python -m pytest tests/gpu
	$(BIN)/python -m benchmarks.run --device cuda

clean:
	rm -rf build dist *.egg-info cvfast/lib cvfast/_C.*.so $(VENV) .venv-other

$(READY): pyproject.toml setup.py CMakeLists.txt $(shell find csrc -type f)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q --upgrade pip
	$(BIN)/pip install -q $(TORCH) "setuptools>=77" cmake ninja "pybind11>=2.13"
	CVFAST_EMULATED512=$(EMULATED512) $(BIN)/pip install -q --no-build-isolation -e ".[test,lint]"
	touch $@
