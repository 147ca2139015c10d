# `make demo` and `make test` need only git, make and Python 3.11; the other targets are for developers.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
TINY := build/internlm-tiny
# What users set reaches the recipes in the environment as it is: neither make nor the shell expands it.
$(foreach name,MODEL PROMPT ARGS PORT ENGINE CONTEXT FILES N SEED TORCH,$(if $(filter-out undefined,$(origin $(name))),$(eval override export $(name) := $$(value $(name)))))
export PYTHONUNBUFFERED := 1
export TOKENIZERS_PARALLELISM := false

.DEFAULT_GOAL := help
.PHONY: help demo chat web test serve quality style real test-real test-gpu test-evaluation test-ecosystem test-web test-vllm test-llamacpp matrix mutation bench bench-llamacpp tiny long-context quantising reliability reliability-serving

help: ## show this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 22

# One environment, to which each target adds what it needs.
$(VENV)/running: requirements.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check -r requirements.txt
	@touch $@

$(VENV)/chatting: $(VENV)/running requirements-chat.txt
	$(BIN)/python -m pip install --disable-pip-version-check -r requirements-chat.txt
	@touch $@

$(VENV)/web: $(VENV)/running requirements-web.txt
	$(BIN)/python -m pip install --disable-pip-version-check -r requirements-web.txt
	@touch $@

$(VENV)/serving: $(VENV)/running requirements-serving.txt
	$(BIN)/python -m pip install --disable-pip-version-check -r requirements-serving.txt
	@touch $@

$(VENV)/real: $(VENV)/running requirements-real.txt
	$(BIN)/python -m pip install --disable-pip-version-check -r requirements-real.txt
	@touch $@

$(VENV)/installed: $(VENV)/running requirements-chat.txt requirements-dev.txt
	$(BIN)/python -m pip install --disable-pip-version-check -r requirements-dev.txt
	@touch $@

demo: $(VENV)/running ## generate text: English, Chinese, one chat turn (MODEL=path-or-repo-id PROMPT="..." for yours)
	@$(BIN)/python examples/demo.py $${MODEL:+--model "$$MODEL"} $${PROMPT:+--prompt "$$PROMPT"}

chat: $(VENV)/chatting ## chat in the terminal (MODEL=path-or-repo-id ARGS="--greedy --seed 1 ...")
	@$(BIN)/python examples/chat.py $${MODEL:+--model "$$MODEL"} $$ARGS

web: $(VENV)/web ## chat in the browser (MODEL=path-or-repo-id PORT=7860)
	@$(BIN)/python examples/web.py $${MODEL:+--model "$$MODEL"} $${PORT:+--port "$$PORT"} $$ARGS

serve: $(if $(filter vllm,$(ENGINE)),.venvs/vllm/serving,$(VENV)/serving) ## start an OpenAI-compatible server, docs/serving.md (MODEL=path-or-repo-id PORT=8000 ENGINE=vllm CONTEXT=16384)
	@$(dir $<)bin/python examples/serve.py $${MODEL:+--model "$$MODEL"} $${ENGINE:+--engine "$$ENGINE"} \
		$${CONTEXT:+--context "$$CONTEXT"} $${PORT:+--port "$$PORT"} $$ARGS

real: $(VENV)/real ## make build/smollm2, a real model of 135M parameters to try things with (downloads 93 MB): MODEL=build/smollm2
	@$(BIN)/python tools/real_model.py

# Two workers with as many threads as cores: threads that spin while they wait take the cores from each other.
test: $(VENV)/installed ## run the tests, in random order (SEED=the number that an earlier run printed for the same one)
	@seed="$${SEED:-$$(date +%s)}"; echo "SEED=$$seed"; \
	OMP_WAIT_POLICY=passive $(BIN)/python -m pytest -q -m "not slow and not evaluation and not ecosystem and not gpu and not real" -n 2 --dist loadfile \
		--randomly-seed="$$seed"

test-gpu: $(VENV)/installed ## run the tests that need a CUDA device; without one they are skipped
	$(BIN)/python -m pytest -q -m gpu

test-real: $(VENV)/installed real .venvs/evaluation/installed ## run the tests with the real model
	$(BIN)/python -m pytest -q -m real tests/test_real_model.py
	.venvs/evaluation/bin/python -m pytest -q -m real tests/test_evaluation.py

quality: $(VENV)/installed ## check lint, formatting and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/basedpyright

style: $(VENV)/installed ## fix what `quality` finds and can fix
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

test-evaluation: .venvs/evaluation/installed ## run the tests with lm-eval, offline, in a separate environment
	.venvs/evaluation/bin/python -m pytest -q -m "evaluation and not real" tests/test_evaluation.py

# The tests' own environments are made by uv, which takes a tenth of pip's time.
UV := $(BIN)/python -m uv pip install --quiet $(addprefix --find-links=,$(PIP_FIND_LINKS))
.venvs/evaluation/installed: $(VENV)/installed requirements-evaluation.txt
	$(PYTHON) -m venv .venvs/evaluation
	$(UV) --python .venvs/evaluation/bin/python -r requirements.txt -r requirements-dev.txt -r requirements-evaluation.txt
	@touch $@

