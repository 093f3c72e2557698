# make demo and make test work on a fresh clone with python3.11+, a C++ compiler and pip.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
JOBS ?= 2
STAMP := $(VENV)/.qlformat-installed
KERNELS := $(shell find kernels -type f)
PYSOURCES := qlformat cli tests tools benchmarks spec
CXXSOURCES := $(shell find kernels spec/kit -name '*.cpp' -o -name '*.h' -o -name '*.c' -o -name '*.cu' -o -name '*.cuh')

.PHONY: help demo test lint types format bench gpu-check clean
.DEFAULT_GOAL := help

help: ## List the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 10

$(STAMP): pyproject.toml constraints.txt $(KERNELS)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "found Python %d.%d, needed 3.11 or newer: make PYTHON=python3.12" % sys.version_info[:2])'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q -c constraints.txt torch scikit-build-core cmake ninja
	$(BIN)/python -m pip install -q -c constraints.txt --no-build-isolation -e '.[test]'
	@touch $@

demo: $(STAMP) ## Convert a real model, verify it, let plain transformers answer with it, and fine-tune it
	$(BIN)/python tools/demo.py

test: $(STAMP) ## Run every test, JOBS at a time
	$(BIN)/python -m pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder

$(VENV)/.qlformat-lint: $(STAMP)
	$(BIN)/python -m pip install -q -c constraints.txt ruff mypy clang-format
	@touch $@

lint: $(VENV)/.qlformat-lint ## Check style: ruff and clang-format
	$(BIN)/ruff check $(PYSOURCES)
	$(BIN)/ruff format --check $(PYSOURCES)
	$(BIN)/clang-format --dry-run -Werror $(CXXSOURCES)

types: $(VENV)/.qlformat-lint ## Check types: mypy --strict
	$(BIN)/mypy

format: $(VENV)/.qlformat-lint ## Rewrite the sources in the project's style
	$(BIN)/ruff check --fix $(PYSOURCES)
	$(BIN)/ruff format $(PYSOURCES)
	$(BIN)/clang-format -i $(CXXSOURCES)

bench: $(STAMP) ## Measure against bitsandbytes and transformers; takes about an hour and 14 GB of disk
	$(BIN)/python benchmarks/bench_kernels.py
	$(BIN)/python benchmarks/bench_startup.py
	$(BIN)/python benchmarks/bench_load.py --cleanup
	$(BIN)/python benchmarks/bench_load_model.py --cleanup
	$(BIN)/python benchmarks/bench_finetune.py --cleanup
	$(BIN)/python benchmarks/bench_initialization.py
	$(BIN)/python benchmarks/bench_merge.py
	$(BIN)/python benchmarks/bench_push.py
	$(BIN)/python benchmarks/bench_push.py --xet
	$(BIN)/python benchmarks/bench_hub.py
	$(BIN)/python benchmarks/bench_hub.py --stress
	$(BIN)/python benchmarks/bench_convert.py --cleanup

OUT ?= gpu-check.json
gpu-check: ## On a machine with an NVIDIA GPU: test and measure the CUDA kernels, write OUT=gpu-check.json
	$(PYTHON) tools/gpu_check.py --out $(OUT)

clean: ## Remove the virtual environment and what was built
	rm -rf $(VENV) build
