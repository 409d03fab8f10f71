# The two commands that set everything up: `make demo` and `make test`.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# CI installs the exact versions that were tested; everybody else gets the newest that fit.
CONSTRAINT := $(if $(CI),--constraint constraints.txt,)
# A process per core, at most four (each takes about 2 GB); a file's tests stay in one process,
# which makes what they share once. One after another, as under a debugger: PARALLEL=
PARALLEL ?= -n logical --maxprocesses 4 --dist loadfile --no-loadscope-reorder

.PHONY: demo test test-slow check format env clean

env: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { \
	  echo "error: clipsys needs Python 3.10 or later; $(PYTHON) is older. Try: make $(MAKECMDGOALS) PYTHON=python3.11"; exit 1; }
	$(PYTHON) -m venv $(VENV) || { \
	  echo "error: this Python cannot make environments; on Debian or Ubuntu: apt-get install python3-venv"; exit 1; }
	$(BIN)/python -m pip install --quiet --upgrade pip
	@echo "Installing clipsys and its libraries (about 7 GB with CUDA, some minutes) ..."
	$(BIN)/python -m pip install --quiet $(CONSTRAINT) --editable '.[dev]'
	@touch $@

demo: env
	$(BIN)/clipsys demo $(if $(filter 0,$(DEMO_UI)),--no-ui,)

test: env
	$(BIN)/python -m pytest $(PARALLEL)

test-slow: env
	$(BIN)/python -m pytest $(PARALLEL) -m 'slow or not slow' --timeout 1800

check: env
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python -m pytest $(PARALLEL) --cov --cov-report=term

format: env
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .coverage* demo-output
