"""A GGUF file, for llama.cpp and what is built on it (Ollama, LM Studio): weights, settings and tokenizer in one.

llama.cpp runs InternLM v1 as Llama with attention biases, so the settings are those of the Llama copy. It rotates
neighbouring dimensions of a head, where the checkpoint's are half a head apart: the rows of q and k change places.
"""

import io
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from tqdm import tqdm

from tools import package
from tools.convert.checkpoint import generation_settings
from tools.convert.files import CHUNK_BYTES, PARTIAL, ConversionError, new_file, read_chunks, write_file
from tools.convert.llama import LlamaCopy, load_tokenizer, plan_llama
from tools.convert.ollama import go_template, modelfile
from tools.convert.shards import check_room
from tools.convert.tensors import Tensor, dtype_name, read_checked


_MISSING = "The package {0} is missing: pip install {0} (requirements-llamacpp.txt has the tested version)."

try:
    import gguf
    from gguf import GGMLQuantizationType as Kind
    from gguf import LlamaFileType, TokenType
except ModuleNotFoundError as error:
    raise ConversionError(_MISSING.format("gguf")) from error


# What this module writes itself. Half precision, and the scale of 32 weights in Q8_0, are float16: the largest value.
_TYPES = {
    "f32": (Kind.F32, LlamaFileType.ALL_F32, float("inf")),
    "f16": (Kind.F16, LlamaFileType.MOSTLY_F16, 65504.0),
    "bf16": (Kind.BF16, LlamaFileType.MOSTLY_BF16, float("inf")),
    "q8_0": (Kind.Q8_0, LlamaFileType.MOSTLY_Q8_0, 65504.0 * 127),
}
_FULL = {"float32": "f32", "float16": "f16", "bfloat16": "bf16"}  # what a checkpoint's dtype is without rounding
_UNUSED_SCORE = -10000.0


def interleave(rows: torch.Tensor, heads: int) -> torch.Tensor:
    """The rows of a q or k projection (or bias) in llama.cpp's order: 0, D/2, 1, D/2 + 1, ... of each head."""
    return rows.unflatten(0, (heads, 2, -1)).transpose(1, 2).reshape(rows.shape)


class Vocabulary(NamedTuple):
    """The tokenizer as llama.cpp has it; each list in the order of the ids."""

    pieces: list[str]
    scores: list[float]
    types: list[int]
    stop: int | None  # <eoa>, of a chat model
    chat_template: str | None
    go_template: str | None


def read_vocabulary(source: Path, size: int, generation: dict[str, Any]) -> Vocabulary:
    """Read a folder's tokenizer.

    Args:
        source: Holds tokenizer.model.
        size: Rows of the embedding; those without a piece get an unused one.
        generation: generation_config.json. A chat model's lists <eoa> in `eos_token_id`; a base model gets neither
            <eoa> as a stop token nor a chat template, although its folder may hold one.

    Raises:
        ConversionError: The tokenizer cannot be read, or has more tokens than the model.
    """
    tokenizer = load_tokenizer(source)
    try:
        pieces, scores, types = map(list, package.load("sentencepiece").read_model(source / "tokenizer.model"))
    except ValueError as error:  # a folder with tokenizer.json alone has no scores
        raise ConversionError(str(error)) from error
    added = tokenizer.added_tokens_decoder  # includes the control tokens of tokenizer.model
    count = max(len(pieces), *(index + 1 for index in added))
    if count > size:
        raise ConversionError(f"The tokenizer of {source} has {count} tokens, but config.json's vocab_size is {size}.")
    unused = range(len(pieces), size)
    pieces += [f"[PAD{index}]" for index in unused]
    scores += [_UNUSED_SCORE for _ in unused]
    types += [TokenType.UNUSED for _ in unused]
    for index, token in added.items():
        pieces[index] = token.content
        if types[index] != TokenType.UNKNOWN:
            types[index] = TokenType.CONTROL if token.special else TokenType.USER_DEFINED
    ends = generation.get("eos_token_id")
    stop = tokenizer.convert_tokens_to_ids("<eoa>")
    if stop not in (ends if isinstance(ends, list) else [ends]):
        return Vocabulary(pieces, scores, types, None, None, None)
    template = tokenizer.chat_template
    return Vocabulary(pieces, scores, types, stop, template, template and go_template(tokenizer))


