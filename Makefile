# SPDX-License-Identifier: Apache-2.0
#
# Every target brings what it needs by itself and is quick when nothing is missing.
#
#   make setup          Debian packages and .venv
#   make check          lint, format, types, layers, unit tests: below a minute
#   make test           check, and the tests on real QEMU and in a booted guest
#   make demo           a running VM backed up, restored and compared, in two minutes
#   make demo-fleet     a host with four VMs, one off and one with a dead target, in ten seconds
#   make bench          measurements against qemu-img, qemu-nbd, restic and borg
#   make coverage       how much of src the tests run through, branches and subprocesses with it
#   make test-versions  the QEMU tests on QEMU 10.0
#   make test-all       everything, the slow tests too; EXAMPLES=n documents for each parser
#   make test-fresh     demo and test as a newcomer's, on a minimal Debian 12 and 13 of their own
#   make deb            one package for Debian 12 and 13 and Ubuntu 24.04, in build/deb
#   make test-deb       it is installed, makes backups by its timer, is upgraded, removed, on booted fresh Debians
#   make dist           wheel and sdist, in build/dist
#   make soak MINUTES=n  a VM, its target and accidents in random order; SEED=… repeats a failure
#   make guest          the small Linux that tests and demo boot, and that which reads their files
#   make clean          forgets what the tools cached in this folder

.SUFFIXES:
MAKEFLAGS += --no-builtin-rules --no-print-directory
.DEFAULT_GOAL := check

BIN := .venv/bin
JOBS ?= 2
PYTEST := $(BIN)/pytest -q -p no:cacheprovider
# A test file is one unit of distribution, so that a guest booted for a file is booted once.
PYTEST_PARALLEL := $(PYTEST) -n $(JOBS) --dist loadfile
# Twice the processor time of the product's: the whole suite is measured by `make coverage` alone, the unit
# tests also where MEASURE is set, as in continuous integration.
COVERAGE := $(BIN)/coverage
MEASURED := $(COVERAGE) run -m $(PYTEST_PARALLEL:$(BIN)/%=%)
REAL := $(wildcard tests/lab tests/images tests/qemu tests/libvirt tests/guest tests/fault tests/contract tests/fuzz)

.PHONY: setup guest check lint unit test test-all test-versions test-fresh deb test-deb dist soak demo demo-fleet bench format clean coverage

setup:
	@scripts/setup.sh

guest: setup
	@scripts/guest.sh >/dev/null
	@$(BIN)/qmpbackup files prepare --if-missing >/dev/null

lint: setup
	@echo "check: ruff, mypy, import-linter, shellcheck"
	@$(BIN)/ruff check --quiet
	@$(BIN)/ruff format --check --quiet
	@# Without its cache, which two runs at once can spoil; it takes seconds.
	@$(BIN)/mypy --no-error-summary --cache-dir=/dev/null --explicit-package-bases src tests scripts bench
	@$(BIN)/lint-imports --no-cache >.venv/lint-imports.log || { cat .venv/lint-imports.log; exit 1; }
	@shellcheck scripts/*.sh .ci/run

unit: setup
	@echo "check: unit tests"
	@$(if $(MEASURE),$(COVERAGE) erase && $(MEASURED),$(PYTEST_PARALLEL)) tests/unit
	@$(if $(MEASURE),$(COVERAGE) combine -q && echo "check: unit tests run through $$($(COVERAGE) report \
		--format=total) % of src (with branches)")

check: lint unit

test: check guest
	@echo "test: on real QEMU, and in a booted guest"
	@$(PYTEST_PARALLEL) -m "not slow" $(REAL)

test-all: check guest
	@scripts/setup.sh prometheus prometheus-node-exporter
	@$(PYTEST) tests/unit/fleet/test_metrics.py
	@echo "test: everything"
	@QMPBACKUP_FUZZ=$(or $(EXAMPLES),500) $(PYTEST_PARALLEL) $(REAL)
	@$(MAKE) test-versions

# Without the tests that bound memory or time, which are about the product alone.
coverage: setup guest
	@$(COVERAGE) erase
	@-$(MEASURED) -m "not slow" --ignore-glob="*/test_memory*" tests/unit $(REAL)
	@$(COVERAGE) combine -q
	@$(COVERAGE) report

test-versions: setup
	@scripts/test-versions.sh $(PYTEST_PARALLEL)

test-fresh:
	@scripts/test-fresh.sh

deb dist:
	@scripts/package.sh $@

test-deb: deb
	@scripts/test-deb.sh

soak: setup
	@QMPBACKUP_SOAK_MINUTES=$(or $(MINUTES),10) QMPBACKUP_SOAK_SEED=$(SEED) \
		$(PYTEST) -s -k soak tests/fault/test_machine.py

demo: setup guest
	@PYTHONPATH=tests $(BIN)/python scripts/demo.py

demo-fleet: setup
	@PYTHONPATH=tests $(BIN)/python scripts/demo_fleet.py

bench: setup guest
	@scripts/setup.sh borgbackup
	@$(BIN)/python -m compileall -q src # as where it is installed
	@$(BIN)/python -m bench.backup
	@$(BIN)/python -m bench.repository
	@$(BIN)/python -m bench.restore
	@PYTHONPATH=tests $(BIN)/python -m bench.worstday
	@PYTHONPATH=tests $(BIN)/python -m bench.fleet

format: setup
	@$(BIN)/ruff check --fix
	@$(BIN)/ruff format --quiet

clean:
	rm -rf .coverage .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache build
