# `make` lists the commands. Recipes use the virtual environment in .venv and make it first.
PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python
NATIVE_SOURCES := setup.py $(wildcard csrc/*.h csrc/cpu/* csrc/cuda/*)

.PHONY: help demo tax test bench lint doctor build clean
help:  ## list the commands
	@grep -hE '^[a-z]+:.*## ' Makefile | sed -E 's/^([a-z]+):.*## /  make \1\t/' | expand -t 18

# Torch first and at its pinned version: left to a requirement, pip takes gigabytes of CUDA libraries.
PIP := $(RUN) -m pip install -q -q --disable-pip-version-check -c constraints.txt
$(VENV)/.installed: pyproject.toml constraints.txt
	@echo "== set-up: $(VENV) and torch (once, about a minute)"
	@$(PYTHON) -m venv $(VENV) || { echo "python3 needs its venv module (on Debian: apt-get install python3-venv)"; exit 1; }
	@$(PIP) "setuptools>=77" torch numpy
	@touch $@

$(VENV)/.built: $(VENV)/.installed $(NATIVE_SOURCES)
	@echo "== set-up: the native kernels"
	@$(PIP) --no-build-isolation -e ".[test,demo]"
	@touch $@

build: $(VENV)/.built  ## make .venv, install, build the kernels

demo: $(VENV)/.built  ## adapt a small language model, unprotected and protected, and draw what it kept
	@$(RUN) benchmarks/demo.py

tax: $(VENV)/.built  ## every cure of the alignment tax, measured: table, figure, page; ARGS="--scale gpu" for more
	@PYTHONPATH=benchmarks $(RUN) -m alignment_tax $(ARGS)

test: $(VENV)/.built  ## every test that this machine can run
	@$(RUN) -m pytest

bench: $(VENV)/.built  ## fused against naive, the best plain torch, and the limit
	@$(RUN) -m pytest benchmarks -q

lint: $(VENV)/.built  ## ruff and mypy
	@$(RUN) -m ruff check .
	@$(RUN) -m ruff format --check .
	@$(RUN) -m mypy

doctor: $(VENV)/.built  ## which backends run here, and what is missing
	@$(RUN) -m gradproj doctor

clean:  ## remove .venv and everything built
	rm -rf $(VENV) build demo .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks *.egg-info python/*.egg-info
	rm -f python/gradproj/*.so
