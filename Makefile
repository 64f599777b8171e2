# `make demo` and `make test` work from a fresh clone; `make help` lists the rest.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP_INSTALL := $(BIN)/python -m pip install --quiet --constraint constraints.txt
SOURCES := vit_common convert vit_flax vit_torch vit_cli tests benchmarks examples setup.py

.DEFAULT_GOAL := help
.PHONY: help demo test test-slow test-docs fuzz mutants test-online test-current-hub test-tpu lint format \
    types wheel wheel-3.12 wheel-3.13 wheel-lowest docs check bench clean

help:  ## list the targets
	@grep -hE '^[a-z0-9.-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z0-9.-]+):.*## /\1\t/' | expand -t 20

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

# torch comes first and alone: asked for by its exact version, pip takes a CPU build if it sees one.
$(VENV)/.demo: pyproject.toml constraints.txt | $(VENV)/bin/python
	@echo "Installing PyTorch, JAX and this package into $(VENV); this takes a few minutes."
	@echo "(If pip finds only the CUDA build of PyTorch, 3 GB, stop and run this first:"
	@echo " $(BIN)/python -m pip install torch==2.13.0 --index-url https://download.pytorch.org/whl/cpu)"
	@$(PIP_INSTALL) torch==2.13.0
	@$(PIP_INSTALL) --editable '.[cli,torch]'
	@touch $@

# timm's models are oracles of the tests. Of torchvision they need the Python half, which fits any
# torch; Transformers would import it too if it saw it, so they are in a folder of their own.
$(VENV)/.test: $(VENV)/.demo
	$(PIP_INSTALL) --editable '.[cli,torch,train,export,onnx,bench,serve,test]'
	$(PIP_INSTALL) --no-deps --target $(VENV)/oracles --upgrade timm==1.0.31 torchvision==0.29.2
	@touch $@

demo: $(VENV)/.demo  ## classify real images with the embedded checkpoint, beside the PyTorch twin
	@$(BIN)/python examples/demo.py
	@echo
	@echo "Now a picture of your own:"
	@echo "    source $(BIN)/activate"
	@echo "    vit predict photo.jpg --model google/vit-base-patch16-224"

# A file's tests in one process share its fixtures and what they compiled: an eighth less work.
test: $(VENV)/.test  ## the whole suite
	$(BIN)/python -m pytest -n 2 --dist loadfile

test-slow: $(VENV)/.test  ## the tests that take minutes or gigabytes
	$(BIN)/python -m pytest -n 2 -m slow

test-docs: $(VENV)/.test  ## everything that README, docs/ and the notebook show is run and compared
	$(BIN)/python -m pytest -n 2 -m docs

SECONDS ?= 60
fuzz: $(VENV)/.test  ## bent files for every reader; SECONDS=60
	$(BIN)/python tests/fuzz.py --seconds $(SECONDS)

test-online: $(VENV)/.test  ## the tests that need the real Hub
	$(BIN)/python -m pytest -m online

mutants: $(VENV)/.test  ## faults planted in the twins' source: the suite must notice each
	$(BIN)/python tests/mutants.py

test-current-hub:  ## Hub access with the newest huggingface_hub, in an environment of its own
	$(PYTHON) -m venv $(VENV)-hub
	$(VENV)-hub/bin/python -m pip install --quiet --editable . pytest 'huggingface_hub>=2'
	$(VENV)-hub/bin/python -m pytest tests/test_hub.py

test-tpu:  ## XLA's TPU compiler, slow tests too, in an environment of its own; no TPU is needed
	$(PYTHON) -m venv $(VENV)-tpu
	$(VENV)-tpu/bin/python -m pip install --quiet --constraint constraints.txt \
	    --editable '.[tpu-check]' pytest
	$(VENV)-tpu/bin/python -m pytest tests/test_tpu_check.py -m 'not online'

lint: $(VENV)/.test  ## ruff: lint and format
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/ruff format --check $(SOURCES)

format: $(VENV)/.test  ## let ruff rewrite the files
	$(BIN)/ruff check --fix $(SOURCES)
	$(BIN)/ruff format $(SOURCES)

types: $(VENV)/.test  ## mypy
	$(BIN)/mypy

wheel: $(VENV)/.test  ## build sdist and wheel and try them in a clean environment
	bash .ci/wheel

wheel-3.12 wheel-3.13: wheel-%:  ## the same with that Python and the newest versions of everything
	bash .ci/wheel --python python$* --newest

wheel-lowest:  ## the same with the lowest versions that pyproject.toml names
	bash .ci/wheel --python $(PYTHON) --lowest

$(VENV)-docs/.done: pyproject.toml
	$(PYTHON) -m venv $(VENV)-docs
	$(VENV)-docs/bin/python -m pip install --quiet 'mkdocs-material>=9.7,<10' 'mkdocstrings[python]>=1,<2'
	@touch $@

docs: $(VENV)-docs/.done  ## the site, into site/; a warning is an error
	NO_MKDOCS_2_WARNING=1 $(VENV)-docs/bin/mkdocs build --quiet --strict

check: test lint types docs test-docs wheel  ## what CI checks

bench: $(VENV)/.test  ## every benchmark, beside its peers; writes benchmarks/results (QUICK=1: a try)
	$(BIN)/python benchmarks/all.py $(if $(QUICK),--quick)

clean:  ## remove the environments
	rm -rf $(VENV) $(VENV)-hub $(VENV)-tpu $(VENV)-docs site
