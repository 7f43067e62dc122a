# make demo and make test set everything up; the rest builds on the same .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
JOBS ?= $(shell nproc 2>/dev/null || echo 2)
OUTPUT ?= bench/results
RATIO ?= 1.10
# A machine with a GPU has its own torch and Triton: make gpu uses the interpreter that holds them.
GPU_PYTHON ?= python3

.PHONY: help setup demo test lint format bench recall plots readme compare gpu soak kernels-report clean

help:
	@echo "make demo            set up, then the recall proof: facts told, context gone, facts asked"
	@echo "make test            set up, then the tests (CPU)"
	@echo "make lint            ruff, and whether README says what the results say"
	@echo "make bench           benchmarks of this machine; JSON under bench/results (OUTPUT=dir)"
	@echo "make recall          what the shipped weights remember: curves, plots, README's table (OUTPUT=dir)"
	@echo "make plots           pictures of the newest results; PNG under bench/results/plots"
	@echo "make readme          README's tables from the newest results"
	@echo "make compare         what moved: OLD=file NEW=file (RATIO=1.10)"
	@echo "make kernels-report  registers, shared memory and spills of every kernel, compiled ahead of time"
	@echo "make gpu             on a machine with a GPU, in nine minutes: its tests, then timings (OUTPUT=dir)"
	@echo "make soak            what takes long"

setup: $(VENV)/.ready

$(VENV)/.ready: setup.py pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt setuptools wheel
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

demo: setup
	$(BIN)/deltamem demo

test: setup
	$(BIN)/python -m pytest -m "not gpu and not soak" -n $(JOBS) --dist loadgroup -q

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python -m bench.readme --check
	$(BIN)/python -m bench.recall readme --check

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: setup
	$(BIN)/python -m bench --output $(OUTPUT)

recall: setup
	$(BIN)/python -m bench.recall curves --output $(OUTPUT)/recall
	$(BIN)/python -m bench.recall plots
	$(BIN)/python -m bench.recall readme

plots: setup
	$(BIN)/python -m bench.plots

readme: plots
	$(BIN)/python -m bench.readme

compare: setup
	$(BIN)/python -m bench.compare $(OLD) $(NEW) --ratio $(RATIO)

kernels-report: setup
	$(BIN)/python -m deltamem_kernels.report

gpu:
	PYTHONPATH=$(CURDIR):$(CURDIR)/kernels $(GPU_PYTHON) -m bench.gpu --output $(OUTPUT)

soak: setup
	$(BIN)/python -m pytest -m "soak and not gpu" -q

clean:
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