test-ecosystem: .venvs/ecosystem/installed ## run the tests with peft, trl, bitsandbytes, onnxruntime, openai, ... in a separate environment
	.venvs/ecosystem/bin/python -m pytest -q -m ecosystem

.venvs/ecosystem/installed: $(VENV)/installed requirements-serving.txt requirements-finetune.txt requirements-ecosystem.txt
	$(PYTHON) -m venv .venvs/ecosystem
	$(UV) --python .venvs/ecosystem/bin/python -r requirements.txt -r requirements-dev.txt -r requirements-ecosystem.txt
	@touch $@

test-web: $(VENV)/installed $(VENV)/web ## test the web page in headless Chromium, which must be installed (apt-get install chromium)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements-test-web.txt
	$(BIN)/python -m pytest -q -m web tests/test_web.py

test-vllm: .venvs/vllm/installed ## check that vLLM gives the same tokens, offline and as a server
	.venvs/vllm/bin/python -m pytest -q -m vllm tests/engines

.venvs/vllm/installed: .venvs/vllm/serving requirements-test-vllm.txt
	.venvs/vllm/bin/python -m pip install --disable-pip-version-check -r requirements-test-vllm.txt
	@touch $@

# vLLM has a package for each kind of machine. That for CPUs needs torch's CPU build, and also installs three packages that
# were built for another one.
VLLM := requirements-vllm$(if $(shell command -v nvidia-smi),-gpu).txt
.venvs/vllm/serving: $(VLLM)
	$(PYTHON) -m venv .venvs/vllm
	.venvs/vllm/bin/python -m pip install --disable-pip-version-check -r $(VLLM)
	$(if $(filter requirements-vllm.txt,$(VLLM)),.venvs/vllm/bin/python -m pip uninstall --yes torchvision torchaudio torchcodec)
	@touch $@

test-llamacpp: .venvs/llamacpp/installed ## check that llama.cpp, built from source, gives the same tokens (needs a C++ compiler)
	.venvs/llamacpp/bin/python -m pytest -q -m llamacpp tests/engines

# The source package also contains llama.cpp's converter to GGUF, which the installed package lacks.
.venvs/llamacpp/installed: requirements.txt requirements-llamacpp.txt
	$(PYTHON) -m venv --clear .venvs/llamacpp
	.venvs/llamacpp/bin/python -m pip download --quiet --disable-pip-version-check --no-deps --dest .venvs/llamacpp \
		$$(grep ^llama-cpp-python requirements-llamacpp.txt)
	mkdir .venvs/llamacpp/source
	tar -xzf .venvs/llamacpp/llama_cpp_python-*.tar.gz -C .venvs/llamacpp/source --strip-components=1
	CMAKE_ARGS=-DLLAVA_BUILD=OFF .venvs/llamacpp/bin/python -m pip install --quiet --disable-pip-version-check \
		-r requirements.txt -r requirements-llamacpp.txt
	@touch $@

matrix: $(VENV)/installed ## check every supported transformers version in new environments (TORCH="2.6.0 2.15.0": these of torch, 3 GB each)
	$(BIN)/python tools/matrix.py $${TORCH:+--torch $$TORCH}

mutation: $(VENV)/installed ## mutate code at random and count what tests notice (FILES="rotary_internlm.py tools/hub/*.py" N=40 SEED=1)
	$(BIN)/python tools/mutation.py $${FILES:+--files $$FILES} $${N:+--number "$$N"} $${SEED:+--seed "$$SEED"}

bench: $(VENV)/installed $(VENV)/real ## run the CPU benchmarks (benchmarks/README.md), about 18 minutes
	for file in cpu long_context loading tokenizer plot; do $(BIN)/python benchmarks/$$file.py || exit 1; done

bench-llamacpp: .venvs/llamacpp/installed ## measure against llama.cpp on a real model (downloads 93 MB), about 10 minutes
	.venvs/llamacpp/bin/python benchmarks/llamacpp.py

long-context: $(VENV)/installed ## measure loss and recall beyond the window: docs/long-context-results.md (MODEL=build/smollm2)
	$(BIN)/python tools/measure_long_context.py $${MODEL:+--model "$$MODEL"} $$ARGS

# llama.cpp's environment first: it can also make the real model.
quantising: .venvs/llamacpp/installed .venvs/ecosystem/installed ## measure quantised models on real text: docs/compatibility.md (MODEL=path-or-repo-id for yours), about an hour
	for name in llamacpp ecosystem; do \
		.venvs/$$name/bin/python tools/measure_quantising.py $${MODEL:+--model "$$MODEL"} || exit 1; done

reliability: $(VENV)/installed ## run fuzzing, concurrency, kill -9 and soak tests at full length: docs/reliability.md
	$(BIN)/python -m pytest -q -m slow -n 2
	$(BIN)/python tests/reliability.py

reliability-serving: .venvs/vllm/installed ## run vLLM's server under 64 clients for 5 minutes: docs/reliability.md
	.venvs/vllm/bin/python tests/reliability_serving.py $$ARGS

tiny: $(VENV)/installed ## retrain checkpoints/tiny (about an hour)
	$(BIN)/python tools/train_tiny.py
