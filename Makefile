# The two commands that set everything up: `make demo` and `make test`. `make help` lists the rest.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# CI installs the exact versions that were tested; everybody else gets the newest that fit.
CONSTRAINT := $(if $(CI),--constraint constraints.txt,)
# A process per core, at most four (each takes about 2 GB); a file's tests stay in one process,
# which makes what they share once. One after another, as under a debugger: PARALLEL=
PARALLEL ?= -n logical --maxprocesses 4 --dist loadfile --no-loadscope-reorder
# Folders of wheels for `make gpu`, separated by spaces; `make gpu-wheels` fills the first of them.
WHEELS ?=
GPU_ARGUMENTS ?=

.DEFAULT_GOAL := help
.PHONY: help demo test test-slow test-portable check docs docs-serve format env gpu gpu-wheels clean

help: ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/\1|\2/p' $(MAKEFILE_LIST) | while IFS='|' read -r name text; do \
	  printf '  make %-14s %s\n' "$$name" "$$text"; done

env: $(VENV)/.installed ## make the environment that the other targets use

$(VENV)/.installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { \
	  echo "error: clipsys needs Python 3.10 or later; $(PYTHON) is older. Try: make $(MAKECMDGOALS) PYTHON=python3.11"; exit 1; }
	$(PYTHON) -m venv $(VENV) || { \
	  echo "error: this Python cannot make environments; on Debian or Ubuntu: apt-get install python3-venv"; exit 1; }
	$(BIN)/python -m pip install --quiet --upgrade pip
	@echo "Installing clipsys and its libraries (about 7 GB with CUDA, some minutes) ..."
	$(BIN)/python -m pip install --quiet $(CONSTRAINT) --editable '.[dev]'
	@touch $@

demo: env ## train, measure and search a sample corpus, then serve the app (DEMO_UI=0: without)
	$(BIN)/clipsys demo $(if $(filter 0,$(DEMO_UI)),--no-ui,)

test: env ## run the tests that take minutes (PARALLEL=: one after another)
	$(BIN)/python -m pytest $(PARALLEL)

test-slow: env ## run all tests
	$(BIN)/python -m pytest $(PARALLEL) -m 'slow or not slow' --timeout 1800

test-portable: env ## run the tests that need neither several processes nor a browser
	$(BIN)/python -m pytest tests/clipsys tests/retrieval/search tests/retrieval/storage \
	  -m 'not slow and not browser' $(PARALLEL)

check: env docs ## check format, lint, types and documentation; run the tests with coverage
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python -m pytest $(PARALLEL) --cov --cov-report=term

docs: env ## build the documentation into site/, strictly; open site/index.html
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict

docs-serve: env ## serve the documentation, and build it again when a page changes
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs serve

format: env ## bring the code into the one format
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

gpu: ## measure on one NVIDIA GPU, without a network, in ten minutes (WHEELS=DIR: what it lacks)
	$(PYTHON) benchmarks/gpu.py $(if $(WHEELS),--wheels $(WHEELS),) $(GPU_ARGUMENTS)

gpu-wheels: ## collect in gpu-wheels/ what a machine for `make gpu` may lack
	$(PYTHON) benchmarks/gpu_wheels.py $(GPU_ARGUMENTS)

clean: ## delete the environment and everything that was built
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .coverage* demo-output \
	  site gpu-wheels gpu-wheels-faiss
