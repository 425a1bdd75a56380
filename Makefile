# Everything this project does, from a fresh machine with Python 3.11 or newer and make.
#
#   make demo         fine-tune the small base that ships here on real text, and print the table
#                     (ARGS="--model FOLDER --data FILE.jsonl" for your own)
#   make test         the everyday suite
#   make conformance  every method on every style of model
#   make parity       comparisons with transformers and peft (installs torch)
#   make test-bench   the benchmarks' own tests, with what they score and draw with
#   make adapters     comparisons with the adapters package (installs torch once more)
#   make clients      models of other libraries (Flax classes of transformers, Equinox, Haiku,
#                     Penzai, Tunix) under five methods, and a table of how exact they are
#   make newest       the core's tests on the newest Python of this machine
#   make lint, types  ruff, mypy
#   make docs         the examples and arguments of docstrings, and the README
#   make dist         sdist and wheel, each tested in an empty environment (TAG=v1.2.3 to release)
#   make tpu-check    compile the examples' steps for TPUs, without a TPU
#
# An environment is made when it is missing and updated when pyproject.toml is newer.

# The first Python that is new enough and can make an environment (some systems split venv off).
PYTHON ?= $(shell for p in python3.11 python3 python3.12 python3.13 python3.14; do \
	$$p -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null \
	&& { command -v $$p; break; }; done)
WORKERS ?= 2
ARGS ?=
VENV := .venv
RUN := $(VENV)/bin/python -m
comma := ,
# What needs environments of their own.
OTHERS := --ignore=tests/parity --ignore=tests/clients

.PHONY: demo test conformance parity test-bench adapters clients newest lint types docs dist tpu-check

demo: $(VENV)/installed-train
	$(VENV)/bin/python examples/demo/run.py $(ARGS)

test: $(VENV)/installed-train-test
	$(RUN) pytest -n $(WORKERS) -m "not conformance and not parity" $(OTHERS)

conformance: $(VENV)/installed-train-test
	$(RUN) pytest -n $(WORKERS) -m conformance $(OTHERS)

parity: $(VENV)/installed-train-test-parity
	$(RUN) pytest -n $(WORKERS) tests/parity

test-bench: $(VENV)/installed-train-test-bench
	$(RUN) pytest -n $(WORKERS) tests/benchmarks

# The adapters package wants a transformers older than that of `make parity`.
adapters: .venv-adapters/installed
	.venv-adapters/bin/python -m pytest tests/adapters_oracle

.venv-adapters/installed: pyproject.toml
	test -x .venv-adapters/bin/python || $(PYTHON) -m venv .venv-adapters
	.venv-adapters/bin/python -m pip install --quiet --editable . pytest adapters==1.3.0 torch==2.13.0
	touch $@

# Version 4 of transformers is the last with Flax classes; Tunix comes without what its trainers
# require, of which its models read nothing.
CLIENTS_TRANSFORMERS := transformers==4.49.0
CLIENTS_JAX := equinox==0.13.8 dm-haiku==0.0.17 penzai==0.2.5 einops==0.8.2
CLIENTS_JAX_ALONE := google-tunix==0.1.7

# Both run, whether or not the first fails.
clients: .venv-clients-transformers/installed .venv-clients-jax/installed
	failed=0; \
	.venv-clients-transformers/bin/python -m pytest tests/clients/test_transformers.py || failed=1; \
	.venv-clients-jax/bin/python -m pytest tests/clients \
		--ignore=tests/clients/test_transformers.py || failed=1; \
	exit $$failed

.venv-clients-transformers/installed: pyproject.toml
	test -x $(@D)/bin/python || $(PYTHON) -m venv $(@D)
	$(@D)/bin/python -m pip install --quiet --editable . pytest $(CLIENTS_TRANSFORMERS)
	touch $@

.venv-clients-jax/installed: pyproject.toml
	test -x $(@D)/bin/python || $(PYTHON) -m venv $(@D)
	$(@D)/bin/python -m pip install --quiet --editable . pytest $(CLIENTS_JAX)
	$(@D)/bin/python -m pip install --quiet --no-deps $(CLIENTS_JAX_ALONE)
	touch $@

lint: $(VENV)/installed-lint
	$(RUN) ruff check .
	$(RUN) ruff format --check .

types: $(VENV)/installed-lint
	$(RUN) mypy

docs: $(VENV)/installed-train-test
	$(RUN) pytest -n 0 -q tests/test_docs.py tests/test_readme.py

dist:
	PYTHON="$(PYTHON)" .ci/dist $(TAG)

# One stamp per set of extras: installed-train-test stands for `pip install -e .[train,test]`.
$(VENV)/installed-%: pyproject.toml | $(VENV)/bin/python
	$(RUN) pip install --quiet --editable ".[$(subst -,$(comma),$*)]"
	touch $@

$(VENV)/bin/python:
	@test -n "$(PYTHON)" || { echo "No Python 3.11 or newer with venv and ensurepip found;" \
		"name one: make PYTHON=/path/to/python3.11"; exit 1; }
	$(PYTHON) -m venv $(VENV)

# Oldest and newest: `make test` runs on the first Python found, this on the newest of 3.12 and
# up, from PATH or from pyenv. The extras of training are left out, so that all but the tests that
# need one (and are skipped) are seen to need none.
NEWEST := $(shell for v in 3.14 3.13 3.12; do \
	for p in python$$v $$(ls -d "$$(pyenv root 2>/dev/null)"/versions/$$v.*/bin/python 2>/dev/null); do \
	$$p -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 12))' 2>/dev/null \
	&& { echo $$p; break 2; }; done; done)

newest:
ifeq ($(NEWEST),)
	@echo "No Python 3.12 or newer on this machine: nothing to do."
else
	$(MAKE) .venv-newest/installed
	.venv-newest/bin/python -m pytest -n $(WORKERS) -m "not conformance and not parity" $(OTHERS)
endif

.venv-newest/installed: pyproject.toml
	test -x .venv-newest/bin/python || $(NEWEST) -m venv .venv-newest
	.venv-newest/bin/python -m pip install --quiet --editable ".[test]"
	touch $@

# libtpu compiles for TPUs on any Linux machine; it gets an environment of its own, since jax
# would otherwise look for a TPU in every test.
tpu-check: .venv-tpu/installed
	JAX_PLATFORMS=cpu TPU_SKIP_MDS_QUERY=1 TPU_WORKER_HOSTNAMES=localhost \
		.venv-tpu/bin/python benchmarks/tpu_check.py $(ARGS)

.venv-tpu/installed: pyproject.toml
	test -x .venv-tpu/bin/python || $(PYTHON) -m venv .venv-tpu
	.venv-tpu/bin/python -m pip install --quiet --editable . jax==0.10.2 libtpu==0.0.42.1
	touch $@
