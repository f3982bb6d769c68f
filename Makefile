# make demo: everything from nothing to a page.  make test: the whole suite.  make docs: the site, into site/.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
MINUTES ?= 4

.PHONY: demo test lint docs install clean

install: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch==2.13.0
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e .
	touch $@

$(VENV)/.tested: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[test]"
	touch $@

$(VENV)/.documented: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[docs]"
	touch $@

demo: install
	$(BIN)/postformer demo --minutes $(MINUTES)

test: $(VENV)/.tested
	$(MAKE) lint
	$(BIN)/python -m pytest -n 2

lint: $(VENV)/.tested
	$(BIN)/ruff check
	$(BIN)/lint-imports
	$(BIN)/pyright

docs: $(VENV)/.documented
	$(BIN)/python -m mkdocs build --strict

clean:
	rm -rf $(VENV) runs site .pytest_cache .ruff_cache .hypothesis .import_linter_cache
