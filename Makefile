# Everything runs in .venv, made on first use and again when pyproject.toml or the constraints change.
PYTHON ?= python3
BIN := .venv/bin

export DIFFUSERS_DISABLE_REMOTE_CODE := 1
export RAY_USAGE_STATS_ENABLED := 0

.PHONY: demo test test-full test-chaos test-chaos-training test-stack test-serve lint bench serve clean

# exec leaves no shell between make and Python: Ctrl-C reaches the driver, which takes its Ray processes down with it.
demo: .venv/installed
	@exec env -u RAY_ADDRESS $(BIN)/python -m jobs.demo

test: .venv/installed
	$(BIN)/pytest -q --durations=10

# Ctrl-C apart: the demo's Ray cannot have its job agent's port while the other tests' Ray has it.
test-full: .venv/installed
	$(BIN)/pytest -q --durations=10 -m full --ignore tests/jobs/test_interrupt.py
	$(BIN)/pytest -q -m full tests/jobs/test_interrupt.py

# Bring an S3 server: AWS_ENDPOINT_URL and its AWS_* credentials. Without one most tests are skipped.
test-chaos: .venv/installed
	LEDGER_INTERLEAVINGS=10000 $(BIN)/pytest -q tests/test_ledger.py
	$(BIN)/pytest -q -s -rs -m chaos tests/chaos
	$(MAKE) test-chaos-training

# A training that is killed 36 times, and one whose machine is taken away: 17 minutes on two cores.
test-chaos-training: .venv/installed
	OMP_NUM_THREADS=1 $(BIN)/pytest -q -m chaos tests/chaos_training

# Ingest, train and promote as Ray jobs, on the S3 that AWS_ENDPOINT_URL names and a tracking server of its own.
test-stack: .venv/installed
	PATH=$(CURDIR)/$(BIN):$$PATH infra/stack.sh test

# The real endpoint under failures and overload: some ten minutes on a quiet machine.
test-serve: .venv/installed
	$(BIN)/pytest -q -s --durations=10 -m serving tests/serve

# http://127.0.0.1:8000 until Ctrl-C, with the miniature.
serve: export RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH := serve.proxy:middlewares
serve: .venv/installed
	@PYTHONPATH=$(CURDIR)/platform:$(CURDIR) OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} RAY_ADDRESS=local exec $(BIN)/serve run serve.app:build

lint: .venv/installed
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/pytest -q tests/test_house.py

bench: .venv/installed
	@exec $(BIN)/python -m jobs.benchmark adapter

.venv/installed: pyproject.toml infra/constraints.txt
	@echo "Installing into .venv, 3 GB with torch's CPU build: some minutes."
	@test -x $(BIN)/pip || $(PYTHON) -m venv .venv
	@$(BIN)/pip install -qq --disable-pip-version-check -c infra/constraints.txt -e '.[dev]'
	@touch $@

# The environment and every cache. Results (out/) stay.
clean:
	rm -rf .venv .hypothesis .mypy_cache .pytest_cache .ruff_cache platform/*.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
