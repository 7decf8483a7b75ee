# Everything starts here. `make help` lists the targets.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PORT ?= 8000
MODEL ?= smollm2
WORKERS ?= 2
SOURCES := src tests benchmarks tools examples

# One thread a process, waiting passively: threads that fight for a core make everything many times slower.
TEST_ENV := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 NUMBA_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE

INSTALLED := $(VENV)/.installed
PULLED := $(VENV)/.models-pulled

.PHONY: help setup serve test lint format types unit docs browser bench bench-full nightly clean

help: ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-12s %s\n", $$1, $$2}'

setup: $(INSTALLED) $(PULLED) ## create .venv with everything in it, and pull the default models

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "Sharewell needs Python 3.11 or newer; name one: make setup PYTHON=python3.12" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

# The stamp is older than what it depends on when a requirement has changed: then pip runs again.
$(INSTALLED): pyproject.toml constraints.txt | $(BIN)/python
	$(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt -e '.[all,dev]'
	@touch $@

# A pull that finds the model in the user's cache returns at once.
$(PULLED): $(INSTALLED) src/sharewell/models/registry.py
	$(BIN)/sharewell models pull smollm2
	$(BIN)/sharewell models pull minilm
	$(BIN)/sharewell models pull minilm-torch
	@touch $@

serve: setup ## answer OpenAI clients on PORT (8000) with MODEL (smollm2)
	exec $(BIN)/sharewell serve $(MODEL) --port $(PORT)

test: setup browser lint unit docs bench ## what CI runs: lint, types, tests, docs, smoke benchmarks

lint: $(INSTALLED) ## style, format, types and the floors
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/ruff format --check $(SOURCES)
	$(MAKE) --no-print-directory types
	$(BIN)/lint-imports

types: $(INSTALLED)
	$(BIN)/pyright --pythonpath $(BIN)/python

format: $(INSTALLED) ## let ruff put the format right
	$(BIN)/ruff check --fix $(SOURCES)
	$(BIN)/ruff format $(SOURCES)

# Tests of one file stay on one worker, so that what they share is loaded once.
unit: setup ## the tests alone
	$(TEST_ENV) $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile

docs: $(INSTALLED) ## build the site into site/, strictly
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

# The page is tested in a real browser: the system's Chromium, never a download of its own.
browser:
	@if command -v chromium || command -v chromium-browser || command -v google-chrome; then :; \
	elif [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
		apt-get update && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends chromium; \
	else \
		echo "The tests of the page need Chromium; install it, for example: sudo apt-get install chromium" >&2; exit 1; \
	fi

bench: setup ## run every benchmark at smoke scale: shows that it runs
	$(TEST_ENV) $(BIN)/sharewell bench --all --scale smoke

bench-full: setup ## run every benchmark at full scale and keep the reports (machine idle, please)
	$(BIN)/sharewell bench --all --scale full

nightly: setup ## the long tests, then the full benchmarks
	$(TEST_ENV) $(BIN)/python -m pytest -m nightly --timeout 7200
	$(MAKE) bench-full

clean: ## remove .venv and everything that was built; pulled models stay in the user's cache
	rm -rf $(VENV) build dist site .pytest_cache .ruff_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
