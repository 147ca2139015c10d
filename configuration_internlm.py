"""The configuration of an InternLM v1 checkpoint. Llama's, except:

* `bias` switches the biases of all four attention projections;
* `rotary` is the normal form of the four published rotary dialects (see `normalise_rotary`);
* every field is validated at construction and again before a model is built, before anything is allocated.
"""

from typing import Any

import transformers
from transformers.activations import ACT2FN


_VERSION = tuple(int(part) for part in transformers.__version__.split(".")[:2])
if _VERSION < (4, 57):
    raise ImportError(
        f"InternLM needs transformers 4.57 or newer, and this is {transformers.__version__}: "
        'pip install -U "transformers>=4.57".'
    )

# PretrainedConfig until 4.57; PreTrainedConfig from 5.0, where the old name is a deprecated alias.
_BaseConfig: Any = transformers.PreTrainedConfig if _VERSION >= (5, 0) else transformers.PretrainedConfig

# The fields that may hold the rotary setting, see `normalise_rotary`.
_DIALECTS = ("rotary", "rope_theta", "rope_scaling", "rope_parameters")

# Far above every InternLM v1 checkpoint: a larger value means a broken or hostile config.json.
_MAX_SIZE, _MAX_LAYERS, _MAX_LABELS = 2**24, 1024, 2**20


def _invalid(field: str, value: Any, allowed: str, fix: str = "correct it in config.json") -> ValueError:
    return ValueError(f"InternLMConfig: {field}={value!r} is not allowed: it must be {allowed}; {fix}.")


