# make demo: everything from made-up clips to a generated GIF.  make test: all checks.  Both set themselves up in .venv.
SHELL := /bin/bash
.DEFAULT_GOAL := help
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.t2v-installed
PYTEST_ARGS ?=

.PHONY: help setup demo test lint clean

help:
	@echo "make demo   set up .venv, train the demo's models and draw a GIF (runs/demo)"
	@echo "make test   set up .venv, then ruff, mypy and pytest (PYTEST_ARGS='tests/unit -k order')"
	@echo "make setup  only create .venv and install; make lint: only ruff and mypy; make clean: remove build leftovers"

setup: $(STAMP)

# The stamp is written last, so that an installation that was interrupted is taken up again.
$(STAMP): setup.py pyproject.toml constraints.txt
	@python="$${PYTHON:-$$(command -v python3.11 || command -v python3)}"; \
	if ! "$$python" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' 2>/dev/null; then \
		python=$$(command -v python3 || true); \
	fi; \
	if [ -z "$$python" ] || ! "$$python" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' 2>/dev/null; then \
		echo "Python 3.11 is needed, and neither python3.11 nor python3 is one; name it: make setup PYTHON=/path/to/python3.11" >&2; exit 1; \
	fi; \
	if [ ! -x $(BIN)/python ]; then echo "creating $(VENV) with $$python"; "$$python" -m venv $(VENV); fi
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

demo: setup
	$(BIN)/t2v demo

lint: setup
	$(BIN)/ruff check .
	$(BIN)/mypy

test: lint
	$(BIN)/python -m pytest -q -n logical --maxprocesses 4 --dist loadgroup --no-loadscope-reorder $(PYTEST_ARGS)

clean:
	rm -rf build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache
	find . -name __pycache__ -type d -not -path './$(VENV)/*' -prune -exec rm -rf {} +
