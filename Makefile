# `make demo` and `make test` set up everything they need, on a machine with Python 3.11 or later and no torch.
PYTHON ?= python3
VENV := .venv
BIN := $(CURDIR)/$(VENV)/bin
export PATH := $(BIN):$(PATH)

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -qq --upgrade pip
	$(BIN)/pip install -qq --constraint constraints.txt --editable '.[dev]'
	touch $@

install: $(VENV)/.installed

# An earlier run is never removed: for another one, `make demo RUN=runs/demo_2`.
RUN ?= runs/demo
EVALUATE = tune run owlore_eval --config eval/mmlu_dev tasks=[mmlu_dev_held_out,mmlu_dev_worked] limit=20

demo: install  # evaluate a real model, fine-tune it, evaluate it again
	owlore download smollm2
	$(EVALUATE) output_dir=$(RUN)/eval/before
	tune run owlore_full_finetune --config smollm2/135M_owlore output_dir=$(RUN) max_steps_per_epoch=40 batch_size=2
	$(EVALUATE) output_dir=$(RUN)/eval/after checkpointer.checkpoint_dir=$(RUN)/step_40
	owlore compare --answers 1 $(RUN)/eval/before $(RUN)/eval/after

pictures: RUN = runs/pictures
pictures: install  # of 60 steps on SmolLM2, for docs/runs.md
	owlore download smollm2
	tune run owlore_full_finetune --config smollm2/135M_owlore output_dir=$(RUN) epochs=2 max_steps_per_epoch=30 \
		run_val_every_n_steps=15
	mkdir -p docs/pictures
	cp $(RUN)/*.png docs/pictures

PYTEST = OMP_NUM_THREADS=1 python -m pytest --numprocesses 2

test: install
	$(PYTEST) -m 'not slow'

# Also the slow tests: documented commands, the wheel, kills, and real models on several ranks. The slow tests of a file
# run on one worker, because documented commands use files that earlier ones wrote. CI sets COVERAGE, which takes time.
check: lint
	$(PYTEST) -m 'not slow' $(COVERAGE)
	$(PYTEST) -m slow --dist loadfile --no-loadscope-reorder --durations 20

lint: install
	ruff check .
	ruff format --check .
	mypy

# On a machine with a GPU: the tests that need one or have paths for one, and the benchmarks.
gpu: install
	python -c 'import torch; assert torch.cuda.is_available(), "torch sees no GPU; see owlore doctor"'
	python -m pytest tests/gpu tests/method/test_kernels.py tests/distributed/test_distributed.py
	$(MAKE) bench

bench: install  # with DATA=DIR, a directory of LLM-Adapters' ARC-Easy and others, evaluation is measured too
	python benchmarks/training.py methods --output benchmarks/methods.md
	python benchmarks/gpu_counts.py --output benchmarks/gpu_counts.md
	python benchmarks/training.py llama2_7b --output benchmarks/llama2_7b.md
	python benchmarks/plans.py --output benchmarks/memory_7b.md --picture docs/pictures/memory_7b.png
	python benchmarks/operations.py --output benchmarks/operations.md
	python benchmarks/faults.py --output benchmarks/faults.md
	python benchmarks/training.py distributed --rounds 3 --output benchmarks/distributed.md
ifdef DATA
	python benchmarks/evaluation.py --data $(DATA) --output benchmarks/evaluation.md
	python benchmarks/evaluation.py --data $(DATA) --decoder --output benchmarks/decoders.md
endif

# Accuracy with tuned learning rates and several seeds. It takes many hours. An interrupted study continues after its
# last run.
quality: install
	$(if $(DATA),,$(error set DATA=DIR, see docs/development.md))
	owlore download smollm2
	python benchmarks/quality.py --data $(DATA) --workers 2
	python benchmarks/quality_report.py

clean:
	rm -rf $(VENV) build recipes/*.egg-info

.PHONY: install demo pictures test check lint gpu bench quality clean
