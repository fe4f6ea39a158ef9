# Every target first installs what it needs into .venv; a second call finds the stamps and starts at once.
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
PIN := -c constraints.txt
# Of the tests: a core each, and at most 4, since each holds some 2 GB.
WORKERS ?= logical --maxprocesses 4

# The first interpreter that is new enough; `make PYTHON=/path/to/python3.12 ...` chooses another.
ifndef PYTHON
PYTHON := $(shell for p in python3 python3.14 python3.13 python3.12 python3.11 python; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1 && { echo $$p; break; }; done)
endif

.PHONY: help demo test test-fast faults bench reproduce ablations check nano install clean
.DELETE_ON_ERROR:

help:
	@echo "make demo    train the embedded pipeline end to end and show what it learned (no GPU needed)"
	@echo "make test    run the tests (no GPU needed)"
	@echo "make test-fast  those that start no process and train nothing (under 2 minutes)"
	@echo "make faults  break the program on purpose, one fault at a time, and see that a test notices (under 20 minutes on 2 cores)"
	@echo "make bench   measure against the published step and its stronger variants, into runs/bench (no GPU needed)"
	@echo "make reproduce  the paper's comparison on the embedded pipeline (under an hour on 2 cores; resumes)"
	@echo "make ablations  the same with the paper's ablations (over an hour more; resumes)"
	@echo "make check   ruff and mypy"
	@echo "make nano    build the embedded pipeline anew (an hour or two on 2 cores; resumes)"
	@echo "make clean   remove the environment and what was built"

demo: install
	$(BIN)/deepspeed dopsd_fast/train.py
	$(BIN)/python -m dopsd_fast.nano.report

test: install
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder

test-fast: install
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --fast

faults: install
	$(BIN)/python tests/faults/run.py

bench: install
	$(BIN)/python bench/run.py --out runs/bench

reproduce: install
	$(BIN)/python bench/run.py reproduce --out runs/reproduce

ablations: install
	$(BIN)/python bench/run.py reproduce --ablations --out runs/reproduce

check: install
	$(BIN)/ruff check .
	$(BIN)/mypy

nano: install
	$(BIN)/python -m dopsd_fast.nano.build

install: $(VENV)/.installed

# The interpreter, and the tools that build packages.
$(VENV)/.tools: constraints.txt
	@test -n "$(PYTHON)" || { echo "Python 3.11 or newer was not found. Install it, or name it: make PYTHON=/path/to/python3.12" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "$(PYTHON) is not Python 3.11 or newer. Name one that is: make PYTHON=/path/to/python3.12" >&2; exit 1; }
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv $(VENV) \
		|| { rm -rf $(VENV); echo "$(PYTHON) could not make an environment. On Debian and Ubuntu: apt-get install python3-venv python3-dev" >&2; exit 1; }
	$(PIP) install -q $(PIN) setuptools wheel scikit-build-core nanobind cmake ninja
	@touch $@

# torch comes first, by its exact version: deepspeed's own set-up looks at it.
$(VENV)/.torch: $(VENV)/.tools
	$(PIP) install -q $(PIN) torch
	@touch $@

# Editable: the Python files are used from here, only the native module is built into the environment.
$(VENV)/.installed: $(VENV)/.torch pyproject.toml CMakeLists.txt $(wildcard kernels/dopsd_kernels/csrc/*)
	@command -v c++ >/dev/null || command -v g++ >/dev/null || command -v clang++ >/dev/null \
		|| { echo "A C++ compiler was not found. On Debian and Ubuntu: apt-get install g++" >&2; exit 1; }
	$(PIP) install -q $(PIN) --no-build-isolation -e '.[test,bench]'
	@touch $@

clean:
	rm -rf $(VENV) build dist .pytest_cache .ruff_cache .mypy_cache
