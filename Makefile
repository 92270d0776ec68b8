# What can be done here; `make` alone lists it. Works with GNU Make 3.81 and later, Linux and macOS.
#   PYTHON=python3.12     the Python (3.11 or later) that the virtual environment is made with
#   PIP_ARGS=...          more options for pip, such as the index with PyTorch's CPU build
#   DEMO_ARGS=--short     options of `prefmoe demo`; DEMO_OUT is its folder
#   PYTEST_ARGS=...       options of pytest, such as `-x -k pooling`
#   WORKERS=2             processes that share the tests; each needs up to 2 GiB
PYTHON ?= python3
PIP_ARGS ?=
DEMO_ARGS ?=
DEMO_OUT ?= runs/demo
PYTEST_ARGS ?=
WORKERS ?= 2

VENV := .venv
RUN := $(VENV)/bin/python -m
# Tests use tiny models, which one thread computes fastest; a file's tests share fixtures, so they stay together.
PYTEST := OMP_NUM_THREADS=1 $(RUN) pytest --numprocesses=$(WORKERS) --dist=loadfile
INSTALL := $(RUN) pip install $(PIP_ARGS) -c constraints.txt
DOCS := docs/cli.md docs/data.md docs/labels.md docs/policy.md docs/reward.md

export HF_HUB_OFFLINE := 1
export HF_HUB_DISABLE_TELEMETRY := 1
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.NOTPARALLEL:
.PHONY: help demo test coverage check fix docs all clean

help:  ## list the targets
	@sed -n 's/^\([a-z]*\):.*## /make \1|/p' $(MAKEFILE_LIST) | awk -F'|' '{printf "%-12s %s\n", $$1, $$2}'

demo: $(VENV)/.installed  ## train and compare reward models on a simulated world, offline; writes a report
	$(VENV)/bin/prefmoe demo --out $(DEMO_OUT) $(DEMO_ARGS)

# The second call runs without the type hook: there, our own error messages are what is tested (CONTRIBUTING.md).
test: $(VENV)/.installed-dev  ## run the whole test suite
	$(PYTEST) --ignore=tests/unit/errors --jaxtyping-packages=prefmoe.nn,beartype.beartype $(PYTEST_ARGS)
	$(PYTEST) tests/unit/errors

coverage: $(VENV)/.installed-dev  ## the suite once more, and which lines it does not reach
	$(PYTEST) --cov=prefmoe --cov-report=term-missing:skip-covered --cov-fail-under=95 $(PYTEST_ARGS)

check: $(VENV)/.installed-dev  ## formatting, lint, types, import directions, generated docs
	$(RUN) ruff format --check .
	$(RUN) ruff check .
	$(RUN) mypy
	$(VENV)/bin/lint-imports
	$(RUN) cogapp --check --diff -I docs $(DOCS)

fix: $(VENV)/.installed-dev  ## format, and repair what ruff can repair
	$(RUN) ruff format .
	$(RUN) ruff check --fix .

docs: $(VENV)/.installed-dev  ## write the generated parts of the docs anew
	$(RUN) cogapp -r -I docs $(DOCS)

all: check test demo  ## everything

clean:  ## remove the virtual environment and the demo's results
	rm -rf $(VENV) $(DEMO_OUT)

# Stamp files: a second call installs nothing until pyproject.toml or constraints.txt change.
$(VENV)/.installed: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(INSTALL) -e .
	@touch $@

$(VENV)/.installed-dev: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(INSTALL) -e '.[dev]'
	@touch $(VENV)/.installed $@

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "prefmoe needs Python 3.11 or later; '$(PYTHON)' is $$($(PYTHON) --version 2>&1)." >&2; \
		echo "Name another one: make PYTHON=python3.12 $(MAKECMDGOALS)" >&2; exit 1; }
	@$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); \
		echo "No virtual environment could be made; on Debian and Ubuntu install the package python3-venv." >&2; exit 1; }
