# Two commands matter: `make demo` runs the whole pipeline, `make test` the tests. Both set themselves up in .venv.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

# Everything Prefect keeps stays in this folder, and nothing is reported to anybody.
export PREFECT_HOME := $(CURDIR)/.prefect
export PREFECT_SERVER_ANALYTICS_ENABLED := false
export PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS := 120
export PREFECT_CLI_PROMPT := false
export PREFECT_LOGGING_LEVEL ?= WARNING
export DO_NOT_TRACK := 1
export HF_HUB_DISABLE_TELEMETRY := 1

.DEFAULT_GOAL := help
.PHONY: help demo test test-interop check format clean

help:  ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/'

demo: $(STAMP)  ## tokenize, harvest, train, analyse, report: four to seven minutes on two cores
	$(BIN)/python -m flows.replicate --preset demo

test: $(STAMP)  ## the whole test suite, without network or GPU
	$(BIN)/python -m pytest

test-interop: $(STAMP)  ## our checkpoints through SAELens's and dictionary_learning's own code, in their environments
	$(BIN)/python -m pytest -m interop tests/interop

check: $(STAMP)  ## format, lint, types, import rules
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/basedpyright --pythonpath $(BIN)/python
	$(BIN)/lint-imports

format: $(STAMP)  ## let ruff rewrite what it can
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:  ## remove the environment and Prefect's files; artifacts stay
	rm -rf $(VENV) .prefect

# torch first and alone: another package's open range would pull the newest build of it.
$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	touch $(STAMP)
