# `make demo` and `make test` need Python 3.11 or newer and nothing else: they set themselves up.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: demo test lint format clean help

help:
	@echo "make demo    train on real images, print a table, draw curves.png (under 3 minutes)"
	@echo "make test    lint, types and the test suite (under 12 minutes)"
	@echo "make lint    ruff and pyright alone"
	@echo "make format  ruff's formatter and its safe fixes"

demo: $(VENV)/.experiments
	$(BIN)/python -m experiments demo

test: lint
	$(BIN)/python -m pytest -n 2 --dist worksteal

lint: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python

format: $(VENV)/.test
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "msgd_jax needs Python 3.11 or newer: make PYTHON=python3.11 ..."; exit 1; }
	$(PYTHON) -m venv $(VENV)

# One stamp for each extra: the demo does not wait for the tools of the tests.
$(VENV)/.experiments $(VENV)/.test: $(VENV)/.%: $(BIN)/python pyproject.toml constraints.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[$*]"
	@touch $@

clean:
	rm -rf $(VENV) .pytest_cache .ruff_cache .hypothesis
