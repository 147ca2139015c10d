"""Models with other layers than config.json says: removed or copied in memory, fewer loaded; caches that two share.

Llama with the same weights is the reference. Also run by tests/matrix_check.py, in environments that hold torch,
transformers, accelerate, jinja2 and pytest only.
"""

import copy

import pytest
import torch
from torch import nn
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, StaticCache

from tools import package

from support.golden import assert_near, load


CACHE = package.load("compat").CACHE
GREEDY = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
HEADS = ["ForCausalLM", "Model", "ForSequenceClassification", "ForTokenClassification", "ForQuestionAnswering"]


@pytest.fixture(scope="module")
def plain(modeling):
    return load(modeling, "tiny_7b_origin")  # plain rotary, with biases


@pytest.fixture(scope="module")
def llama(plain):
    same = (
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "rms_norm_eps",
    )
    config = LlamaConfig(**{name: getattr(plain.config, name) for name in same}, attention_bias=True, pad_token_id=0)
    model = LlamaForCausalLM(config).eval()
    model.load_state_dict(plain.state_dict())
    return model


@pytest.fixture(scope="module")
def prompt(plain):
    return torch.randint(3, plain.config.vocab_size, (1, 12), generator=torch.Generator().manual_seed(0))


def with_layers(model, order: list[int], numbered: bool, configured: bool):
    """A copy that runs these layers; `numbered`: layer_idx is their place, `configured`: the config counts them."""
    model = copy.deepcopy(model)
    layers = [copy.deepcopy(model.model.layers[index]) for index in order]
    for index, layer in enumerate(layers):
        layer.self_attn.layer_idx = index if numbered else layer.self_attn.layer_idx
    model.model.layers = nn.ModuleList(layers)
    if configured:
        model.config.num_hidden_layers = len(order)
    return model


def steps(model, ids, cache) -> torch.Tensor:
    """Logits of all tokens, by a prefill and one decode step per token."""
    parts = [ids[:, :8], *ids[:, 8:].split(1, dim=1)]
    return torch.cat([model(part, **{CACHE: cache}).logits for part in parts], dim=1)


# order, numbered, configured
CHANGED = {
    "removed": ([0, 1, 3], False, False),
    "removed, numbered": ([0, 1, 3], True, False),
    "removed, numbered and configured": ([1, 2, 3], True, True),
    "one left": ([0], False, False),
    "reordered": ([2, 0, 1, 3], False, False),
    "copied": ([0, 1, 1, 2, 2, 3], True, True),
    "copied, config.json unchanged": ([0, 1, 1, 2, 2, 3], True, False),
}


@pytest.mark.parametrize("name", CHANGED)
@torch.no_grad()
def test_layers_changed_in_memory(plain, llama, prompt, name):
    """Forward, generate, and decode steps on caches of three kinds are Llama's, and do not depend on the cache."""
    models = [with_layers(model, *CHANGED[name]) for model in (plain, llama)]
    expected = models[1](prompt, use_cache=False).logits
    for use_cache in (False, True):
        assert_near(models[0](prompt, use_cache=use_cache).logits, expected)
    for settings in ({}, {"cache_implementation": "static"}):
        found, wanted = (model.generate(prompt, **GREEDY, **settings) for model in models)
        assert torch.equal(found, wanted)
    for make in (DynamicCache, lambda: DynamicCache(config=plain.config), lambda: StaticCache(plain.config, 32)):
        if make is DynamicCache or "copied" not in name:  # the others have the four layers of config.json
            assert_near(steps(models[0], prompt, make()), expected)


@torch.no_grad()
def test_removed_layers_that_only_the_config_counts(plain, llama, prompt):
    """The config may say more layers than there are or fewer, and a lazily filled cache more than the config."""
    more, first, fewer = copy.deepcopy(plain), copy.deepcopy(plain), with_layers(plain, [0, 1, 3], False, True)
    more.config.num_hidden_layers = 6
    assert torch.equal(more.generate(prompt, **GREEDY), llama.generate(prompt, **GREEDY))
    first.config.num_hidden_layers = 2
    expected = with_layers(llama, [0, 1], False, True)(prompt, use_cache=False).logits
    assert_near(steps(first, prompt, DynamicCache()), expected)
    expected = with_layers(llama, [0, 1, 3], False, True)(prompt, use_cache=False).logits
    assert_near(steps(fewer, prompt, DynamicCache()), expected)
    with pytest.raises(ValueError, match=r"Where layers were removed, number the self_attn\.layer_idx of the others"):
        fewer.generate(prompt, **GREEDY)  # Llama's is an IndexError


@torch.no_grad()
def test_a_draft_of_the_first_layers_reads_the_cache_of_all(plain, llama, prompt):
    """Early exit by hand. The other way round there is no past for the upper layers, and Llama is silently wrong."""
    logits = []
    for model in (plain, llama):
        draft, cache = with_layers(model, [0, 1], False, True), DynamicCache()
        model(prompt[:, :8], **{CACHE: cache})
        logits.append(draft(prompt[:, 8:9], **{CACHE: cache}).logits)
    assert_near(*logits)
    cache = DynamicCache()
    with_layers(plain, [0, 1, 2], False, True)(prompt[:, :8], **{CACHE: cache})
    with pytest.raises(ValueError, match="The cache has 3 layers, and this model 4: start with a new cache"):
        plain(prompt[:, 8:9], **{CACHE: cache})


@torch.no_grad()
def test_layers_run_twice_with_one_past_are_refused(plain, prompt):
    """Both would append to the same keys, and Llama is silently wrong."""
    twice = with_layers(plain, [0, 1, 1, 2, 2, 3], False, True)
    with pytest.raises(ValueError, match=r"where layers were copied, number their self_attn\.layer_idx"):
        steps(twice, prompt, DynamicCache())


@pytest.mark.parametrize("name", ["tiny_7b_origin", "tiny_20b_dynamic"])
@pytest.mark.parametrize("kind", HEADS)
@torch.no_grad()
def test_fewer_layers_than_the_checkpoint_has(modeling, prompt, kind, name):
    """What the checkpoint has beyond them, biases too, is not missed; a wrong `bias` still is an error."""
    torch.manual_seed(0)  # of the new heads
    found = load(modeling, name, f"InternLM{kind}", num_hidden_layers=2)
    base = load(modeling, name, "InternLMModel")
    base.layers = base.layers[:2]
    assert_near(getattr(found, "model", found)(prompt).last_hidden_state, base(prompt).last_hidden_state)
    bias = not found.config.bias
    for layers in (2, 4):
        with pytest.raises(
            ValueError, match=f"biases, but config.bias is {bias}: set .bias.: {str(not bias).lower()} in"
        ):
            load(modeling, name, f"InternLM{kind}", num_hidden_layers=layers, bias=bias)
