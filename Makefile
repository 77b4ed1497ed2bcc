# Everything from a fresh clone: `make serve` runs the server, `make test` runs every check.
#
#   make serve ARGS="--prefill 2 --decode 1 --port 9000"
#   make test            lint, import contracts, every test that is neither slow nor for a GPU
#   make test-slow       the tests that take minutes
#   make test-gpu        the tests that need a CUDA device
#   make test-netns      the tests of two hosts, which are network namespaces: as root
#   make test-clients    other projects' clients against the server, each in a venv of its own
#   make compiled        the machines and the simulator, compiled: takes minutes and a C compiler
#   make test-compiled   the tests of these, in a venv of its own
#   make lint            ruff, mypy, import contracts
#
# PYTHON names the interpreter (3.11 or newer). TORCH names the torch to install; a machine that has
# one of its own, say for its GPU, keeps it with: make serve TORCH= VENV_ARGS=--system-site-packages

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help

PYTHON ?= python3
VENV ?= .venv
VENV_ARGS ?=
TORCH ?= $(shell grep '^torch==' constraints.txt)
MODEL ?= smollm2-135m
ARGS ?=
# A server is several processes: where Python keeps no bytecode, each compiles all of pdserve anew.
export PYTHONDONTWRITEBYTECODE :=
# The first that reads dependency groups is 25.1.
PIP_VERSION := pip==26.3

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
INSTALL := $(PIP) install --constraint $(VENV)/constraints.txt
COMPILED := src/pdserve/engine/native src/pdserve/transport/native
KERNELS := $(wildcard src/pdserve/CMakeLists.txt \
  $(foreach folder,$(COMPILED),$(folder)/*.[ch]* $(folder)/CMakeLists.txt))
COMPILED_TESTS := tests/compiled tests/node tests/sim $(addprefix tests/unit/,kv policy cost sim) \
  tests/e2e/test_replay_of_changes.py tests/e2e/test_parity.py
COMPILED_MARK := not interpreted and not slow and not gpu
READY := $(VENV)/.ready
TEST_READY := $(VENV)/.test-ready

.PHONY: help serve test test-slow test-gpu test-netns test-clients test-compiled compiled lint pull \
  clean

help:
	@sed -n 's/^# \{0,1\}//p' Makefile | sed '/^$$/q'
	@sed -n '/^#   make/s/^# *//p' Makefile

serve: $(READY)
	@case " $(ARGS)" in *" --model"*) ;; *) $(BIN)/pdserve pull $(MODEL) ;; esac
	@exec $(BIN)/pdserve serve $(ARGS)

pull: $(READY)
	$(BIN)/pdserve pull $(MODEL)

test: lint pull
	$(BIN)/python -m pytest

test-slow: $(TEST_READY) pull
	$(BIN)/python -m pytest -m 'slow and not gpu and not netns'

test-gpu: $(TEST_READY) pull
	$(BIN)/python -m pytest -m gpu

test-netns: $(TEST_READY)
	$(BIN)/python -m pytest -m netns

test-clients: $(TEST_READY)
	$(if $(VLLM),VLLM="$(VLLM)") $(BIN)/python -m pytest -m clients $(if $(VLLM),,-k "not vllm")

# What was edited since is not seen until it is made again; `make clean serve` goes back to the files.
compiled: $(READY)
	PDSERVE_COMPILE=1 $(INSTALL) --no-deps --force-reinstall .

test-compiled:
	$(MAKE) VENV=$(VENV)-compiled pull $(VENV)-compiled/.test-ready compiled
	$(VENV)-compiled/bin/python -m pytest -m '$(COMPILED_MARK)' $(COMPILED_TESTS)

lint: $(TEST_READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# The venv is made anew only if it is missing; installing is repeated only if what it reads changes.
$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null \
	  || { echo "pdserve needs Python 3.11 or newer and $(PYTHON) is not one:" \
	    "apt-get install python3 python3-venv, or make PYTHON=/path/to/python3.12"; exit 1; }
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null \
	  || { echo "$(PYTHON) has no venv module: apt-get install python3-venv" \
	    "(or python3.X-venv for another Python)"; exit 1; }
	$(PYTHON) -m venv $(VENV_ARGS) $(VENV)

$(READY): pyproject.toml constraints.txt $(KERNELS) | $(BIN)/python
	@echo "installing pdserve into $(VENV)"
	@grep -v '^torch==' constraints.txt > $(VENV)/constraints.txt
	@$(INSTALL) --quiet $(PIP_VERSION)
	$(INSTALL) $(TORCH) --editable .
	@touch $@

$(TEST_READY): pyproject.toml constraints.txt | $(READY)
	@echo "installing what the tests need into $(VENV)"
	$(INSTALL) --group test
	@touch $@

clean:
	rm -rf $(VENV) $(VENV)-compiled .pytest_cache .hypothesis .mypy_cache .ruff_cache .import_linter_cache
