# A fresh machine needs Python 3.11 to 3.14 and nothing else. macOS's own is 3.9.
FITS := import sys, venv, ensurepip; sys.exit(not (3, 11) <= sys.version_info < (3, 15))
NAMES := python3 python3.14 python3.13 python3.12 python3.11
PYTHON ?= $(shell for name in $(NAMES); do \
	if $$name -c "$(FITS)" >/dev/null 2>&1; then echo $$name; break; fi; done)
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
	@$(or $(PYTHON),false) -c "$(FITS)" >/dev/null 2>&1 || { echo "mlx-flash needs" \
	"Python 3.11 to 3.14 with venv. Install one (macOS: brew install python@3.13;" \
	"Debian: apt install python3-venv), or name yours: make PYTHON=/path/to/python3" \
	>&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: $(VENV)/bin/pip pyproject.toml setup.py $(wildcard mlx_flash/storage/_read*.[ch])
	$(BIN)/pip install -q -e .
	touch $@

$(VENV)/.tests: $(VENV)/.installed
	$(BIN)/pip install -q -e ".[test]"
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info
