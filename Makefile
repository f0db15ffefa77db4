# Every target does its own set-up: a .venv, uv into it, the rest by uv. A stamp file remembers what is installed.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
UV := $(BIN)/uv
WORKERS ?= 2
export UV_PROJECT_ENVIRONMENT := $(VENV)
export VIRTUAL_ENV := $(CURDIR)/$(VENV)

.PHONY: help demo lab test test-quick cluster check format lock bench clean
.DEFAULT_GOAL := help

help: ## what can be made
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

$(UV):
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo "nbdeploy needs Python 3.11 or newer: make PYTHON=/path/to/python3.11 ..."; exit 1; }
	@$(PYTHON) -m venv $(VENV) \
	  || { echo "This Python cannot make a virtual environment (on Debian: apt-get install python3-venv)"; rm -rf $(VENV); exit 1; }
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check uv

$(VENV)/.%: requirements/%.txt pyproject.toml | $(UV)
	@echo "installing requirements/$*.txt"
	@$(UV) pip install --quiet -r $< -e .
	@touch $@

demo: $(VENV)/.demo ## a model goes from a notebook to an HTTP endpoint and back to another notebook
	@$(BIN)/python examples/demo.py

lab: $(VENV)/.lab ## JupyterLab on the quickstart
	@$(BIN)/jupyter lab examples/quickstart.ipynb

test: $(VENV)/.test ## the whole suite
	@$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal

test-quick: $(VENV)/.quick ## the suite without torch and slow tests
	@$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal -m "not torch and not slow"

cluster: ## install what the Kubernetes of the tests needs (Linux, root; minutes, once)
	@tests/cluster/cluster install

check: $(VENV)/.check ## style, types, layers
	@$(BIN)/ruff check
	@$(BIN)/ruff format --check
	@$(BIN)/mypy
	@$(BIN)/lint-imports

format: $(VENV)/.check ## mend style
	@$(BIN)/ruff check --fix
	@$(BIN)/ruff format

lock: | $(UV) ## renew the exact versions of requirements/*.txt
	@$(UV) pip compile --quiet --upgrade --universal --python-version 3.11 --no-annotate --no-header \
	  pyproject.toml requirements/test.in -o requirements/test.txt
	@for set in demo lab check quick bench; do $(UV) pip compile --quiet --universal --python-version 3.11 --no-annotate --no-header \
	  pyproject.toml requirements/$$set.in -c requirements/test.txt -o requirements/$$set.txt; done

bench: $(VENV)/.bench ## every benchmark; each prints ratios
	@for file in benchmarks/[a-z]*.py; do echo "== $$file"; $(BIN)/python $$file; done

clean: ## remove the virtual environment and caches
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
