# A few verbs; each builds what it needs. `make` alone prints them.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
# `make UV=uv ...` installs with uv in place of pip.
UV     ?=
install_into = $(if $(UV),$(UV) pip install --quiet --python $(1)/python,$(1)/python -m pip install --quiet --disable-pip-version-check)

.PHONY: help install demo test test-cluster check docs site check-docs wheel test-elsewhere test-lowest test-newest audit picture clean

help:
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 13

$(VENV)/.run: pyproject.toml
	@test -x $(BIN)/python || $(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "kdlora needs Python 3.11 or newer: make PYTHON=python3.12 ...")'
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV) || { rm -rf $(BIN); exit 1; }
	$(call install_into,$(BIN)) -e ".[train]"
	@touch $@

$(VENV)/.dev: pyproject.toml $(VENV)/.run
	$(call install_into,$(BIN)) -e ".[dev,docs]"
	@touch $@

install: $(VENV)/.dev  ## build .venv with everything that development needs

demo: $(VENV)/.run  ## distil a real encoder on real film reviews, print the table, name the report
	$(BIN)/kdlora demo

test: $(VENV)/.dev  ## everything the tests need, then the tests
	$(BIN)/python -m pytest -n auto --dist loadfile --no-loadscope-reorder

test-cluster: $(VENV)/.dev  ## the tests that start several processes, or a Ray cluster, on this machine
	$(BIN)/python -m pytest -m cluster tests/suites tests/experiment

test-elsewhere: $(VENV)/.dev  ## a part of the tests without what only Linux has, as on macOS or Windows
	@mkdir -p build
	PYTHONPATH=tests/guard KDLORA_TESTS_SYSTEM=another $(BIN)/python -m pytest -m 'not docs and not cluster' -n auto --dist loadfile --basetemp build/elsewhere $$(cat tests/elsewhere.txt)

check: $(VENV)/.dev  ## lint, format, types, import layers, the documentation site
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest tests/test_import_layers.py
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict

docs: $(VENV)/.dev  ## write the pages that are generated from the code
	$(BIN)/python docs/generate.py

site: $(VENV)/.dev  ## build the documentation site into build/site, and serve it
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs serve

check-docs: $(VENV)/.dev  ## check the words of the documentation; run its commands, snippets, examples and notebooks
	$(BIN)/python docs/readability.py
	$(BIN)/python -m pytest -m docs -n auto tests/docs

picture: $(VENV)/.dev  ## draw the README's picture anew, from the demo's records
	$(BIN)/python docs/picture.py runs/demo docs/images/demo.svg

wheel: $(VENV)/.dev  ## build wheel and source archive, check them, try the wheel in empty environments, light and full
	rm -rf dist build/wheel-full build/wheel-light build/wheel-run
	$(BIN)/python -m build --outdir dist .
	$(BIN)/twine check --strict dist/*
	$(PYTHON) -m venv build/wheel-full
	$(call install_into,build/wheel-full/bin) "$$(ls dist/*.whl)[train]"
	cd build && wheel-full/bin/python ../tests/wheel_smoke.py full wheel-run
	$(PYTHON) -m venv build/wheel-light
	$(call install_into,build/wheel-light/bin) "$$(ls dist/*.whl)"
	cd build && wheel-light/bin/python ../tests/wheel_smoke.py light wheel-run

test-lowest: pyproject.toml  ## a part of the tests with the lowest allowed version of every package
	$(PYTHON) tests/versions.py lowest build/lowest

test-newest: pyproject.toml  ## the same with the newest that the package index has
	$(PYTHON) tests/versions.py newest build/newest

audit: $(VENV)/.dev  ## known vulnerabilities of the lowest allowed versions and of the installed ones; asks the package index
	@mkdir -p build
	$(call install_into,$(BIN)) pip-audit
	$(PYTHON) tests/versions.py bounds > build/lowest.txt
	$(BIN)/pip-audit --no-deps --disable-pip --requirement build/lowest.txt
	$(BIN)/pip-audit --skip-editable

clean:  ## remove the environment and the caches
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache build dist
