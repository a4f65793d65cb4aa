# make run: the example. make test: the tests. Each first sets up what it needs, on a new machine too.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet

.PHONY: run test lint types docs trio-suite interop bench install clean

run: install
	$(BIN)/python examples/main_job.py

test: install $(VENV)/group-test
	$(BIN)/python -m pytest

lint: $(VENV)/group-lint
	$(BIN)/ruff check
	$(BIN)/ruff format --check

types: install $(VENV)/group-test $(VENV)/group-lint
	$(BIN)/mypy

docs: install $(VENV)/group-docs
	$(BIN)/sphinx-build -W --keep-going -q -E docs/sphinx docs/sphinx/_build/html

trio-suite: install $(VENV)/group-trio-suite
	$(BIN)/python tests/interop/run_trio_suite.py

interop: install $(VENV)/group-interop
	tools/setup.sh $(BIN)/python interop
	$(BIN)/python -m pytest tests/interop

bench: install $(VENV)/group-bench
	$(BIN)/python -m benchmarks

install: $(VENV)/installed

# The stamps: the venv, the package in it (built anew when the C side changes), one for each dependency group.
$(VENV)/made:
	tools/setup.sh $(PYTHON)
	$(PYTHON) -m venv --clear $(VENV)
	$(PIP) install 'pip>=25.1'
	@touch $@

$(VENV)/installed: $(VENV)/made pyproject.toml setup.py $(wildcard native/*.*)
	$(PIP) install --editable .
	@touch $@

$(VENV)/group-%: $(VENV)/made pyproject.toml
	$(PIP) install --group $*
	@touch $@

clean:
	rm -rf $(VENV) .nox build dist src/*.egg-info src/trio_uring/*.so docs/sphinx/_build
	rm -rf .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find . -name __pycache__ -prune -exec rm -rf {} +
