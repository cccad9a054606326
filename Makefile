# Every target makes what it needs, including the virtual environment.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/ready
# A package index for torch alone, such as PyTorch's for CPUs; by default the one for everything else.
TORCH_INDEX ?=
export OMP_NUM_THREADS := 1
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: help setup verify test test-long test-torch check prove gate golden museum mutants docs bench clean

help:
	@echo "make setup   make the virtual environment, as the other targets do; TORCH_INDEX=URL: the package index for torch"
	@echo "make verify  prove DualPipe, run it on processes and compare it with plain PyTorch, bitwise"
	@echo "make test    run the test suite on CPU; make test-long for the few long tests"
	@echo "make test-torch VERSION=2.9.1   test runtime and provers with another torch, in an environment of its own"
	@echo "make check   run lint, types and the fast tests"
	@echo "make prove   prove the theorems for every size, and each schedule at one size"
	@echo "make gate    check the change since the main branch, or since BASE=...; FIRST=1 stops at the first fault, ALL=1 runs"
	@echo "             the tests even if a schedule is refuted, TESTED=1 none, as the whole suite has passed on this tree;"
	@echo "             make golden writes the golden schedules"
	@echo "make museum  plant known faults in the sources and check that the gate refuses each"
	@echo "make mutants N=150 SEED=1   plant small faults at random and list those that no test notices; FILES=... for some sources"
	@echo "make docs    write the reference pages that are made from the code: command line and Python API"
	@echo "make bench   run the measurements in under ten minutes; none is a test; OUTPUT=folder: write results as JSON too"
	@echo "make clean   remove the virtual environment and all other generated files"

setup: $(READY)

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(if $(TORCH_INDEX),$(BIN)/pip install --quiet --constraint constraints.txt --no-deps --index-url "$(TORCH_INDEX)" torch)
	$(BIN)/pip install --quiet --constraint constraints.txt torch numpy
	$(BIN)/pip install --quiet --constraint constraints.txt --editable ".[test]"
	@touch $(READY)

verify: $(READY)
	$(BIN)/dualpipe prove -P 4 -M 8
	$(BIN)/dualpipe verify -P 4 -M 8

prove: $(READY)
	$(BIN)/dualpipe prove --all-sizes
	for name in dualpipe dualpipev 1f1b zb1p; do $(BIN)/dualpipe prove -P 8 -M 20 --schedule $$name || exit 1; done

test: $(READY)
	$(BIN)/pytest -n 2 --dist loadfile -q -m "not long"

test-long: $(READY)
	$(BIN)/pytest -n 2 --dist loadfile -q -m long

# The environment is removed at the end, also after a failure, unless KEEP is set.
TORCH_ENV = .venv-torch-$(VERSION)
TORCH_PINS = $(TORCH_ENV)/constraints.txt
test-torch:
	$(if $(VERSION),,$(error test-torch needs a version of torch: make test-torch VERSION=2.9.1))
	@set -e; trap '$(if $(KEEP),,rm -rf "$(TORCH_ENV)")' EXIT; trap 'exit 130' INT; trap 'exit 143' TERM; set -x; \
	$(PYTHON) -m venv --clear $(TORCH_ENV); \
	sed 's/^torch==.*/torch==$(VERSION)/' constraints.txt > $(TORCH_PINS); \
	$(if $(TORCH_INDEX),$(TORCH_ENV)/bin/pip install --quiet --constraint $(TORCH_PINS) --no-deps --index-url "$(TORCH_INDEX)" torch;) \
	$(TORCH_ENV)/bin/pip install --quiet --constraint $(TORCH_PINS) torch numpy; \
	$(TORCH_ENV)/bin/pip install --quiet --constraint $(TORCH_PINS) --editable ".[test]"; \
	$(TORCH_ENV)/bin/python -c 'import torch; print("torch", torch.__version__)'; \
	$(TORCH_ENV)/bin/pytest -n 2 -q -m "not long" tests/schedule tests/production tests/reference tests/proofs

check: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/pytest -n 2 -q -m "not long" tests/test_architecture.py tests/schedule tests/cli/test_show_and_simulate.py \
		tests/docs/test_museum.py tests/docs/test_links.py tests/ci/test_selection.py

gate: $(READY)
	$(BIN)/python -m ci.gate $(if $(BASE),--base "$(BASE)") $(if $(OUTPUT),--output "$(OUTPUT)") $(if $(FIRST),--first) $(if $(ALL),--all) $(if $(TESTED),--tested)

golden: $(READY)
	$(BIN)/python -m ci.golden

museum: $(READY)
	$(BIN)/python -m ci.faults

N ?= 150
SEED ?= 1
mutants: $(READY)
	$(BIN)/python -m ci.mutants --count $(N) --seed $(SEED) $(if $(OUTPUT),--output "$(OUTPUT)") -- $(FILES)

docs: $(READY)
	$(BIN)/python -m tests.docs.reference

# Each measurement at a size that leaves it a minute or two.
bench: $(READY)
	$(if $(OUTPUT),mkdir -p "$(OUTPUT)")
	$(BIN)/python bench/machine.py
	$(BIN)/python bench/executor.py --sizes 4/16 --rounds 5 $(if $(OUTPUT),--json "$(OUTPUT)/executor.json")
	$(BIN)/python bench/scale.py --sizes 8,32,128 --limit 30 $(if $(OUTPUT),--output "$(OUTPUT)/scale.json")
	$(BIN)/python bench/provers.py --sizes 8/20,16/64 --rounds 2
	$(BIN)/python bench/fake_vs_oracle.py
	$(BIN)/python bench/bubble.py --sizes 4/8 --repeats 1
	$(BIN)/python bench/soundness.py --mutants 40 --processes 6
	$(BIN)/python bench/campaign.py --trials 8 --steps 100
	$(BIN)/python bench/megatron_matrix.py --cells gpt,clipping
	$(BIN)/python bench/megatron_step.py --sizes 2/8 --rounds 3 $(if $(OUTPUT),--output "$(OUTPUT)/megatron_step.json")

clean:
	rm -rf $(VENV) .venv-torch-* .mypy_cache .pytest_cache .ruff_cache .hypothesis .cache build *.egg-info
