# Routerscope's commands. `make` alone lists them. Nothing is needed beforehand but python3 (3.11 or newer) and make.
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
MAKEFLAGS += --no-print-directory

PYTHON ?= python3
PORT ?= 8501
CHROMIUM ?= /usr/bin/chromium
BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --no-input
SAY := printf 'routerscope: %s\n'

# Waiting threads sleep instead of spinning: on busy cores a spinning team made one forward pass 200 times slower.
# Nothing is ever fetched from a model hub unless a command asks for it.
export OMP_WAIT_POLICY ?= passive
export TOKENIZERS_PARALLELISM ?= false
export HF_HUB_DISABLE_TELEMETRY ?= 1
export USE_HUB_KERNELS ?= 0
export PYTHONUNBUFFERED ?= 1

.PHONY: help run test lint format env env-dev chromium s3-server demo-model demo-run bench faults screenshots clean

help:  ## list the commands
	@awk -F':.*## ' '/^[a-z-]+:.*## /{printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

run: env  ## serve the dashboard at localhost:8501 (PORT=9000 for another port)
	@$(SAY) "serving http://localhost:$(PORT) with the demo run open; Ctrl-C stops it"
	exec $(BIN)/python -m streamlit run app/serve.py --server.port $(PORT)

test: env-dev chromium s3-server  ## run every test, the browser tests included
	@$(SAY) "running the tests"
	$(BIN)/python -m pytest -n 2 --dist loadfile $(ARGS)

lint: env-dev  ## style, types and the direction of imports
	@$(SAY) "ruff, mypy, import-linter"
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: env-dev  ## rewrite the sources in the project's style
	$(BIN)/ruff check --fix-only --quiet .
	$(BIN)/ruff format .

demo-model: env  ## train the demo model again, from fetching its text to its card (MINUTES=85)
	@$(SAY) "training for $(or $(MINUTES),85) minutes; data and results go to data/build"
	$(BIN)/python -m data.train_demo --minutes $(or $(MINUTES),85)
	$(BIN)/python -m data.model_card --work data/build

demo-run: env  ## record the demo run again, over data/demo-prompts.jsonl
	@$(SAY) "recording data/demo-prompts.jsonl through data/demo-model"
	rm -rf data/build/demo-run && mkdir -p data/build
	$(BIN)/python -m analysis capture --model data/demo-model --input data/demo-prompts.jsonl --out data/build/demo-run
	$(BIN)/python -m analysis verify data/build/demo-run
	rm -rf data/demo-run && mv data/build/demo-run data/demo-run

bench: env-dev  ## measure speed and memory (prints figures, judges nothing)
	for bench in tests/bench/bench_*.py; do $(BIN)/python -m tests.bench.$$(basename "$$bench" .py); done

faults: env-dev  ## the fault tests alone: kills (of cluster workers too), broken files, full disks
	ROUTERSCOPE_KILLS=20 $(BIN)/python -m pytest tests/faults $(ARGS)

screenshots: env-dev chromium  ## take the pictures of README and docs/ from the running app
	$(BIN)/python -m tests.browser.screenshots --out build/screenshots
	mkdir -p docs/pictures && cd build/screenshots && for f in *-light-1280.png; do cp "$$f" "../../docs/pictures/$${f%-light-1280.png}.png"; done

clean:  ## remove the environment and the caches; recorded runs stay
	rm -rf .venv .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache

# The environment. A stamp is newer than the pins it was made from, so a second start installs nothing.
env: .venv/.installed
env-dev: .venv/.installed-dev

.venv/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { $(SAY) "Python 3.11 or newer is needed; $(PYTHON) is $$($(PYTHON) --version 2>&1). Try make PYTHON=python3.12 $(MAKECMDGOALS)" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || \
	  { $(SAY) "$(PYTHON) cannot make environments; on Debian or Ubuntu: apt-get install python3-venv" >&2; exit 1; }
	@$(SAY) "making .venv with $$($(PYTHON) --version)"
	@rm -rf .venv
	@$(PYTHON) -m venv .venv

.venv/.installed: requirements.txt | .venv/bin/python
	@$(SAY) "installing requirements.txt into .venv (the first time takes a few minutes)"
	@$(PIP) install -qq --requirement requirements.txt
	@touch $@

.venv/.installed-dev: requirements-dev.txt requirements-cluster.txt .venv/.installed
	@$(SAY) "installing requirements-dev.txt into .venv"
	@$(PIP) install -qq --requirement requirements-dev.txt
	@touch $@

s3-server: .venv/s3/.installed

.venv/s3/.installed: tests/s3-server.txt | .venv/bin/python
	@$(SAY) "installing tests/s3-server.txt into .venv/s3"
	@$(PYTHON) -m venv .venv/s3
	@.venv/s3/bin/python -m pip --disable-pip-version-check --no-input install -qq --requirement tests/s3-server.txt
	@touch $@

chromium:
	@test -x "$(CHROMIUM)" || { \
	  if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
	    $(SAY) "installing Chromium and fonts for the browser tests"; \
	    { apt-get update && DEBIAN_FRONTEND=noninteractive apt-get install --yes --no-install-recommends \
	        chromium fonts-noto-core fonts-noto-cjk; } >.venv/apt.log 2>&1 </dev/null || { tail -n 20 .venv/apt.log >&2; exit 1; }; \
	  else \
	    $(SAY) "the browser tests need Chromium at $(CHROMIUM): install it (apt-get install chromium) or say make test CHROMIUM=/path/to/it" >&2; exit 1; \
	  fi; }
