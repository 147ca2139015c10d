"""Checkpoints in the Hub's layout, read without building a model: pickled or safetensors, sharded or not."""

from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from tools.convert.files import ConversionError, check_links, check_not_lfs_pointer, read_json, write_file
from tools.convert.pickles import damaged, load_pickle, missing
from tools.convert.shards import DEFAULT_SHARD_BYTES, DTYPES, INDEX_NAME, SINGLE_NAME, write_shards
from tools.convert.tensors import Tensor, check_shapes, parameters


PICKLE_INDEX_NAME = "pytorch_model.bin.index.json"
PICKLE_NAME = "pytorch_model.bin"

# The settings and the tokenizer, beside the weights.
SMALL_FILES = (
    *("config.json", "generation_config.json", "tokenizer_config.json", "special_tokens_map.json"),
    *("chat_template.jinja", "tokenizer.model"),
)


def has_pickles(folder: Path) -> bool:
    return (folder / PICKLE_INDEX_NAME).is_file() or (folder / PICKLE_NAME).is_file()


def has_safetensors(folder: Path) -> bool:
    return (folder / INDEX_NAME).is_file() or (folder / SINGLE_NAME).is_file()


def _listed_files(folder: Path, index_name: str, single_name: str) -> dict[str, set[str] | None]:
    """The weight files of a folder with the names that its index lists for them, None without an index."""
    if (folder / index_name).is_file():
        weight_map = read_json(folder / index_name).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise ConversionError(f"{folder / index_name} has no weight_map; fetch it again.")
        listed: dict[str, set[str] | None] = {}
        for name, file in weight_map.items():
            if not isinstance(file, str) or Path(file).name != file or "\\" in file:
                raise ConversionError(
                    f"{folder / index_name} places {name} in {file!r}, outside its folder; do not use this checkpoint."
                )
            listed.setdefault(file, set()).add(name)
        return dict(sorted(listed.items()))
    if (folder / single_name).is_file():
        return {single_name: None}
    raise ConversionError(f"{folder} holds no weights: there is neither {index_name} nor {single_name}.")


def _check_index(path: Path, held: set[str], listed: set[str] | None) -> None:
    if listed is None or held == listed:
        return
    if lacking := sorted(listed - held):
        raise ConversionError(f"{path} lacks {lacking[0]}, which the index places there; fetch both again.")
    raise ConversionError(f"{path} holds {sorted(held - listed)[0]}, which the index does not list; fetch both again.")


def _unique(tensors: list[Tensor]) -> list[Tensor]:
    seen: set[str] = set()
    for tensor in tensors:
        if tensor.name in seen:
            raise ConversionError(f"{tensor.name} is in two shards; the checkpoint is inconsistent, fetch it again.")
        seen.add(tensor.name)
    return tensors


def pickled_tensors(folder: Path) -> list[Tensor]:
    """The parameters in a folder of pickled shards, in the order of the files; one file is mapped at a time.

    Raises:
        ConversionError: See `load_pickle`; also an index that does not match its files.
    """
    open_file = lru_cache(maxsize=1)(load_pickle)
    tensors = []
    for file, listed in _listed_files(folder, PICKLE_INDEX_NAME, PICKLE_NAME).items():
        path = folder / file
        state = open_file(path)
        _check_index(path, set(state), listed)
        for name, value in state.items():
            read = partial(lambda path, name: open_file(path)[name], path, name)
            tensors.append(Tensor(name, tuple(value.shape), value.dtype, read))
    return _unique(parameters(tensors))


def safetensors_files(folder: Path) -> dict[Path, list[Tensor]]:
    """The tensors of a folder of safetensors files, by file. Raises `ConversionError` as `pickled_tensors` does."""
    files = {}
    for file, listed in _listed_files(folder, INDEX_NAME, SINGLE_NAME).items():
        path = folder / file
        if not path.is_file():
            raise missing(path)
        check_not_lfs_pointer(path)
        try:
            with safe_open(path, "pt") as shard:
                names = list(shard.keys())
                _check_index(path, set(names), listed)
                files[path] = [_safetensor(path, name, shard.get_slice(name)) for name in names]
        except (SafetensorError, OSError) as error:
            raise damaged(path, error) from error
    _unique([tensor for tensors in files.values() for tensor in tensors])
    return files


def safetensors_tensors(folder: Path) -> list[Tensor]:
    """The tensors of `safetensors_files`, without the files."""
    return [tensor for tensors in safetensors_files(folder).values() for tensor in tensors]


def _safetensor(path: Path, name: str, view: Any) -> Tensor:
    def read() -> torch.Tensor:
        try:
            with safe_open(path, "pt") as shard:
                return shard.get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise damaged(path, error) from error

    dtype = DTYPES.get(view.get_dtype())
    if dtype is None:
        raise ConversionError(f"{name} in {path} is {view.get_dtype()}; a checkpoint holds F32, F16 or BF16.")
    return Tensor(name, tuple(view.get_shape()), dtype, read)


def plan_pickles(source: Path) -> list[Tensor]:
    """`pickled_tensors`, compared with the folder's config.json if it has one."""
    check_links(source)
    if has_safetensors(source) and not has_pickles(source):
        raise ConversionError(f"{source} holds safetensors already: there is nothing to convert.")
    tensors = pickled_tensors(source)
    if (source / "config.json").is_file():
        check_shapes(tensors, read_json(source / "config.json"))
    return tensors


def pickles_to_safetensors(
    source: Path, target: Path, max_shard_bytes: int = DEFAULT_SHARD_BYTES, progress: bool = True
) -> list[Path]:
    """Write a folder of pickled shards as safetensors; after an interruption, the same call resumes.

    Stored inv_freq is dropped. Where the source has a config.json, names and shapes must match it.

    Args:
        source: Folder with pytorch_model.bin, or with pytorch_model.bin.index.json and its shards. Never written to,
            unless it is the target too.
        target: Folder for model.safetensors, or model-0000N-of-0000M.safetensors and model.safetensors.index.json.
        max_shard_bytes: Maximum size of the tensors in one file.
        progress: Whether to show a progress bar on stderr.

    Returns:
        The weight files, without the index.

    Raises:
        ConversionError: The source is damaged, inconsistent or hostile, or the target cannot be written.
    """
    return write_shards(plan_pickles(Path(source)), Path(target), max_shard_bytes, progress)


def generation_settings(folder: Path) -> tuple[dict[str, Any], list[str]]:
    """The settings in a folder's generation_config.json that transformers knows, and the names of all others.

    What else people keep there (paths, notes, tokens of services) must not be published with a model.
    """
    from transformers import GenerationConfig

    path = folder / "generation_config.json"
    content = read_json(path) if path.is_file() else {}
    stamps = {"_from_model_config", "transformers_version"}
    known = GenerationConfig().to_dict().keys() - stamps
    return {key: content[key] for key in content if key in known}, sorted(content.keys() - known - stamps)


def copy_small_files(source: Path, target: Path) -> None:
    """Copy the settings and the tokenizer to converted weights, so that upload_to_hub.py can assemble the folder."""
    if source.resolve() != target.resolve():
        for name in SMALL_FILES:
            if (source / name).is_file():
                write_file(target / name, [(source / name).read_bytes()])
