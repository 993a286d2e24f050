# Each target sets up what it needs, once: a virtual environment with the versions of constraints.txt.
VENV ?= .venv
PYTHON ?= python3
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
DEMO := runs/demo

.PHONY: demo test lint bench clean

demo: $(STAMP) ## train a small VMamba on Fashion-MNIST, test it, show its predictions
	$(BIN)/vmamba train --config configs/fashion_mnist/demo.yaml --overwrite true
	$(BIN)/vmamba validate --checkpoint $(DEMO)/model.safetensors
	$(BIN)/vmamba predict examples/images
	@echo "The model is $(DEMO)/model.safetensors; beside it are predictions.png, confusion_matrix.png, learning_curve.png."

test: $(STAMP) ## the whole test suite
	$(BIN)/python -m pytest

lint: $(STAMP) ## style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(STAMP) ## the learning benchmark: table and plot under benchmarks/results/
	$(BIN)/python benchmarks/learning.py

clean: ## everything that was built, but not runs/
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis

$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --constraint constraints.txt --editable ".[all,dev]"
	touch $@
