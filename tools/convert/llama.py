"""A copy in the plain Llama layout, for engines that take no remote code.

InternLM v1 is Llama with optional attention biases, under the same names, so the weights are linked unchanged, and
only config.json and the tokenizer's files differ. Llama does not have dynamic NTK: beyond the trained window an engine
needs a fixed base, which `--context` writes.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from tools import package
from tools.convert.checkpoint import generation_settings, has_safetensors, pickled_tensors, safetensors_files
from tools.convert.files import (
    ConversionError,
    check_links,
    copy_file,
    json_bytes,
    link_or_copy,
    read_chunks,
    read_json,
    write_file,
    write_json,
)
from tools.convert.shards import INDEX_NAME, plan_shards, write_shards
from tools.convert.tensors import Tensor, check_finite, check_shapes, dtype_name, parameters, total_bytes


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
        context: Tokens to serve. Beyond the trained window, the base is fixed to dynamic NTK's at this length, and is
            used at every length. None: the trained window.

    Raises:
        ConversionError: The settings are not a valid InternLM configuration, or context is not positive.
    """
    if settings.get("model_type", "internlm") != "internlm":
        raise ConversionError(f"config.json is a {settings['model_type']!r} model's; only internlm can be converted.")
    try:
        config = package.load("configuration").InternLMConfig(**settings)
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


def _plan_weights(source: Path, config: dict[str, Any]) -> dict[Path, list[Tensor]] | list[Tensor]:
    """The copy's weights, compared with a config.json.

    Returns:
        Files to link, with their tensors; or tensors to write to new files, where the source is pickled or also holds
        stored inv_freq, which engines refuse.
    """
    files = safetensors_files(source) if has_safetensors(source) else {}
    stored = [tensor for tensors in files.values() for tensor in tensors]
    tensors = parameters(stored) if files else pickled_tensors(source)
    check_shapes(tensors, config)
    return files if files and len(tensors) == len(stored) else tensors


def _link_weights(files: dict[Path, list[Tensor]], target: Path, copy: bool, progress: bool) -> None:
    """Link, or copy, safetensors files and their index into a folder, after a check of every value.

    Raises:
        ConversionError: Values that are not finite, a full disk, or another file of the same name.
    """
    target.mkdir(parents=True, exist_ok=True)
    total = sum(total_bytes(tensors) for tensors in files.values())
    with tqdm(total=total, unit="B", unit_scale=True, disable=not progress) as bar:
        for path, tensors in files.items():
            bar.set_description(path.name)
            for tensor in tensors:
                check_finite(tensor.name, tensor.read())
                bar.update(tensor.nbytes)
            _link(path, target / path.name, copy)
    index = next(iter(files)).with_name(INDEX_NAME)
    if index.is_file():
        write_file(target / INDEX_NAME, [index.read_bytes()])


def _link(source: Path, target: Path, copy: bool) -> None:
    if target.is_symlink() or not target.exists():
        target.unlink(missing_ok=True)
        (copy_file if copy else link_or_copy)(source, target)
    elif not target.samefile(source):
        write_file(target, read_chunks(source))  # compares them


@dataclass
class LlamaCopy:
    """A copy that is planned, but not written."""

    settings: dict[str, Any]  # the source's config.json
    config: dict[str, Any]  # the copy's
    files: dict[str, bytes]  # the tokenizer, and generation_config.json
    weights: dict[Path, list[Tensor]] | list[Tensor]  # files to link, or tensors to write to new files
    notes: list[str]  # what the user should know, one line each

    @property
    def tensors(self) -> list[Tensor]:
        if isinstance(self.weights, list):
            return self.weights
        return [tensor for tensors in self.weights.values() for tensor in tensors]

    def shards(self, max_shard_bytes: int) -> dict[str, list[Tensor]]:
        """The copy's weight files by name."""
        if isinstance(self.weights, list):
            return plan_shards(self.weights, max_shard_bytes)
        return {path.name: tensors for path, tensors in self.weights.items()}

    def write(self, target: Path, copy: bool, max_shard_bytes: int, progress: bool) -> None:
        """Write the copy; after an interruption, the same call resumes."""
        if isinstance(self.weights, list):
            write_shards(self.weights, target, max_shard_bytes, progress)
        else:
            _link_weights(self.weights, target, copy, progress)
        for name, content in self.files.items():
            write_file(target / name, [content])
        write_json(target / "config.json", self.config)  # last: without it the folder is not a model

    def internlm_config(self) -> Any:
        """The InternLMConfig with which the source must give the copy's logits: the copy's window and fixed base."""
        settings = {key: value for key, value in self.settings.items() if not key.startswith("rope_")}
        settings["rotary"] = {"type": "origin", "base": self.config["rope_theta"]}
        settings["max_position_embeddings"] = self.config["max_position_embeddings"]
        return package.load("configuration").InternLMConfig(**settings)


def plan_llama(source: Path, context: int | None = None, tokenizer: bool = True) -> LlamaCopy:
    """Plan a folder's copy as a LlamaForCausalLM.

    Args:
        source: Folder with config.json and weights.
        context: See `llama_config`.
        tokenizer: Whether the copy gets a tokenizer.

    Raises:
        ConversionError: The source is damaged, inconsistent or not InternLM v1.
    """
    check_links(source)
    settings = read_json(source / "config.json")
    config = llama_config(settings, context)
    files = llama_tokenizer(source) if tokenizer else {}
    notes = [
        f"window {config['max_position_embeddings']} tokens, base {config['rope_theta']:.1f}",
        "tokenizer: " + (", ".join(files) or "none, as requested"),
    ]
    if (source / "generation_config.json").is_file():
        generation, _ = generation_settings(source)
        files["generation_config.json"] = json_bytes(generation)
    made = LlamaCopy(settings, config, files, _plan_weights(source, config), notes)
    config["torch_dtype"] = dtype_name(made.tensors[0].dtype)  # the name that every version reads
    return made


def load_tokenizer(source: Path) -> Any:
    """A folder's InternLMTokenizer.

    Raises:
        ConversionError: tokenizer.model is missing, damaged, or belongs to another model.
    """
    try:
        return package.load("tokenization").InternLMTokenizer.from_pretrained(source)
    except (ValueError, OSError) as error:
        raise ConversionError(f"The tokenizer of {source} cannot be read: {error}") from error


def llama_tokenizer(source: Path) -> dict[str, bytes]:
    """The tokenizer's files, by name, in the form that transformers reads without remote code.

    Args:
        source: Folder with tokenizer.model and, optionally, tokenizer_config.json.

    Raises:
        ConversionError: tokenizer.model is missing, damaged, or belongs to another model.
    """
    tokenizer = load_tokenizer(source)
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        # For llama.cpp's converter, which otherwise prepends a space to every text, and treats <eoa> as plain text.
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
        "tokenizer_config.json": json_bytes(config, sort_keys=False),
    }
    if tokenizer.chat_template:
        files["chat_template.jinja"] = tokenizer.chat_template.encode()
    if (source / "tokenizer.model").is_file():  # llama.cpp's converter reads it
        files["tokenizer.model"] = (source / "tokenizer.model").read_bytes()
    return files
