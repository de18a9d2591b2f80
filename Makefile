# A fresh clone needs python3 and make: the first target that runs something makes .venv, once.
PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/.installed

.DEFAULT_GOAL := help
.PHONY: help demo test test-slow parity lint clean

help: ## this list
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/make \1@\2/p' Makefile | while IFS=@ read -r name what; do \
		printf '%-16s%s\n' "$$name" "$$what"; done

demo: $(INSTALLED) ## simulate a tissue, pretrain on it, embed it, and write a report
	$(BIN)/scfm demo

test: lint ## lint, then the tests
	$(BIN)/pytest

test-slow: $(INSTALLED) ## the tests that take minutes
	$(BIN)/pytest -m slow

# The authors' code wants lightning and peft, which what we import of it does not: hence --no-deps.
parity: .venv-parity/.installed ## against the authors' code, in an environment of its own (torch)
	.venv-parity/bin/pytest tests/parity

.venv-parity/.installed: pyproject.toml
	$(PYTHON) -m venv .venv-parity
	.venv-parity/bin/python -m pip install --quiet --editable '.[test,parity]'
	.venv-parity/bin/python -m pip install --quiet --no-deps modelgenerator==0.1.3.post0
	@touch $@

lint: $(INSTALLED) ## style and types
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

clean: ## remove .venv and what tools left; runs/ stays
	rm -rf .venv .venv-parity build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# A dot is a package found or fetched. pip says why it fails on standard error; that it succeeded, on its last line.
$(INSTALLED): pyproject.toml
	@command -v $(PYTHON) >/dev/null || { echo 'make: $(PYTHON) is not there: install Python 3.11 or newer' >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "make: $(PYTHON) is" \
		"$$($(PYTHON) --version 2>&1), and scfm_jax needs 3.11 or newer: make PYTHON=python3.11 ..." >&2; exit 1; }
	$(PYTHON) -m venv .venv
	@printf 'installing scfm_jax and what it needs into .venv, once '
	@$(BIN)/python -m pip install --editable '.[test]' | { while read -r word rest; do case $$word in \
		Collecting|Downloading) printf .;; Installing) printf ' unpacking ';; Successfully) done=yes;; esac; done; \
		[ "$$done" ] && echo 'done'; }
	@touch $@
