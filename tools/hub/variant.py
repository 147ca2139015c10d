"""Which InternLM v1 variant a folder of weights holds, and the content of the repository's JSON files.

A checkpoint's own settings (sizes, window, rotary setting, sampling) are kept, read through InternLMConfig and written
in its normal form. The rest (auto_map, padding, stop tokens) is this package's.
"""

import hashlib
from pathlib import Path
from typing import Any

from tools import package
from tools.convert.checkpoint import generation_settings
from tools.convert.files import check_not_lfs_pointer, hash_file, read_json
from tools.hub.errors import InputError
from tools.package import ROOT


TINY = "internlm-tiny"  # the demonstration model, whose config.json is beside its weights, in checkpoints/tiny
CUSTOM = "custom"  # a model of this architecture in sizes of its own
# --prompt-format of a custom model: the variant whose chat template and stop tokens it gets.
PROMPT_FORMATS = {"early": "internlm-chat-7b", "later": "internlm-chat-20b", "none": "internlm-20b"}
OFFICIAL_TOKENIZER = "aab622d98c98677a1a51f969e25765154487bf3e85c7819db105db2fcacba83f"

# The sizes that distinguish variants. Not the window: a fine-tuned model may have another.
_SIZES = ("num_hidden_layers", "hidden_size", "num_attention_heads", "intermediate_size", "bias")
_CHECKPOINT_FIELDS = (
    *_SIZES,
    *("vocab_size", "hidden_act", "max_position_embeddings", "rms_norm_eps", "initializer_range"),
    *("rotary", "tie_word_embeddings", "use_cache", "bos_token_id", "eos_token_id"),
)


def variants() -> list[str]:
    """Every name that --variant accepts, without "custom"."""
    return [*sorted(path.name for path in (ROOT / "variants").iterdir() if path.is_dir()), TINY]


def template_of(variant: str | None, prompt_format: str | None) -> str | None:
    """The variant whose chat template and stop tokens a --variant gets, None if it is to be detected.

    Raises:
        InputError: A custom model's prompt format is not given, or that of another.
    """
    if variant == CUSTOM and prompt_format is None:
        raise InputError(
            f"--variant {CUSTOM} needs --prompt-format {', '.join(PROMPT_FORMATS)}: how the model was trained to chat."
        )
    if variant != CUSTOM and prompt_format is not None:
        raise InputError(f"--prompt-format {prompt_format} is for --variant {CUSTOM} only: others have their own.")
    return PROMPT_FORMATS[prompt_format] if prompt_format else variant


def variant_file(variant: str, name: str) -> Path:
    """The path of a variant's small file: in the variant's folder, else at the root of the package."""
    own = ROOT / "variants" / variant / name
    return own if own.is_file() else ROOT / name


def variant_config(variant: str) -> dict[str, Any]:
    """This package's config.json of a variant."""
    tiny = ROOT / "checkpoints" / "tiny" / "config.json"
    return read_json(tiny if variant == TINY and tiny.is_file() else variant_file(variant, "config.json"))


def is_chat(variant: str) -> bool:
    """Whether a variant has its own stop tokens, as only chat variants do."""
    return variant_file(variant, "generation_config.json") != ROOT / "generation_config.json"


def load_config(weights: Path) -> tuple[Any, dict[str, Any]]:
    """The weights folder's config.json, as an InternLMConfig and unchanged."""
    if not weights.is_dir():
        raise InputError(f"{weights} is not a folder: give the one that holds config.json and the weights.")
    path = weights / "config.json"
    if path.is_file():
        check_not_lfs_pointer(path)
    raw = read_json(path)
    if raw.get("model_type") != "internlm":
        raise InputError(
            f'{path} has model_type={raw.get("model_type")!r}, and this code is for InternLM v1 ("internlm") only: '
            "load other models with their own code."
        )
    if raw.get("quantization_config") is not None:
        raise InputError(f"{weights} is quantised: give the unquantised checkpoint, and quantise the result.")
    try:
        return package.load("configuration").InternLMConfig(**raw), raw
    except (ValueError, TypeError) as error:
        raise InputError(f"{path}: {error}") from error


