# make demo        set up everything and run the main job on real data
# make test        set up everything and run the tests
# make test-gpu    the tests that need a CUDA device
# make test-faults everything that may break a run, as tests; NF_FAULT_TABLE=FILE takes a line for each fault
# make test-slow   larger loads: networks of 200 layers, 10,000 classes, memory at 16 times the data; every classifier
#                  of torchvision; the larger recipes
# make soak        faults at random times for SOAK_MINUTES (10); SOAK_SEED repeats them
# make fuzz        much more bad input than `make test` tries: FUZZ_SECONDS (120) for each decoder, then properties
# make lint        style and formatting
# make bench       this project beside backpropagation at several budgets: a quarter of an hour on two cores, for
#                  DATA=PATH with CIFAR-10 in any form that train reads; results in workflows/benchmarks/results/;
#                  BENCH_FLAGS='--seeds 3' repeats it with other seeds, 8 minutes each
# make bench-gpu   the same with VGG-16, VGG-19 and ResNet-18 at 100 to 500 MiB of a GPU, full schedules; it ends
#                  after BENCH_SECONDS (540): run it again and again, each call goes on where the last one ended.
#                  It installs nothing and uses no network: BENCH_PYTHON must have torch, torchvision, pyarrow,
#                  numpy, pillow, pydantic, click and safetensors; DATA is to be a path
# make clean       remove .venv and caches (runs in nf-runs/ stay)
#
# Variables:
#   PYTHON        interpreter that makes the virtual environment, 3.11 or newer
#   VENV          where the virtual environment goes
#   BENCH_PYTHON  interpreter of bench-gpu: that of VENV if it is there, else PYTHON
#   TORCH         what pip installs first, when torch is not there yet. PyPI's Linux wheels carry CUDA
#                 (about 5 GB installed); for a CPU build: TORCH='torch torchvision --index-url URL'
#   DATA          images of the benchmarks
#   TEST_PROCESSES  processes for the tests that can run side by side
#   PYTEST_FLAGS, DEMO_FLAGS, BENCH_FLAGS   appended to the commands

PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch torchvision
PYTEST_FLAGS ?=
DEMO_FLAGS ?=
BENCH_FLAGS ?=
BENCH_SECONDS ?= 540
BENCH_PYTHON ?= $(or $(wildcard $(VENV)/bin/python),$(PYTHON))
DATA ?= torchvision:CIFAR10:data
FUZZ_SECONDS ?= 120
TEST_PROCESSES ?= 2

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install -qq --disable-pip-version-check --no-input
BENCH_OUTPUT := 'workflows/benchmarks/results/{device}'
DEMO_STORE := nf-runs
DEMO_DATA := nf_pipeline/data/digits.parquet
DEMO_OUTPUT := $(DEMO_STORE)/demo-predictions.parquet

QUICK := not gpu and not slow and not soak

# Stamps: newer than pyproject.toml means that its dependencies are installed.
INSTALLED := $(VENV)/.installed
INSTALLED_TEST := $(VENV)/.installed-test

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help demo test test-gpu test-faults test-slow soak fuzz lint format bench bench-gpu clean

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

# Two Rays that start at the same time may choose the same port: tests with a cluster run one after the other.
test: $(INSTALLED_TEST)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(TEST_PROCESSES) --dist loadfile -m '$(QUICK) and not ray' $(PYTEST_FLAGS)
	$(BIN)/python -m pytest -m '$(QUICK) and ray' $(PYTEST_FLAGS)

test-gpu: $(INSTALLED_TEST)
	$(BIN)/python -m pytest -m gpu $(PYTEST_FLAGS)

test-faults: $(INSTALLED_TEST)
	$(BIN)/python -m pytest tests/faults -m 'not soak' $(PYTEST_FLAGS)

test-slow: $(INSTALLED_TEST)
	$(BIN)/python -m pytest tests/core tests/load tests/workflows -m slow $(PYTEST_FLAGS)

soak: $(INSTALLED_TEST)
	$(BIN)/python -m pytest tests/faults -m soak --log-cli-level=INFO $(PYTEST_FLAGS)

fuzz: $(INSTALLED_TEST)
	$(PIP) --editable '.[fuzz]' || echo 'atheris cannot be installed here'
	for target in shards manifest sealed plan model events weights images; do \
		$(BIN)/python tests/fuzz/decoders.py $$target -max_total_time=$(FUZZ_SECONDS) || exit 1; done
	HYPOTHESIS_PROFILE=thorough $(BIN)/python -m pytest tests/fuzz --timeout=7200 $(PYTEST_FLAGS)

lint: $(INSTALLED_TEST)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(INSTALLED_TEST)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# Without matplotlib the tables are made all the same, and without a network there may be none.
bench: $(INSTALLED)
	@$(BIN)/python -c 'import matplotlib' 2>/dev/null || $(PIP) --editable '.[bench]' || true
	$(BIN)/nf-pipeline bench --data $(DATA) --models nf_pipeline.bench.networks:narrow_vgg16 \
		--max-train-images 2000 --val-fraction 0.2 --epochs 5 --search-seconds 5 --search-tries 3 --give-up 2 \
		--output $(BENCH_OUTPUT) --work $(DEMO_STORE)/bench $(BENCH_FLAGS)

bench-gpu:
	@$(BENCH_PYTHON) -c 'import torch, torchvision, pyarrow, numpy, PIL, pydantic, click, safetensors'
	$(BENCH_PYTHON) -m nf_pipeline bench --device cuda --data $(DATA) --models vgg16_bn,vgg19_bn,resnet18 \
		--budgets 100MiB,200MiB,300MiB,400MiB,500MiB --max-batch 256 --epochs 50 --augment crop_flip \
		--search-seconds 30 --search-tries 3 \
		--output $(BENCH_OUTPUT) --work $(DEMO_STORE)/bench-gpu --time-limit $(BENCH_SECONDS) $(BENCH_FLAGS)

clean:
	rm -rf $(VENV) .pytest_cache .ruff_cache .hypothesis nf_pipeline.egg-info build dist
	find nf_pipeline tests workflows -name __pycache__ -type d -prune -exec rm -rf {} +
