# `make` lists the targets. Everything happens in .venv; nothing but git, make and python3 is needed to begin.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
CPP_SOURCES := $(shell git ls-files '*.cpp' '*.h')
export HF_HUB_OFFLINE ?= 1
export TOKENIZERS_PARALLELISM ?= false

.DEFAULT_GOAL := help
.PHONY: help venv test test-lowest lint format demo distill-demo bench docs wheel wheel-check clean

help: ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

venv: $(VENV)/.installed ## make .venv with the package, editable, and what its tests need

KERNEL_SOURCES := setup.py $(wildcard fastbert_hf/kernels/native/build.py fastbert_hf/kernels/native/csrc/*)

$(VENV)/.installed: setup.cfg pyproject.toml constraints.txt $(KERNEL_SOURCES)
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Python 3.10 or newer is needed, this is " + sys.version)'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[test]'
	touch $@

# Workers take whole files: the fixtures of a file are built once. WORKERS=0 runs everything in one process.
WORKERS ?= 2

test: venv ## run the whole test suite
	$(BIN)/python -m pytest --numprocesses $(WORKERS) --dist loadfile --no-loadscope-reorder

# the core alone, in its lowest versions: no extras, so this also shows that the core needs none
LOWEST := .venv-lowest
FAST_TESTS := tests/ops tests/model tests/kernels --ignore tests/kernels/triton_kernels

$(LOWEST)/.installed: setup.cfg pyproject.toml constraints-lowest.txt $(KERNEL_SOURCES)
	test -x $(LOWEST)/bin/python || $(PYTHON) -m venv $(LOWEST)
	$(LOWEST)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints-lowest.txt -e . pytest hypothesis
	touch $@

test-lowest: $(LOWEST)/.installed ## run the fast part of the suite with the lowest supported versions (6 GB on Linux)
	$(LOWEST)/bin/python -m pytest $(FAST_TESTS)

lint: venv ## check style
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run -Werror $(CPP_SOURCES)

format: venv ## apply style
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CPP_SOURCES)

demo: venv ## pretrain, fine-tune and use a small FastBERT from text this machine has, in minutes, offline
	$(BIN)/python scripts/demo.py

distill-demo: venv ## make a real sentence embedder faster, in a quarter of an hour
	$(BIN)/python scripts/distill_demo.py

bench: venv ## measure this machine in three minutes; scripts/benchmark.py --help has the rest
	$(BIN)/python scripts/benchmark.py --quick --fresh --output_dir runs/bench

docs: venv ## build the documentation site into build/site; a warning is an error
	PATH="$(CURDIR)/$(BIN):$$PATH" NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

# The library links no OpenMP runtime: it takes the one that torch has loaded. Should a compiler link one, it stays out.
wheel: venv ## build dist/: a source archive, and a wheel with the compiled kernels for every Python of this platform
	rm -rf build dist
	$(BIN)/python -m build --outdir dist/built .
	if [ "$$(uname)" = Linux ]; then \
	    PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/auditwheel repair --exclude 'libgomp*' --wheel-dir dist dist/built/*.whl; \
	else mv dist/built/*.whl dist; fi
	mv dist/built/*.tar.gz dist
	rm -rf dist/built
	$(BIN)/twine check --strict dist/*

wheel-check: wheel ## install that wheel where there is no compiler, and run its kernels
	$(BIN)/python tests/cli/check_wheel.py dist/*.whl

clean: ## remove the environment and build products
	rm -rf $(VENV) $(LOWEST) build dist *.egg-info
