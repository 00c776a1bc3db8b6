# Any target may be the first one called on a fresh machine: tools/bootstrap does what is missing.

PYTHON ?= /usr/bin/python3
bin := .venv/bin
STORM_KILLS ?= 250
FUZZ_CALLS ?= 50000
SOAK_MINUTES ?= 30

.DEFAULT_GOAL := help
.PHONY: help demo test lint types check storm fuzz soak vm-test vm-powercut deb bench bench-metastore clean runtime development benchmark

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-16s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: runtime ## show the service at work on a bus of its own (root)
	@$(bin)/snapd-native demo

test: lint types check ## everything that has to pass before a change is merged (root)

lint: development ## style and formatting
	@$(bin)/ruff check .
	@$(bin)/ruff format --check .

types: development ## static types
	@$(bin)/mypy

check: development ## the tests alone (root)
	@$(bin)/pytest

storm: development ## kill the service 500 times under load (root, 10 minutes)
	@STORM_KILLS=$(STORM_KILLS) $(bin)/pytest -s tests/test_storm.py

fuzz: development ## call the service 50,000 times as nobody would (root, 5 minutes)
	@FUZZ_CALLS=$(FUZZ_CALLS) $(bin)/pytest -s tests/test_fuzz.py

soak: development ## load the service with 32 clients for 30 minutes (root)
	@SOAK_MINUTES=$(SOAK_MINUTES) $(bin)/pytest -s tests/test_soak.py

vm-test: development ## prove the service in a virtual machine (root, 20 minutes)
	@$(bin)/python tools/vm/run test

vm-powercut: development ## cut the power of a virtual machine 20 times (root, an hour)
	@$(bin)/python tools/vm/run powercut

deb: ## build the Debian package into dist/ (root)
	@tools/build-deb

bench: benchmark ## measure beside containerd and cp, for docs/benchmarks.md (root, 10 minutes)
	@$(bin)/python -m bench --plot docs/benchmarks.svg --document docs/benchmarks.md

bench-metastore: runtime ## measure the metadata store
	@$(bin)/python -m bench.metastore

clean: ## remove the virtual environment, what was built and the caches
	@rm -rf .venv build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
	@find . -path ./.git -prune -o -type d -name __pycache__ -prune -exec rm -rf {} +

# The lock keeps `make -j demo test` and a second make from building one .venv at the same time.
runtime development benchmark:
	@flock --close . tools/bootstrap $@ "$(PYTHON)" "make $(MAKECMDGOALS)"
