# Each target sets up what it needs, once: a virtual environment with the versions of constraints.txt.
VENV ?= .venv
PYTHON ?= python3
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
DEMO := runs/demo
GARMENTS := runs/garments
SANITIZED := build/sanitize/_native.so

.PHONY: demo demo-dense explore test lint docs bench sanitize clean

demo: $(STAMP) ## train a small VMamba on Fashion-MNIST, test it, show its predictions
	$(BIN)/vmamba train --config configs/fashion_mnist/demo.yaml --run $(DEMO) --overwrite true
	$(BIN)/vmamba validate --checkpoint $(DEMO)/model.safetensors
	$(BIN)/vmamba predict examples/images --topk 1 --checkpoint $(DEMO)/model.safetensors
	@echo "The model is $(DEMO)/model.safetensors. Beside it: predictions.png, confusion_matrix.png, learning_curve.png."

# Settings of the two trainings beside those of their recipes, such as SEGMENTATION="--optim.epochs 3".
SEGMENTATION ?=
DETECTION ?=

demo-dense: $(GARMENTS)/classes.txt ## segmentation and detection: train on garments, measure, show what is found
	$(BIN)/vmamba train --config configs/segmentation/garments.yaml --overwrite true $(SEGMENTATION)
	$(BIN)/vmamba validate --checkpoint $(GARMENTS)_segmentation/model.safetensors
	$(BIN)/vmamba train --config configs/coco/garments.yaml --overwrite true $(DETECTION)
	$(BIN)/vmamba validate --checkpoint $(GARMENTS)_detection/model.safetensors
	for task in segmentation detection; do $(BIN)/vmamba predict $(GARMENTS)/images/val/000*.jpg \
	  --checkpoint $(GARMENTS)_$$task/model.safetensors --pictures $(GARMENTS)_$$task || exit; done
	@echo "The models are $(GARMENTS)_*/model.safetensors. Beside them: samples.png, per_class*.png, overlays/ and masks/."

$(GARMENTS)/classes.txt: examples/garments.py | $(STAMP)
	rm -rf $(GARMENTS)
	$(BIN)/python examples/garments.py $(GARMENTS)

explore: $(STAMP) ## a page to look inside the demo's model, which is trained first where there is none
	test -f $(DEMO)/model.safetensors || $(MAKE) demo
	$(BIN)/vmamba explore

test: $(STAMP) ## the whole test suite
	$(BIN)/python -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder --max-worker-restart 0

lint: $(STAMP) ## style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: $(STAMP) ## the documentation as a site, build/docs/index.html; a broken link or reference is an error
	$(BIN)/sphinx-build -W --keep-going -n --quiet -d build/doctrees docs build/docs

bench: $(STAMP) ## the benchmarks of this machine; tables and plots under benchmarks/results/
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/learning.py --seeds 0 1 2 --clock processor
	$(BIN)/python benchmarks/cpu.py
	$(BIN)/python benchmarks/dense_speed.py

sanitize: $(STAMP) $(SANITIZED) ## the CPU kernel's tests under AddressSanitizer and UndefinedBehaviorSanitizer
	LD_PRELOAD="$$(g++ -print-file-name=libasan.so) $$(g++ -print-file-name=libstdc++.so)" \
	  ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 VMAMBA_NATIVE_LIBRARY=$(SANITIZED) \
	  $(BIN)/python -m pytest tests/ops/backends/native -s --numprocesses 2 -k "not memory_of and not forked and not without"

$(SANITIZED): CMakeLists.txt $(wildcard src/vmamba/csrc/*)
	$(PYTHON) -m venv $(VENV)/build && $(VENV)/build/bin/python -m pip install --quiet cmake ninja
	PATH="$(abspath $(VENV))/build/bin:$$PATH" cmake -S . -B build/sanitize -G Ninja \
	  -DVMAMBA_SANITIZE=ON -DCMAKE_BUILD_TYPE=RelWithDebInfo
	$(VENV)/build/bin/cmake --build build/sanitize
	touch $@

clean: ## everything that was built, but not runs/
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis

# Of the 22,000 files in it, Python compiles those that it imports.
$(STAMP): pyproject.toml constraints.txt CMakeLists.txt $(wildcard src/vmamba/csrc/*)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --no-compile --constraint constraints.txt --editable ".[all,dev]"
	touch $@
