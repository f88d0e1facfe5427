# `make demo` and `make test` do their own set-up: Python 3.11 or newer with venv, g++ or clang, no GPU.
PYTHON ?= python3
# Installed before everything else: `pip install torch` alone may bring gigabytes of CUDA libraries. Where this version
# has no wheel (another platform, a newer Python), the Makefile takes whatever `torch` there is.
TORCH ?= torch==2.13.0
EXTRAS ?= cpu,export,dev,docs
# AUTO: kernels for the CUDA provider where nvcc works (docs/cuda.md); ON, OFF. CUDA_ARCHITECTURES=90a-real: for one card.
CUDA ?= AUTO
CUDA_ARCHITECTURES ?=
KERNELS := cmake.define.QCOMPILE_CUDA=$(CUDA)
ifneq ($(CUDA_ARCHITECTURES),)
KERNELS += "cmake.define.QCOMPILE_CUDA_ARCHITECTURES=$(CUDA_ARCHITECTURES)"
endif

BIN := .venv/bin
STAMP := .venv/.installed
# A worker a core, each with whole files of tests: what several tests of a file read is made once.
WORKERS ?= --numprocesses auto --dist loadfile --no-loadscope-reorder
PYTEST_ARGS ?=

.PHONY: demo test fuzz mutants test-slow lint types wheel docs clean

demo: $(STAMP)
	$(BIN)/python benchmarks/demo.py

# Threads of BLAS would spin where another worker wants to run; and the many processes that tests start read bytecode.
test: export OMP_NUM_THREADS ?= 1
unexport PYTHONDONTWRITEBYTECODE
test: $(STAMP)
	$(BIN)/python -m pytest $(WORKERS) $(PYTEST_ARGS)

# Damaged models for FUZZ_SECONDS, from FUZZ_FIRST on, at most FUZZ_CASES; what fails is kept in fuzz-failures/.
FUZZ_SECONDS ?= 3600
FUZZ_SEED ?= 0
FUZZ_FIRST ?= 0
FUZZ_CASES ?= 1000000000
fuzz: $(STAMP)
	PYTHONPATH=tests $(BIN)/python -m fuzz.run --seconds $(FUZZ_SECONDS) --seed $(FUZZ_SEED) --first $(FUZZ_FIRST) \
	    --cases $(FUZZ_CASES) --keep fuzz-failures

# How many small faults in passes/ the tests see; which tests run which lines is kept in build/mutation/.
MUTANTS ?= 120
MUTANTS_SEED ?= 0
mutants: $(STAMP)
	$(BIN)/python -m pip install --quiet --editable ".[mutation]" $(addprefix --config-settings=,$(KERNELS))
	PYTHONPATH=tests:benchmarks $(BIN)/python -m mutation.run --number $(MUTANTS) --seed $(MUTANTS_SEED)

test-slow: $(STAMP)
	$(BIN)/python -m pytest -m slow $(PYTEST_ARGS)

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(STAMP)
	$(BIN)/mypy

wheel: $(STAMP)
	$(BIN)/python -m build --wheel --outdir dist $(addprefix --config-setting=,$(KERNELS)) .

# build/site: every page, its links checked; the notebook is run for it.
docs: export NO_MKDOCS_2_WARNING = 1
docs: $(STAMP)
	$(BIN)/python docs/site/pages.py build/pages
	$(BIN)/mkdocs build

clean:
	rm -rf .venv build dist demo-output

# The install is editable: Python is read where it lies. A change of dependencies, of packages or of the kernels needs
# it again.
$(STAMP): pyproject.toml $(wildcard */__init__.py */*/__init__.py */*/*/__init__.py) $(wildcard runtime/kernels/*) $(wildcard runtime/kernels/cuda/*)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	    { echo "qcompile needs Python 3.11 or newer; name one with: make PYTHON=python3.12" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' || \
	    { echo "$(PYTHON) cannot make virtual environments; on Debian and Ubuntu: apt install python3-venv" >&2; exit 1; }
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet "$(TORCH)" || $(BIN)/python -m pip install --quiet torch
	$(BIN)/python -m pip install --quiet --editable ".[$(EXTRAS)]" $(addprefix --config-settings=,$(KERNELS))
	@touch $@
