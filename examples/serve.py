"""`make serve`: a local OpenAI-compatible server, by transformers or by vLLM (docs/serving.md).

    python examples/serve.py [--model M] [any option of `transformers serve`, for example --port 8001 --compile]
    python examples/serve.py --engine vllm [--model M] [--context N] [any option of `vllm serve`]

Clients call the model by the name of its folder or repository.
"""

import argparse

from demo import complete_model


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],
        epilog="Other options are the engine's: see `transformers serve --help` or `vllm serve --help`.",
    )
    parser.add_argument("--model", help="a model folder or Hub repository id (default: the tiny model)")
    parser.add_argument(
        "--engine", choices=("transformers", "vllm"), default="transformers", help="default: %(default)s"
    )
    parser.add_argument(
        "--context", type=int, help="vllm: tokens to serve beyond the trained window, for example 16384"
    )
    arguments, options = parser.parse_known_args()
    if arguments.context is not None and arguments.context < 1:
        parser.error("--context must be positive")
    name = complete_model(arguments.model)
    if arguments.engine == "vllm":
        from tools.serving import vllm_server

        vllm_server.serve(name, arguments.context, options)
    else:
        if arguments.context is not None:
            print("CONTEXT is for ENGINE=vllm: transformers computes any length exactly, without a setting.")
        from tools.serving import transformers_server

        transformers_server.serve(name, options)


if __name__ == "__main__":
    main()
