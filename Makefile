.DEFAULT_GOAL := help
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# pysteps is built from source: without a C compiler the tests that compare with it are skipped.
EXTRA := $(if $(shell command -v cc 2>/dev/null),dev,test)

.PHONY: help train test test-slow check format bench bench-gpu clean

help:  ## show this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## */\1\t/' | expand -t 12

train: $(VENV)/train  ## make the environment and train the default: moving digits, a few minutes
	$(BIN)/python train.py $(ARGS)

test: $(VENV)/test  ## make the environment and run the tests
	$(BIN)/python -m pytest $(ARGS)

test-slow: $(VENV)/test  ## the tests that take minutes
	$(BIN)/python -m pytest -m slow $(ARGS)

check: $(VENV)/test  ## format, lint and types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: $(VENV)/test  ## put the code into shape
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: $(VENV)/test  ## what scores, gradients in time, data and recurrences cost: minutes; PEERS=folder with checkouts
	$(BIN)/python benchmarks/scores.py $(ARGS)
	$(BIN)/python benchmarks/tbptt.py
	$(BIN)/python -m benchmarks.data
	$(BIN)/python -m benchmarks.recurrences $(if $(PEERS),--peers "$(PEERS)")

bench-gpu: $(VENV)/test  ## what recurrences cost on a CUDA device; PEERS=folder with checkouts
	$(BIN)/python -m benchmarks.recurrences --device cuda $(if $(PEERS),--peers "$(PEERS)")

clean:  ## remove the environment and caches, keep the runs
	rm -rf $(VENV) .mypy_cache .pytest_cache .ruff_cache .hypothesis *.egg-info

$(BIN)/python:
	$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(None if (3, 11) <= v <= (3, 13) else "stormcell needs Python 3.11 to 3.13, this is %d.%d; call make with PYTHON=python3.12" % v)'
	$(PYTHON) -m venv $(VENV)

$(VENV)/train: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --editable .
	@touch $@

$(VENV)/test: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --editable '.[$(EXTRA)]'
	@touch $@ $(VENV)/train
