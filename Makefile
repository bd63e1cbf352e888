# make demo        set up everything and run the main job on real data
# make test        set up everything and run the tests
# make test-gpu    the tests that need a CUDA device
# make lint        style and formatting              make bench      block-by-block beside backpropagation
# make clean       remove .venv and caches (runs in nf-runs/ stay)
#
# Variables:
#   PYTHON        interpreter that makes the virtual environment, 3.11 or newer
#   VENV          where the virtual environment goes
#   TORCH         what pip installs first, when torch is not there yet. PyPI's Linux wheels carry CUDA
#                 (about 5 GB installed); for a CPU build: TORCH='torch torchvision --index-url URL'
#   PYTEST_FLAGS, DEMO_FLAGS, BENCH_FLAGS   appended to the commands

PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch torchvision
PYTEST_FLAGS ?=
DEMO_FLAGS ?=
BENCH_FLAGS ?=

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install -qq --disable-pip-version-check --no-input
DEMO_STORE := nf-runs
DEMO_DATA := nf_pipeline/data/digits.parquet
DEMO_OUTPUT := $(DEMO_STORE)/demo-predictions.parquet

# Stamps: newer than pyproject.toml means that its dependencies are installed.
INSTALLED := $(VENV)/.installed
INSTALLED_TEST := $(VENV)/.installed-test

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help demo test test-gpu lint format bench clean

help:
	@sed -n 's/^# \{0,1\}//p' Makefile | sed '/^Stamps/,$$d'

$(INSTALLED): pyproject.toml
	@$(PYTHON) -c 'import sys, venv; sys.exit(sys.version_info < (3, 11))' || { \
		echo 'Python 3.11 or newer with the venv module is needed. Fix: make $(MAKECMDGOALS) PYTHON=python3.11'; \
		exit 1; }
	@echo 'Setting up $(VENV) (first time: some minutes)'
	@$(PYTHON) -m venv $(VENV)
	@$(BIN)/python -c 'import importlib.util as u, sys; \
		sys.exit(not (u.find_spec("torch") and u.find_spec("torchvision")))' || $(PIP) $(TORCH)
	@$(PIP) --editable .
	@touch $@

$(INSTALLED_TEST): $(INSTALLED)
	@echo 'Adding the test tools to $(VENV)'
	@$(PIP) --editable '.[test]'
	@touch $@

demo: $(INSTALLED)
	$(BIN)/nf-pipeline train --memory-budget 4MiB --store $(DEMO_STORE) --run demo $(DEMO_FLAGS)
	$(BIN)/nf-pipeline predict $(DEMO_STORE)/demo $(DEMO_DATA) --output $(DEMO_OUTPUT)
	@$(BIN)/python -c 'import pyarrow.parquet as pq; \
		[print(row) for row in pq.read_table("$(DEMO_OUTPUT)").slice(0, 5).to_pylist()]'

test: $(INSTALLED_TEST)
	$(BIN)/python -m pytest $(PYTEST_FLAGS)

test-gpu: $(INSTALLED_TEST)
	$(BIN)/python -m pytest -m gpu $(PYTEST_FLAGS)

lint: $(INSTALLED_TEST)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(INSTALLED_TEST)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(INSTALLED)
	$(BIN)/python workflows/benchmarks/compare.py $(BENCH_FLAGS)

clean:
	rm -rf $(VENV) .pytest_cache .ruff_cache .hypothesis nf_pipeline.egg-info build dist
	find nf_pipeline tests workflows -name __pycache__ -type d -prune -exec rm -rf {} +
