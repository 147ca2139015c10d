"""Quantised by each library: close to the original, able to generate, unchanged by saving and loading.

QUANTISED holds the limits, of the tiny model; tools/measure_quantising.py measures a real one.
"""

import json
import subprocess
import sys
from typing import NamedTuple

import pytest
import torch
from transformers import AutoModelForCausalLM, GPTQConfig, QuantizedCache

from tools.measure_quantising import saved_tensors, settings, sizes

from support.paths import ROOT


pytestmark = pytest.mark.ecosystem

TEXT = (
    "Coming to the beautiful nature, we found a white swallow. The swallow was not afraid of people. The spring rain "
    "was soft and warm. 来到美丽的大自然，我们发现森林边上有一条弯弯的山泉。这条山泉的水又凉又甜。"
)
CALIBRATION = [  # not the sentences that are measured
    "In the evening the travellers went home slowly under the stars. White clouds drifted across the sky.",
    "We took out bread and cheese and ate it on a flat stone. They climbed the hill and listened to the birds.",
    "微风轻轻抚摸着树叶。再往前走，我和妹妹又看到了一座高高的寺庙。我们爬上山坡，听着鸟儿唱歌。",
    "当白天变长的时候，我和朋友们看到空气很清新，天空像大海一样蓝。阳光温暖而明亮。",
]


class Quantised(NamedTuple):
    """Limits for one library: min cosine of the logits, max ratio of the layers' bytes on disk to float32."""

    cosine: float
    ratio: float


QUANTISED = {
    "bitsandbytes 8-bit": Quantised(0.999, 0.27),
    "bitsandbytes nf4": Quantised(0.98, 0.18),
    "torchao int8": Quantised(0.999, 0.28),
    "GPTQ 8-bit": Quantised(0.999, 0.29),
    "GPTQ 4-bit": Quantised(0.98, 0.18),
}


def mean_cosine(one: torch.Tensor, other: torch.Tensor) -> float:
    return torch.nn.functional.cosine_similarity(one, other, dim=-1).mean().item()


@pytest.mark.parametrize("name", QUANTISED)
@torch.no_grad()
def test_quantised(tiny_dir, tiny_model, tiny_tokenizer, tmp_path, name):
    expected, inputs = QUANTISED[name], tiny_tokenizer(TEXT, return_tensors="pt")
    where = {"trust_remote_code": True, "device_map": "cpu"}
    model = AutoModelForCausalLM.from_pretrained(
        tiny_dir, dtype=torch.float32, quantization_config=settings(name, tiny_dir, CALIBRATION), **where
    )
    model.save_pretrained(tmp_path)  # before its first forward: bitsandbytes repacks 4-bit weights there
    logits, original = model(**inputs).logits.float()[0], tiny_model(**inputs).logits[0]
    cosine = mean_cosine(logits, original)
    tiny_model.save_pretrained(tmp_path / "float32")
    quantised, float32 = (sizes(saved_tensors(folder))["layer_bytes"] for folder in (tmp_path, tmp_path / "float32"))
    agree = (logits.argmax(-1) == original.argmax(-1)).float().mean().item()
    print(f"\n| {name} | {cosine:.4f} | {agree:.0%} | {float32 / quantised:.1f}x |")  # rows of docs/compatibility.md
    assert cosine >= expected.cosine and quantised / float32 <= expected.ratio

    if name.startswith("GPTQ"):
        # The layers were inserted after eval(), so they are still in training mode and compute in float32. Reloaded
        # 4-bit layers use a bfloat16 kernel; another backend computes as before.
        default = AutoModelForCausalLM.from_pretrained(tmp_path, **where)
        assert mean_cosine(default(**inputs).logits.float()[0], original) >= expected.cosine
        where["quantization_config"] = GPTQConfig(bits=int(name[5]), backend="torch")
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path, **where)
    torch.testing.assert_close(reloaded(**inputs).logits.float()[0], logits, atol=1e-4, rtol=0)
    prompt = tiny_tokenizer("Coming to the beautiful nature, we found", return_tensors="pt")
    one, other = (
        each.generate(**prompt, max_new_tokens=12, do_sample=False)[0].tolist() for each in (model, reloaded)
    )
    assert one == other and len(one) == prompt["input_ids"].shape[1] + 12


def test_quantised_cache(tiny_model, tiny_tokenizer):
    """Keys and values in 4 bits by hqq: most tokens stay the same, also across the window."""
    ids = tiny_tokenizer(TEXT, return_tensors="pt")["input_ids"]
    ids = tiny_model.generate(ids, min_length=240, max_length=240, do_sample=False)
    run = {"max_new_tokens": 30, "min_new_tokens": 30, "do_sample": False}
    plain = tiny_model.generate(ids, **run)[0, 240:]
    cache = QuantizedCache("hqq", tiny_model.config, nbits=4, axis_key=1, axis_value=1, residual_length=64)
    quantised = tiny_model.generate(ids, cache=cache, **run)[0, 240:]
    assert (plain == quantised).float().mean() > 0.8


def test_the_tool_measures_a_model(tiny_dir, tmp_path):
    """Its whole run: the original's row and the method's, with their versions; a second run measures nothing."""
    out = tmp_path / "results.json"
    command = [sys.executable, "tools/measure_quantising.py", "--model", tiny_dir, "--tokens", "512", "--out", out]
    for _ in range(2):
        run = subprocess.run(
            [*command, "--only", "torchao int8", "GGUF f32"], cwd=ROOT, capture_output=True, text=True
        )
        assert run.returncode == 0, run.stderr
        assert "\nGGUF f32 is missing: this environment lacks llama-cpp-python\n" in run.stdout
    assert "window/s" not in run.stderr
    original, quantised = json.loads(out.read_text())["rows"]
    assert (original["case"], quantised["case"]) == ("float32", "torchao int8")
    assert original["cosine"] == pytest.approx(1) and original["same_token"] == 1
    assert 0.999 < quantised["cosine"] < 0.99999 and quantised["perplexity"] != original["perplexity"]
    assert quantised["perplexity"] == pytest.approx(original["perplexity"], rel=0.02)
    assert quantised["layer_bytes"] < QUANTISED["torchao int8"].ratio * original["layer_bytes"]
    assert "torchao" in quantised["versions"]
