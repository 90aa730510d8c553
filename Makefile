# Each target sets up what it needs: `make demo` and `make test` work in a fresh clone.
.DEFAULT_GOAL := test
.PHONY: demo test test-matrix trust figures installed lint arch clean
.DELETE_ON_ERROR:

VENV ?= .venv
PY := $(VENV)/bin/python
WORKERS ?= 2
TORCH ?= $(shell grep '^torch==' constraints.txt)

# Containers often say that no compiled code is to be kept: then each process of the tests compiles torch and transformers for itself,
# which takes longer than to import them.
unexport PYTHONDONTWRITEBYTECODE

# The first Python of the machine that is 3.11 or newer and can make a virtual environment.
PYTHON ?= $(shell for p in python3.11 python3.12 python3.13 python3 python; do \
	$$p -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)

# torch goes in first and alone, so that a local or CPU build of it is what everything else resolves against. Python compiles what it
# imports; of all that is installed that is a tenth.
$(VENV)/.stamp: pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "No Python 3.11 or newer found; set PYTHON=/path/to/python3." >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet --no-compile --constraint constraints.txt setuptools wheel
	$(PY) -m pip install --quiet --no-compile --constraint constraints.txt $(TORCH)
	$(PY) -m pip install --quiet --no-compile --constraint constraints.txt --no-build-isolation --editable '.[dev]'
	@touch $@

demo: $(VENV)/.stamp
	$(PY) benchmarks/demo.py $(DEMO)

test: $(VENV)/.stamp
	$(PY) -m pytest -n $(WORKERS) --dist worksteal

# Other versions: of transformers with every test file that reaches it, of torch with all tests. `make test-torch-2.14.1` is one of
# them, `make test-matrix VERSIONS=5.17.0 TORCHES=` a choice.
VERSIONS ?= 5.17.0 5.19.0 5.21.1 5.23.0 5.24.0
TORCHES ?= 2.11.0 2.14.1 2.15.0
MATRIX_TESTS ?= $(shell grep -lE '\b(zoo|transformers|models|README)\b' -r tests --include='test_*.py' --exclude=test_architecture.py)
.PRECIOUS: .venv-transformers-%/.stamp .venv-torch-%/.stamp
SITE := -c 'import site; print(site.getsitepackages()[0])'

# Takes all but transformers, and what that asks for, from $(VENV).
.venv-transformers-%/.stamp: $(VENV)/.stamp
	$(PY) -m venv --without-pip $(@D)
	$(PY) $(SITE) > "$$($(@D)/bin/python $(SITE))/all-else.pth"
	$(PY) -m pip --python $(@D)/bin/python install --quiet transformers==$*
	@touch $@

# Stands alone: torch brings its own Triton and bound on setuptools and, where pip takes the build for CUDA, gigabytes. Triton 3.6's
# interpreter turns arrays of one number into numbers, which numpy does no more from 2.4 on.
.venv-torch-%/.stamp: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(@D)
	grep -vE '^(torch|triton|setuptools|numpy)==' constraints.txt > $(@D)/constraints.txt
	$(@D)/bin/python -m pip install --quiet --constraint $(@D)/constraints.txt torch==$* $(if $(filter 2.11%,$*),'numpy<2.4') --editable '.[dev]'
	@touch $@

test-transformers-%: .venv-transformers-%/.stamp
	$(<D)/bin/python -m pytest -n $(WORKERS) --dist worksteal -q $(MATRIX_TESTS)

test-torch-%: .venv-torch-%/.stamp
	$(<D)/bin/python -m pytest -n $(WORKERS) --dist worksteal -q

test-matrix:
	$(MAKE) --keep-going $(VERSIONS:%=test-transformers-%) $(TORCHES:%=test-torch-%)

# Takes about half an hour on 2 cores; writes the table in docs/trust.md.
trust: $(VENV)/.stamp
	$(PY) docs/trust.py

# Writes the tables of figures on the pages from benchmarks/results/*.json, and draws the plots that the pages show.
figures: $(VENV)/.stamp
	$(PY) benchmarks/figures.py

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
