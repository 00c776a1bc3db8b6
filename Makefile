# Any target may be the first one called on a fresh machine: tools/bootstrap does what is missing.

PYTHON ?= /usr/bin/python3
bin := .venv/bin
# One more than there are processors, because tests also wait for the disk.
JOBS ?= $(shell expr $$(nproc) + 1)
N ?= 10
pytest := $(bin)/pytest $(if $(SEED),--randomly-seed=$(SEED))
parallel := --numprocesses $(JOBS) --dist worksteal

.DEFAULT_GOAL := help
.PHONY: help demo docs/session.svg test lint types unit check test-all check-all coverage test-repeat storm fuzz soak \
    vm-test vm-up vm-down vm-powercut deb install uninstall dist rpm bench bench-plugin bench-metastore clean static runtime development long benchmark

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z/.-]+:.*## / { printf "make %-16s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: runtime ## show the service at work on a bus of its own (root)
	@$(bin)/snapd-native demo

docs/session.svg: runtime ## draw what make demo prints (root)
	@mkdir -p build && $(bin)/snapd-native demo >build/session
	@$(bin)/python -m tools.picture 'make demo' <build/session >$@

test: lint types check ## everything that has to pass before a change is merged (root, 6 to 10 minutes)

test-all: lint types check-all ## test, and the long tests too (root, 20 minutes)

lint: static ## style and formatting (no root)
	@$(bin)/ruff check .
	@$(bin)/ruff format --check .

types: static ## static types (no root)
	@$(bin)/mypy

unit: static ## the tests that need no root
	@$(pytest) tests/unit

check: development ## the quick tests alone (root); JOBS=1 runs one at a time, SEED=N repeats an order
	@$(pytest) $(parallel)

check-all: export STORM_KILLS ?= 50
check-all: export FUZZ_CALLS ?= 10000
check-all: export SOAK_MINUTES ?= 5
check-all: export MODEL_EXAMPLES ?= 250
check-all: long
	@$(pytest) $(parallel) -m ''

coverage: development ## which lines the quick tests do not run (root); build/coverage/html
	@rm -rf build/coverage
	@mkdir -p build && mkdir -m 1777 build/coverage
	@$(bin)/coverage run -m pytest $(parallel)
	@$(bin)/coverage combine --quiet
	@$(bin)/coverage html --quiet
	@$(bin)/coverage report

test-repeat: development ## run the quick tests N times, every second time beside a load (root)
	@tools/test-repeat $(N) build/test-repeat $(MAKE) --no-print-directory check

storm: export STORM_KILLS ?= 250
storm: development ## kill the service 500 times under load (root, 10 minutes)
	@$(pytest) -s -m '' tests/load/test_storm.py

fuzz: export FUZZ_CALLS ?= 50000
fuzz: development ## call the service 50,000 times as nobody would (root, 5 minutes)
	@$(pytest) -s -m '' tests/load/test_fuzz.py

soak: export SOAK_MINUTES ?= 30
soak: development ## load the service with 32 clients for 30 minutes (root)
	@$(pytest) -s -m '' tests/load/test_soak.py

vm-test: development ## prove the service in a virtual machine (root, 20 minutes); ONLY=TESTS runs some
	@$(bin)/python -m tools.vm test $(if $(ONLY),--only "$$ONLY")

vm-up: development ## start a virtual machine that vm-test uses until vm-down (root, 3 minutes)
	@$(bin)/python -m tools.vm up

vm-down: development ## destroy the virtual machine of vm-up (root)
	@$(bin)/python -m tools.vm down

vm-powercut: development ## cut the power of a virtual machine 20 times, and make its disks fail (root, an hour)
	@$(bin)/python -m tools.vm powercut

deb: ## build the Debian packages into dist/ (root)
	@tools/build-deb

install: ## install the program below PREFIX (default /usr/local) without a package (root)
	@PYTHON="$(PYTHON)" tools/install all
	@[ "$(DESTDIR)" ] || echo 'now run: systemctl daemon-reload; systemctl reload dbus; systemctl enable --now snapd-native'

uninstall: ## remove what make install has installed (root); data and mounts stay
	@PYTHON="$(PYTHON)" tools/install remove

dist: development ## build a wheel and a source archive into dist/
	@mkdir -p build
	@$(bin)/python -m build --no-isolation --outdir dist >build/dist.log 2>&1 || { cat build/dist.log >&2; exit 1; }

rpm: dist ## build the RPM packages into dist/, on Debian (root)
	@tools/build-rpm

bench: benchmark ## measure beside containerd and cp, for docs/benchmarks.md (root, 10 minutes)
	@$(bin)/python -m bench --plot docs/benchmarks.svg --document docs/benchmarks.md

bench-plugin: benchmark ## measure the containerd plugin beside containerd's own snapshotters (root, 10 minutes)
	@$(bin)/python -m bench.plugin

bench-metastore: runtime ## measure the metadata store
	@$(bin)/python -m bench.metastore

clean: ## remove the virtual environment, what was built and the caches
	@rm -rf .venv build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
	@find . -path ./.git -prune -o -type d -name __pycache__ -prune -exec rm -rf {} +

# The lock keeps `make -j demo test` and a second make from building one .venv at the same time.
static runtime development long benchmark:
	@flock --close . tools/bootstrap $@ "$(PYTHON)" "make $(MAKECMDGOALS)"
