# Each target sets up what it needs: `make demo` and `make test` work in a fresh clone.
.DEFAULT_GOAL := test
.PHONY: demo test test-matrix trust installed lint arch clean
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

# Every test file that reaches transformers, with other versions of it. Each has a virtual environment of its own that takes all
# but transformers, and what that asks for, from $(VENV).
VERSIONS ?= 5.17.0 5.19.0 5.21.1 5.23.0 5.24.0
MATRIX_TESTS ?= $(shell grep -lE '\b(zoo|transformers|models)\b' -r tests --include='test_*.py' --exclude=test_architecture.py)

.venv-%/.stamp: $(VENV)/.stamp
	$(PY) -m venv --without-pip .venv-$*
	$(PY) -c 'import site; print(site.getsitepackages()[0])' > "$$(.venv-$*/bin/python -c 'import site; print(site.getsitepackages()[0])')/all-else.pth"
	$(PY) -m pip --python .venv-$*/bin/python install --quiet transformers==$*
	@touch $@

test-matrix: $(VERSIONS:%=.venv-%/.stamp)
	@failed=; for v in $(VERSIONS); do \
		echo "transformers $$v"; \
		.venv-$$v/bin/python -m pytest -n $(WORKERS) --dist worksteal -q $(MATRIX_TESTS) || failed="$$failed $$v"; \
	done; test -z "$$failed" || { echo "Failed with transformers$$failed" >&2; exit 1; }

# Takes about half an hour on 2 cores; writes the table in docs/trust.md.
trust: $(VENV)/.stamp
	$(PY) docs/trust.py

# pip install into an environment of its own, then the README's commands.
installed: $(VENV)/.stamp
	rm -rf build
	$(PY) -m tests.installed

lint: $(VENV)/.stamp
	$(PY) -m ruff check .
	$(PY) -m ruff format --check --quiet .

arch: $(VENV)/.stamp
	$(VENV)/bin/lint-imports --no-logo

clean:
	rm -rf $(VENV) .venv-* build *.egg-info
