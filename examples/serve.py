"""`make serve`: a local OpenAI-compatible server, using `transformers serve` (docs/serving.md).

    python examples/serve.py [--model M] [any option of `transformers serve`, for example --port 8001 --compile]

Clients use the same model id as --model.
"""

import argparse

from demo import complete_model
from transformers import AutoConfig
from transformers.cli.serving import model_manager
from transformers.cli.transformers import app
from transformers.dynamic_module_utils import get_class_from_dynamic_module


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], epilog="Other options are passed to `transformers serve`; see its --help."
    )
    parser.add_argument("--model", help="a model folder or Hub repository id (default: the tiny model)")
    arguments, options = parser.parse_known_args()
    name = complete_model(arguments.model)
    config = AutoConfig.from_pretrained(name, trust_remote_code=True)
    # `transformers serve` looks up the model's class by name in transformers, which does not contain remote code. It
    # must be set in the module object that `serve` uses: `import transformers` here may give another one (5.24).
    model_class = get_class_from_dynamic_module(config.auto_map["AutoModelForCausalLM"], name)
    setattr(model_manager.transformers, model_class.__name__, model_class)
    app(["serve", name, "--trust-remote-code", *options])


if __name__ == "__main__":
    main()
