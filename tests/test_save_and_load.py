"""Loading and saving a model folder as users do: offloaded, and copied together with its code."""

import os
import shutil
import subprocess
import sys

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from support.generation import PROMPTS, greedy_text


# Loads the folder argv[1] and prints the greedy continuation of argv[2].
FRESH_PROCESS = """
import sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1], trust_remote_code=True)
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True, dtype=torch.float32)
output = model.generate(**tokenizer(sys.argv[2], return_tensors="pt"), max_new_tokens=24, do_sample=False)
sys.stdout.buffer.write(tokenizer.decode(output[0], skip_special_tokens=True).encode())
"""


def test_offload_to_cpu_and_disk(tiny_dir, tiny_model, tiny_tokenizer, tmp_path):
    """Layers offloaded to the disk give the same text."""
    device_map = {"model.embed_tokens": "cpu", "model.norm": "cpu", "lm_head": "cpu"}
    device_map |= {f"model.layers.{i}": "cpu" if i < 2 else "disk" for i in range(4)}
    model = AutoModelForCausalLM.from_pretrained(
        tiny_dir, trust_remote_code=True, dtype=torch.float32, device_map=device_map, offload_folder=tmp_path
    )
    assert model.model.layers[3].mlp.up_proj.weight.device.type == "meta"
    assert model.hf_device_map["model.layers.3"] == "disk"
    for prompt in PROMPTS[:2]:
        assert greedy_text(model, tiny_tokenizer, prompt) == greedy_text(tiny_model, tiny_tokenizer, prompt)


def test_a_device_map_never_splits_a_layer(tiny_dir, tiny_model, tiny_tokenizer, tmp_path):
    """device_map="auto" with memory for the embeddings and a layer and a half: the second layer is on disk as a whole.

    A layer's residual connections add its input to its output, which would be on two devices.
    """
    layer = sum(weight.nbytes for weight in tiny_model.model.layers[0].parameters())
    memory = tiny_model.model.embed_tokens.weight.nbytes + layer  # and one more is held back for offloaded layers
    model = AutoModelForCausalLM.from_pretrained(
        tiny_dir,
        trust_remote_code=True,
        dtype=torch.float32,
        device_map="auto",
        max_memory={"cpu": memory + layer + layer // 2},
        offload_folder=tmp_path,
    )
    layers = {name: device for name, device in model.hf_device_map.items() if name.startswith("model.layers")}
    assert layers == {f"model.layers.{index}": "cpu" if index == 0 else "disk" for index in range(4)}
    assert greedy_text(model, tiny_tokenizer, PROMPTS[0]) == greedy_text(tiny_model, tiny_tokenizer, PROMPTS[0])


def test_saved_copy_in_a_fresh_process(tiny_dir, tmp_path):
    """save_pretrained copies the code; the copy generates without the original folder or its module cache."""
    source, copy = tmp_path / "source", tmp_path / "a.b-c 模型 7B"
    shutil.copytree(tiny_dir, source)
    model = AutoModelForCausalLM.from_pretrained(source, trust_remote_code=True, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=True)
    expected = greedy_text(model, tokenizer, PROMPTS[1])
    model.save_pretrained(copy)
    tokenizer.save_pretrained(copy)
    original = AutoConfig.from_pretrained(source, trust_remote_code=True).auto_map
    shutil.rmtree(source)

    for kind in ("configuration", "modeling", "tokenization"):
        code = (copy / f"{kind}_internlm.py").read_text()
        assert code == (tiny_dir / f"{kind}_internlm.py").read_text()
    saved = AutoConfig.from_pretrained(copy, trust_remote_code=True).auto_map
    assert saved["AutoModelForCausalLM"].endswith("modeling_internlm.InternLMForCausalLM")
    assert saved.keys() <= original.keys()
    environment = os.environ | {"HF_MODULES_CACHE": str(tmp_path / "modules")}
    command = [sys.executable, "-c", FRESH_PROCESS, str(copy), PROMPTS[1]]
    process = subprocess.run(command, capture_output=True, env=environment)
    assert process.returncode == 0, process.stderr.decode()
    assert process.stdout.decode() == expected
