# make run    serve the dashboard at localhost:$(PORT) with the demo run open
# make test   run every test, browser tests included
PORT ?= 8501
PYTHON ?= python3
BIN = .venv/bin
# Waiting threads must not spin: on busy cores that slows a small model down by orders of magnitude.
export OMP_WAIT_POLICY = passive
export USE_HUB_KERNELS = 0

.PHONY: run test lint demo-model demo-run bench screenshots

run: .venv/run.stamp
	@echo "routerscope: serving http://localhost:$(PORT) (stop with Ctrl-C)"
	@$(BIN)/python -m streamlit run app/serve.py --server.port $(PORT) --server.headless true

test: .venv/test.stamp
	@echo "routerscope: running the tests"
	@command -v chromium >/dev/null || $(MAKE) --no-print-directory chromium
	@$(BIN)/python -m pytest

lint: .venv/test.stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

.venv/run.stamp: requirements.txt
	@echo "routerscope: making .venv and installing the pinned requirements (a few minutes, once)"
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check "$$(grep '^torch==' requirements.txt)"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	@touch $@

.venv/test.stamp: requirements-dev.txt .venv/run.stamp
	@echo "routerscope: installing the test tools"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	@touch $@

.PHONY: chromium
chromium:
	@echo "routerscope: installing Debian's chromium for the browser tests"
	@if [ "$$(id -u)" = 0 ]; then apt-get update -qq && apt-get install -y -qq --no-install-recommends chromium fonts-noto-core fonts-noto-cjk >/dev/null; \
	else echo "run as root: apt-get install chromium"; exit 1; fi

demo-model: .venv/test.stamp
	$(BIN)/python -m data.train_demo --minutes 40
	$(BIN)/python -m data.model_card --work data/build

demo-run: .venv/run.stamp
	rm -rf data/demo-run
	$(BIN)/python -m analysis capture --model data/demo-model --input data/demo-prompts.jsonl --out data/demo-run

bench: .venv/test.stamp
	$(BIN)/python -m tests.bench.bench_capture
	$(BIN)/python -m tests.bench.bench_store

screenshots: .venv/test.stamp
	$(BIN)/python -m tests.browser.screenshots
