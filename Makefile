# The verbs of this repository. `make` lists them.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
ARGS ?=

.DEFAULT_GOAL := help
.PHONY: help demo test test-proofs check test-peers nightly bench proto lock format clean

help: ## List the verbs
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 14

# Hashes and editable installs don't mix in one pip call, hence two.
# Its output goes to stderr: stdout belongs to what was asked for (`--json`).
$(STAMP): requirements.lock pyproject.toml
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV) >&2
	@echo "installing what requirements.lock pins into $(VENV) ..." >&2
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --require-hashes -r requirements.lock >&2
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e . >&2
	@touch $(STAMP)

demo: $(STAMP) ## Run a herd on this machine (ARGS="--for 60s --json" runs unattended)
	@$(BIN)/python deploy/demo/demo.py $(ARGS)

test: $(STAMP) ## The hermetic test suite
	$(BIN)/python -m pytest -m "not peers" -n 2 --dist loadfile -q $(ARGS)

check: $(STAMP) ## Lint, types, import contracts, generated code, light install
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache
	$(BIN)/python proto/generate.py --check
	$(BIN)/python docs/generate.py --check
	$(BIN)/python tests/light_install.py

test-peers: $(STAMP) ## Compare with Debian's Prometheus and others (needs root and apt)
	tests/peers/install.sh
	$(BIN)/python -m pytest -m peers -n 2 --dist loadfile -q $(ARGS)

test-proofs: $(STAMP) ## Every default alert fired by its fault on real servers (needs no root; small volumes are skipped without)
	$(BIN)/python -m pytest tests/proof -n 2 --dist loadfile -q $(ARGS)

nightly: $(STAMP) ## What takes hours: full sizes, all majors, a two-hour soak, long fuzzing
	PGHERD_NIGHTLY=1 PGHERD_SOAK_S=7200 PGHERD_FUZZ_EXAMPLES=2000 $(BIN)/python -m pytest -n 2 --dist loadfile -q --timeout 9000 $(ARGS)

bench: $(STAMP) ## Measure and print tables
	@$(BIN)/python tests/perf/bench.py $(ARGS)

proto: $(STAMP) ## Generate the wire code
	$(BIN)/python proto/generate.py

lock: $(STAMP) ## Pin all dependencies anew
	$(BIN)/uv pip compile --quiet pyproject.toml --extra collector --extra tui --group dev --universal --python-version 3.11 \
		--generate-hashes --no-emit-index-url --no-annotate --no-header --upgrade -o requirements.lock

format: $(STAMP) ## Format and mend what can be mended
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean: ## Remove what was built here
	rm -rf $(VENV) dist build .mypy_cache .ruff_cache .pytest_cache .hypothesis
