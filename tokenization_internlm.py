"""The InternLM v1 tokenizer: a SentencePiece BPE model with byte fallback, run by the Rust `tokenizers` library.

SentencePiece and nothing more, except:
* `<s>`, `</s>`, `<unk>` and the user-defined pieces (`<eoh>`, `<eoa>`, ...) in a text are encoded as their ids, as in
  the official tokenizer; with `split_special_tokens=True` they are encoded as plain text.
* NUL is encoded as the model's own piece for it (354), as in 2023; sentencepiece 0.2 encodes it as byte 0.
* Special tokens decode to their names, or to nothing with `skip_special_tokens=True`.
* `apply_chat_template` never turns text from a message, tool or document into a control token
  (control_tokens_internlm.py).

sentencepiece_internlm.py reads `tokenizer.model`; neither protobuf nor sentencepiece is needed.
tool_calls_internlm.py parses replies with tool calls.
"""

import functools
import json
import os
import re
import shutil
from collections.abc import Callable, Iterable, Mapping
from itertools import groupby
from typing import Any

import transformers
from tokenizers import AddedToken, Tokenizer, decoders, normalizers, processors
from tokenizers.models import BPE
from transformers import BatchEncoding, PreTrainedTokenizerFast


# As in configuration_internlm.py, which the tokenizer does not import; before the imports that old versions lack.
if tuple(int(part) for part in transformers.__version__.split(".")[:2]) < (4, 57):
    raise ImportError(
        f"InternLM needs transformers 4.57 or newer, and this is {transformers.__version__}: "
        'pip install -U "transformers>=4.57".'
    )

from transformers.utils.generic import to_py_obj

from .control_tokens_internlm import ChatGuard, break_role_headers, build_hiding_backend, read_iterators
from .sentencepiece_internlm import CONTROL, NORMAL, UNKNOWN, USER_DEFINED, read_model
from .tool_calls_internlm import RESPONSE_TEMPLATE, parse_tool_calls


_SPACE = "\u2581"  # how SentencePiece writes a space inside a piece
_CLEANED = (" .", " ?", " !", " ,", " ' ", " n't", " 'm", " 's", " 've", " 're")  # transformers' clean-up list


def _build_backend(path: str | None) -> Tokenizer:
    """Build the Rust tokenizer that encodes as SentencePiece does with the model at `path`."""
    pieces, scores, types = read_model(path)
    normal = {piece for piece, kind in zip(pieces, types, strict=True) if kind == NORMAL}
    # SentencePiece merges the adjacent pieces whose union has the highest score. The official model was concatenated
    # from three, so its ids are not ordered by score. Sorting is stable: equal scores stay in the order of their ids.
    ranked = sorted((i for i, kind in enumerate(types) if kind == NORMAL), key=lambda i: -scores[i])
    merges = [
        (left, right)
        for piece in (pieces[i] for i in ranked)
        for cut in range(len(piece) - 1, 0, -1)
        if (left := piece[:cut]) in normal and (right := piece[cut:]) in normal
    ]
    vocabulary = {piece: i for i, piece in enumerate(pieces)}
    unknown = pieces[types.index(UNKNOWN)]
    backend = Tokenizer(BPE(vocab=vocabulary, merges=merges, unk_token=unknown, byte_fallback=True))
    # No pre-tokenizer: with one, and a vocabulary over 100,000, transformers tries a fix that may use the network.
    backend.normalizer = normalizers.Replace(" ", _SPACE)
    # For tools that use the backend alone. InternLMTokenizer.decode differs for invalid UTF-8 and for U+2581 in bytes.
    backend.decoder = decoders.Sequence([decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()])
    control = [piece for piece, kind in zip(pieces, types, strict=True) if kind in (UNKNOWN, CONTROL, USER_DEFINED)]
    backend.add_special_tokens([AddedToken(piece, special=True, normalized=False) for piece in control])
    return backend


def _load_backend(path: str) -> Tokenizer:
    try:
        return Tokenizer.from_file(path)
    except Exception as error:  # tokenizers raises bare Exception
        raise ValueError(f"{path} is not a tokenizer.json ({error}): fetch it again or delete it.") from error


class _Uncopied:
    """Prevents the deep copy that transformers makes of `tokenizer_object`, which takes a second."""

    def __init__(self, backend: Tokenizer):
        self.backend = backend

    def __deepcopy__(self, memo: dict) -> Tokenizer:
        return self.backend


