# Each target does its own set-up; a fresh machine needs Python 3.11, make and a C compiler.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
# Set-up has two parts, each done when the file that marks it is older than what it depends on:
# what running needs, and the test tools on top.
RUN := $(VENV)/.ready-to-run
DEV := $(VENV)/.ready-to-test
BENCH := $(VENV)/.ready-to-bench
# Building the documentation needs no torch, so it has an environment of its own.
DOCS := build/docs-venv
LOCKS := build/locks
DEMO_OUT ?= out/demo
WORKERS ?= auto

# Byte-compiling everything takes longer than the rest of the installation. Python compiles what it
# imports when it first does, and keeps it, unless a variable forbids that: torch would then be
# compiled anew by every command.
unexport PYTHONDONTWRITEBYTECODE
INSTALL := -m pip install --quiet --disable-pip-version-check --no-compile

.PHONY: help setup demo check test lint docs bench-quality format lock clean

help:  ## Show this list.
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 15

setup: $(DEV)  ## Make .venv with everything pinned, test tools included.

# Debian ships venv apart from Python; as root we can add it.
$(RUN): pyproject.toml requirements/lock-run.txt requirements/lock-executorch.txt $(wildcard quant/kernels/*.[ch])
	@$(PYTHON) -m venv $(VENV) >/dev/null 2>&1 || { \
	  [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null && \
	  apt-get update -qq && apt-get install -y -qq python3.11-venv python3-dev >/dev/null && \
	  $(PYTHON) -m venv --clear $(VENV); }
	$(BIN)/python $(INSTALL) --requirement requirements/lock-run.txt
	$(BIN)/python $(INSTALL) --no-deps --no-build-isolation \
	  --requirement requirements/lock-executorch.txt --editable .
	@touch $@

$(DEV): $(RUN) requirements/lock-dev.txt
	$(BIN)/python $(INSTALL) --requirement requirements/lock-dev.txt
	@touch $@

demo: $(RUN)  ## Export the demo model, verify it, print the table.
	$(BIN)/edgeforge export demo --target onnx,coreml,executorch --out $(DEMO_OUT) --force
	$(BIN)/edgeforge verify $(DEMO_OUT)
	$(BIN)/edgeforge run $(DEMO_OUT)/executorch --prompt "The function returns" --max-tokens 48

check: $(DEV)  ## Run the units and contracts: no test that writes or runs whole artifacts.
	$(BIN)/python -m pytest -q -n $(WORKERS) --dist loadgroup --no-loadscope-reorder -m "not artifact"

test: $(DEV)  ## Run the whole suite.
	$(BIN)/python -m pytest -q -n $(WORKERS) --dist loadgroup --no-loadscope-reorder

lint: $(DEV)  ## ruff, mypy and the order of the floors.
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

$(DOCS)/.ready: requirements/lock-docs.txt
	@$(PYTHON) -m venv $(DOCS)
	$(DOCS)/bin/python $(INSTALL) --requirement requirements/lock-docs.txt
	@touch $@

docs: $(DOCS)/.ready  ## Build the site in out/docs; a dead link is an error.
	$(DOCS)/bin/python -m sphinx -W --keep-going -q docs out/docs
	@echo "open out/docs/index.html"

# What the benchmarks need beside the tests' packages.
$(BENCH): $(DEV) pyproject.toml
	$(BIN)/python $(INSTALL) --constraint requirements/lock-dev.txt \
	  $$($(BIN)/python -c "import tomllib; print(*tomllib.load(open('pyproject.toml', 'rb'))['project']['optional-dependencies']['bench'][1:])")
	@touch $@

# TABLES and MODELS name a part; LLAMA is the folder of the second model; OPTIONS are the script's.
bench-quality: $(BENCH)  ## Measure quality on real models, write docs/benchmarks/quality.md.
	$(BIN)/python benchmarks/bench_quality.py $(if $(TABLES),--tables $(TABLES)) \
	  $(if $(MODELS),--models $(MODELS)) $(if $(LLAMA),--llama $(LLAMA)) $(OPTIONS)

format: $(DEV)  ## Let ruff format and mend.
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# The exact versions of an environment, its own package left out. A version like 2.13.0+cpu names a
# build of 2.13.0 that one machine had, and nvidia's packages belong to another build.
FREEZE := -m pip freeze --all --exclude pip --exclude edgeforge
PORTABLE := sed -e 's/+[a-z0-9.]*$$//' -e '/^nvidia/d' -e '/^triton/d'

# What is written keeps the comments at the head of each file. ExecuTorch narrows torch, so the list
# for tests is made first and the list for running holds to it.
lock:  ## Write requirements/ anew: the newest versions that pyproject.toml allows.
	rm -rf $(LOCKS)
	$(PYTHON) -m venv $(LOCKS)/dev
	$(LOCKS)/dev/bin/python $(INSTALL) ".[dev]"
	{ grep '^#' requirements/lock-dev.txt; $(LOCKS)/dev/bin/python $(FREEZE) | $(PORTABLE); } > $(LOCKS)/dev.txt
	$(PYTHON) -m venv $(LOCKS)/run
	$(LOCKS)/run/bin/python $(INSTALL) --constraint $(LOCKS)/dev.txt ".[onnx]"
	{ grep '^#' requirements/lock-run.txt; $(LOCKS)/run/bin/python $(FREEZE) | $(PORTABLE); } > $(LOCKS)/run.txt
	$(PYTHON) -m venv $(LOCKS)/docs
	$(LOCKS)/docs/bin/python $(INSTALL) $$($(PYTHON) -c "import tomllib; print(*tomllib.load(open('pyproject.toml', 'rb'))['project']['optional-dependencies']['docs'])")
	{ grep '^#' requirements/lock-docs.txt; $(LOCKS)/docs/bin/python $(FREEZE) | $(PORTABLE); } > $(LOCKS)/docs.txt
	{ grep '^#' requirements/lock-executorch.txt; grep '^executorch==' $(LOCKS)/dev.txt; } > $(LOCKS)/executorch.txt
	for list in dev run executorch docs; do mv $(LOCKS)/$$list.txt requirements/lock-$$list.txt; done

clean:  ## Remove what was built here.
	rm -rf $(VENV) out build *.egg-info quant/kernels/*.so
