# Needs python3 and make, and g++ for the native module; everything else comes from pip into .venv.
PYTHON ?= python3
SHELL := bash
.SHELLFLAGS := -euo pipefail -c

# Also what build isolation installs is pinned (pip from 25.3 on reads the second variable for that).
export PIP_CONSTRAINT := $(CURDIR)/constraints.txt
export PIP_BUILD_CONSTRAINT := $(PIP_CONSTRAINT)

STAMP := .venv/.installed
SOURCES := $(shell find csrc -type f)

.PHONY: demo test bench lint clean

demo: $(STAMP)
	.venv/bin/pecker-fast demo --output_dir runs/demo

test: $(STAMP)
	.venv/bin/python -m pytest -q

bench: $(STAMP)
	.venv/bin/python -m pytest benchmarks/ --benchmark-only

lint: $(STAMP)
	.venv/bin/ruff check
	.venv/bin/ruff format --check
	.venv/bin/mypy

$(STAMP): pyproject.toml setup.py CMakeLists.txt constraints.txt $(SOURCES)
	test -x .venv/bin/python || $(PYTHON) -m venv .venv
	@echo "Installing pecker_fast and what it needs into .venv (some minutes the first time)"
	@.venv/bin/python -m pip install --progress-bar off -e '.[demo,dev]' \
	  | sed -un -E '/^ *(Downloading .*[MG]B|Building editable|Installing)/{s/(.{100}).*/\1.../;p}'
	@touch $@

clean:
	rm -rf .venv build dist *.egg-info pecker_fast/_C*.so
