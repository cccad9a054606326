# Every target makes what it needs, the virtual environment included.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/ready
export OMP_NUM_THREADS := 1
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: help setup verify test check bench clean

help:
	@echo "make verify  run DualPipe on processes and compare it with plain PyTorch, bitwise"
	@echo "make test    the whole test suite on CPU"
	@echo "make check   lint, types and the fast tests"
	@echo "make bench   measurements, none of which is a test"

setup: $(READY)

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt torch numpy
	$(BIN)/pip install --quiet --constraint constraints.txt --editable ".[test]"
	@touch $(READY)

verify: $(READY)
	$(BIN)/dualpipe verify -P 4 -M 8

test: $(READY)
	$(BIN)/pytest -n 2 -q

check: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/pytest -n 2 -q -m "not long"

bench: $(READY)
	for script in bench/*.py; do $(BIN)/python $$script || exit 1; done

clean:
	rm -rf $(VENV) .mypy_cache .pytest_cache .ruff_cache .hypothesis .cache build *.egg-info
