"""The script that check.py runs in a fresh process: load a folder or repository, generate, print JSON."""

import argparse
import json
import math
import os
import sys
import time
from pathlib import Path
from typing import Any


if __name__ == "__main__":  # import the package `tools`, not the modules beside this file
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from tools.convert.checkpoint import safetensors_tensors
from tools.convert.tensors import check_finite
from tools.hub import errors


PROMPT = "Coming to the beautiful nature, we found"
NEW_TOKENS = 8


def check_values(folder: Path) -> None:
    """Read every tensor, one at a time, and refuse NaN and infinite values with a ConversionError."""
    from tqdm import tqdm

    for tensor in tqdm(safetensors_tensors(folder), desc="finite", unit="tensor", leave=False):
        check_finite(tensor.name, tensor.read())


def load_and_generate(where: str, revision: str | None = None) -> dict[str, Any]:
    """What `check_loading` returns, computed in this process."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
    from transformers.dynamic_module_utils import get_class_from_dynamic_module

    if os.path.isdir(where):
        check_values(Path(where))
    source: dict[str, Any] = {"revision": revision, "trust_remote_code": True}
    config = AutoConfig.from_pretrained(where, **source)
    for reference in config.auto_map.values():
        get_class_from_dynamic_module(reference.split("--")[-1], where, revision=revision)
    tokenizer = AutoTokenizer.from_pretrained(where, **source)
    model, report = AutoModelForCausalLM.from_pretrained(
        where, **source, dtype="auto", device_map="auto", output_loading_info=True
    )
    if wrong := {key: sorted(map(str, names)) for key, names in report.items() if names}:
        raise errors.LocalCheckFailed(f"the weights do not match the model: {wrong}")
    inputs = tokenizer(PROMPT, return_tensors="pt").to(model.device)
    with torch.no_grad():
        logits = float(model(**inputs, logits_to_keep=1).logits.float().abs().sum())
    if not math.isfinite(logits):
        raise errors.LocalCheckFailed("the logits are not finite: the weights or the environment are damaged.")
    output = model.generate(**inputs, max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS, do_sample=False)
    return {"tokens": output[0, inputs["input_ids"].shape[1] :].tolist(), "logits": logits}


def main() -> int:
    parser = argparse.ArgumentParser(description="Load a model folder or repository and generate; prints JSON.")
    parser.add_argument("where", help="folder or repository id")
    parser.add_argument("--revision", help="commit of the repository")
    arguments = parser.parse_args()
    for wait in (1, 5, None):
        try:
            result = load_and_generate(arguments.where, arguments.revision)
            break
        except Exception as error:  # any failure while loading is the result
            known = errors.explain(error)
            network = bool(arguments.revision) and isinstance(known, errors.NetworkLost | errors.ServerFailed)
            text = str(known) if network else f"{type(error).__name__}: {error}"
            result = {"error": " ".join(text.split()), "network": network}
            # The client itself tries again after a lost connection, and not after an error status of a download.
            if wait is None or not (network and isinstance(known, errors.ServerFailed)):
                break
            time.sleep(wait)  # what has been downloaded is in the cache
    print(json.dumps(result))
    return int("error" in result)


if __name__ == "__main__":
    sys.exit(main())
