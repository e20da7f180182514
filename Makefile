# Every target makes its own environment: .venv is created by the first call and reused for as long as pyproject.toml
# and constraints.txt stay as they are, so that the second call starts at once.

SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.PHONY: help setup compare test test-all check format bench sanitize

# The first of these that is Python 3.11 or newer.
PYTHON ?= $(shell for python in python3 python3.13 python3.12 python3.11; do \
	$$python -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$python && break; done)
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
# The builds of torch for CUDA bring the Triton that they want; beside any other, the tests of the GPU kernels want this.
TRITON := triton==3.9.0
INSTALLED := $(VENV)/installed-$(shell cat pyproject.toml constraints.txt <(echo $(TRITON)) | cksum | cut -d ' ' -f 1)
MODELS := $(subst installed-,models-,$(INSTALLED))

# Two workers with one thread each: more threads than cores make every worker slower.
PYTEST := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 $(BIN)/python -m pytest -n 2

help:  ## list these targets
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1\t\2/p' Makefile | expand -t 20
	@echo
	@echo '  ARGS="..."        more arguments for compare, test, test-all and bench'
	@echo '  PYTHON=...        the Python (3.11 or newer) that .venv is made from'
	@echo '  TORCH_INDEX=...   where torch comes from: https://download.pytorch.org/whl/cpu is much smaller without a GPU'

compare: $(INSTALLED)  ## train real networks with and without normalization, and say which is better
	@$(BIN)/normkit compare $(ARGS)

test: $(INSTALLED)  ## every test but the slow ones
	@$(PYTEST) -m "not slow" --durations 5 --durations-min 10 $(ARGS)

test-all: $(INSTALLED) $(MODELS)  ## every test; prints what was skipped, and why
	@$(PYTEST) -rs $(ARGS)

check: $(INSTALLED)  ## format, lint, types, generated documentation
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python docs/generate.py --check

format: $(INSTALLED)  ## rewrite the code the way `make check` wants it
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

sanitize:  ## run the compiled kernels on random cases under the address and undefined-behaviour sanitizers
	@tests/sanitize/build.sh $(ARGS)

bench: $(INSTALLED)  ## time the layers against torch's own
	@$(BIN)/normkit bench $(ARGS)

setup: $(INSTALLED)  ## make .venv and nothing else
	@echo '$(VENV) is ready'

# torch comes first and in the exact version, so that no later step can choose another one: each is gigabytes of CUDA
# libraries. The build tools come with it, so that the package itself is built from what is pinned here and not from
# whatever is newest. pip learned to read dependency groups only in 25.1; tomllib has always been able to. A first run
# that was interrupted may have left a Python without pip behind: such a .venv is made again.
$(INSTALLED):
	@[ -n "$(PYTHON)" ] || { echo 'normkit needs Python 3.11 or newer, and none was found: install one, or name it with make PYTHON=...' >&2; exit 2; }
	@echo 'Setting up $(VENV) (once; a few minutes, most of it downloading torch) ...'
	@$(PIP) --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV)
	@$(PIP) install -c constraints.txt $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) "$$(grep '^torch==' constraints.txt)" \
		$$($(BIN)/python -c 'import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["dependency-groups"]["dev"])')
	@$(PIP) install -q -c constraints.txt --no-build-isolation -e ".[lab,export]"
	@$(BIN)/python -c 'import triton' 2>/dev/null || $(PIP) install -q --no-deps $(TRITON) || \
		echo 'There is no $(TRITON) for this machine: the tests of the GPU kernels will be skipped' >&2
	@rm -f $(VENV)/installed-*
	@touch $@

# What only the slow tests want. No torch among it, and none that another could choose.
$(MODELS): | $(INSTALLED)
	@$(PIP) install -q -c constraints.txt \
		$$($(BIN)/python -c 'import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["dependency-groups"]["models"])')
	@rm -f $(VENV)/models-*
	@touch $@
