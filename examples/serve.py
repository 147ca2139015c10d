"""`make serve`: an OpenAI-compatible server on this machine, by `transformers serve` (docs/serving.md).

    python examples/serve.py [--model M] [any option of `transformers serve`, for example --port 8001 --compile]

The model id that a client names is the one given here.
"""

import argparse

from demo import tiny_model
from transformers import AutoConfig
from transformers.cli.serving import model_manager
from transformers.cli.transformers import app
from transformers.dynamic_module_utils import get_class_from_dynamic_module


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], epilog="Other options go to `transformers serve`; see its --help."
    )
    parser.add_argument("--model", help="a model folder or Hub repository id (default: the tiny model)")
    arguments, options = parser.parse_known_args()
    name = arguments.model or tiny_model()
    config = AutoConfig.from_pretrained(name, trust_remote_code=True)
    # `transformers serve` looks the model's class up in transformers, by name, where remote code is not. Set in the
    # module that it sees: the one of an `import transformers` here may have been replaced since (5.24).
    model_class = get_class_from_dynamic_module(config.auto_map["AutoModelForCausalLM"], name)
    setattr(model_manager.transformers, model_class.__name__, model_class)
    app(["serve", name, "--trust-remote-code", *options])


if __name__ == "__main__":
    main()
