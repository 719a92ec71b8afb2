# Every target sets itself up: the first call makes .venv and installs into it.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# What makes a model folder; metrics.jsonl and the manifest stay with the run.
OMNI_FILES := config.json generation_config.json model.safetensors chat_template.jinja processor_config.json \
	tokenizer.json tokenizer_config.json

.PHONY: quickstart test test-fast lint types format base omni clean

$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $(STAMP)

quickstart: $(STAMP)   ## the whole pipeline on bundled data with the bundled base
	$(BIN)/mmtune run recipes/quickstart.yaml

test: $(STAMP)         ## all tests
	$(BIN)/python -m pytest -n 2 --dist loadfile

test-fast: $(STAMP)    ## without the slow ones
	$(BIN)/python -m pytest -n 2 --dist loadfile -m 'not slow'

lint: $(STAMP)         ## style and format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(STAMP)        ## static types of the package
	$(BIN)/mypy

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

base: $(STAMP)         ## train the bundled base again (about a quarter of an hour)
	$(BIN)/python data/make_base.py --out runs/base/start --weights
	$(BIN)/python data/make_dialogues.py
	$(BIN)/mmtune run recipes/base.yaml
	$(BIN)/python data/make_base.py
	cp runs/base/adapter/model.safetensors data/base/model.safetensors

omni: $(STAMP)         ## train the bundled omni base again
	$(BIN)/python data/make_lessons.py
	$(BIN)/mmtune run recipes/omni.yaml
	mkdir -p data/omni
	cp $(addprefix runs/omni/base/,$(OMNI_FILES)) data/omni/

clean:
	rm -rf $(VENV) runs .pytest_cache .ruff_cache .mypy_cache
