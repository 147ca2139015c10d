"""Run a model larger than memory by offloading layers to disk. python examples/offload.py --memory 2MB"""

import argparse
import tempfile
from collections import Counter

from demo import complete_model
from transformers import AutoModelForCausalLM, AutoTokenizer, logging


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", help="a model folder or Hub repository id (default: the tiny model)")
    parser.add_argument(
        "--memory", default="2MB", help="how much of the model may stay in memory (default: %(default)s)"
    )
    parser.add_argument("--prompt", default="In the evening")
    arguments = parser.parse_args()
    logging.set_verbosity_error()
    name = complete_model(arguments.model)
    tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=True)
    with tempfile.TemporaryDirectory() as folder:
        # With a GPU, max_memory={0: "20GB", "cpu": "30GB"} fills it first.
        model = AutoModelForCausalLM.from_pretrained(
            name,
            trust_remote_code=True,
            dtype="auto",
            device_map="auto",
            max_memory={"cpu": arguments.memory},
            offload_folder=folder,
        )
        # A model that fits on one device has no map.
        devices = Counter(str(device) for device in getattr(model, "hf_device_map", {"": model.device}).values())
        print("parts of the model:", ", ".join(f"{count} on {device}" for device, count in devices.items()))
        inputs = tokenizer(arguments.prompt, return_tensors="pt")
        output = model.generate(**inputs, max_new_tokens=30, do_sample=False)
    print(tokenizer.decode(output[0], skip_special_tokens=True))


if __name__ == "__main__":
    main()