def detect(weights: Path, config: Any, asked: str | None) -> tuple[str, str]:
    """The variant of a checkpoint, and how it was found.

    Args:
        weights: The folder, for its name.
        config: Its InternLMConfig.
        asked: The user's --variant, which must have the checkpoint's sizes.
    """
    known = {name: variant_config(name) for name in variants()}
    if asked is not None and asked not in (*known, CUSTOM):
        raise InputError(f"--variant {asked} is unknown: choose one of {', '.join((*known, CUSTOM))}.")
    same = [name for name in known if all(known[name].get(key) == getattr(config, key) for key in _SIZES)]
    if asked in (TINY, CUSTOM, *same):
        return asked, "as requested"
    sizes = ", ".join(f"{key} {getattr(config, key)}" for key in _SIZES)
    if asked is not None:
        raise InputError(f"{weights} ({sizes}) is not {asked}: leave --variant out, or give other weights.")
    if not same:
        raise InputError(
            f"{weights} ({sizes}) matches the sizes of no variant: there are {', '.join(known)}. For another model "
            f"add --variant {CUSTOM} --prompt-format {'|'.join(PROMPT_FORMATS)}."
        )
    window = config.max_position_embeddings
    fitting = [name for name in same if known[name]["max_position_embeddings"] == window] or same
    if len(fitting) == 1:
        return fitting[0], "by the sizes and window in config.json"
    # In huggingface_hub's cache a parent folder has the name: models--internlm--internlm-20b/snapshots/<hash>.
    path = weights.resolve()
    names = [path.name, *(part for part in path.parts if part.startswith("models--"))]
    if not (named := [name for name in fitting if any(name in part.lower() for part in names)]):
        raise InputError(f"{weights} can be {' or '.join(fitting)}, of equal sizes: choose one with --variant.")
    return max(named, key=len), "by the folder's name"


def config_json(variant: str, config: Any, raw: dict[str, Any], stored: str, notes: list[str]) -> dict[str, Any]:
    """config.json of the repository; `stored` is the dtype of the weights, for a config.json without one."""
    base = variant_config(variant)
    fields = {key: getattr(config, key) for key in _CHECKPOINT_FIELDS}
    for key, value in fields.items():
        if variant not in (TINY, CUSTOM) and base.get(key) != value:
            notes.append(f"config.json: {key} {value} is the checkpoint's own ({variant} has {base.get(key)})")
    if raw.get("pad_token_id") not in (0, None):
        notes.append(f"config.json: pad_token_id {raw['pad_token_id']} becomes 0 (<unk>): a stop token must not pad")
    return {
        **{key: base[key] for key in ("architectures", "model_type")},
        **fields,
        "auto_map": read_json(ROOT / "config.json")["auto_map"],
        "dtype": raw.get("dtype") or raw.get("torch_dtype") or stored,
        "pad_token_id": 0,
    }


def generation_json(variant: str, weights: Path, vocab_file: Path, notes: list[str]) -> dict[str, Any]:
    """generation_config.json of the repository: the checkpoint's sampling settings, the variant's stop tokens."""
    settings, unknown = generation_settings(weights)
    if unknown:
        notes.append(f"generation_config.json: {', '.join(unknown)} left out, which transformers does not know")
    fixed = read_json(variant_file(variant, "generation_config.json"))
    own = _as_list(settings.get("eos_token_id"))
    if not all(type(token) is int for token in own):
        raise InputError(f"{weights / 'generation_config.json'}: eos_token_id {own} must be ids: fix it.")
    stops = [2, *own]
    if is_chat(variant):
        stops.append(_piece_id(vocab_file, "<eoa>"))
        if settings and stops[-1] not in stops[:-1]:
            notes.append(f"generation_config.json: also stops at <eoa> ({stops[-1]}), which ends a reply")
    stops = list(dict.fromkeys(stops))
    return {**settings, **fixed, "eos_token_id": stops if len(stops) > 1 else stops[0]}


def _as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [] if value is None else [value]


