# A few verbs; each builds what it needs. `make` alone prints them.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin

.PHONY: help install demo test check docs clean

help:
	@grep -E '^[a-z]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 10

$(VENV)/.run: pyproject.toml
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e ".[onnx]"
	@touch $@

$(VENV)/.dev: pyproject.toml $(VENV)/.run
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e ".[onnx,dev]"
	@touch $@

install: $(VENV)/.dev  ## build .venv with everything that development needs

demo: $(VENV)/.run  ## distil a real encoder on real film reviews, print the table, name the report
	$(BIN)/kdlora demo

test: $(VENV)/.dev  ## everything the tests need, then the tests
	$(BIN)/python -m pytest -n auto --dist loadfile

check: $(VENV)/.dev  ## lint, format, types, import layers
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest tests/test_import_layers.py

docs: $(VENV)/.dev  ## write the pages that are generated from the code
	$(BIN)/python docs/generate.py

clean:  ## remove the environment and the caches
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache build dist
