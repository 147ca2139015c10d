"""Convert InternLM v1 checkpoints: pickles to safetensors, training shards to the Hub's layout, the Hub's to
Llama's or to a GGUF file.

    convert_checkpoint.py safetensors SOURCE TARGET     pytorch_model*.bin -> model*.safetensors
    convert_checkpoint.py training SOURCE TARGET ...    model_tp*_pp*.pt -> model*.safetensors, config.json
    convert_checkpoint.py llama SOURCE TARGET ...       -> a LlamaForCausalLM, for engines that take no remote code
    convert_checkpoint.py gguf SOURCE FILE.gguf ...     -> one file for llama.cpp, Ollama, LM Studio, and a Modelfile

The source is only read. Files appear in the target when they are complete; after an interruption, the same command
resumes. Pickles are loaded as data: no code in them ever runs. Afterwards the result is read back and checked.
"""

import argparse
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any


if __package__ in (None, ""):  # run as a script: import the package `tools`, not the modules beside this file
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from tools.convert.checkpoint import copy_small_files, plan_pickles
from tools.convert.files import ConversionError, read_json, write_json
from tools.convert.shards import DEFAULT_SHARD_BYTES, plan_shards, write_shards
from tools.convert.tensors import Tensor, check_shapes, total_bytes


_GGUF_TYPES = ("f32", "f16", "bf16", "q8_0", "q4_k_m")
_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9}


def _size(text: str) -> int:
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([KMG]?)B?", text.strip().upper())
    if match is None or (size := int(float(match[1]) * _UNITS[match[2]])) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size; write for example 5GB or 500MB")
    return size


def _show_plan(shards: dict[str, list[Tensor]], args: argparse.Namespace, notes: list[str]) -> None:
    print(f"{args.source} -> {args.target}: without --dry-run, this would be written:")
    for name, shard in shards.items():
        print(f"  {name}  {len(shard)} tensors, {total_bytes(shard):,} bytes")
    for note in notes:
        print(f"  {note}")


def _check(tensors: list[Tensor], config: dict[str, Any], loaders: list[Callable], args: argparse.Namespace) -> None:
    """Check what was written, and print the result."""
    from tools.convert.check import check_files, check_logits

    folder = args.target
    print(f"{folder}: {check_files(folder, config, tensors)}")
    print(f"{folder}: {check_logits(loaders, folder) if args.check_logits else 'logits not compared, as requested'}")


def convert_safetensors(args: argparse.Namespace) -> None:
    tensors = plan_pickles(args.source)
    if args.dry_run:
        _show_plan(plan_shards(tensors, args.max_shard_size), args, [])
        return
    write_shards(tensors, args.target, args.max_shard_size, args.progress)
    copy_small_files(args.source, args.target)
    if not (args.target / "config.json").is_file():
        print(f"{args.target}: written, but not checked, because {args.source} has no config.json; see variants/")
        return

    from tools.convert.check import internlm_loader

    loaders = [internlm_loader(args.source, use_safetensors=False), internlm_loader(args.target)]
    _check(tensors, read_json(args.target / "config.json"), loaders, args)


def convert_training(args: argparse.Namespace) -> None:
    import torch

    from tools.convert.training import training_config, training_tensors

    if (args.window is None) == (args.config is None):
        raise ConversionError("Give one of --window and --config: the shards do not tell how long a sequence was.")
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

    from tools.convert.check import internlm_loader

    _check(tensors, config, [internlm_loader(args.target)], args)


def convert_llama(args: argparse.Namespace) -> None:
    from tools.convert.llama import plan_llama

    if args.source.resolve() == args.target.resolve():
        raise ConversionError("The Llama copy needs its own folder: choose another target.")
    copy = plan_llama(args.source, args.context, args.tokenizer)
    if args.dry_run:
        _show_plan(copy.shards(args.max_shard_size), args, copy.notes)
        return
    copy.write(args.target, args.copy, args.max_shard_size, args.progress)
    for note in copy.notes:
        print(f"{args.target}: {note}")

    from tools.convert.check import internlm_loader, llama_loader

    loaders = [internlm_loader(args.source, config=copy.internlm_config()), llama_loader(args.target)]
    _check(copy.tensors, copy.config, loaders, args)


