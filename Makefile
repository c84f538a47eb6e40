# Each target runs in the active environment; `make PYTHON=.venv/bin/python test` names another one.
PYTHON ?= python
CHECKED = d3llm_hf trainers tests

.PHONY: help quality style types test test-all common-tests wheel clean

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## */\1\t/' | expand -t 16

quality:  ## check style without changing a file
	$(PYTHON) -m ruff check $(CHECKED)
	$(PYTHON) -m ruff format --check $(CHECKED)

style:  ## fix style in place
	$(PYTHON) -m ruff check --fix $(CHECKED)
	$(PYTHON) -m ruff format $(CHECKED)

types:  ## check types
	$(PYTHON) -m mypy

test:  ## the default tests: CPU, offline
	$(PYTHON) -m pytest

test-all:  ## with the slow ones
	$(PYTHON) -m pytest -m "not gpu and not hub"

common-tests:  ## transformers' own model tests on our models (fetches transformers' source distribution)
	$(PYTHON) tests/common/run_common_tests.py

wheel:  ## build dist/*.whl
	$(PYTHON) -m build --wheel

clean:
	rm -rf build dist .pytest_cache .ruff_cache .mypy_cache .hypothesis htmlcov .coverage