class Entry(NamedTuple):
    """One tensor of a GGUF file."""

    name: str
    tensor: Tensor
    heads: int | None  # whose rows are interleaved
    kind: Kind
    limit: float  # of absolute values

    @property
    def nbytes(self) -> int:
        block, size = gguf.GGML_QUANT_SIZES[self.kind]
        return self.tensor.nbytes // self.tensor.dtype.itemsize // block * size

    def chunks(self) -> Iterator[memoryview]:
        """The bytes, some rows at a time.

        Raises:
            ConversionError: Values that are not finite, or too large for the type.
        """
        values = read_checked(self.tensor)
        largest = values.abs().max().item()
        if largest > self.limit:
            raise ConversionError(f"{self.tensor.name} holds {largest:.3g}, which float16 cannot: use --type bf16.")
        values = interleave(values, self.heads) if self.heads else values
        for rows in values.split(max(1, CHUNK_BYTES // (values[0].numel() * 4))):
            yield memoryview(gguf.quantize(rows.float().numpy(), self.kind)).cast("B")


def _entries(copy: LlamaCopy, kind: Kind, limit: float) -> list[Entry]:
    """The tensors of a GGUF file, in the order that is cheapest to read. Norms and biases stay in float32."""
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, copy.config["num_hidden_layers"])
    entries = []
    for tensor in copy.tensors:
        if tensor.name == "lm_head.weight" and copy.config["tie_word_embeddings"]:
            continue  # llama.cpp multiplies by the embedding if there is no other matrix
        name = names.get_name(tensor.name, (".weight", ".bias"))
        heads = copy.config["num_attention_heads"] if ".q_proj." in tensor.name or ".k_proj." in tensor.name else None
        if len(tensor.shape) == 1:
            own = Kind.F32, float("inf")
        elif tensor.shape[-1] % gguf.GGML_QUANT_SIZES[kind][0]:  # as llama.cpp's own converter does
            own = Kind.F16, 65504.0
        else:
            own = kind, limit
        entries.append(Entry(name, tensor, heads, *own))
    return entries


@dataclass
class GgufCopy:
    """A GGUF file that is planned, but not written."""

    target: Path
    type: str
    copy: LlamaCopy
    vocabulary: Vocabulary
    generation: dict[str, Any]

    @property
    def written_type(self) -> str:
        """What is written first: K-quants are made of a file in the checkpoint's dtype by llama.cpp."""
        return self.type if self.type in _TYPES else _FULL[dtype_name(self.copy.tensors[0].dtype)]

    @property
    def entries(self) -> list[Entry]:
        kind, _, limit = _TYPES[self.written_type]
        return _entries(self.copy, kind, limit)

    @property
    def size(self) -> str:
        """What is written, and how large it is before llama.cpp makes a K-quant of it."""
        entries = self.entries
        of_type = "" if self.type in _TYPES else f" as {self.written_type}, then made {self.type} by llama.cpp"
        return f"{self.target.name}  {len(entries)} tensors, {sum(entry.nbytes for entry in entries):,} bytes{of_type}"

    @property
    def modelfile(self) -> tuple[Path, bytes]:
        generation = None if self.vocabulary.stop is None else self.generation
        window = self.copy.config["max_position_embeddings"]
        text = modelfile(self.target.name, window, self.vocabulary.go_template, generation)
        return self.target.with_suffix(".Modelfile"), text.encode()

    @property
    def notes(self) -> list[str]:
        """What the user should know, one line each."""
        stop, chat, go = self.vocabulary.stop, self.vocabulary.chat_template, self.vocabulary.go_template
        notes = [self.copy.notes[0]]
        if stop is None:
            notes.append("base model: stops at </s>, no chat template (generation_config.json does not list <eoa>)")
        else:
            notes.append(f"chat model: stops at <eoa> ({stop}), {'with' if chat else 'without'} a chat template")
        if chat and not go:
            notes.append("the chat template is in neither of InternLM's formats: write TEMPLATE in the Modelfile")
        return notes

    def _header(self) -> bytes:
        """The file up to the values of the first tensor."""
        writer = gguf.GGUFWriter(None, gguf.MODEL_ARCH_NAMES[gguf.MODEL_ARCH.LLAMA])
        config, (_, file_type, _) = self.copy.config, _TYPES[self.written_type]
        writer.add_type(gguf.GGUFType.MODEL)
        writer.add_name(self.target.stem)
        writer.add_file_type(file_type)
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        writer.add_vocab_size(config["vocab_size"])
        writer.add_context_length(config["max_position_embeddings"])
        writer.add_embedding_length(config["hidden_size"])
        writer.add_feed_forward_length(config["intermediate_size"])
        writer.add_block_count(config["num_hidden_layers"])
        writer.add_head_count(config["num_attention_heads"])
        writer.add_head_count_kv(config["num_key_value_heads"])
        writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
        writer.add_rope_dimension_count(config["head_dim"])
        writer.add_rope_freq_base(config["rope_theta"])
        self._add_vocabulary(writer)
        for entry in self.entries:
            # float32 only says that the shape is in values, not in bytes.
            writer.add_tensor_info(entry.name, entry.tensor.shape, np.dtype("float32"), entry.nbytes, entry.kind)
        buffer = io.BytesIO()
        writer.fout, writer.state = [buffer], gguf.WriterState.EMPTY  # instead of a file that it would open by name
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        writer.write_padding(buffer, buffer.tell())
        return buffer.getvalue()

    def _add_vocabulary(self, writer: Any) -> None:
        config, vocabulary = self.copy.config, self.vocabulary
        writer.add_tokenizer_model("llama")
        writer.add_tokenizer_pre("default")
        writer.add_token_list(vocabulary.pieces)
        writer.add_token_scores(vocabulary.scores)
        writer.add_token_types(vocabulary.types)
        writer.add_bos_token_id(config["bos_token_id"])
        writer.add_eos_token_id(config["eos_token_id"])
        writer.add_pad_token_id(config["pad_token_id"])
        writer.add_unk_token_id(vocabulary.types.index(TokenType.UNKNOWN))
        writer.add_add_bos_token(True)
        writer.add_add_eos_token(False)
        writer.add_add_space_prefix(False)
        if vocabulary.stop is not None:
            writer.add_eot_token_id(vocabulary.stop)
        if vocabulary.chat_template:
            writer.add_chat_template(vocabulary.chat_template)

    def _content(self) -> Iterator[bytes | memoryview]:
        yield self._header()
        for entry in self.entries:
            yield from entry.chunks()
            yield bytes(-entry.nbytes % gguf.GGUF_DEFAULT_ALIGNMENT)

    def _write_whole(self, path: Path, progress: bool) -> None:
        """Write `written_type`."""
        total = len(self._header()) + sum(entry.nbytes for entry in self.entries)
        with tqdm(total=total, unit="B", unit_scale=True, disable=not progress, desc=path.name) as bar:
            write_file(path, self._content(), bar)

    def _write_quantised(self, progress: bool) -> None:
        """Write a K-quant through two files beside the target, which are removed."""
        whole, small = (self.target.with_name(f"{self.target.name}.{part}") for part in ("whole", "small"))
        try:
            self._write_whole(whole, progress)
            with new_file(small):  # reserves the name that llama.cpp writes to
                _quantise(whole, small.with_name(small.name + PARTIAL))
            whole.unlink()
            write_file(self.target, read_chunks(small))
        finally:
            for path in (whole, small):
                path.unlink(missing_ok=True)

    def write(self, progress: bool) -> None:
        """Write the file and its Modelfile; after an interruption, the same call starts again.

        Raises:
            ConversionError: Values that the type cannot hold, a full disk, another file of the same name, or no
                llama-cpp-python for a K-quant.
        """
        if self.type not in _TYPES:
            _llama_cpp()
        self.target.parent.mkdir(parents=True, exist_ok=True)
        size = sum(entry.nbytes for entry in self.entries)
        if not self.target.exists():
            check_room(self.target.parent, size if self.type in _TYPES else size * 4 // 3)
        if self.type in _TYPES:
            self._write_whole(self.target, progress)
        else:
            self._write_quantised(progress)
        path, text = self.modelfile
        write_file(path, [text])

    def check(self) -> str:
        """Read the file back. Returns one line with the result.

        Raises:
            ConversionError: It has other tensors than planned.
        """
        tensors = gguf.GGUFReader(self.target).tensors
        found = {tensor.name: tuple(map(int, reversed(tensor.shape))) for tensor in tensors}
        if found != {entry.name: entry.tensor.shape for entry in self.entries}:
            raise ConversionError(f"{self.target} has other tensors than planned: do not use it, and report this.")
        kinds = Counter(tensor.tensor_type.name for tensor in tensors)
        types = ", ".join(f"{count} {name}" for name, count in sorted(kinds.items()))
        return f"{types}; {self.target.stat().st_size:,} bytes: names and shapes are right"


def _llama_cpp() -> Any:
    try:
        import llama_cpp
    except ModuleNotFoundError as error:
        raise ConversionError(_MISSING.format("llama-cpp-python")) from error
    return llama_cpp


def _quantise(source: Path, target: Path) -> None:
    """Write a GGUF file as Q4_K_M with llama.cpp, which takes another type for rows of no multiple of 256 values.

    Raises:
        ConversionError: llama.cpp cannot.
    """
    llama, lines = _llama_cpp(), []
    settings = llama.llama_model_quantize_default_params()
    settings.ftype = llama.LLAMA_FTYPE_MOSTLY_Q4_K_M
    keep = llama.llama_log_callback(lambda level, text, data: lines.append(text.decode(errors="replace")))
    llama.llama_log_set(keep, None)  # it would print a line for every tensor
    try:
        if llama.llama_model_quantize(bytes(source), bytes(target), settings):
            reason = "".join(lines).strip().rpartition("\n")[2]
            raise ConversionError(f"llama.cpp cannot quantise {source}: {reason or 'it gives no reason'}.")
    finally:
        llama.llama_log_set(llama._logger.llama_log_callback, None)


def plan_gguf(source: Path, target: Path, type: str, context: int | None = None) -> GgufCopy:
    """Plan a folder's copy as a GGUF file.

    Args:
        source: Folder with config.json, weights and tokenizer.model, as `plan_llama` takes it.
        target: The file.
        type: f32, f16, bf16, q8_0 or q4_k_m.
        context: See `llama_config`.

    Raises:
        ConversionError: The source is damaged, inconsistent or not InternLM v1, or the target's name does
            not end in .gguf.
    """
    if target.suffix != ".gguf":
        raise ConversionError(f"{target} must be the name of a file that ends in .gguf.")
    copy = plan_llama(source, context, tokenizer=False)
    generation, _ = generation_settings(source)
    return GgufCopy(target, type, copy, read_vocabulary(source, copy.config["vocab_size"], generation), generation)
