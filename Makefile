# Needs make, sh and a Python 3.11 or newer; everything else is installed into .venv.

.SUFFIXES:
.DEFAULT_GOAL := help
.PHONY: help setup demo test test-fast test-slow test-browser test-newest test-extras test-all crash soak fuzz mutate bench gpu lint docs wheel tflite clean-environment
.NOTPARALLEL: # two test runs at once would share the cores

PYTHON ?= python3
QUICK ?=
SMALL ?=
ARGS ?=
DURATIONS ?=
DUE ?=
N ?= 2000
MINUTES ?= 60
MUTANTS ?= 200
SEED ?= 0
IN_ENVIRONMENT = .venv/bin/python
FAST_TESTS = -m pytest -q -n auto --dist loadfile --no-loadscope-reorder

# The folder goes to the shell as a variable, word for word, so that spaces and dollar signs survive.
export DEMO_DATA := $(value DATA)
# Otherwise make exports what its command line sets, and runs `$(shell ...)` in it, such as in a folder's name, on the way.
unexport DATA PYTHON QUICK SMALL ARGS DURATIONS DUE N MINUTES MUTANTS SEED

help: ## list the verbs (the default)
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-18s %s\n", $$1, $$2 }' Makefile
	@echo
	@echo '  make demo QUICK=1                   the smaller demo, for a first look'
	@echo '  make demo DATA="/path/to/my leaves" your own photographs: a folder of class folders, or a CSV manifest'
	@echo '  make demo DATA=... SMALL=1          with small networks beside the pretrained ones'
	@echo '  make test ARGS="-k export"          further arguments for pytest or for the demo'
	@echo '  make setup PYTHON=python3.12        another interpreter (after make clean-environment)'

setup: ## make .venv and install requirements.txt; does nothing when that is done
	@$(PYTHON) scripts/environment.py

demo: setup ## train, combine and compare networks, from nothing to a report
	@$(IN_ENVIRONMENT) ensemble_orchestrator.py demo $(if $(filter-out 0,$(QUICK)),--quick) \
		$(if $(filter-out 0,$(SMALL)),--small) $${DEMO_DATA:+--data} $${DEMO_DATA:+"$$DEMO_DATA"} $(ARGS)

test: setup ## run the fast tests; DURATIONS=1 prints the slowest
	@$(IN_ENVIRONMENT) $(FAST_TESTS) $(if $(filter-out 0,$(DURATIONS)),--durations=100) $(ARGS)

test-fast: setup ## run the tests of functions alone, for the time between two edits
	@$(IN_ENVIRONMENT) $(FAST_TESTS) -m "not slow and not browser and not costly" tests/numeric tests/combiners tests/core $(ARGS)

test-slow: setup ## run the slow tests
	@$(IN_ENVIRONMENT) -m pytest -q -m slow $(ARGS)

test-browser: setup ## open the report in Chromium, which is installed first where apt or npm can do so
	@scripts/chromium.sh
	@$(IN_ENVIRONMENT) -m pytest -q -rs -m browser $(ARGS)

test-newest: ## run the fast tests in .venv-newest, with the newest Python here and today's releases
	@$(PYTHON) scripts/environment.py --newest --environment .venv-newest
	@.venv-newest/bin/python $(FAST_TESTS) $(ARGS)

test-extras: setup ## run the tests of Ray and TFLite in environments that have them; DUE=1: unless they passed this week
	@$(IN_ENVIRONMENT) tests/extras/run.py $(if $(filter-out 0,$(DUE)),--due) $(ARGS)

test-all: test test-slow test-browser test-newest test-extras ## run fast, slow and browser tests, then test-newest and test-extras

crash: setup ## kill commands at eighty-four random moments and at every write, and compare how they end
	@KILLS=48 STRIDE=1 OMP_NUM_THREADS=1 $(IN_ENVIRONMENT) -m pytest -v -rP -n 2 --dist load -m '' tests/crash $(ARGS)

soak: setup ## random commands, kills and changes on one workspace, for an hour or MINUTES
	@$(IN_ENVIRONMENT) tests/soak/run.py --minutes $(MINUTES) --seed $(SEED)

fuzz: setup ## feed hostile files to every reader; N=100000 for more of them
	@$(IN_ENVIRONMENT) tests/fuzz/run.py $(N) $(SEED)

mutate: setup ## patch 200 (MUTANTS) small defects into a copy and count those that no test notices
	@$(IN_ENVIRONMENT) tests/mutants/run.py --count $(MUTANTS) --seed $(SEED)

bench: setup ## run all benchmarks (two hours and more) and print one table of goals
	@$(IN_ENVIRONMENT) benchmarks/all.py $(if $(filter-out 0,$(QUICK)),--quick) $(ARGS)

gpu: setup ## on a machine with a CUDA device: run the tests that need one and print the table of benchmarks/gpu.py
	@$(IN_ENVIRONMENT) -m pytest -q -rs -m gpu; tests=$$?; \
		$(IN_ENVIRONMENT) benchmarks/gpu.py $(if $(filter-out 0,$(QUICK)),--quick) $(ARGS) && exit $$tests

lint: setup ## check style, layers of packages, unused code and types
	@$(IN_ENVIRONMENT) -m ruff check .
	@$(IN_ENVIRONMENT) -m ruff format --check .
	@.venv/bin/lint-imports --no-logo
	@$(IN_ENVIRONMENT) -m vulture
	@$(IN_ENVIRONMENT) -m mypy utils ensemble_system ensemble_orchestrator.py
	@cd BASE-BACK/src && ../../$(IN_ENVIRONMENT) -m mypy --config-file ../../pyproject.toml .

docs: setup ## build the documentation as a site in docs/_build/html; needs the extra docs
	@$(IN_ENVIRONMENT) -m pip install -q "sphinx>=8.1,<10" "myst-parser>=4.0,<6" "furo>=2024.8,<2027"
	@$(IN_ENVIRONMENT) -m sphinx -q -W --keep-going -b html docs docs/_build/html
	@echo docs/_build/html/index.html

wheel: setup ## build the installable package into dist/
	@$(IN_ENVIRONMENT) -m hatchling build -t wheel

tflite: ## make .venv-tflite with the converter and the interpreters of TFLite files, which export finds
	@$(PYTHON) scripts/environment.py --environment .venv-tflite --requirements scripts/requirements-tflite.txt

clean-environment: ## remove .venv, .venv-newest, .venv-ray, .venv-tflite and .chromium
	rm -rf .venv .venv-newest .venv-ray .venv-tflite .chromium
