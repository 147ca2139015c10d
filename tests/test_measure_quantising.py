"""tools/measure_quantising.py: what it measures, the result file, the table. The libraries are tested elsewhere."""

import json
import math

import pytest
import torch

from tools import measure_quantising as tool
from tools.measure_quantising import ORIGINAL, Results, Window, compare, measures, sizes, table, windows_of

from support.paths import ROOT


def test_every_position_of_every_window_has_the_next_token_of_the_text():
    """The last position of a window, too, whose next token begins the next window."""
    assert windows_of(list(range(10)), 8, 4) == [
        Window([0, 1, 2, 3], [1, 2, 3, 4]),
        Window([4, 5, 6, 7], [5, 6, 7, 8]),
    ]


@pytest.mark.parametrize(("tokens", "message"), [(6, "a multiple of the model's window, here 4"), (0, "a multiple")])
def test_windows_that_are_not_whole_are_refused(tokens: int, message: str):
    with pytest.raises(SystemExit, match=message):
        windows_of(list(range(20)), tokens, 4)


def test_a_text_that_is_too_short_is_refused():
    """It needs one token more, which the last position predicts."""
    with pytest.raises(SystemExit, match="must be less than the text's 8 tokens"):
        windows_of(list(range(8)), 8, 4)


def test_sums_of_a_window():
    """Of three positions: twice equal logits, of which three tokens are equally likely; and opposite ones."""
    level, steep = torch.tensor([0.0, 0.0, 0.0, -1e4]), torch.tensor([3.0, 4.0, 0.0, 0.0])
    original, logits = torch.stack([level, level, steep]), torch.stack([level, level, -steep])
    cosine, same, loss = compare(logits, original, [1, 0, 2]).tolist()
    assert (cosine, same) == (1.0, 2.0)
    assert loss == pytest.approx(2 * math.log(3) + math.log(math.exp(-3) + math.exp(-4) + 2))


@torch.no_grad()
def test_the_original_is_measured_as_transformers_does(tiny_model):
    """Perplexity is exp of the loss that the model itself returns; one bit less of a logit changes no measure much."""
    ids = torch.randint(5, 500, (1, 65))
    output = tiny_model(ids, labels=ids)
    logits, windows = output.logits[0, :-1], windows_of(ids[0].tolist(), 64, 64)
    found = measures([logits], [logits], windows)
    assert found == pytest.approx({"cosine": 1, "same_token": 1, "perplexity": output.loss.exp().item()}, rel=1e-5)
    rounded = measures([logits.bfloat16().float()], [logits], windows)
    assert 0.9999 < rounded["cosine"] < 1 and rounded["perplexity"] != found["perplexity"]


def test_sizes_of_a_saved_model(tiny_model, tmp_path):
    """In bytes, those of the decoder layers by type; llama.cpp's names of the layers are known, too."""
    tiny_model.save_pretrained(tmp_path)
    found = sizes(tool.saved_tensors(tmp_path))
    layers = sum(parameter.numel() for parameter in tiny_model.model.layers.parameters())
    assert found["bytes"] == 4 * sum(parameter.numel() for parameter in tiny_model.parameters())
    assert found["layer_bytes"] == 4 * layers and found["layer_types"] == {"float32": 4 * layers}
    gguf = {"blk.0.attn_q.weight": ("Q8_0", 34), "blk.0.attn_norm.weight": ("F32", 16), "output.weight": ("Q6_K", 5)}
    assert sizes(gguf) == {"bytes": 55, "layer_bytes": 50, "layer_types": {"Q8_0": 34, "F32": 16}}


@pytest.mark.parametrize(("variant", "size"), [("internlm-20b", 128), ("internlm-7b", 128), (None, 64)])
def test_groups_of_gptq_divide_all_rows(configuration, variant: str | None, size: int):
    """Those of the published models, and of the real model of the benchmarks, whose rows have 576 weights."""
    small = {"hidden_size": 576, "intermediate_size": 1536, "num_attention_heads": 9}
    fields = json.loads((ROOT / "variants" / variant / "config.json").read_text()) if variant else small
    assert tool.group_size(configuration.InternLMConfig(**fields)) == size


def test_calibration_is_from_all_over_the_library(tiny_tokenizer):
    """Its texts do not overlap, and none of them is measured."""
    texts = tool.calibration_of(tiny_tokenizer, 64)
    assert len(set(texts)) == tool.CALIBRATION
    whole, measured = tool.library(), tool.documentation()
    found = [whole.find(text[8:-8]) for text in texts]
    assert found == sorted(found) and found[-1] > 0.9 * len(whole)
    assert not [text for text in texts if text[8:-8] in measured]


def numbers(perplexity: float, size: int) -> dict:
    return {"cosine": 0.99996, "same_token": 0.9876, "perplexity": perplexity, "bytes": size, "layer_bytes": size // 2}


def test_a_run_continues_an_earlier_one(tmp_path, monkeypatch):
    """Its rows are kept in the order of METHODS, whichever was measured first; of another setting they are refused."""
    monkeypatch.setitem(tool.METHODS, "torchao int8", ("torch",))
    path, setting = tmp_path / "new" / "results.json", {"model": "a", "tokens": 8}
    Results(path, setting).add("torchao int8", numbers(10.126, 1_000_000))
    Results(path, setting).add(ORIGINAL, numbers(10, 4_000_000))
    rows = json.loads(path.read_text())["rows"]
    assert [row["case"] for row in rows] == [ORIGINAL, "torchao int8"]
    assert rows[1]["versions"] == {"torch": torch.__version__} and rows[1]["environment"]["cores"]
    assert table(rows).splitlines()[4:6] == [
        "| bitsandbytes nf4 | – | – | – | – | – | – |",
        f"| torchao int8 | torch {torch.__version__} | 1.0000 | 98.8% | 10.13 | 1 MB, 4.0x | 0 MB, 4.0x |",
    ]
    with pytest.raises(SystemExit, match=r"has results of .*'tokens': 8.*and these would be of .*'tokens': 4"):
        Results(path, setting | {"tokens": 4})


def test_methods_whose_library_is_missing_are_known(monkeypatch):
    monkeypatch.setitem(tool.METHODS, "GGUF f32", ("torch", "no-such-package"))
    assert tool.installed(ORIGINAL) and not tool.installed("GGUF f32")
