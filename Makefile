# make demo      the whole story on real data            make lint      only checks
# make test      the tests, without the slow ones        make format    rewrites the sources
# make bench     the benchmarks                          make clean     removes all that make made
#
# Every target sets up .venv by itself. PYTHON=python3.12 picks the interpreter, PIP_FLAGS goes to every pip install.
PYTHON    ?= python3
PIP_FLAGS ?=

VENV   := .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready
PIP    := $(BIN)/python -m pip --disable-pip-version-check install --quiet --quiet -c constraints.txt $(PIP_FLAGS)
PYTEST := $(BIN)/python -m pytest

# ninja is in the environment; the compiler finds it there
export PATH := $(abspath $(BIN)):$(PATH)

.PHONY: demo test test-all lint format bench clean help
.DEFAULT_GOAL := help

help:
	@sed -n '/^#/!q; s/^# \{0,1\}//p' Makefile

demo: $(READY)
	@$(BIN)/blk demo

test: $(READY)
	@$(PYTEST) -q -m "not slow"

test-all: $(READY)
	@$(PYTEST) -q

lint: $(READY)
	@echo "ruff check";  $(BIN)/ruff check --quiet .
	@echo "ruff format"; $(BIN)/ruff format --check --quiet . || { echo "not formatted: run make format"; exit 1; }
	@echo "mypy";        $(BIN)/mypy --no-error-summary

format: $(READY)
	@$(BIN)/ruff check --quiet --fix .
	@$(BIN)/ruff format --quiet .

bench: $(READY)
	@$(PYTEST) -q benchmarks --benchmark-only

clean:
	@rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks
	@rm -f bayesian_lora_kernels/_native*.so bayesian_lora_kernels/_native_build.json
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null || { \
	  echo "setup: Python 3.10 or newer is needed, and $(PYTHON) is not one; try make PYTHON=python3.12 ..."; exit 1; }
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || { \
	  echo "setup: $(PYTHON) cannot make virtual environments (Debian and Ubuntu: apt install python3-venv)"; exit 1; }
	@echo "setup: $(VENV) with $$($(PYTHON) --version)"
	@$(PYTHON) -m venv $(VENV)

# PyTorch comes first: the extension is built against it, without pip's build isolation, which would download another.
$(READY): $(VENV)/bin/python pyproject.toml setup.py constraints.txt $(wildcard csrc/*)
	@echo "setup: PyTorch and the build tools (the first time this downloads, and takes minutes)"
	@$(PIP) torch ninja pybind11 "setuptools>=77" wheel || { \
	  echo "setup: pip could not install PyTorch; the lines above say why (no network? no disk?)"; exit 1; }
	@echo "setup: the package with its dependencies and the native extension"
	@$(PIP) --no-build-isolation --editable ".[dev]" || { \
	  echo "setup: pip could not install the package; the lines above say why"; exit 1; }
	@$(BIN)/python -c 'from bayesian_lora_kernels.ops.native import why_unavailable; \
	  print("setup:", why_unavailable() or "native extension ready")'
	@touch $@