def _piece_bytes(piece: str) -> bytes:
    if len(piece) == 6 and re.fullmatch("<0x[0-9A-F]{2}>", piece):
        return bytes.fromhex(piece[3:5])
    return piece.replace(_SPACE, " ").encode()


def _join(pieces: Iterable[bytes]) -> str:
    """Join pieces as SentencePiece does: each byte that is not part of a valid UTF-8 sequence becomes one U+FFFD."""
    data = b"".join(pieces)
    try:
        return data.decode()
    except UnicodeDecodeError:
        return re.sub("[\udc80-\udcff]", "\ufffd", data.decode(errors="surrogateescape"))


class InternLMTokenizer(PreTrainedTokenizerFast):
    """Tokenizer of InternLM v1, fast, with offsets; the same class for use_fast=True and use_fast=False.

    Args:
        vocab_file: path of tokenizer.model, a SentencePiece model. Its pieces, not this class, define the control
            tokens.
        tokenizer_file: path of a tokenizer.json written by save_pretrained(); preferred where both exist, because it
            also contains added tokens.
        add_bos_token, add_eos_token: prepend bos, append eos. Default: the setting in tokenizer.json, else True and
            False.
        kwargs: arguments of every fast tokenizer of transformers, `tokenizer_object` too. Here, `padding_side`
            defaults to "left".

    Raises:
        ValueError: a file is missing or broken; the message names it and the fix.
    """

    vocab_files_names = {"vocab_file": "tokenizer.model"}  # transformers adds tokenizer.json itself
    model_input_names = ["input_ids", "attention_mask"]
    padding_side = "left"
    slow_tokenizer_class = None
    _protect: Callable[[list[str]], tuple[list[str], Tokenizer]] | None = None  # of apply_chat_template() on a copy
    _ready = False
    # What is built on first use is outside __dict__, which pickle saves and whose hash names a cache of datasets.
    __slots__ = ("_pieces", "_chat_backend")
    _pieces: tuple[dict[int, bytes], frozenset[int]] | None  # built by the first decode()
    _chat_backend: tuple[Any, Tokenizer] | None  # built by apply_chat_template()

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        tokenizer = super().__new__(cls)  # copies, too, are made without __init__
        tokenizer._pieces = tokenizer._chat_backend = None
        return tokenizer

    def __init__(
        self,
        vocab_file: str | None = None,
        tokenizer_file: str | None = None,
        add_bos_token: bool | None = None,
        add_eos_token: bool | None = None,
        unk_token: str | AddedToken = "<unk>",
        bos_token: str | AddedToken = "<s>",
        eos_token: str | AddedToken = "</s>",
        pad_token: str | AddedToken = "<unk>",
        **kwargs: Any,
    ):
        backend = kwargs.pop("tokenizer_object", None)
        if backend is None:
            backend = _load_backend(tokenizer_file) if tokenizer_file else _build_backend(vocab_file)
        saved = json.loads(backend.post_processor.__getstate__()) if backend.post_processor else {}
        if saved.get("type") == "TemplateProcessing":  # transformers 5 saves the two flags only here
            add_bos_token = "SpecialToken" in saved["single"][0] if add_bos_token is None else add_bos_token
            add_eos_token = "SpecialToken" in saved["single"][-1] if add_eos_token is None else add_eos_token
        # save_pretrained() writes the current values of only those settings that were passed to the base class.
        for name in ("padding_side", "truncation_side"):
            kwargs.setdefault(name, getattr(self, name))
        for name in ("clean_up_tokenization_spaces", "split_special_tokens"):
            kwargs.setdefault(name, False)
        self.vocab_file = vocab_file
        super().__init__(
            tokenizer_object=_Uncopied(backend),
            add_bos_token=True if add_bos_token is None else add_bos_token,
            add_eos_token=bool(add_eos_token),
            unk_token=unk_token,
            bos_token=bos_token,
            eos_token=eos_token,
            pad_token=pad_token,
            **kwargs,
        )
        self.add_bos_token = self.init_kwargs["add_bos_token"]
        self.add_eos_token = self.init_kwargs["add_eos_token"]
        self._ready = True
        self.update_post_processor()

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike, *inputs: Any, **kwargs: Any) -> Any:
        """As in transformers, with errors that explain what is wrong with a broken file."""
        try:
            return super().from_pretrained(pretrained_model_name_or_path, *inputs, **kwargs)
        except json.JSONDecodeError as error:
            raise ValueError(
                f"A JSON file of the tokenizer in {pretrained_model_name_or_path} is broken, or a Git LFS pointer "
                f"({error}): run `git lfs pull` in the folder, or fetch tokenizer*.json again."
            ) from error
        except (ImportError, TypeError, AttributeError, LookupError, RecursionError) as error:
            # Up to 5.0, without protobuf, any error in __init__ is replaced by one about the missing protobuf.
            cause = error.__context__ if isinstance(error, ImportError) else error
            if isinstance(cause, ValueError):
                raise cause from None
            if cause is None or isinstance(cause, ImportError):
                raise
            if any(callable(getattr(cls, name, None)) for name in kwargs):  # the library's message names the argument
                raise cause from None
            raise ValueError(
                f"A field of the tokenizer's JSON files in {pretrained_model_name_or_path}, or an argument, is not "
                f"what transformers needs ({cause!r}): correct it, or fetch tokenizer_config.json again."
            ) from cause

    @classmethod
    def convert_to_native_format(cls, **kwargs: Any) -> dict[str, Any]:
        """Leave the files to __init__: transformers 5 would parse them with protobuf, or order merges by id."""
        return kwargs

    def __setattr__(self, key: str, value: Any) -> None:
        super().__setattr__(key, value)
        # Of the flags, transformers 5 has properties that do this.
        if self._ready and key.removesuffix("_id") in ("bos_token", "eos_token", "add_bos_token", "add_eos_token"):
            self.update_post_processor()

    def __getstate__(self) -> dict[str, Any]:
        """The state for pickle and copy: everything except what can be rebuilt."""
        return self.__dict__.copy()

    def update_post_processor(self) -> None:
        """Make the backend add the current bos and eos tokens: bos A [B] eos."""
        bos: list[Any] = [self.bos_token] if self.add_bos_token and self.bos_token else []
        eos: list[Any] = [self.eos_token] if self.add_eos_token and self.eos_token else []
        before, after = [f"{token}:0" for token in bos], [f"{token}:0" for token in eos]
        self._tokenizer.post_processor = processors.TemplateProcessing(
            single=[*before, "$A:0", *after],
            pair=[*before, "$A:0", "$B:0", *after],
            special_tokens=[(token, self.convert_tokens_to_ids(token)) for token in {*bos, *eos}],
        )

    def add_tokens(self, new_tokens: Any, special_tokens: bool = False) -> int:
        added = super().add_tokens(new_tokens, special_tokens=special_tokens)
        self._chat_backend = None
        if self._pieces is not None:
            self._read_pieces()
        if self._ready:
            self.update_post_processor()  # bos or eos may be among the new tokens
        return added

    @property
    def all_special_tokens(self) -> list[str]:
        """Every control token: unk, bos, eos, pad and all others that the model or the user marked as special."""
        added = self._tokenizer.get_added_tokens_decoder().values()
        return list(dict.fromkeys([*super().all_special_tokens, *(token.content for token in added if token.special)]))

    @functools.wraps(PreTrainedTokenizerFast.__call__)
    def __call__(self, text: Any = None, *args: Any, **kwargs: Any) -> BatchEncoding:
        if self._protect is not None:  # called by the library's apply_chat_template with the rendered text
            texts, self.__dict__["_tokenizer"] = self._protect([text] if isinstance(text, str) else text)
            text = texts[0] if isinstance(text, str) else texts
        return super().__call__(text, *args, **kwargs)

    def encode(self, text: Any, *args: Any, **kwargs: Any) -> Any:
        """Encode a text as in transformers, but faster: offsets are not computed."""
        if not isinstance(text, str) or args or kwargs.keys() - {"add_special_tokens", "split_special_tokens"}:
            return super().encode(text, *args, **kwargs)
        backend, split = self._tokenizer, kwargs.get("split_special_tokens")
        split = self.split_special_tokens if split is None else split
        # Reset only what an earlier call changed: another thread may be reading the settings.
        if backend.encode_special_tokens != split:
            backend.encode_special_tokens = split
        if backend.truncation is not None:
            backend.no_truncation()
        if backend.padding is not None:
            backend.no_padding()
        ids = backend.encode_batch_fast([text], add_special_tokens=kwargs.get("add_special_tokens", True))[0].ids
        return ids if len(ids) <= self.model_max_length else super().encode(text, **kwargs)  # which warns

    def decode(
        self,
        token_ids: Any,
        skip_special_tokens: bool = False,
        clean_up_tokenization_spaces: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """Decode ids losslessly: the text of SentencePiece's decode, with special tokens by name.

        Args:
            token_ids: an id, a sequence of ids or a batch of sequences; lists, arrays or tensors.
            skip_special_tokens: leave special tokens out.
            clean_up_tokenization_spaces: remove the space before English punctuation, as the 2023 tokenizer always
                did; it damages code. Default: the attribute of that name, which is False unless set.

        Returns:
            A string, or a list of strings for a batch.

        Raises:
            ValueError: an id is outside the vocabulary.
        """
        ids: Any = token_ids["input_ids"] if isinstance(token_ids, Mapping) else token_ids
        if not (isinstance(ids, list) and ids and type(ids[0]) is int):
            ids = to_py_obj(ids)
            ids = [ids] if isinstance(ids, int) else ids
            if ids and isinstance(ids[0], list | tuple):
                return [self.decode(row, skip_special_tokens, clean_up_tokenization_spaces) for row in ids]
        try:
            text = self._join_ids(ids, skip_special_tokens)
        except (KeyError, TypeError):  # a tensor after the first id, or a token that was added to the backend
            pieces, _ = self._read_pieces()
            try:
                text = self._join_ids(to_py_obj(ids), skip_special_tokens)
            except KeyError as error:
                raise ValueError(
                    f"Token id {error} is outside the vocabulary (0 to {max(pieces)}). Replace labels of -100, with "
                    "pad_token_id for example, before they are decoded."
                ) from None
        clean = (
            self.clean_up_tokenization_spaces if clean_up_tokenization_spaces is None else clean_up_tokenization_spaces
        )
        return self.clean_up_tokenization(text) if clean else text

    def _join_ids(self, ids: Any, skip_special_tokens: bool) -> str:
        pieces, special_ids = self._pieces or self._read_pieces()
        if skip_special_tokens and not special_ids.isdisjoint(ids):
            # Bytes before and after a skipped token never form one character.
            runs = groupby(ids, special_ids.__contains__)
            return "".join(_join(map(pieces.__getitem__, run)) for special, run in runs if not special)
        return _join(map(pieces.__getitem__, ids))

    def _read_pieces(self) -> tuple[dict[int, bytes], frozenset[int]]:
        """The bytes of every id, and the special ids; called on first use and after tokens were added."""
        if self._pieces is not None:
            pieces = self._pieces[0]
        else:
            base = self._tokenizer.get_vocab(with_added_tokens=False)
            pieces = {i: _piece_bytes(piece) for piece, i in base.items()}
        added = self._tokenizer.get_added_tokens_decoder()
        for i, token in added.items():
            pieces.setdefault(i, token.content.encode())
        self._pieces = pieces, frozenset(i for i, token in added.items() if token.special)
        return self._pieces

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        pieces, _ = self._pieces or self._read_pieces()
        ids = map(self._tokenizer.token_to_id, tokens)
        # An id without bytes is that of a token which was added to the backend since.
        return _join(
            _piece_bytes(token) if i is None else pieces.get(i, token.encode())
            for i, token in zip(ids, tokens, strict=True)
        )

    def clean_up_tokenization(self, text: str) -> str:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Remove the same spaces as transformers, whose version 5.0 lacks this method."""
        for spaced in _CLEANED:
            text = text.replace(spaced, spaced.strip())
        return text

    def save_vocabulary(self, save_directory: str, filename_prefix: str | None = None) -> tuple[str, ...]:
        """Copy tokenizer.model, if this tokenizer has one; return the path of the copy."""
        if not self.vocab_file or not os.path.isfile(self.vocab_file):
            return ()
        name = (filename_prefix + "-" if filename_prefix else "") + self.vocab_files_names["vocab_file"]
        target = os.path.join(save_directory, name)
        if os.path.realpath(target) != os.path.realpath(self.vocab_file):
            shutil.copyfile(self.vocab_file, target)
        return (target,)

    def _save_pretrained(
        self,
        save_directory: str | os.PathLike,
        file_names: tuple[str, ...],
        legacy_format: bool | None = None,
        filename_prefix: str | None = None,
    ) -> tuple[str, ...]:
        # A fast tokenizer saves only tokenizer.json. Not in save_pretrained: its push_to_hub would already be done.
        files = super()._save_pretrained(save_directory, file_names, legacy_format, filename_prefix)
        return (*files, *self.save_vocabulary(str(save_directory), filename_prefix))

    def apply_chat_template(
        self,
        conversation: Any,
        tools: Any = None,
        documents: Any = None,
        chat_template: str | None = None,
        add_generation_prompt: bool = False,
        continue_final_message: bool | str = False,
        tokenize: bool = True,
        role_headers: str = "keep",
        sanitize_control_tokens: bool = False,
        **kwargs: Any,
    ) -> Any:
        """Render and encode a conversation so that only the template's own control tokens are encoded as such.

        As in transformers, except that `<eoa>`, `</s>` and all other special tokens are always encoded as plain text
        unless they stand in the source of the template or in a special-token variable such as bos_token, on every
        version. With tokenize=False the result is a plain string, in which the two cannot be told apart: do not trust
        the control tokens in it.

        Args:
            role_headers: how to treat a `<|User|>`, `<|Bot|>` or `<|System|>` that is not the template's. They are
                plain text to this model, but start a turn: "keep" them, "break" them with spaces in messages, tools
                and documents, or "refuse" them with an error.
            sanitize_control_tokens: also encode as plain text the added tokens that are not special but control
                tokens, as transformers 5.23 does: those in the attribute chat_control_tokens; without that, those in
                the source of the template.

        Raises:
            ValueError: role_headers is "refuse" and a header was found, or "break" and one was put together by the
                template; or template and messages write a control token together; or there is no template.
        """
        if role_headers not in ("keep", "break", "refuse"):
            raise ValueError(f'role_headers={role_headers!r} is not allowed: it must be "keep", "break" or "refuse".')
        conversation, tools, documents, kwargs = read_iterators((conversation, tools, documents, kwargs))
        if role_headers == "break":
            conversation, tools, documents = break_role_headers(conversation, tools, documents)
        if not (chat_template or self.chat_template):
            raise ValueError(
                "The tokenizer has no chat template: put chat_template.jinja (for internlm-chat-7b and -7b-8k "
                "variants/early_chat_template.jinja, under the same name) into the model's folder and load it again, "
                "or complete the folder with upload_to_hub.py."
            )
        template = self.get_chat_template(chat_template, tools)
        options = (add_generation_prompt, continue_final_message)
        apply = super().apply_chat_template

        def render(source: str, variables: dict[str, Any]) -> list[str]:
            unused = ("return_dict", "return_assistant_tokens_mask")  # refused without tokenize
            others = {key: value for key, value in kwargs.items() if key not in unused}
            text: Any = apply(conversation, tools, documents, source, *options, False, **others | variables)
            return [text] if isinstance(text, str) else text

        trusted = {*self.SPECIAL_TOKENS_ATTRIBUTES, *self.special_tokens_map} & kwargs.keys()
        guard = ChatGuard(template, self.special_tokens_map | {key: kwargs[key] for key in trusted}, render)

        def protect(rendered: list[str]) -> tuple[list[str], Any]:
            if role_headers != "keep":
                guard.refuse_role_headers(rendered)
            return self._hide_controls(guard, rendered, sanitize_control_tokens) if tokenize else (rendered, None)

        copied = type(self).__new__(type(self))
        copied.__dict__.update(self.__dict__, _protect=protect)
        library: Any = super(InternLMTokenizer, copied)
        result = library.apply_chat_template(conversation, tools, documents, template, *options, tokenize, **kwargs)
        if not tokenize:
            protect([result] if isinstance(result, str) else result)
        return result

    parse_tool_calls = staticmethod(parse_tool_calls)
    # Not as response_template: given that, the pipeline leaves </s> at the end of plain completions (5.24).
    tool_response_template = RESPONSE_TEMPLATE

    def _hide_controls(self, guard: ChatGuard, texts: list[str], sanitize: bool) -> tuple[list[str], Any]:
        """The texts, and the backend that finds no control tokens in them except those that the template wrote."""
        added = list(self._tokenizer.get_added_tokens_decoder().values())
        names = {*super().all_special_tokens, *(token.content for token in added if token.special)}
        if sanitize:
            listed = getattr(self, "chat_control_tokens", None)  # from transformers 5.23
            inferred = (token.content for token in added if token.content.strip() and token.content in guard.template)
            names.update(inferred if listed is None else listed)
        controls = tuple(token.content for token in added if token.content in names)
        hidden, marks = guard.hide_others(texts, controls, "".join(token.content for token in added))
        # If a control token is found in normalized text, that can be a text which the guard does not look for.
        if not marks and not any(token.normalized and token.content in names for token in added):
            return hidden, self._tokenizer
        known, backend = self._chat_backend or (None, None)
        if known != (marks, controls, len(added)):
            original: Any = self._tokenizer
            backend = build_hiding_backend(original, marks, controls)
            self._chat_backend = (marks, controls, len(added)), backend
        return hidden, backend
