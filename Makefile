# Each target does its own set-up: a virtual environment in .venv, and the test bed (QEMU, a guest
# kernel) in $XDG_CACHE_HOME/vfio-user-virtio or ~/.cache/vfio-user-virtio.  The system is not changed.

PYTHON := .venv/bin/python
SANS_IO := tests/protocol tests/pci tests/virtio
export PYTHONPATH := server:.

.PHONY: help setup inner-kernel demo test lint unit e2e bench clean

help:
	@echo 'make demo   boot a guest on the software device and send packets through it'
	@echo 'make test   everything that CI runs: lint, types, unit tests, coverage, guests'
	@echo 'make unit   the tests that need no guest'
	@echo 'make e2e    the tests that boot one'
	@echo 'make bench  measure against peers in the same run; BENCH="--quick guest" says what'
	@echo 'make lint   ruff and mypy'
	@echo 'make setup  only .venv and the test bed'
	@echo 'make inner-kernel  build the kernel of the tests that need VFIO, once'
	@echo 'make clean  remove what these made here; the cache stays'

setup:
	@PYTHONPATH=. python3 -m tests.testbed.environment
	@PYTHONPATH=. python3 -m tests.testbed.provision
	@PYTHONPATH=. python3 -m tests.testbed.varlinkctl

# For the tests of kernel VFIO: built once, which takes some minutes.
inner-kernel: setup
	@PYTHONPATH=. python3 -m tests.testbed.inner_kernel

demo: setup
	@$(PYTHON) examples/demo.py

test: lint unit e2e

lint: setup
	$(PYTHON) -m ruff check
	$(PYTHON) -m ruff format --check
	$(PYTHON) -m mypy

# The sans-I/O packages must be covered whole, every branch, by their own tests.
unit: setup
	$(PYTHON) -m coverage run -m pytest $(SANS_IO)
	$(PYTHON) -m coverage report
	$(PYTHON) -m pytest -n auto -m 'not e2e' $(SANS_IO:%=--ignore=%) tests

e2e: setup inner-kernel
	$(PYTHON) -m pytest -m e2e tests

bench: setup inner-kernel
	$(PYTHON) -m tests.bench $(BENCH)

clean:
	rm -rf .venv build dist *.egg-info .coverage .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
