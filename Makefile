# Baton: `make help` lists the targets. Needs Python 3.11 or newer, pip and make; nothing else.

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help

PYTHON ?= $(shell for p in python3.11 python3.12 python3.13 python3 python; do \
	"$$p" -c 'import sys; raise SystemExit(sys.version_info < (3, 11))' 2>/dev/null && { echo "$$p"; break; }; done)
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
LOCKS := requirements-dev.lock requirements-torch.lock
CONFIG ?= deploy/examples/local.yaml
# Further arguments of the pip command that installs torch, such as an index of CPU builds.
TORCH_PIP_ARGS ?=
# Further arguments of pytest, such as ARGS="-k migration".
ARGS ?=
QUICK := tests/unit tests/property tests/conformance
TRAIN_OUT ?= .runtime/baton-tiny-new

.PHONY: help venv demo serve test check bench bench-engine bench-peer bench-scheduling fuzz-codecs fault-kv proto lock train-tiny wheels clean

help: ## list the targets
	@echo "Baton: disaggregated prefill/decode serving. On a fresh machine: make demo, then make test."
	@echo
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sort | awk -F':.*## ' '{printf "  make %-16s %s\n", $$1, $$2}'

venv: $(STAMP) ## create .venv with the locked versions, and say which torch build it holds
	@$(BIN)/python tools/torch_build.py

$(STAMP): $(LOCKS) pyproject.toml
	@test -n "$(PYTHON)" || { \
	  echo "error: no Python 3.11 or newer on PATH (found: $$(python3 --version 2>&1 || echo none)); install one, or say make PYTHON=/path/to/python3.11"; exit 1; }
	@echo "[1/4] creating $(VENV) with $$($(PYTHON) --version)"
	@$(PYTHON) -m venv $(VENV) || { \
	  echo "error: '$(PYTHON) -m venv' failed; on Debian and Ubuntu install the package python3-venv"; exit 1; }
	@echo "[2/4] installing the locked packages, every one checked against its hash"
	@$(BIN)/python -m pip install --disable-pip-version-check --require-hashes --no-deps -r requirements-dev.lock
	@echo "[3/4] installing $$(grep -v '^#' requirements-torch.lock), the build that the package index of this machine serves"
	@$(BIN)/python -m pip install --disable-pip-version-check $(TORCH_PIP_ARGS) -r requirements-torch.lock
	@echo "[4/4] installing Baton itself from this folder"
	@$(BIN)/python -m pip install --disable-pip-version-check --no-deps --no-build-isolation --editable .
	@$(BIN)/python -m pip check --disable-pip-version-check
	@touch $(STAMP)

demo: venv ## start a small cluster on this machine, send requests through it, show each hop
	@$(BIN)/python -m cluster.demo

serve: venv ## serve CONFIG (deploy/examples/local.yaml) until Ctrl-C
	@$(BIN)/baton serve -f $(CONFIG)

# The quick tests run two at a time; those that start clusters have the machine to themselves.
test: venv ## run all tests, or those that ARGS picks
ifeq ($(ARGS),)
	@status=0; \
	$(BIN)/python -m pytest -q -n 2 $(QUICK) || status=1; \
	$(BIN)/python -m pytest tests/integration tests/fault || status=1; \
	exit $$status
else
	@$(BIN)/python -m pytest $(ARGS)
endif

check: venv ## style, types, import layers, and the quick tests (two minutes)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo
	$(BIN)/python -m pytest -q -n 2 $(QUICK) $(ARGS)

bench: venv ## measure against colocated serving; results land in benchmarks/results
	@$(BIN)/python -m benchmarks $(ARGS)

bench-engine: venv ## the engine alone beside vLLM's CPU build and transformers (installs them apart)
	@$(BIN)/python -m benchmarks.engine --torch-pip-args "$(TORCH_PIP_ARGS)" $(ARGS)

bench-peer: venv ## the whole cluster beside vLLM's 1 prefill + 1 decode over NIXL (installs it apart)
	@$(BIN)/python -m benchmarks.peer --torch-pip-args "$(TORCH_PIP_ARGS)" $(ARGS)

bench-scheduling: venv ## what one scheduling step costs, up to 1,024 running and 10,000 waiting
	@$(BIN)/python -m benchmarks.scheduling $(ARGS)

fuzz-codecs: venv ## damaged KV streams against every codec, with bounds checks, for ten minutes
	@$(BIN)/python -m tests.fuzz.codecs $(ARGS)

fault-kv: venv ## every fault at every step of a hand-over, between real workers (many minutes)
	@$(BIN)/python -m pytest -s tests/fault/every_kv_fault.py $(ARGS)

proto: venv ## write the gRPC stubs from baton/api/v1/baton.proto
	@$(BIN)/python tools/generate_proto.py

lock: venv ## write the lock files from pyproject.toml (ARGS=--upgrade takes newer versions)
	@$(BIN)/python tools/lock.py $(ARGS)

train-tiny: venv ## train a checkpoint like baton-tiny from this Python's standard library
	@$(BIN)/python -m tools.train_tiny --out $(TRAIN_OUT) $(ARGS)

wheels: venv ## build the baton-serve and baton-client wheels into dist/
	@$(BIN)/python -m build --wheel --no-isolation --outdir dist .
	@$(BIN)/python -m build --wheel --no-isolation --outdir dist deploy/client_wheel
	@ls -l dist

clean: ## remove the environment, build results and caches
	rm -rf $(VENV) build dist .runtime .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
