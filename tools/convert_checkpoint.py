"""Convert InternLM v1 checkpoints: pickles to safetensors, training shards to the Hub's layout, the Hub's to Llama's.

    convert_checkpoint.py safetensors SOURCE TARGET     pytorch_model*.bin -> model*.safetensors
    convert_checkpoint.py training SOURCE TARGET ...    model_tp*_pp*.pt -> model*.safetensors, config.json
    convert_checkpoint.py llama SOURCE TARGET ...       -> a LlamaForCausalLM, for engines that take no remote code

The source is only read. Files appear in the target when they are complete; after an interruption, the same command
goes on. Pickles are read as data: no code in them is ever run. Afterwards the result is read back and checked.
"""

import argparse
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any


if __package__ in (None, ""):  # started as a script: the folder above holds the package `tools`
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tools.convert.files import (
    DEFAULT_SHARD_BYTES,
    ConversionError,
    Tensor,
    check_shapes,
    plan_shards,
    read_json,
    write_file,
    write_json,
    write_shards,
)
from tools.convert.checkpoint import pickles_to_safetensors, plan_pickles


__all__ = ["ConversionError", "main", "pickles_to_safetensors"]

# Beside the weights, what a converted folder needs to be assembled into a repository by upload_to_hub.py.
_SMALL_FILES = (
    *("config.json", "generation_config.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json"),
    "chat_template.jinja",
)
_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9}


def _size(text: str) -> int:
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([KMG]?)B?", text.strip().upper())
    if match is None or (size := int(float(match[1]) * _UNITS[match[2]])) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size; write for example 5GB or 500MB")
    return size


def _show_plan(shards: dict[str, list[Tensor]], args: argparse.Namespace, notes: list[str]) -> None:
    print(f"{args.source} -> {args.target}: would be written, without --dry-run:")
    for name, shard in shards.items():
        print(f"  {name}  {len(shard)} tensors, {sum(tensor.nbytes for tensor in shard):,} bytes")
    for note in notes:
        print(f"  {note}")


def _copy_small_files(source: Path, target: Path) -> None:
    if source.resolve() != target.resolve():
        for name in _SMALL_FILES:
            if (source / name).is_file():
                write_file(target / name, iter([(source / name).read_bytes()]))


def _internlm_loader(folder: Path, config: Any = None, **settings: Any) -> Callable:
    from tools.convert.check import internlm

    model = internlm("modeling").InternLMForCausalLM
    return lambda dtype: model.from_pretrained(folder, config=config, dtype=dtype, **settings)


def _report(tensors: list[Tensor], config: dict[str, Any], loaders: list[Callable], args: argparse.Namespace) -> None:
    """Check what was written, and say so. The models are imported only here: planning needs none of them."""
    from tools.convert.check import check_files, check_logits

    folder = args.target
    print(f"{folder}: {check_files(folder, config, tensors)}")
    print(f"{folder}: {check_logits(loaders, folder) if args.check_logits else 'logits not compared, as you asked'}")


def convert_safetensors(args: argparse.Namespace) -> None:
    tensors = plan_pickles(args.source)
    if args.dry_run:
        _show_plan(plan_shards(tensors, args.max_shard_size), args, [])
        return
    write_shards(tensors, args.target, args.max_shard_size, args.progress)
    _copy_small_files(args.source, args.target)
    if not (args.target / "config.json").is_file():
        print(f"{args.target}: written, but not checked, because {args.source} has no config.json; see variants/")
        return
    loaders = [_internlm_loader(args.source, use_safetensors=False), _internlm_loader(args.target)]
    _report(tensors, read_json(args.target / "config.json"), loaders, args)


def convert_training(args: argparse.Namespace) -> None:
    import torch

    from tools.convert.training import training_config, training_tensors

    if (args.window is None) == (args.config is None):
        raise ConversionError("Give one of --window and --config: the shards do not say how long a sequence was.")
    tensors = training_tensors(args.source, args.dtype and getattr(torch, args.dtype))
    config = read_json(args.config) if args.config else training_config(args.source, tensors, args.window)
    check_shapes(tensors, config)
    if args.dry_run:
        sizes = ("num_hidden_layers", "hidden_size", "num_attention_heads", "intermediate_size", "bias")
        shown = ", ".join(f"{field} {config.get(field)}" for field in (*sizes, "max_position_embeddings"))
        _show_plan(plan_shards(tensors, args.max_shard_size), args, [f"config.json: {shown}"])
        return
    write_shards(tensors, args.target, args.max_shard_size, args.progress)
    write_json(args.target / "config.json", config)
    _report(tensors, config, [_internlm_loader(args.target)], args)


