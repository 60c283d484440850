# Two commands for a fresh checkout: `make demo` shows both stages on a real model, `make test` checks the code.
# `make test-long` adds the tests that are long by nature (marker `long`); `make test-all` runs all tests.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV ?= .venv
BIN := $(VENV)/bin
PYTEST := $(BIN)/python -m pytest --numprocesses=logical --maxprocesses=8

.PHONY: demo test test-long test-all lint format gpu gpu-check gpu-wheels clean

demo: $(VENV)/.installed
	$(BIN)/kr2cache demo

test: lint
	$(PYTEST) --dist=worksteal -m "not long"

# One process more than cores, because many long tests wait most of the time. By file: tests of one file share what takes
# long to make (see pytest_xdist_make_scheduler in tests/conftest.py).
test-long: $(VENV)/.installed
	$(PYTEST) --numprocesses=$$(($$(getconf _NPROCESSORS_ONLN) + 1)) --dist=loadfile -m long

test-all: lint
	$(PYTEST) --dist=worksteal

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# On a machine with a GPU, with the Python there is (torch, transformers): checks first, then figures; see tests/gpu/README.md.
GPU_PYTHON ?= python3
OUT ?= gpu-report

gpu:
	$(GPU_PYTHON) tests/gpu/run.py --out $(OUT)

gpu-check:
	$(GPU_PYTHON) tests/gpu/run.py --check-only --out $(OUT)

gpu-wheels:
	$(PYTHON) tests/gpu/wheels.py

format: $(VENV)/.installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# The exact versions that are tested; without the constraints any version in pyproject.toml's ranges is taken.
$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit("kr2cache needs Python 3.11 or newer") if sys.version_info < (3, 11) else None'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable ".[demo,dev,ray]"
	touch $@

clean:
	rm -rf $(VENV) .wheels gpu-report .kr2cache runs kr2cache-demo .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