def convert_gguf(args: argparse.Namespace) -> None:
    from tools.convert.gguf import plan_gguf

    made = plan_gguf(args.source, args.target, args.type, args.context)
    if args.dry_run:
        print(f"{args.source} -> {args.target}: without --dry-run, this would be written:")
        print(f"  {made.size}")
    else:
        made.write(args.progress)
        print(f"{args.target}: {made.check()}")
    for note in made.notes:
        print(f"{args.target}: {note}")


def _common_options() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(add_help=False)
    add = parser.add_argument
    add("source", type=Path, metavar="SOURCE", help="folder to read; it is not changed")
    add("--dry-run", action="store_true", help="check the source and show the plan; write nothing")
    add("--quiet", dest="progress", action="store_false", help="no progress bars")
    return parser


def _folder_options() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(add_help=False, parents=[_common_options()])
    add = parser.add_argument
    add("target", type=Path, metavar="TARGET", help="folder to write; it is created if necessary")
    add(
        "--max-shard-size",
        type=_size,
        default=DEFAULT_SHARD_BYTES,
        metavar="SIZE",
        help="of one file (default: 5GB)",
    )
    add("--no-logits", dest="check_logits", action="store_false", help="do not run the models to compare their logits")
    return parser


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="convert_checkpoint.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def add_command(
        name: str, run: Callable, help: str, description: str, options: Callable = _folder_options
    ) -> Callable:
        command = commands.add_parser(name, parents=[options()], help=help, description=description)
        command.set_defaults(run=run)
        return command.add_argument

    add_command(
        "safetensors",
        convert_safetensors,
        "pickled shards to safetensors",
        "Write pytorch_model.bin, or its shards, as safetensors with an index. Stored inv_freq is dropped.",
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
        help="a complete config.json, for example variants/internlm-7b/config.json",
    )
    add("--dtype", choices=("bfloat16", "float16", "float32"), help="dtype to convert to (default: as stored)")
    add = add_command(
        "llama",
        convert_llama,
        "a copy as LlamaForCausalLM with tokenizer.json, for engines that take no remote code",
        "Link the weights into a folder that loads as a LlamaForCausalLM. Exact up to the window in its config.json.",
    )
    context_help = (
        "serve N tokens; beyond the trained window the base becomes dynamic NTK's at N (20B, 16384: 40889.9)"
    )
    add("--context", type=int, metavar="N", help=context_help)
    add("--copy", action="store_true", help="copy the weights instead of linking them")
    add("--no-tokenizer", dest="tokenizer", action="store_false", help="weights and config.json only")
    add = add_command(
        "gguf",
        convert_gguf,
        "a GGUF file for llama.cpp, Ollama and LM Studio",
        "Write weights, settings and tokenizer to one file, and a Modelfile for Ollama beside it, for one window.",
        _common_options,
    )
    add("target", type=Path, metavar="FILE.gguf", help="file to write; its folder is created if necessary")
    type_help = "of the weights (default: f16); q4_k_m needs llama-cpp-python"
    add("--type", choices=_GGUF_TYPES, default="f16", help=type_help)
    add("--context", type=int, metavar="N", help=context_help)
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Run a conversion. Returns the exit status: 0, 1 after an error, 130 after Ctrl-C."""
    args = _parser().parse_args(arguments)
    try:
        args.run(args)
    except ConversionError as error:
        print(f"convert_checkpoint.py: {error}", file=sys.stderr)
        return 1
    except OSError as error:  # no such folder, or no permission
        reason = f"{error.filename}: {error.strerror}; choose another folder." if error.filename else str(error)
        print(f"convert_checkpoint.py: {reason}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("convert_checkpoint.py: interrupted; run the same command again to resume.", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