def convert_llama(args: argparse.Namespace) -> None:
    from transformers import LlamaForCausalLM

    from tools.convert import llama

    if args.source.resolve() == args.target.resolve():
        raise ConversionError("The Llama copy needs a folder of its own: choose another target.")
    settings = read_json(args.source / "config.json")
    config = llama.llama_config(settings, args.context)
    files = llama.llama_tokenizer(args.source) if args.tokenizer else {}
    length, base = config["max_position_embeddings"], config["rope_theta"]
    weights = llama.plan_weights(args.source, config)
    notes = [f"window {length} tokens, base {base:.1f}", "tokenizer: " + (", ".join(files) or "none, as you asked")]
    linked = isinstance(weights, dict)
    tensors = [tensor for held in weights.values() for tensor in held] if linked else weights
    config["torch_dtype"] = str(tensors[0].dtype).removeprefix("torch.")  # the name that every version reads
    if args.dry_run:
        shards = {path.name: held for path, held in weights.items()} if linked else None
        _show_plan(shards or plan_shards(weights, args.max_shard_size), args, notes)
        return
    if linked:
        llama.link_weights(weights, args.target, args.copy, args.progress)
    else:
        write_shards(weights, args.target, args.max_shard_size, args.progress)
    for name, content in files.items():
        write_file(args.target / name, iter([content]))
    if (args.source / "generation_config.json").is_file():
        content = (args.source / "generation_config.json").read_bytes()
        write_file(args.target / "generation_config.json", iter([content]))
    write_json(args.target / "config.json", config)  # last: without it the folder is no model
    for note in notes:
        print(f"{args.target}: {note}")
    rotary = {"rotary": {"type": "origin", "base": base}, "max_position_embeddings": length}
    without = {key: value for key, value in settings.items() if not key.startswith("rope_")}
    ours = llama.internlm("configuration").InternLMConfig(**(without | rotary))
    theirs = lambda dtype: LlamaForCausalLM.from_pretrained(args.target, dtype=dtype)  # noqa: E731
    _report(tensors, config, [_internlm_loader(args.source, config=ours), theirs], args)


def _common_options() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(add_help=False)
    add = parser.add_argument
    add("source", type=Path, metavar="SOURCE", help="folder to read; it is not changed")
    add("target", type=Path, metavar="TARGET", help="folder to write; it is made if need be")
    add("--dry-run", action="store_true", help="check the source and show the plan; write nothing")
    add("--max-shard-size", type=_size, default=DEFAULT_SHARD_BYTES, metavar="SIZE", help="of a file (default: 5GB)")
    add("--no-logits", dest="check_logits", action="store_false", help="do not run the models to compare")
    add("--quiet", dest="progress", action="store_false", help="no progress bars")
    return parser


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="convert_checkpoint.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def add_command(name: str, run: Callable, help: str, description: str) -> Callable:
        command = commands.add_parser(name, parents=[_common_options()], help=help, description=description)
        command.set_defaults(run=run)
        return command.add_argument

    add_command(
        "safetensors",
        convert_safetensors,
        "pickled shards to safetensors",
        "Write pytorch_model.bin, or its shards, as safetensors with an index. Stored rotary frequencies are dropped.",
    )
    add = add_command(
        "training",
        convert_training,
        "a training run's model_tp*_pp*.pt to safetensors and config.json",
        "Merge the tensor- and pipeline-parallel shards of InternLM's training code. Give --window or --config.",
    )
    add("--window", type=int, metavar="N", help="tokens per training sequence: 2048, 4096, ...")
    add(
        "--config",
        type=Path,
        metavar="FILE",
        help="a finished config.json, for example variants/internlm-7b/config.json",
    )
    add("--dtype", choices=("bfloat16", "float16", "float32"), help="convert to it (default: as stored)")
    add = add_command(
        "llama",
        convert_llama,
        "a copy as LlamaForCausalLM with tokenizer.json, for engines that take no remote code",
        "Link the weights into a folder that says LlamaForCausalLM. Exact up to the window that its config.json says.",
    )
    context_help = (
        "serve N tokens; beyond the trained window the base becomes dynamic NTK's at N (20B, 16384: 40889.9)"
    )
    add("--context", type=int, metavar="N", help=context_help)
    add("--copy", action="store_true", help="copy the weights instead of linking them")
    add("--no-tokenizer", dest="tokenizer", action="store_false", help="weights and config.json only")
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Run a conversion. Returns the exit status: 0, 1 after an error, 130 after Ctrl-C."""
    args = _parser().parse_args(arguments)
    try:
        args.run(args)
    except ConversionError as error:
        print(f"convert_checkpoint.py: {error}", file=sys.stderr)
        return 1
    except OSError as error:  # no folder, or one that may not be read or written
        reason = f"{error.filename}: {error.strerror}; name another folder." if error.filename else str(error)
        print(f"convert_checkpoint.py: {reason}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("convert_checkpoint.py: interrupted; run the same command again to go on.", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