def _pieces(vocab_file: Path) -> list[str]:
    """The pieces of a SentencePiece model, read and checked as the tokenizer does."""
    try:
        return package.load("sentencepiece").read_model(vocab_file).pieces
    except ValueError as error:
        raise InputError(str(error)) from error


def _piece_id(vocab_file: Path, piece: str) -> int:
    pieces = _pieces(vocab_file)
    if piece not in pieces:
        raise InputError(f"{vocab_file} has no {piece}, which ends a chat model's replies: pass the model's own file.")
    return pieces.index(piece)


def check_tokenizer(vocab_file: Path, vocab_size: int, notes: list[str]) -> int:
    """Refuse a tokenizer.model that cannot belong to this checkpoint; note an unofficial one. Returns its pieces."""
    if not vocab_file.is_file():
        raise InputError(f"{vocab_file} is missing: put InternLM's there, or pass the file with --tokenizer.")
    pieces = len(_pieces(vocab_file))
    if pieces > vocab_size:
        raise InputError(f"{vocab_file} has {pieces} pieces, the model only {vocab_size}: pass the model's own file.")
    digest = hashlib.sha256()
    hash_file(vocab_file, digest)
    if digest.hexdigest() != OFFICIAL_TOKENIZER:
        found = f"{pieces} pieces, {digest.hexdigest()}"
        notes.append(f"tokenizer.model is not the official one, but the checkpoint's own ({found})")
    return pieces


def tokenizer_json(weights: Path, pieces: int, vocab_size: int, notes: list[str]) -> dict[str, Any]:
    """tokenizer_config.json of the repository: this package's, with the checkpoint's added tokens."""
    made = read_json(ROOT / "tokenizer_config.json")
    added = {number: token for number, token in _added_tokens(weights).items() if number >= pieces}
    if not added:
        return made
    if sorted(added) != list(range(pieces, pieces + len(added))) or max(added) >= vocab_size:
        raise InputError(
            f"{weights}: the added tokens have the ids {sorted(added)[0]} to {max(added)}, but they must follow the "
            f"{pieces} pieces of tokenizer.model without a gap and end below vocab_size {vocab_size}: fix its files."
        )
    names = [token["content"] for token in added.values()]
    notes.append(f"tokenizer_config.json: {len(names)} added tokens are the checkpoint's own ({', '.join(names[:3])})")
    return {**made, "added_tokens_decoder": {str(number): added[number] for number in sorted(added)}}


_FLAGS = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}


def _added_tokens(weights: Path) -> dict[int, dict[str, Any]]:
    """The added tokens of a tokenizer, by id, from the three files in which transformers has stored them."""
    plain, listed, by_id = (weights / f"{name}.json" for name in ("added_tokens", "tokenizer", "tokenizer_config"))
    found = [_token(plain, number, {"content": text, **_FLAGS}) for text, number in _part(plain, None, dict).items()]
    found += [_token(listed, _field(entry, "id"), entry) for entry in _part(listed, "added_tokens", list)]
    found += [_token(by_id, number, entry) for number, entry in _part(by_id, "added_tokens_decoder", dict).items()]
    return dict(found)


def _part(path: Path, key: str | None, kind: type) -> Any:
    """The value of a key in a JSON file, or all of it; empty if there is none."""
    content = read_json(path) if path.is_file() else {}
    value = content if key is None else content.get(key)
    if not isinstance(value, kind | None):
        raise InputError(f"{path}: {key} is no {kind.__name__}: fix it, or remove the file.")
    return value or kind()


def _field(entry: Any, key: str) -> Any:
    return entry.get(key) if isinstance(entry, dict) else None


def _token(path: Path, number: Any, entry: Any) -> tuple[int, dict[str, Any]]:
    """An id and a token of a tokenizer's file, without fields that tokens do not have."""
    number = int(number) if isinstance(number, str) and number.isdecimal() else number
    flags = {key: _field(entry, key) for key in _FLAGS if _field(entry, key) is not None}
    content = _field(entry, "content")
    if [type(number), type(content), *map(type, flags.values())] != [int, str, *[bool] * len(flags)]:
        raise InputError(f"{path}: {entry!r} is no added token with the id {number!r}: fix it, or remove the file.")
    return number, {"content": content, **flags}
