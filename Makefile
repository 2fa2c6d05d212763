# Thin: each target calls a script or the package. `make` lists them.
SHELL  := /bin/bash
CORE   := .venv/core/bin
PYTEST := $(CORE)/python -m pytest
# Two modules of tests at a time, as most wait for Nextflow, a container or a lock; no more, for memory. In the order of the
# folders, so that long runs of the pipeline come before what is short.
PAIRED := -n 2 --dist loadfile --no-loadscope-reorder
CODE   := python/src tests bin

.DEFAULT_GOAL := help
.PHONY: help setup demo run test test-fast test-faults check-baysor bench showdown lint format generate images docs clean

help: ## List the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' Makefile

setup: ## Make the environments and find Nextflow (STAGES="core cellpose4" for some)
	@scripts/setup.sh $(STAGES)

demo: STAGES = core cellpose3 domains nextflow
demo: setup ## Run the pipeline on the demo input and show what came out
	@scripts/demo.sh

run: setup ## Run the pipeline: make run ARGS="--input sheet.csv --outdir results"
	@scripts/nextflow run main.nf $(ARGS)

# Tests of what cannot be set up (proseg where there is no cargo) are skipped and say so.
test: STAGES = core cellpose3 cellpose4 stardist domains nextflow $(shell command -v cargo >/dev/null && echo proseg)
test: setup lint ## What CI runs: lint, types, layers, all tests
	$(PYTEST) $(PAIRED) -m "not bench" tests $(ARGS)
	.venv/domains/bin/python -m pytest $(PAIRED) -m "not bench" tests/domains $(ARGS)

test-fast: setup ## Tests that take under two minutes together
	$(PYTEST) -m "not bench and not slow" tests/unit $(ARGS)

test-faults: STAGES = core nextflow
test-faults: setup ## Every fault of docs/faults.md, whose table it writes; as root, with a real Slurm (ARGS="-k disk" for some)
	CELLQUILT_RECORD_FAULTS=1 $(PYTEST) -rs -m faults tests/faults $(ARGS)

check-novae: ## A novae checkpoint against novae itself: PYTHON=/path/to/python (with novae 1.1.2) WEIGHTS=folder
	cd tests && PYTHONPATH=../python/src CELLQUILT_NOVAE_WEIGHTS=$(abspath $(WEIGHTS)) $(PYTHON) -m pytest -rs -p no:cacheprovider domains/test_equal_to_novae.py -k live $(ARGS)

check-baysor: setup ## Baysor's contract against a real one: on PATH, or through Julia in the environment of PYTHON=/path/to/python
	CELLQUILT_REAL_BAYSOR=1 $(or $(PYTHON),$(CORE)/python) -m pytest -rs tests/contract/test_baysor.py $(ARGS)

bench: setup ## Benchmarks, side by side with Sopa: make bench PEER=/path/to/python ARGS="--cases 'resolve-*'"
	$(CORE)/python tests/benchmarks/compare.py $(if $(PEER),--peer $(PEER)) $(ARGS)

showdown: STAGES = core cellpose3 domains nextflow
showdown: setup ## The same slide through ours and Sopa, killed and resumed: make showdown PEER=/path/to/python NOVAE=/path/to/python SIZE=small|full
	$(CORE)/python tests/benchmarks/showdown.py --size $(or $(SIZE),small) $(if $(PEER),--peer $(PEER)) $(if $(NOVAE),--novae $(NOVAE)) $(ARGS)

lint: setup ## Style, types and the order of the layers
	$(CORE)/ruff check --config python/pyproject.toml $(CODE)
	$(CORE)/ruff format --check --config python/pyproject.toml $(CODE)
	cd python && ../$(CORE)/mypy
	cd python && ../$(CORE)/lint-imports

images: setup ## Build and try the container images (IMAGES="core cellpose4" for some)
	@scripts/images.sh $(IMAGES)

docs: STAGES = core
docs: setup ## Build the documentation as a site, strictly: missing pages and links to nowhere are errors
	@scripts/docs.sh $(ARGS)

format: setup ## Format the code and mend what can be mended
	$(CORE)/ruff check --fix --config python/pyproject.toml $(CODE)
	$(CORE)/ruff format --config python/pyproject.toml $(CODE)

generate: setup ## Write the schemas, parameter defaults and parameter page from the table of settings
	$(CORE)/python -m cellquilt.core.schema .

clean: ## Remove what runs and tests leave behind (environments and results stay)
	rm -rf .nextflow .nextflow.log* work demo-results site .pytest_cache .ruff_cache .mypy_cache .hypothesis
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +
