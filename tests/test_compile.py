"""torch.compile: complete graphs, one compilation per decode loop, and eager's logits and tokens."""

import copy

import pytest
import torch
from accelerate import cpu_offload
from transformers import AutoModelForCausalLM, CompileConfig

from support.changes import CHANGES
from support.generation import PROMPTS, greedy_ids, greedy_rows, pad_left
from support.golden import assert_near, load, new_cache
from support.versions import needs_dynamo


@pytest.fixture(scope="module")
def model(modeling):
    return load(modeling, "tiny_20b_dynamic")  # window 64


@pytest.fixture(scope="module")
def ids(model):
    return torch.randint(3, model.config.vocab_size, (3, 300), generator=torch.Generator().manual_seed(0))


class Recompilations:
    """A backend that counts compilations; a decode loop must compile once."""

    def __init__(self) -> None:
        self.graphs = 0

    def __call__(self, graph, example_inputs):
        self.graphs += 1
        return graph.forward


@needs_dynamo
@torch.no_grad()
def test_fullgraph_static_decode_compiles_once(model, ids):
    """One graph without a break, from inside the window to beyond it, with the logits of eager mode."""
    counter = Recompilations()
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    past, eager = new_cache("static", model), new_cache("static", model)
    model(ids[:2, :55], past_key_values=past)
    model(ids[:2, :55], past_key_values=eager)
    for step in range(55, 80):
        logits = compiled(ids[:2, step : step + 1], past_key_values=past).logits
        assert_near(logits, model(ids[:2, step : step + 1], past_key_values=eager).logits)
    assert counter.graphs == 1


@needs_dynamo
def test_compiled_generate_across_the_window(model, ids):
    """generate with a static cache and inductor's kernels gives the tokens of eager mode, padded rows included."""
    padded, mask = pad_left([ids[0, :60], ids[1, :40]], 60)
    expected = greedy_rows(model, padded, attention_mask=mask)
    config = CompileConfig(fullgraph=True, mode="default", dynamic=False)
    config._compile_all_devices = True
    output = greedy_rows(
        model, padded, attention_mask=mask, cache_implementation="static", compile_config=config, disable_compile=False
    )
    assert output.tolist() == expected.tolist()


@needs_dynamo
def test_compiled_static_cache(tiny_dir, tiny_tokenizer):
    """generate() compiles the decode step by default on a GPU; forced to on a CPU, it captures a single graph."""
    model = AutoModelForCausalLM.from_pretrained(tiny_dir, trust_remote_code=True, dtype=torch.float32)
    ids = tiny_tokenizer(PROMPTS[0], return_tensors="pt")["input_ids"]
    config = CompileConfig(fullgraph=True, backend="aot_eager", mode=None)
    config._compile_all_devices = True
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    compiled = greedy_ids(model, ids, cache_implementation="static", compile_config=config)
    counters = torch._dynamo.utils.counters["stats"]
    assert compiled == greedy_ids(model, ids)
    assert counters["unique_graphs"] == 1 and not torch._dynamo.utils.counters["graph_break"]


class Operators:
    """A backend that records the operators of the graph."""

    def __call__(self, graph, example_inputs):
        self.operators = {str(node.target) for node in graph.graph.nodes}
        return graph.forward


@needs_dynamo
@pytest.mark.parametrize("change", CHANGES)
@torch.no_grad()
def test_compiled_products_of_one_token_see_what_changes_a_layer(model, ids, change):
    """Hooks, global ones too, a replaced forward or weight: they change a compiled step as they do an eager one."""
    here, caches = copy.deepcopy(model), [new_cache("static", model) for _ in range(2)]
    for cache in caches:
        here(ids[:1, :20], past_key_values=cache)
    plain = model(ids[:1, 20:21], past_key_values=copy.deepcopy(caches[0])).logits
    handle = CHANGES[change](here.lm_head)
    try:
        torch.compiler.reset()
        eager = here(ids[:1, 20:21], past_key_values=caches[0]).logits
        compiled = torch.compile(here, backend="aot_eager")(ids[:1, 20:21], past_key_values=caches[1]).logits
    finally:
        getattr(handle, "remove", lambda: None)()
    assert_near(compiled, eager)
    assert not torch.allclose(eager, plain, atol=0.1)


@torch.no_grad()
def test_compiled_products_of_one_token_take_offloaded_weights(tiny_dir, tiny_model, ids):
    """accelerate fetches each weight when its layer runs; outside of that the weight has no storage."""
    offloaded = AutoModelForCausalLM.from_pretrained(tiny_dir, trust_remote_code=True, dtype=torch.float32).eval()
    cpu_offload(offloaded, execution_device="cpu")
    caches = [new_cache("static", tiny_model) for _ in range(2)]
    for cache in caches:
        tiny_model(ids[:1, :20] % 2000, past_key_values=cache)
    torch.compiler.reset()
    expected = tiny_model(ids[:1, 20:21] % 2000, past_key_values=caches[0]).logits
    assert offloaded.lm_head.weight.is_meta
    found = torch.compile(offloaded, backend="aot_eager")(ids[:1, 20:21] % 2000, past_key_values=caches[1]).logits
    assert_near(found, expected)


@needs_dynamo
@pytest.mark.parametrize("case", ("one token", "two rows"))
@torch.no_grad()
def test_compiled_products_of_one_token_are_written_out(model, ids, case):
    """On a CPU, so that all its cores read the weights. Logits are eager's."""
    graph, rows = Operators(), 2 if case == "two rows" else 1
    torch.compiler.reset()
    past, eager = new_cache("static", model), new_cache("static", model)
    for cache in (past, eager):
        model(ids[:rows, :20], past_key_values=cache)
    expected = model(ids[:rows, 20:21], past_key_values=eager).logits
    logits = torch.compile(model, backend=graph)(ids[:rows, 20:21], past_key_values=past).logits
    assert_near(logits, expected)
    assert any("linear" in operator for operator in graph.operators) == (case != "one token")


@needs_dynamo
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
@torch.no_grad()
def test_compiled_steps_of_one_row_are_eager_steps(dtype, model, ids):
    """inductor's kernels, across the window; in bfloat16, as close to the float32 model as eager steps are."""
    torch.compiler.reset()
    here = copy.deepcopy(model).to(dtype)
    ways = [(torch.compile(here, fullgraph=True), here), (here, here), (model, model)]
    caches = [new_cache("static", way) for _, way in ways]
    for (_, way), cache in zip(ways, caches, strict=True):
        way(ids[:1, :60], past_key_values=cache)
    errors = []
    for step in range(60, 70):
        token = ids[:1, step : step + 1]
        logits = [call(token, past_key_values=cache).logits for (call, _), cache in zip(ways, caches, strict=True)]
        errors.append([(found.float() - logits[-1]).abs().mean() for found in logits[:2]])
    compiled, eager = torch.tensor(errors).mean(0)
    assert compiled < max(1.2 * eager, 1e-4)


@pytest.mark.parametrize("strict", (False, pytest.param(True, marks=needs_dynamo)))
@torch.no_grad()
def test_an_exported_program_keeps_its_products(model, ids, strict):
    """They are for its runtime to choose; written out, they would also fix the number of tokens."""
    program = torch.export.export(model, (), {"input_ids": ids[:1, :1], "use_cache": False}, strict=strict)
    operators = [str(node.target) for node in program.graph.nodes]
    assert sum("linear" in operator for operator in operators) == 7 * len(model.model.layers) + 1
