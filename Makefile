PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet --constraint constraints.txt

.DEFAULT_GOAL := help
.PHONY: help demo test lint bench clean

help:
	@echo "make demo    train a small network, compress it and show what came out"
	@echo "make test    the tests"
	@echo "make lint    ruff, mypy --strict and the import contracts"
	@echo "make bench   the benchmarks, which need a quiet machine"
	@echo "make clean   remove everything that these commands made"

demo: $(VENV)/core.stamp
	@$(BIN)/python examples/demo.py

test: $(VENV)/dev.stamp
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 $(ARGS)

lint: $(VENV)/dev.stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: $(VENV)/bench.stamp
	@for name in limits zoo cifar_ptq zoo_latency trained quant_fragile predictor explain gate memory tune_mode reparam lowrank activations gpu; do \
		echo "benchmarks/$$name.py"; $(BIN)/python -W ignore -m benchmarks.$$name || exit 1; done
	$(BIN)/python -W ignore -m benchmarks.zoo_latency --throughput
	ONEDNN_MAX_CPU_ISA=AVX2 $(BIN)/python -W ignore -m benchmarks.zoo_latency --name zoo_latency_avx2

clean:
	rm -rf $(VENV) build dist demo .mypy_cache .pytest_cache .ruff_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(VENV)/core.stamp: pyproject.toml constraints.txt
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "Installing hwcompress into $(VENV)"
	@$(PIP) --editable ".[openvino]" scikit-learn
	@touch $@

$(VENV)/bench.stamp: $(VENV)/dev.stamp
	@echo "Installing what the benchmarks compare with into $(VENV)"
	@$(PIP) --editable ".[nncf]" huggingface_hub
	@$(PIP) --no-deps torchvision timm
	@touch $@

$(VENV)/dev.stamp: $(VENV)/core.stamp
	@echo "Installing what the tests need into $(VENV)"
	@$(PIP) --editable ".[dev,openvino,executorch]"
	@touch $@
