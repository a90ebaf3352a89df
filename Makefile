# Everything from a fresh machine with python3 (and its venv module), g++ and make: see `make help`.
#
# Nothing is run from the source folder fastbn/, which has no built extension: it would shadow the installed
# package. So scripts are started by their path, and pytest from within tests/, never as `python -m` from here.

PYTHON ?= python3
# What pip installs where $(PYTHON) has no torch of its own; options of pip may follow the name.
TORCH ?= torch==2.13.0
VENV := .venv
PACKAGES := numpy pybind11 pytest hypothesis expecttest setuptools wheel scikit-learn rich
# Formatters are pinned, because another version formats differently. These three go into the environment even
# where $(PYTHON) has them, so that their programs are found in it.
TOOLS := ninja ruff==0.17.6 clang-format==23.1.5
# Which tests `make asan` runs, and whatever else pytest takes.
ASAN_TESTS ?= -m sanitize
BENCH_ARGUMENTS ?=

BIN := $(CURDIR)/$(VENV)/bin
PY := $(BIN)/python
SITE := $(CURDIR)/build/asan/lib
CXX ?= g++
# Folders too: their time changes when a file is added or removed.
SOURCES := $(shell find csrc fastbn -not -path '*/__pycache__*') setup.py pyproject.toml
C_SOURCES := $(filter %.h %.cpp %.cuh %.cu,$(SOURCES))
SAY := @printf '\n==> %s\n'

# If $(PYTHON) is a virtual environment, one made from it does not see its packages until it is told where.
PRINT_SITE := 'import torch, pathlib; print(pathlib.Path(torch.__file__).parents[1])'
PRINT_PURELIB := 'import sysconfig; print(sysconfig.get_path("purelib"))'

# For what looks up programs, such as ninja, by itself. Not for all: $(PYTHON) must not become $(VENV)'s.
IN_VENV := PATH="$(BIN):$$PATH"

export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: help venv build test test-slow lint includes format bench asan sdist clean distclean
.DELETE_ON_ERROR:
.NOTPARALLEL:

help:
	@echo "make bench      time fastbn against torch (about 5 minutes), then train a small network with both"
	@echo "make test       lint, include check, and the tests that are not slow"
	@echo "make test-slow  the slow tests"
	@echo "make asan       the CPU kernels' tests under AddressSanitizer and UndefinedBehaviorSanitizer"
	@echo "make build      install fastbn into $(VENV), which every target above does when sources changed"
	@echo "make venv       make $(VENV) with torch and the tools"
	@echo "make lint       ruff, clang-format, include check; make format applies the first two"
	@echo "make sdist      a source distribution, in dist/"
	@echo "make clean      remove what was built; make distclean removes $(VENV) as well"
	@echo
	@echo "PYTHON=$(PYTHON) chooses the interpreter; its torch is used if it has one, otherwise $(TORCH)"

venv: $(VENV)/.packages
build: $(VENV)/.built

$(VENV)/.packages: Makefile
	$(SAY) "environment in $(VENV), with $$($(PYTHON) --version)"
	@if test -x $(PY); then \
	    echo "it is there already"; \
	elif $(PYTHON) -c 'import torch' 2>/dev/null; then \
	    echo "using the torch that $(PYTHON) has"; \
	    $(PYTHON) -m venv --system-site-packages $(VENV); \
	    $(PY) -c 'import torch' 2>/dev/null || $(PYTHON) -c $(PRINT_SITE) > "$$($(PY) -c $(PRINT_PURELIB))/chosen.pth"; \
	else \
	    $(PYTHON) -m venv $(VENV); \
	fi
	@$(PY) -c 'import torch' 2>/dev/null || { \
	    printf '\n==> %s\n' "installing $(TORCH): a long download the first time"; \
	    $(PY) -m pip install $(TORCH); \
	}
	$(SAY) "installing the tools"
	$(PY) -m pip install --quiet $(PACKAGES)
	$(PY) -m pip install --quiet --force-reinstall --no-deps $(TOOLS)
	@touch $@

$(VENV)/.built: $(VENV)/.packages $(SOURCES)
	$(SAY) "building fastbn and installing it: up to two minutes on two cores"
	@rm -rf build/lib* build/bdist*
	$(IN_VENV) $(PY) -m pip install --no-build-isolation --no-deps --force-reinstall .
	@touch $@

test: lint build
	$(SAY) "tests"
	cd tests && $(IN_VENV) $(PY) -m pytest -m "not slow"

test-slow: build
	$(SAY) "slow tests"
	cd tests && $(IN_VENV) $(PY) -m pytest -m slow

lint: venv includes
	$(SAY) "lint"
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $(C_SOURCES)

includes: venv
	$(SAY) "include rules"
	$(PY) tests/check_includes.py

format: venv
	$(BIN)/ruff check --fix-only .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(C_SOURCES)

bench: build
	$(SAY) "benchmark against torch"
	$(PY) benchmarks/run.py $(BENCH_ARGUMENTS)
	$(SAY) "training a small network"
	$(PY) benchmarks/digits.py

# A second build beside the installed one, found first through PYTHONPATH. Python itself knows nothing of the
# sanitizers, so their libraries are loaded before it; libstdc++ too, or they miss its exceptions. Python's own
# leaks are not ours.
asan: venv
	$(SAY) "building fastbn with sanitizers"
	$(IN_VENV) FASTBN_SANITIZE=1 $(PY) setup.py --quiet build --build-base build/asan --build-lib $(SITE)
	$(SAY) "tests under the sanitizers"
	cd tests && $(IN_VENV) PYTHONPATH=$(SITE) \
	    LD_PRELOAD="$(foreach name,asan ubsan stdc++,$(shell $(CXX) -print-file-name=lib$(name).so))" \
	    ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=halt_on_error=1:print_stacktrace=1 \
	    $(PY) -m pytest -p no:cacheprovider $(ASAN_TESTS)

sdist: venv
	$(SAY) "source distribution"
	$(PY) setup.py --quiet sdist
	@ls -l dist

clean:
	rm -rf build dist *.egg-info $(VENV)/.built

distclean: clean
	rm -rf $(VENV)
