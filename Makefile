# Each target does its own set-up; a fresh machine needs Python 3.11, make and a C compiler.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
DEMO_OUT ?= out/demo
FLOORS := edgeforge device_harness exporters quant

.PHONY: help setup demo test lint format clean

help:  ## Show this list.
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 10

setup: $(STAMP)  ## Make .venv with everything pinned.

# Debian ships venv apart from Python; as root we can add it.
$(STAMP): pyproject.toml $(wildcard quant/kernels/*.[ch])
	@$(PYTHON) -m venv $(VENV) >/dev/null 2>&1 || { \
	  [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null && \
	  apt-get update -qq && apt-get install -y -qq python3.11-venv python3-dev >/dev/null && \
	  $(PYTHON) -m venv --clear $(VENV); }
	$(BIN)/python -m pip install --quiet --disable-pip-version-check "torch==2.13.0"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable ".[dev]"
	@touch $@

demo: $(STAMP)  ## Export the demo model at int4, verify it, print the table.
	$(BIN)/edgeforge export demo --target onnx,coreml,executorch --recipe int4 --out $(DEMO_OUT) --force
	$(BIN)/edgeforge verify $(DEMO_OUT)
	$(BIN)/edgeforge run $(DEMO_OUT)/executorch --prompt "The function returns" --max-tokens 48

test: $(STAMP)  ## Run the whole fast suite.
	$(BIN)/python -m pytest -q -n 2 --dist loadfile

lint: $(STAMP)  ## ruff, mypy and the order of the floors.
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(STAMP)  ## Let ruff format and mend.
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:  ## Remove what was built here.
	rm -rf $(VENV) out build *.egg-info quant/kernels/*.so
