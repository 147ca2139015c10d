"""Reads tokenizer.model, a SentencePiece model, without protobuf or sentencepiece.

The message formats are those of sentencepiece_model.proto.
"""

import os
import struct
from typing import Any, NamedTuple


NORMAL, UNKNOWN, CONTROL, USER_DEFINED, BYTE = 1, 2, 3, 4, 6  # SentencePiece.Type
_TRAINER, _NORMALIZER = 2, 3  # fields of its ModelProto; field 1 is a piece
# The settings that InternLMTokenizer implements: (message, field) -> name, required value, default in the format.
_SETTINGS = {
    (_TRAINER, 3): ("model_type (2 is BPE)", 2, 1),
    (_TRAINER, 35): ("byte_fallback", 1, 0),
    (_TRAINER, 24): ("treat_whitespace_as_suffix", 0, 0),
    (_NORMALIZER, 2): ("precompiled_charsmap", b"", b""),
    (_NORMALIZER, 3): ("add_dummy_prefix", 0, 1),
    (_NORMALIZER, 4): ("remove_extra_whitespaces", 0, 1),
    (_NORMALIZER, 5): ("escape_whitespaces", 1, 1),
}


def _varint(data: bytes, at: int) -> tuple[int, int]:
    """The number that starts at byte `at`, and the offset after it."""
    value = 0
    for shift in range(0, 64, 7):
        value |= (data[at] & 127) << shift
        at += 1
        if data[at - 1] < 128:
            return value, at
    raise ValueError(f"varint too long at byte {at}")


def _fields(data: bytes) -> list[tuple[int, Any]]:
    """Split a protobuf message into (field number, int or bytes); LookupError or ValueError if it is malformed."""
    found, at, size = [], 0, len(data)
    while at < size:
        key, at = (data[at], at + 1) if data[at] < 128 else _varint(data, at)
        kind = key & 7
        if kind in (0, 2):  # a number, or the length of a string or message
            value, at = (data[at], at + 1) if data[at] < 128 else _varint(data, at)
        else:
            value = {1: 8, 5: 4}[kind]
        if kind:
            if at + value > size:
                raise ValueError(f"truncated at byte {size}")
            value, at = data[at : at + value], at + value
        found.append((key >> 3, value))
    return found


class SentencePieceModel(NamedTuple):
    """The pieces of tokenizer.model, each list in the order of the ids."""

    pieces: list[str]
    scores: list[float]
    types: list[int]


def read_model(path: str | os.PathLike | None) -> SentencePieceModel:
    """Read a SentencePiece model.

    Raises:
        ValueError: the file is missing, a Git LFS pointer, broken, or a model with other settings than InternLM's.
            Not OSError: transformers would replace it by one that hides the cause.
    """
    if not path or not os.path.isfile(path):
        raise ValueError("tokenizer.model is missing: put InternLM's into the folder, next to tokenizer_config.json.")
    with open(path, "rb") as file:
        data = file.read()
    if data.startswith(b"version https://git-lfs"):
        raise ValueError(
            f"{path} is a Git LFS pointer ({len(data)} bytes), not the model: run `git lfs pull` in the folder, or "
            "fetch the file with `hf download`."
        )
    settings, pieces, scores, types = {}, [], [], []
    try:
        for message, content in _fields(data):
            if message == 1:
                piece = dict(_fields(content))
                pieces.append(piece[1].decode())
                scores.append(struct.unpack("<f", piece.get(2, bytes(4)))[0])
                types.append(piece.get(3, NORMAL))
            elif message in (_TRAINER, _NORMALIZER):
                settings.update({(message, field): value for field, value in _fields(content)})
        if not all(pieces) or len(set(pieces)) < len(pieces) or types.count(UNKNOWN) != 1 or not settings:
            raise ValueError("pieces or settings are missing")
    except (ValueError, LookupError, TypeError, AttributeError, struct.error) as error:
        raise ValueError(
            f"{path} ({len(data)} bytes) is not a complete SentencePiece model ({error!r}): fetch the file again."
        ) from error
    wrong = [
        f"{name} is {settings.get(key, unset)!r:.20}, not {needed!r}"
        for key, (name, needed, unset) in _SETTINGS.items()
        if settings.get(key, unset) != needed
    ]
    in_bytes = sorted(piece for piece, kind in zip(pieces, types, strict=True) if kind == BYTE)
    known = {NORMAL, UNKNOWN, CONTROL, USER_DEFINED, BYTE}
    if wrong or in_bytes != [f"<0x{byte:02X}>" for byte in range(256)] or set(types) - known:
        raise ValueError(
            f"{path} is another model's tokenizer, not InternLM's ({'; '.join(wrong) or 'its pieces differ'}): "
            "load it with its own class, or put InternLM's file there."
        )
    return SentencePieceModel(pieces, scores, types)


__all__ = ["BYTE", "CONTROL", "NORMAL", "UNKNOWN", "USER_DEFINED", "SentencePieceModel", "read_model"]
