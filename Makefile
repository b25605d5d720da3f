# Needs python3 and make, and g++ for the native module; everything else comes from pip into .venv.
PYTHON ?= python3
SHELL := bash
.SHELLFLAGS := -euo pipefail -c

# Also what build isolation installs is pinned (pip from 25.3 on reads the second variable for that).
export PIP_CONSTRAINT := $(CURDIR)/constraints.txt
export PIP_BUILD_CONSTRAINT := $(PIP_CONSTRAINT)

STAMP := .venv/.installed
SOURCES := $(shell find csrc -type f)

.PHONY: demo test soak bench lint sanitize clean

demo: $(STAMP)
	.venv/bin/pecker-fast demo --output_dir runs/demo --overwrite

# Files are shared out in their order: those with few tests, which would come last otherwise, are the longest.
test: $(STAMP)
	.venv/bin/python -m pytest -q -n logical --dist loadfile --no-loadscope-reorder

# A training is killed at any moment, again and again, and must end as one that never was.
KILLS ?= 200
soak: $(STAMP)
	OMP_NUM_THREADS=1 .venv/bin/python tests/soak.py --kills $(KILLS)

bench: $(STAMP)
	.venv/bin/python -m pytest benchmarks/ --benchmark-only

lint: $(STAMP)
	.venv/bin/ruff check
	.venv/bin/ruff format --check
	.venv/bin/mypy

# A copy of the package with a sanitized native module; ours stays as it is. Python itself is not sanitized, so
# the runtimes are loaded before it, and libstdc++ with them so that they see its exceptions.
SANITIZED := build/sanitized
sanitize: $(STAMP)
	.venv/bin/python -m pip install --quiet cmake ninja pybind11
	rm -rf $(SANITIZED)
	mkdir -p $(SANITIZED)
	cp -r pecker_fast $(SANITIZED)/ && cp -r kernels $(SANITIZED)/pecker_fast/ && rm -f $(SANITIZED)/pecker_fast/_C*.so
	.venv/bin/cmake -S . -B build/sanitize -G Ninja -DPECKER_FAST_SANITIZE=ON -DCMAKE_CXX_COMPILER=g++ \
	  -DCMAKE_MAKE_PROGRAM=$(CURDIR)/.venv/bin/ninja -DPython_EXECUTABLE=$(CURDIR)/.venv/bin/python \
	  -Dpybind11_DIR=$$(.venv/bin/python -m pybind11 --cmakedir) \
	  -DCMAKE_LIBRARY_OUTPUT_DIRECTORY=$(CURDIR)/$(SANITIZED)/pecker_fast
	.venv/bin/cmake --build build/sanitize
	LD_PRELOAD="$$(g++ -print-file-name=libasan.so) $$(g++ -print-file-name=libubsan.so) $$(g++ -print-file-name=libstdc++.so)" \
	ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=halt_on_error=1:print_stacktrace=1 \
	PYTHONPATH=$(CURDIR)/$(SANITIZED) PECKER_FAST_SANITIZED=1 \
	  .venv/bin/pytest -q tests/test_sanitizers.py tests/test_native.py tests/ops

$(STAMP): pyproject.toml setup.py CMakeLists.txt constraints.txt $(SOURCES)
	test -x .venv/bin/python || $(PYTHON) -m venv .venv
	@echo "Installing pecker_fast and what it needs into .venv (some minutes the first time)"
	@.venv/bin/python -m pip install --progress-bar off -e '.[demo,dev]' \
	  | sed -un -E '/^ *(Downloading .*[MG]B|Building editable|Installing)/{s/(.{100}).*/\1.../;p}'
	@touch $@

clean:
	rm -rf .venv build dist *.egg-info pecker_fast/_C*.so
