# Two commands matter: `make demo` runs the whole pipeline, `make test` the tests. Both set themselves up in .venv.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
WORKERS ?= 2

# Everything Prefect keeps stays in this folder, and nothing is reported to anybody.
export PREFECT_HOME := $(CURDIR)/.prefect
export PREFECT_SERVER_ANALYTICS_ENABLED := false
export PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS := 120
export PREFECT_CLI_PROMPT := false
export PREFECT_LOGGING_LEVEL ?= WARNING
export DO_NOT_TRACK := 1
export HF_HUB_DISABLE_TELEMETRY := 1

.DEFAULT_GOAL := help
.PHONY: help demo up down test test-faults test-interop check docs bench format clean

help:  ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/'

demo: $(STAMP)  ## tokenize, harvest, train, analyse, report: four to nine minutes on two cores
	$(BIN)/python -m flows.replicate --preset demo

test: $(STAMP)  ## the whole test suite, without network or GPU, two files at a time (WORKERS=0: in one process)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder

test-faults: $(STAMP)  ## kills, power cuts, full and failing disks, in numbers that `make test` has no time for
	SPARSEMILL_FAULTS=long $(BIN)/python -m pytest -s tests/faults

up: $(STAMP)  ## a Prefect server on this machine, with pools, deployments and workers (port: PREFECT_PORT)
	$(BIN)/python -m flows.local up

down: $(STAMP)  ## end exactly what `make up` started
	$(BIN)/python -m flows.local down

test-interop: $(STAMP)  ## our checkpoints through SAELens's and dictionary_learning's own code, in their environments
	$(BIN)/python -m pytest -m interop tests/interop

check: $(STAMP)  ## format, lint, types, import rules
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/basedpyright --pythonpath $(BIN)/python
	$(BIN)/lint-imports

docs: $(STAMP)  ## this documentation as a site in build/docs; a warning, so a dead link too, is an error
	$(BIN)/python -m sphinx -W --keep-going --quiet docs build/docs

bench: $(STAMP)  ## the benchmarks that take minutes each; other programs in environments of their own, from PyPI
	$(BIN)/python -m bench.scaling
	$(BIN)/python -m bench.orders
	$(BIN)/python -m bench.peer_steps --size 512-4096
	$(BIN)/python -m bench.formats
	$(BIN)/python -m bench.peer_stores
	$(BIN)/python -m bench.peer_quality
	$(BIN)/python -m bench.tables

format: $(STAMP)  ## let ruff rewrite what it can
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:  ## end what `make up` started, remove the environment and Prefect's files; artifacts stay
	if [ -x $(BIN)/python ]; then $(BIN)/python -m flows.local down; fi
	rm -rf $(VENV) .prefect

# torch first and alone: another package's open range would pull the newest build of it.
$(STAMP): pyproject.toml constraints.txt
	@echo "installing some 4 GB of packages into $(VENV), once; this takes minutes"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	touch $(STAMP)
