# make search ARGS="name=first search.n_trials=50"
# make test   ARGS="tests/test_policy.py -k budget"
PYTHON ?= python3
ARGS ?=
VENV := .venv
PY := $(VENV)/bin/python
READY := $(VENV)/.ready

# What the caller's shell has set must not reach into the environment that is made here.
unexport PYTHONPATH PYTHONHOME VIRTUAL_ENV
export PYTHONNOUSERSITE := 1

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help search test lint format

help:
	@echo "make search   train a small supernet and search its routing policies (ARGS=... passes overrides)"
	@echo "make test     run the tests (ARGS=... is passed to pytest)"
	@echo "make lint     check format, lint and types"
	@echo "make format   format the code and fix what the linter can"

# The editable install is repeated when what it depends on has changed; the stamp is written last.
$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: " + sys.version)'
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --constraint constraints.txt --editable '.[dev]'
	@touch $@

search: $(READY)
	$(PY) -m search $(ARGS)

# Two workers of one thread each: the tests are many and small, so threads inside one of them gain little. Files go by
# name: by their number of tests, as is the default, a file with few tests that take long would come last.
test: $(READY)
	OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 $(PY) -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder $(ARGS)

lint: $(READY)
	$(PY) -m ruff format --check .
	$(PY) -m ruff check .
	$(PY) -m mypy

format: $(READY)
	$(PY) -m ruff format .
	$(PY) -m ruff check --fix .
