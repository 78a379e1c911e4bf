# The two commands; each makes its own virtual environment first and installs what it needs.
#   make quickstart   train, merge and judge a sparse adapter on a small model made here
#   make test         run all tests
#   make bench        compare a training step with LoRA's, SHiRA's and the limit
#   make engines      train under DDP and DeepSpeed ZeRO-1, 2, 3 on two CPU ranks, kill, resume, and compare
#   make lint       ruff and mypy
#   make evidence     compare tuned methods on the quickstart's model (integration/evidence has the larger experiments)
# TORCH says which build: `make test TORCH=torch` takes the newest.
PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV ?= .venv
BIN := $(VENV)/bin
CONFIG := examples/quickstart/spft.yml

export AXOLOTL_DO_NOT_TRACK ?= 1
export TOKENIZERS_PARALLELISM ?= false

.PHONY: quickstart test bench engines evidence lint clean

$(VENV)/installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check '$(TORCH)' -e '.[dev,deepspeed]'
	touch $@

quickstart: $(VENV)/installed
	$(BIN)/python examples/quickstart/prepare.py
	$(BIN)/accelerate launch --num_processes 1 -m axolotl.cli.train $(CONFIG)
	$(BIN)/axolotl merge-lora $(CONFIG)
	$(BIN)/python examples/quickstart/report.py $(CONFIG)

test: $(VENV)/installed
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder -q

bench: $(VENV)/installed
	$(BIN)/python -m axolotl_spft bench

engines: $(VENV)/installed
	$(BIN)/python -m integration.engines.matrix

evidence: $(VENV)/installed
	$(BIN)/python examples/quickstart/prepare.py
	$(BIN)/python -m integration.evidence run integration/evidence/experiments/small.json --threads 2 --results build/evidence/results
	$(BIN)/python -m integration.evidence report --results build/evidence/results --output build/evidence

lint: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf build $(VENV)