def _check_int(field: str, value: Any, low: int, high: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        raise _invalid(field, value, f"an integer from {low} to {high}")


def _check_number(field: str, value: Any, low: float, high: float) -> None:
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not low <= value <= high or value == 0:
        raise _invalid(field, value, f"a number from {low:g} to {high:g}, and not 0")


def _agreed(field: str, default: Any, *values: Any) -> Any:
    """The value that is given, under one name or under several; `default` if none is."""
    given = [value for value in values if value is not None] or [default]
    if any(value != given[0] for value in given):
        raise _invalid(field, given, "the same under all of its names", "remove the wrong one")
    return given[0]


def normalise_rotary(
    rotary: dict | None = None,
    rope_theta: float | None = None,
    rope_scaling: dict | None = None,
    rope_parameters: dict | None = None,
    default_base: float = 10000.0,
) -> dict:
    """Convert any published dialect of the rotary setting to `{"type", "base", "scaling_factor"}`.

    A configuration uses exactly one of these dialects:

    1. no field: dynamic NTK with base 10000, the default of the last official code;
    2. `rotary={"type": "origin" | "dynamic", "base": 10000, "scaling_factor": 1.0}` (the last official form);
    3. `rope_theta=10000.0, rope_scaling=None | {"type": "dynamic", "factor": 1.0}` (the 20B in 2023); None means
       dynamic with factor 1.0, because the official code never read these two fields;
    4. `rope_parameters={"rope_type": "default" | "dynamic", "rope_theta": 10000.0, "factor": 1.0}`.

    Args:
        rotary, rope_theta, rope_scaling, rope_parameters: The fields of config.json, unchanged.
        default_base: The base, if no field gives one.

    Returns:
        `type` is "origin" (plain rotary) or "dynamic" (dynamic NTK beyond max_position_embeddings); `base` and
        `scaling_factor` are floats.

    Raises:
        ValueError: A field has the wrong type or is out of range, two dialects are mixed, or two names of one value
            disagree.
    """
    given = {"rotary": rotary, "rope_scaling": rope_scaling, "rope_parameters": rope_parameters}
    given = {field: value for field, value in given.items() if value is not None}
    if len(given) > 1:
        raise _invalid(" and ".join(given), list(given.values()), "given in one field only", 'keep "rotary"')
    field, settings = next(iter(given.items()), ("rope_theta", {}))
    if not isinstance(settings, dict):
        raise _invalid(field, settings, "an object", 'for example {"type": "dynamic", "base": 10000}')

    names = ("type", "rope_type", "base", "rope_theta", "factor", "scaling_factor")
    if unknown := sorted(set(map(str, settings)) - set(names)):
        raise _invalid(field, settings, f"made of the keys {', '.join(names)}", f"remove {', '.join(unknown)}")
    kind = _agreed(f"{field}.type", "dynamic", settings.get("type"), settings.get("rope_type"))
    if kind not in ("origin", "default", "dynamic"):
        raise _invalid(f"{field}.type", kind, '"origin" (plain rotary) or "dynamic" (dynamic NTK)')
    base = _agreed(f"{field}: base", default_base, settings.get("base"), settings.get("rope_theta"), rope_theta)
    factor = _agreed(f"{field}: scaling_factor", 1.0, settings.get("scaling_factor"), settings.get("factor"))
    _check_number(f"{field}: base", base, 0, 1e12)
    _check_number(f"{field}: scaling_factor", factor, 1, 1e6)
    kind = "dynamic" if kind == "dynamic" else "origin"
    return {"type": kind, "base": float(base), "scaling_factor": float(factor)}


class _Rotary(dict):
    """The normal form, also after a change in place such as `config.rotary["base"] = 5e5`."""

    def __setitem__(self, key: str, value: Any) -> None:
        self.update({key: value})

    def update(self, *args: Any, **kwargs: Any) -> None:
        super().update(normalise_rotary({**self, **dict(*args, **kwargs)}))


class InternLMConfig(_BaseConfig):
    """Configuration of InternLM v1; the defaults are internlm-7b's, as in the official code.

    Args:
        vocab_size: Rows of the embedding and of the output head.
        hidden_size: Width of the residual stream; num_attention_heads times an even head_dim.
        intermediate_size: Width of the gated MLP.
        num_hidden_layers: Decoder layers.
        num_attention_heads: Attention heads; InternLM v1 has no grouped-query attention.
        num_key_value_heads: Accepted because tools write it; must equal num_attention_heads.
        hidden_act: Activation of the MLP's gate, a key of `transformers.activations.ACT2FN`.
        max_position_embeddings: Trained window in tokens, the M of dynamic NTK.
        initializer_range: Standard deviation of newly initialised weights.
        rms_norm_eps: Added to the mean square in RMSNorm.
        use_cache: Whether a forward returns keys and values by default.
        pad_token_id: Padding token. 0 (`<unk>`), never eos: padding with eos masks eos in the training loss.
        bos_token_id, eos_token_id: Start of sequence, and end of sequence (an integer or a list).
        tie_word_embeddings: Whether the output head shares the embedding's weight.
        bias: Biases on q, k, v and o projections: True for the 7B family, False for the 20B.
        rotary: See `normalise_rotary`, which also reads rope_theta, rope_scaling and rope_parameters.

    Raises:
        ValueError: A field is invalid; the message gives its name and value, what is allowed, and the fix.
    """

    model_type = "internlm"
    keys_to_ignore_at_inference = ["past_key_values", "cache"]  # "cache" from transformers 5.24
    # The names of these styles are the same in every version. lm_head's is not, so its plan is part of the model.
    base_model_tp_plan = {
        **{f"layers.*.self_attn.{name}_proj": "colwise" for name in "qkv"},
        **{f"layers.*.mlp.{name}_proj": "colwise" for name in ("gate", "up")},
        **{f"layers.*.{name}_proj": "rowwise" for name in ("self_attn.o", "mlp.down")},
    }
    base_model_pp_plan = {
        "embed_tokens": (["input_ids"], ["inputs_embeds"]),
        "layers": (["hidden_states", "attention_mask"], ["hidden_states"]),
        "norm": (["hidden_states"], ["hidden_states"]),
    }
    _auto_class = "AutoConfig"

    def __init__(
        self,
        vocab_size: int = 103168,
        hidden_size: int = 4096,
        intermediate_size: int = 11008,
        num_hidden_layers: int = 32,
        num_attention_heads: int = 32,
        num_key_value_heads: int | None = None,
        hidden_act: str = "silu",
        max_position_embeddings: int = 2048,
        initializer_range: float = 0.02,
        rms_norm_eps: float = 1e-6,
        use_cache: bool = True,
        pad_token_id: int | None = 0,
        bos_token_id: int | None = 1,
        eos_token_id: int | list[int] | None = 2,
        tie_word_embeddings: bool = False,
        bias: bool = True,
        rotary: dict | None = None,
        **kwargs: Any,
    ) -> None:
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.intermediate_size = intermediate_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.num_key_value_heads = num_attention_heads if num_key_value_heads is None else num_key_value_heads
        self.hidden_act = hidden_act
        self.max_position_embeddings = max_position_embeddings
        self.initializer_range = initializer_range
        self.rms_norm_eps = rms_norm_eps
        self.use_cache = use_cache
        self.bias = bias
        self.tie_word_embeddings = tie_word_embeddings
        self.rotary = normalise_rotary(rotary, **{name: kwargs.pop(name, None) for name in _DIALECTS[1:]})
        self.check_fields()
        self.head_dim = kwargs.pop("head_dim", None)
        special = {"pad_token_id": pad_token_id, "bos_token_id": bos_token_id, "eos_token_id": eos_token_id}
        self._set_inherited(special, kwargs)

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.hidden_size // self.num_attention_heads

    @head_dim.setter
    def head_dim(self, value: int | None) -> None:
        if value not in (None, self.head_dim):
            raise _invalid("head_dim", value, f"hidden_size / num_attention_heads ({self.head_dim})", "remove it")

    def __setattr__(self, key: str, value: Any) -> None:
        """The library's, except that every dialect is converted to `rotary`; the base stays if rope_* gives none."""
        if key not in _DIALECTS:
            super().__setattr__(key, value)
        elif key == "rope_theta" and value is not None:
            self.rotary = {**self.rotary, "base": value}
        elif value is not None:
            kept = {} if key == "rotary" else {"default_base": self.rotary["base"]}
            super().__setattr__("rotary", _Rotary(normalise_rotary(**{key: value}, **kept)))

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """The library's, except that every dialect may be a keyword, also of from_pretrained."""
        late = {name: kwargs.pop(name) for name in _DIALECTS if name in kwargs}
        loaded: Any = super().from_dict(config_dict, **kwargs)
        (loaded[0] if isinstance(loaded, tuple) else loaded).update(late)
        return loaded

    def to_dict(self) -> dict[str, Any]:
        return {**super().to_dict(), "rotary": dict(self.rotary)}

    def check_fields(self) -> None:
        """Validate the fields as they are now: they may have been assigned since the constructor checked them.

        Raises:
            ValueError: A field is invalid, or contradicts another.
        """
        for field in ("vocab_size", "hidden_size", "intermediate_size", "num_attention_heads"):
            _check_int(field, getattr(self, field), 1, _MAX_SIZE)
        _check_int("num_hidden_layers", self.num_hidden_layers, 1, _MAX_LAYERS)
        _check_int("max_position_embeddings", self.max_position_embeddings, 1, 2**31)
        _check_number("rms_norm_eps", self.rms_norm_eps, 0, 1)
        _check_number("initializer_range", self.initializer_range, 0, 10)
        for field in ("use_cache", "bias", "tie_word_embeddings"):
            if not isinstance(getattr(self, field), bool):
                raise _invalid(field, getattr(self, field), "true or false")
        if not isinstance(self.hidden_act, str) or self.hidden_act not in ACT2FN:
            raise _invalid("hidden_act", self.hidden_act, 'an activation of transformers, for example "silu"')
        heads = self.num_attention_heads
        if self.hidden_size % (2 * heads):
            raise _invalid("hidden_size", self.hidden_size, f"a multiple of 2 * num_attention_heads ({2 * heads})")
        if self.num_key_value_heads != heads:
            equal = f"equal to num_attention_heads ({heads}), for InternLM v1 has no grouped-query attention"
            raise _invalid("num_key_value_heads", self.num_key_value_heads, equal)

    def _set_inherited(self, special: dict[str, Any], kwargs: dict[str, Any]) -> None:
        """Check and set the fields of the base class; call this last, because it serialises the configuration."""
        for field, value in special.items():
            for token in value if isinstance(value, list) and field == "eos_token_id" else [value]:
                if token is not None:
                    _check_int(field, token, 0, self.vocab_size - 1)
        _check_int("num_labels", kwargs.get("num_labels") or 0, 0, _MAX_LABELS)  # the base class makes a name for each
        if methods := [name for name in kwargs if callable(getattr(type(self), name, None))]:
            raise _invalid(methods[0], kwargs[methods[0]], "absent: it is a method", "remove it")
        try:
            super().__init__(tie_word_embeddings=self.tie_word_embeddings, **special, **kwargs)
            # From 5.0 the base class drops the special token ids; 4.57 keeps them.
            for field, value in special.items():
                setattr(self, field, value)
            self.to_json_string(use_diff=False)
        except Exception as error:  # a field of the base class has the wrong type: any exception may follow
            raise ValueError(f"InternLMConfig: transformers refuses a field of config.json ({error!r}).") from error

    # From 5.0 configurations are dataclasses, whose generated __eq__ ignores attributes that a plain __init__ sets.
    def __eq__(self, other: Any) -> bool:
        return isinstance(other, _BaseConfig) and self.to_dict() == other.to_dict()

    __hash__ = None


__all__ = ["InternLMConfig"]
