"""A copy in the plain Llama layout, for engines that take no remote code.

InternLM v1 is Llama with biases that one switch turns on or off, under the same names, so the weights are linked as
they are, and only config.json and the tokenizer's files change. What Llama has not is dynamic NTK: beyond the trained
window an engine needs a fixed base, which `--context` writes.
"""

import json
import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from tqdm import tqdm

from tools.convert.check import internlm
from tools.convert.files import (
    INDEX_NAME,
    ConversionError,
    Tensor,
    check_finite,
    check_shapes,
    write_file,
)
from tools.convert.checkpoint import DROPPED, has_safetensors, pickled_tensors, safetensors_files


_KEPT = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "hidden_act"),
    *("initializer_range", "rms_norm_eps", "use_cache", "pad_token_id", "bos_token_id", "eos_token_id"),
    "tie_word_embeddings",
)


def fixed_base(config: Any, context: int) -> float:
    """The base that dynamic NTK reaches at `context` tokens: 40889.9 for the 20B at 16384, 10000 within its window."""
    base, factor = config.rotary["base"], config.rotary["scaling_factor"]
    ratio = max(1.0, factor * context / config.max_position_embeddings - (factor - 1))
    return base * ratio ** (config.head_dim / (config.head_dim - 2))


def llama_config(settings: dict[str, Any], context: int | None = None) -> dict[str, Any]:
    """The config.json of the same model as a LlamaForCausalLM.

    Args:
        settings: An InternLM config.json, of any dialect.
        context: Tokens to serve. Beyond the trained window, the base is fixed to what dynamic NTK would use at this
            length, and is used at every length. None: the trained window.

    Raises:
        ConversionError: The settings are not a valid InternLM configuration, or context is not positive.
    """
    if settings.get("model_type", "internlm") != "internlm":
        raise ConversionError(f"config.json is of a {settings['model_type']!r} model; only internlm can be converted.")
    try:
        config = internlm("configuration").InternLMConfig(**settings)
    except (ValueError, TypeError) as error:
        raise ConversionError(str(error)) from error
    if context is not None and context < 1:
        raise ConversionError(f"--context {context} must be at least 1.")
    length = context or config.max_position_embeddings
    return {field: getattr(config, field) for field in _KEPT} | {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "attention_bias": config.bias,
        "mlp_bias": False,
        "attention_dropout": 0.0,
        "head_dim": config.head_dim,
        "num_key_value_heads": config.num_attention_heads,
        "max_position_embeddings": length,
        "rope_theta": fixed_base(config, length),
        "rope_scaling": None,
    }


def _pieces(path: Path) -> Iterator[bytes]:
    with open(path, "rb") as file:
        while piece := file.read(1 << 26):
            yield piece


def _link(source: Path, target: Path, copy: bool) -> None:
    """Give a file a second name, or copy it where that cannot be done (another disk, Windows without rights)."""
    if target.exists() and target.samefile(source):
        return
    if not copy and not target.exists():
        with suppress(OSError):
            os.link(source.resolve(), target)  # a Hub cache holds symbolic links: link the file itself
            return
    write_file(target, _pieces(source))


def plan_weights(source: Path, config: dict[str, Any]) -> dict[Path, list[Tensor]] | list[Tensor]:
    """What the copy's weights will be, compared with a config.json.

    Returns:
        Files to link, with what each holds; or tensors to write anew, where the source is pickled or also holds rotary
        frequencies, which engines refuse.
    """
    if not has_safetensors(source):
        tensors = pickled_tensors(source)
        check_shapes(tensors, config)
        return tensors
    files = safetensors_files(source)
    held = [tensor for tensors in files.values() for tensor in tensors]
    wanted = [tensor for tensor in held if not DROPPED.search(tensor.name)]
    check_shapes(wanted, config)
    return files if len(wanted) == len(held) else wanted


def link_weights(files: dict[Path, list[Tensor]], target: Path, copy: bool, progress: bool) -> None:
    """Link, or copy, safetensors files and their index into a folder, after a look at every value.

    Raises:
        ConversionError: Values that are not finite, a full disk, or a file in the way.
    """
    target.mkdir(parents=True, exist_ok=True)
    total = sum(tensor.nbytes for held in files.values() for tensor in held)
    with tqdm(total=total, unit="B", unit_scale=True, disable=not progress) as bar:
        for path, held in files.items():
            bar.set_description(path.name)
            for tensor in held:
                check_finite(tensor.name, tensor.read())
                bar.update(tensor.nbytes)
            _link(path, target / path.name, copy)
    index = next(iter(files)).with_name(INDEX_NAME)
    if index.is_file():
        write_file(target / INDEX_NAME, _pieces(index))


def llama_tokenizer(source: Path) -> dict[str, bytes]:
    """The tokenizer's files, by name, in the form that transformers reads without remote code.

    Args:
        source: Folder with tokenizer.model, and its tokenizer_config.json if there is one.

    Raises:
        ConversionError: tokenizer.model is missing, damaged, or another model's.
    """
    try:
        tokenizer = internlm("tokenization").InternLMTokenizer.from_pretrained(source)
    except (ValueError, OSError) as error:
        raise ConversionError(f"The tokenizer of {source} cannot be read: {error}") from error
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        # For llama.cpp's converter: else it puts a space before every text, and takes <eoa> for plain text.
        "add_prefix_space": False,
        "added_tokens_decoder": {
            str(index): {"content": token.content, "special": token.special}
            for index, token in tokenizer.added_tokens_decoder.items()
        },
        "add_bos_token": tokenizer.add_bos_token,
        "add_eos_token": tokenizer.add_eos_token,
        "clean_up_tokenization_spaces": False,
        "model_input_names": tokenizer.model_input_names,
        "model_max_length": tokenizer.model_max_length,
        "padding_side": tokenizer.padding_side,
        **{name: str(getattr(tokenizer, name)) for name in ("bos_token", "eos_token", "pad_token", "unk_token")},
    }
    files = {
        "tokenizer.json": tokenizer.backend_tokenizer.to_str(pretty=True).encode(),
        "tokenizer_config.json": (json.dumps(config, indent=2, ensure_ascii=False) + "\n").encode(),
    }
    if tokenizer.chat_template:
        files["chat_template.jinja"] = tokenizer.chat_template.encode()
    if (source / "tokenizer.model").is_file():  # llama.cpp's converter reads it
        files["tokenizer.model"] = (source / "tokenizer.model").read_bytes()
    return files
