# `make demo` and `make test` are all a fresh machine with git, make and Python 3.11 needs; the rest is for developers.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
TINY := build/internlm-tiny
export PYTHONUNBUFFERED := 1
export TOKENIZERS_PARALLELISM := false

.DEFAULT_GOAL := help
.PHONY: help demo chat test serve quality style test-evaluation test-ecosystem test-vllm test-llamacpp matrix bench tiny long-context reliability

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

serve: .venvs/serving/installed ## an OpenAI-compatible server, docs/serving.md (MODEL=path-or-repo-id PORT=8000)
	@.venvs/serving/bin/python examples/serve.py $(if $(MODEL),--model "$(MODEL)") $(if $(PORT),--port $(PORT))

.venvs/serving/installed: requirements.txt requirements-serving.txt
	$(PYTHON) -m venv .venvs/serving
	.venvs/serving/bin/python -m pip install --quiet --disable-pip-version-check -r requirements.txt -r requirements-serving.txt
	@touch $@

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

test-ecosystem: .venvs/ecosystem/installed ## tests with peft, trl, bitsandbytes, onnxruntime, openai, ... in an environment of their own
	.venvs/ecosystem/bin/python -m pytest -q -m ecosystem

.venvs/ecosystem/installed: requirements.txt requirements-dev.txt requirements-serving.txt requirements-ecosystem.txt
	$(PYTHON) -m venv .venvs/ecosystem
	.venvs/ecosystem/bin/python -m pip install --quiet --disable-pip-version-check -r requirements.txt -r requirements-dev.txt -r requirements-ecosystem.txt
	@touch $@

test-vllm: .venvs/vllm/installed ## the same tokens from vLLM, offline and as a server
	.venvs/vllm/bin/python -m pytest -q -m vllm tests/engines

.venvs/vllm/installed: requirements-vllm.txt
	$(PYTHON) -m venv .venvs/vllm
	.venvs/vllm/bin/python -m pip install --quiet --disable-pip-version-check -r requirements-vllm.txt
	.venvs/vllm/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	@touch $@

test-llamacpp: .venvs/llamacpp/installed ## the same tokens from llama.cpp, which is built for it (needs a C++ compiler)
	.venvs/llamacpp/bin/python -m pytest -q -m llamacpp tests/engines

# The source also holds llama.cpp's converter to GGUF, which the package as installed lacks.
.venvs/llamacpp/installed: requirements.txt requirements-llamacpp.txt
	$(PYTHON) -m venv --clear .venvs/llamacpp
	.venvs/llamacpp/bin/python -m pip download --quiet --disable-pip-version-check --no-deps --dest .venvs/llamacpp \
		$$(grep ^llama-cpp-python requirements-llamacpp.txt)
	mkdir .venvs/llamacpp/source
	tar -xzf .venvs/llamacpp/llama_cpp_python-*.tar.gz -C .venvs/llamacpp/source --strip-components=1
	CMAKE_ARGS=-DLLAVA_BUILD=OFF .venvs/llamacpp/bin/python -m pip install --quiet --disable-pip-version-check \
		-r requirements.txt -r requirements-llamacpp.txt
	@touch $@

matrix: $(VENV)/installed ## every supported transformers version, each in a fresh environment and process
	$(BIN)/python tools/matrix.py

bench: $(VENV)/installed ## the CPU benchmarks (benchmarks/README.md), under 15 minutes
	for file in cpu long_context loading tokenizer plot; do $(BIN)/python benchmarks/$$file.py || exit 1; done

long-context: $(VENV)/installed ## loss and recall at 1 to 4 windows: docs/long-context-results.md
	$(BIN)/python tools/measure_long_context.py

reliability: $(VENV)/installed ## fuzzing, threads, kill -9 and a soak at full length: docs/reliability.md
	$(BIN)/python tests/reliability.py

tiny: $(VENV)/installed ## train checkpoints/tiny anew (about an hour)
	$(BIN)/python tools/train_tiny.py
