# `make demo` and `make test` need Python 3.11 or newer and nothing else: they set themselves up.
PYTHON ?= python3
VENV ?= .venv
CONSTRAINTS ?= constraints.txt
BIN := $(VENV)/bin

.PHONY: demo docs check-site test test-slow test-oldest coverage test-pods test-pages package benchmark benchmark-pods lint format clean help

help:
	@echo "make demo         train on real images, print who beats whom, draw demo.png (90 seconds)"
	@echo "make test         lint, types and the test suite (under 12 minutes)"
	@echo "make test-slow    the tests that take long: every benchmark, more orders of the SDE"
	@echo "make coverage     the share of the library's lines that its tests run, per file"
	@echo "make test-oldest  the tests with the oldest versions allowed"
	@echo "make test-pods    what compilers make of our steps for TPU pods and H100s; no chip needed"
	@echo "make test-pages   the code of each page, run with what its first line installs (15 minutes)"
	@echo "make package      wheel and sdist in dist, checked; the wheel tried in an environment of its own"
	@echo "make docs         the documentation site in docs/_build/html, its pages run (4 minutes)"
	@echo "make check-site   links and accessibility of that site; needs npm and Chromium (10 minutes)"
	@echo "make benchmark    all benchmarks on this machine (25 minutes; installs PyTorch)"
	@echo "make benchmark-pods  the same at the sizes of real nets (an hour on two cores)"
	@echo "make lint         ruff and pyright alone"
	@echo "make format       ruff's formatter and its safe fixes"

demo: $(VENV)/.experiments
	$(BIN)/python -m experiments demo

test: lint
	$(BIN)/python -m pytest -n 2 --dist worksteal -m "not slow" --durations=10

# Whatever takes long and is tested more quickly, if less broadly, above. Programs are compiled as
# users' are, which `make test` does where bits are compared: tests/conftest.py says why.
test-slow: $(VENV)/.test
	JAX_DISABLE_MOST_OPTIMIZATIONS=0 $(BIN)/python -m pytest -n 2 --dist worksteal -m slow

# Which lines of the library the tests of the library run, those of `make test`.
coverage: $(VENV)/.test
	$(BIN)/python -m pytest -n 2 --dist worksteal -m "not slow" tests/library msgd_jax --cov=msgd_jax

# The tests of `make test`, compiled as users' programs are, with the oldest versions that
# pyproject.toml allows, in an environment of its own.
test-oldest:
	$(MAKE) VENV=.venv-oldest CONSTRAINTS=constraints-oldest.txt .venv-oldest/.test
	JAX_DISABLE_MOST_OPTIMIZATIONS=0 .venv-oldest/bin/python -m pytest -n 2 --dist worksteal -m "not slow"

# The compilers of TPUs and H100s need no chip, but an environment of their own.
test-pods: .venv-pods/.pods-ready
	JAX_DISABLE_MOST_OPTIMIZATIONS=0 .venv-pods/bin/python -m pytest -q -rs tests/benchmarks/test_pods.py

benchmark-pods: .venv-pods/.pods-ready
	JAX_PLATFORMS=cpu .venv-pods/bin/python -m benchmarks.pods

.venv-pods/.pods-ready: pyproject.toml $(CONSTRAINTS)
	$(MAKE) VENV=.venv-pods .venv-pods/.pods
	@touch $@

# Each page as its reader runs it: its cells in a file, the wheel, and what its first line installs.
test-pages: $(VENV)/.test
	$(BIN)/python -m tests.copied_cells --constraints $(CONSTRAINTS)

# What a user gets: the wheel alone, without extras, outside the checkout.
package: $(VENV)/.package
	rm -rf dist .venv-package
	$(BIN)/python -m hatchling build -d dist -t sdist -t wheel
	$(BIN)/python -m twine check --strict dist/*
	$(PYTHON) -m venv .venv-package
	.venv-package/bin/python -m pip install --quiet --disable-pip-version-check -c $(CONSTRAINTS) dist/*.whl
	cd dist && ../.venv-package/bin/python ../tests/smoke.py

# Every warning is an error, and so is a cell that raises. Two processes read the pages.
docs: $(VENV)/.docs
	$(BIN)/python -m sphinx -q -j 2 -W --keep-going -b html docs docs/_build/html
	@echo "The site is in docs/_build/html/index.html"

# Links inside the site, and the rules of WCAG 2.1 on every page, light and dark, wide and narrow.
# Needs npm, and a Chromium: `make check-site CHROMIUM=/path/to/chromium`.
CHROMIUM ?= chromium
check-site: docs
	$(BIN)/python -m tests.site.links docs/_build/html
	npm install --prefix tests/site --no-package-lock --no-audit --no-fund --silent
	node tests/site/accessibility.mjs docs/_build/html "$$(command -v $(CHROMIUM))"

benchmark: $(VENV)/.benchmarks
	$(BIN)/python -m benchmarks

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

# One stamp for each dependency group: the demo does not wait for the tools of the tests. They need
# a pip that knows groups. The tests and the pages use what users install as extras, too.
EXTRAS :=
$(VENV)/.test $(VENV)/.docs: EXTRAS := [solvers,streaming]
$(VENV)/.benchmarks: EXTRAS := [streaming]
# Convolutions are faster where there is a C++ compiler; nothing needs one. Compiled here, they are
# there before several processes ask for them.
COMPILE :=
$(VENV)/.test $(VENV)/.benchmarks: COMPILE = -@$(BIN)/python -m experiments.models
# Python compiles what it imports, and keeps that; to compile all that is installed takes longer.
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile -c $(CONSTRAINTS)
export PYTHONDONTWRITEBYTECODE :=

$(VENV)/.experiments $(VENV)/.test $(VENV)/.benchmarks $(VENV)/.docs $(VENV)/.package $(VENV)/.pods: $(VENV)/.%: $(BIN)/python pyproject.toml $(CONSTRAINTS) $(wildcard experiments/models/*cpu.*)
	$(PIP) 'pip>=25.1'
	$(PIP) -e '.$(EXTRAS)' --group $*
	$(COMPILE)
	@touch $@

clean:
	rm -rf $(VENV) .venv-oldest .venv-package .venv-pods tests/site/node_modules build dist docs/_build .pytest_cache .ruff_cache .hypothesis .coverage*
