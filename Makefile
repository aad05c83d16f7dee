# A fresh machine needs Python 3.11 or later and nothing else.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test campaign lint clean

demo: $(VENV)/.installed
	$(BIN)/mlx-flash generate "Once upon a time"

test: $(VENV)/.tests
	$(BIN)/python -m pytest -q -n auto --dist loadfile

# What takes too long for every change: see docs/reliability.md.
campaign: $(VENV)/.tests
	$(BIN)/python -m pytest -q -s -m slow tests/campaign

lint: $(VENV)/.tests
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

$(VENV)/bin/pip:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: $(VENV)/bin/pip pyproject.toml setup.py $(wildcard mlx_flash/storage/_read*.[ch])
	$(BIN)/pip install -q -e .
	touch $@

$(VENV)/.tests: $(VENV)/.installed
	$(BIN)/pip install -q -e ".[test]"
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info
