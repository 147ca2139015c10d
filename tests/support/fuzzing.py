"""Fuzzing of the files that a checkpoint is loaded from: every outcome is success or one of the listed exceptions."""

import contextlib
import io
import json
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tqdm import tqdm

from tools import package


REFUSALS = (ValueError, OSError)  # from our classes; from transformers, for an unreadable file
FOREIGN = (TypeError, AttributeError, RecursionError)  # from transformers, before our code runs: see `_is_object`
DEADLINE = 10_000  # milliseconds for one input, on a shared machine

# Fields that transformers reads from these files besides ours, and names that must not be set from a file.
_CONFIG_FIELDS = (
    *("num_labels", "id2label", "label2id", "problem_type", "dtype", "torch_dtype", "layer_types", "architectures"),
    *("rope_theta", "rope_scaling", "rope_parameters", "head_dim", "num_key_value_heads", "quantization_config"),
    *("to_dict", "__class__", "attribute_map", "use_return_dict", "_attn_implementation", "name_or_path"),
)
_TOKENIZER_FIELDS = (
    *("add_bos_token", "add_eos_token", "added_tokens_decoder", "additional_special_tokens", "chat_template"),
    *("padding_side", "truncation_side", "model_max_length", "split_special_tokens", "tokenizer_object", "vocab_file"),
    *("clean_up_tokenization_spaces", "extra_special_tokens", "model_input_names", "unk_token", "decode", "__class__"),
)
_SCALARS = st.one_of(
    *(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=8)),
    st.sampled_from([-1, 2**20, 2**31, 2**63, 10**30, "dynamic", "</s>", "left"]),
)
_VALUES = st.recursive(
    _SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)


def _damage(content: bytes, where: float, data: bytes, truncate: bool) -> bytes:
    start = int(where * len(content))
    return content[:start] + data + (b"" if truncate else content[start + len(data) :])


def damaged(content: bytes, rest: bytes = b"") -> st.SearchStrategy[Callable[[], bytes]]:
    """`content` with some bytes replaced, or truncated after them. Built lazily, because hypothesis keeps values."""

    def lazily(*damage: Any) -> Callable[[], bytes]:
        return lambda: _damage(content, *damage) + rest

    return st.builds(lazily, st.floats(0, 1), st.binary(min_size=1, max_size=8), st.booleans())


def broken_json(content: bytes, fields: tuple[str, ...]) -> st.SearchStrategy[Any]:
    """A JSON file with changed fields or damaged bytes, another JSON value, or no JSON at all."""
    real = json.loads(content)
    names = st.sampled_from([*real, *fields]) | st.text(max_size=8)
    changed = st.dictionaries(names, _VALUES, min_size=1, max_size=4).map(lambda changes: real | changes)
    return st.one_of(
        changed.map(lambda value: json.dumps(value).encode()),
        damaged(content),
        st.one_of(_VALUES.map(lambda value: json.dumps(value).encode()), st.binary(max_size=64)),
    )


def _is_object(data: bytes) -> bool:
    """Whether a JSON file holds an object; for any other value, transformers itself raises FOREIGN exceptions."""
    try:
        return isinstance(json.loads(data), dict)
    except ValueError:
        return True
    except RecursionError:
        return False


def fuzz(load: Callable[[Path], Any], folder: Path, files: dict[str, st.SearchStrategy], inputs: int) -> Counter:
    """Load a folder `inputs` times, each time with one of `files` broken; count the outcomes by exception."""
    outcomes: Counter = Counter()
    originals = {name: (folder / name).read_bytes() for name in files}
    bar = tqdm(total=inputs, desc=f"fuzz {', '.join(files)}", mininterval=1)
    choices = st.one_of(*(strategy.map(lambda data, name=name: (name, data)) for name, strategy in files.items()))

    @settings(max_examples=inputs, derandomize=True, deadline=DEADLINE, suppress_health_check=list(HealthCheck))
    @given(choices)
    def attempt(choice: tuple[str, Any]) -> None:
        name, data = choice
        data = data() if callable(data) else data
        (folder / name).write_bytes(data)
        allowed = REFUSALS if name.endswith(".model") or _is_object(data) else (*REFUSALS, *FOREIGN)
        try:
            load(folder)
            outcomes["loaded"] += 1
        except allowed as error:
            outcomes[next(kind.__name__ for kind in allowed if isinstance(error, kind))] += 1
        finally:
            (folder / name).write_bytes(originals[name])
            bar.update()

    with contextlib.redirect_stdout(io.StringIO()), bar:
        attempt()
    return outcomes


def _copy(folder: Path, scratch: Path) -> Path:
    """A folder that may be written to: none of its files is a hard link."""
    return shutil.copytree(folder, scratch, dirs_exist_ok=True)


def fuzz_config(tiny: Path, scratch: Path, inputs: int) -> Counter:
    folder = _copy(tiny, scratch)
    load = package.load("configuration").InternLMConfig.from_pretrained
    return fuzz(
        load, folder, {"config.json": broken_json((folder / "config.json").read_bytes(), _CONFIG_FIELDS)}, inputs
    )


def fuzz_tokenizer(tiny: Path, scratch: Path, inputs: int) -> Counter:
    """tokenizer.model or tokenizer_config.json, at random."""
    folder = _copy(tiny, scratch)
    load = package.load("tokenization").InternLMTokenizer.from_pretrained
    files = {
        "tokenizer.model": damaged((folder / "tokenizer.model").read_bytes()) | st.binary(max_size=64),
        "tokenizer_config.json": broken_json((folder / "tokenizer_config.json").read_bytes(), _TOKENIZER_FIELDS),
    }
    return fuzz(load, folder, files, inputs)


def fuzz_saved_tokenizer(tiny: Path, scratch: Path, inputs: int) -> Counter:
    """tokenizer.json, which the Rust library reads."""
    tokenizer = package.load("tokenization").InternLMTokenizer
    tokenizer.from_pretrained(tiny).save_pretrained(scratch)
    content = (scratch / "tokenizer.json").read_bytes()
    # Half of the damage hits the settings at its start: the pieces and merges that follow are all alike.
    files = {"tokenizer.json": damaged(content) | damaged(content[:4000], rest=content[4000:])}
    return fuzz(tokenizer.from_pretrained, scratch, files, inputs)
