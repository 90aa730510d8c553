# Each target sets up what it needs: `make demo` and `make test` work in a fresh clone.
.DEFAULT_GOAL := test
.PHONY: demo test lint arch clean
.DELETE_ON_ERROR:

VENV ?= .venv
PY := $(VENV)/bin/python
WORKERS ?= 2
TORCH ?= $(shell grep '^torch==' constraints.txt)

# The first Python of the machine that is 3.11 or newer and can make a virtual environment.
PYTHON ?= $(shell for p in python3.11 python3.12 python3.13 python3 python; do \
	$$p -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)

# torch goes in first and alone, so that a local or CPU build of it is what everything else resolves against.
$(VENV)/.stamp: pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "No Python 3.11 or newer found; set PYTHON=/path/to/python3." >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet --constraint constraints.txt setuptools wheel
	$(PY) -m pip install --quiet --constraint constraints.txt $(TORCH)
	$(PY) -m pip install --quiet --constraint constraints.txt --no-build-isolation --editable '.[dev]'
	@touch $@

demo: $(VENV)/.stamp
	$(PY) examples/demo.py

test: $(VENV)/.stamp
	$(PY) -m pytest -n $(WORKERS) --dist worksteal

lint: $(VENV)/.stamp
	$(PY) -m ruff check .

arch: $(VENV)/.stamp
	$(VENV)/bin/lint-imports --no-logo

clean:
	rm -rf $(VENV) build *.egg-info
