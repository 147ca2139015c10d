# `make demo` and `make test` are all a fresh machine with git, make and Python 3.11 needs; the rest is for developers.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
TINY := build/internlm-tiny
export PYTHONUNBUFFERED := 1
export TOKENIZERS_PARALLELISM := false

.DEFAULT_GOAL := help
.PHONY: help demo chat test quality style test-evaluation test-ecosystem matrix bench tiny long-context

help: ## show this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 18

$(VENV)/installed: requirements.txt requirements-dev.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt -r requirements-dev.txt
	@touch $@

demo: $(VENV)/installed ## let InternLM speak: English, Chinese, one chat turn (MODEL=path-or-repo-id PROMPT="..." for yours)
	@$(BIN)/python examples/demo.py $(if $(MODEL),--model "$(MODEL)") $(if $(PROMPT),--prompt "$(PROMPT)")

chat: $(VENV)/installed ## talk with it in the terminal (MODEL=path-or-repo-id)
	@$(BIN)/python examples/chat.py $(if $(MODEL),--model "$(MODEL)")

test: $(VENV)/installed ## the tests
	$(BIN)/python -m pytest -q -m "not slow and not evaluation and not ecosystem and not gpu" -n 2 --dist loadfile

quality: $(VENV)/installed ## lint, formatting, types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/basedpyright

style: $(VENV)/installed ## mend what `quality` finds and can mend
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

test-evaluation: .venvs/evaluation/installed ## tests that run lm-eval, offline, in an environment of their own
	.venvs/evaluation/bin/python -m pytest -q -m evaluation tests/test_evaluation.py

.venvs/evaluation/installed: requirements.txt requirements-dev.txt requirements-evaluation.txt
	$(PYTHON) -m venv .venvs/evaluation
	.venvs/evaluation/bin/python -m pip install --quiet --disable-pip-version-check -r requirements.txt -r requirements-dev.txt -r requirements-evaluation.txt
	@touch $@

test-ecosystem: .venvs/ecosystem/installed ## tests with peft, trl, bitsandbytes, ... in an environment of their own
	.venvs/ecosystem/bin/python -m pytest -q -m ecosystem

.venvs/ecosystem/installed: requirements.txt requirements-dev.txt requirements-ecosystem.txt
	$(PYTHON) -m venv .venvs/ecosystem
	.venvs/ecosystem/bin/python -m pip install --quiet --disable-pip-version-check -r requirements.txt -r requirements-dev.txt -r requirements-ecosystem.txt
	@touch $@

matrix: $(VENV)/installed ## every supported transformers version, each in a fresh environment and process
	$(BIN)/python tools/matrix.py

bench: $(VENV)/installed ## the CPU benchmarks (benchmarks/README.md), under 15 minutes
	for file in cpu long_context loading tokenizer plot; do $(BIN)/python benchmarks/$$file.py || exit 1; done

long-context: $(VENV)/installed ## loss and recall at 1 to 4 windows: docs/long-context-results.md
	$(BIN)/python tools/measure_long_context.py

tiny: $(VENV)/installed ## train checkpoints/tiny anew (about half an hour)
	$(BIN)/python tools/train_tiny.py
