"""InternLM v1 for today's transformers. Llama, except:

* the rotary embedding has no buffers and no state, and beyond the trained window it is a dynamic NTK that stays exact
  with a cache: rotary_internlm.py, the one module to read for what is special;
* one `config.bias` switches the biases of all four attention projections;
* the norm is one fused operation, and one token's queries and keys are rotated together;
* the embedding has no padding_idx, so that training on the pad token's row works;
* the default cache appends in place instead of copying the past at every token: cache_internlm.py;
* the loss never holds float32 copies of all logits;
* `chat` and `stream_chat` use the checkpoint's own prompt format: chat_internlm.py.

Version differences of transformers are in compat_internlm.py, checks of calls and checkpoints in checks_internlm.py,
and how linear layers are called on a CPU in linear_internlm.py. This file imports all siblings directly, because
transformers 4.57 copies no others when it loads a folder.

Shapes: B batch, Q new tokens, K keys including the new ones, H heads, D head_dim, E hidden_size, V vocab_size.
"""

import itertools
import os
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import DynamicCache, GenerationMixin, PreTrainedModel
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache
from transformers.loss.loss_utils import ForCausalLMLoss
from transformers.modeling_layers import (
    GenericForQuestionAnswering,
    GenericForSequenceClassification,
    GenericForTokenClassification,
    GradientCheckpointingLayer,
)
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.utils.generic import can_return_tuple

from .batching_internlm import InternLMBatchingMixin
from .cache_internlm import GrowingCache, default_cache
from .chat_internlm import InternLMChatMixin, refuse_chat
from .checks_internlm import (
    check_finite,
    check_indexes,
    check_inputs,
    check_keys,
    embed,
    warn_far_beyond_window,
)
from .compat_internlm import (
    ALL_ATTENTION_FUNCTIONS,
    CACHE,
    LM_HEAD_PLAN,
    PAGES_ARE_EXACT,
    TIED_WEIGHTS,
    capture_outputs,
    causal_mask,
    deprecate_past_key_values,
    merge_with_config_defaults,
    resolve_cache,
    update_cache,
)
from .configuration_internlm import InternLMConfig
from .decoding_internlm import Decoding
from .kernels_internlm import silu_mul, usable, warn_if_missing
from .linear_internlm import Linear, call, call_together, is_plain, linear_for
from .positions_internlm import is_dense, new_positions
from .rotary_internlm import attend, corrected_attention, rotary_tables, rotate_new


# The loss is computed for at most this many elements of the logits at a time: 128 MB in float32.
_LOSS_CHUNK_NUMEL = 2**25
_SILU = type(ACT2FN["silu"])


class InternLMRMSNorm(nn.Module):
    """Llama's RMSNorm as one operation: mean square and normalisation in float32, result in the weight's dtype."""

    def __init__(self, hidden_size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden_size))
        self.variance_epsilon = eps

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        weight = self.weight
        if hidden_states.dtype != weight.dtype:  # a quantised or mixed-precision model keeps norms in float32
            normed = torch.rms_norm(hidden_states.float(), weight.shape, None, self.variance_epsilon)
            return weight * normed.to(weight.dtype)
        return torch.rms_norm(hidden_states, weight.shape, weight, self.variance_epsilon)

    def extra_repr(self) -> str:
        return f"{tuple(self.weight.shape)}, eps={self.variance_epsilon}"


class InternLMMLP(nn.Module):
    def __init__(self, config: InternLMConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)
        self.act_fn = ACT2FN[config.hidden_act]

    def forward(self, hidden_states: torch.Tensor, linear: Linear = call) -> torch.Tensor:
        gate, up = call_together(linear, (self.gate_proj, self.up_proj), hidden_states)
        # One token costs Python less as two operations; outputs of one product are not contiguous.
        by_kernel = gate.shape[1] > 1 and gate.is_contiguous() and usable(gate) and is_plain(self.act_fn, _SILU)
        return linear(self.down_proj, silu_mul(gate, up) if by_kernel else self.act_fn(gate) * up)


def eager_attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Plain attention, (B, H, Q, D) -> ((B, Q, H, D), probabilities (B, H, Q, K)); softmax in float32."""
    scores = torch.matmul(query, key.transpose(2, 3)) * scaling
    return attend(scores, value, attention_mask, dropout if module.training else 0.0)


class InternLMAttention(nn.Module):
    """Llama's attention, except: `config.bias`, joint rotation, and corrected queries and keys beyond the window."""

    def __init__(self, config: InternLMConfig, layer_idx: int) -> None:
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.head_dim = config.head_dim
        self.num_key_value_groups = 1
        self.scaling = self.head_dim**-0.5
        self.is_causal = True
        self.q_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=config.bias)
        self.k_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=config.bias)
        self.v_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=config.bias)
        self.o_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=config.bias)

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple,
        attn_implementation: str,
        attention_mask: torch.Tensor | None = None,
        cache: Cache | None = None,
        linear: Linear = call,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        cos, sin, corrections, cache_position = position_embeddings
        input_shape = hidden_states.shape[:-1]
        queries, keys, values = call_together(linear, (self.q_proj, self.k_proj, self.v_proj), hidden_states)
        queries, keys, corrected_keys = rotate_new(queries, keys, self.head_dim, cos, sin, corrections)  # (B, H, Q, D)
        values = values.view(*input_shape, -1, self.head_dim).transpose(1, 2)
        if cache is not None:
            keys, values = update_cache(cache, keys, values, self.layer_idx, cache_position, kwargs)  # (B, H, K, D)

        # vLLM looks for this call in every layer, and transformers, until 5.0, in this file for the text
        # ALL_ATTENTION_FUNCTIONS[self.config._attn_implementation], which is passed because it is slow to read.
        attention_interface: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(
            attn_implementation, eager_attention_forward
        )
        if corrected_keys is not None:
            keys, corrections = corrected_keys, []
        arguments = self, queries, keys, values, attention_mask
        kwargs |= {"dropout": 0.0, "scaling": self.scaling}
        if corrections:
            output, weights = corrected_attention(attention_interface, *arguments, corrections, **kwargs)
        else:
            output, weights = attention_interface(*arguments, **kwargs)
        return linear(self.o_proj, output.reshape(*input_shape, -1)), weights


class InternLMDecoderLayer(GradientCheckpointingLayer):
    def __init__(self, config: InternLMConfig, layer_idx: int) -> None:
        super().__init__()
        self.self_attn = InternLMAttention(config, layer_idx)
        self.mlp = InternLMMLP(config)
        self.input_layernorm = InternLMRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = InternLMRMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, hidden_states: torch.Tensor, linear: Linear = call, **kwargs: Any) -> torch.Tensor:
        attended, _ = self.self_attn(self.input_layernorm(hidden_states), linear=linear, **kwargs)
        hidden_states = hidden_states + attended
        return hidden_states + self.mlp(self.post_attention_layernorm(hidden_states), linear)


class InternLMPreTrainedModel(PreTrainedModel):
    config_class = InternLMConfig
    config: InternLMConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["InternLMDecoderLayer"]
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    _can_record_outputs = {"hidden_states": InternLMDecoderLayer, "attentions": InternLMAttention}
    # Some 7B checkpoints hold it, rounded to half precision; it is recomputed.
    _keys_to_ignore_on_load_unexpected = [r"rotary_emb\.inv_freq"]

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: Any, *args: Any, output_loading_info: bool = False, **kwargs: Any
    ) -> Any:
        """The library's, except that a damaged checkpoint is an error, not a model that generates nonsense.

        Raises:
            ValueError: The checkpoint's index names files outside its folder; the checkpoint lacks parameters, or its
                attention biases contradict `config.bias` (with output_loading_info the caller gets the lists instead;
                an empty state_dict requests a randomly initialised model); a weight is NaN or infinite.
        """
        folder = os.path.join(str(pretrained_model_name_or_path), kwargs.get("subfolder") or "")
        if os.path.isdir(folder):  # for a repository on the Hub, huggingface_hub refuses such names
            check_indexes(folder)
        loaded: Any = super().from_pretrained(pretrained_model_name_or_path, *args, output_loading_info=True, **kwargs)
        model, info = loaded
        if not output_loading_info and kwargs.get("state_dict") != {}:
            check_keys(model, info["missing_keys"], info["unexpected_keys"])
        check_finite(model)
        return (model, info) if output_loading_info else model


class InternLMModel(InternLMPreTrainedModel):
    """The decoder without a head: token ids (B, Q) -> hidden states (B, Q, E). Llama's, except the rotary tables."""

    _auto_class = "AutoModel"
    _warned_of_length = False
    chat = stream_chat = refuse_chat

    def __init__(self, config: InternLMConfig) -> None:
        super().__init__(config)
        config.check_fields()
        # No padding_idx: it would freeze that row, and published configurations pad with eos.
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList([InternLMDecoderLayer(config, index) for index in range(config.num_hidden_layers)])
        self.norm = InternLMRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.gradient_checkpointing = False
        self.post_init()

    @deprecate_past_key_values
    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        cache: Cache | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """
        Args:
            input_ids: Token ids, (B, Q); or pass `inputs_embeds`, (B, Q, E), not both.
            attention_mask: 1 for tokens and 0 for padding, (B, K), or a prepared mask of 4 dimensions.
            position_ids: (B, Q); by default counted from the attention mask, or from the cache's length.
            cache: A transformers cache with the tokens so far; `past_key_values` is its name until transformers 5.23.
            kwargs: For the attention function.

        Raises:
            ValueError: Neither or both of input_ids and inputs_embeds; shapes that do not fit (checks_internlm.py).
        """
        inputs_embeds = embed(self.embed_tokens, input_ids, inputs_embeds)
        cache = resolve_cache(self, past_key_values, cache)
        num_layers = self.config.num_hidden_layers  # fewer than there are in early-exit decoding
        check_inputs(inputs_embeds, attention_mask, position_ids, cache, min(num_layers, len(self.layers)))
        if use_cache and cache is None:
            cache = default_cache(self.config)
        library_cache = cache if isinstance(cache, Cache) else None
        positions = new_positions(
            inputs_embeds, attention_mask, position_ids, library_cache, kwargs.pop("cache_position", None)
        )
        warn_if_missing(inputs_embeds)
        warn_far_beyond_window(self, positions.key_offset + positions.key_length)
        mask = None
        if not self._sees_all_keys(inputs_embeds, attention_mask, library_cache):
            mask = causal_mask(
                self.config, inputs_embeds, attention_mask, library_cache, positions.new, positions.slots
            )
        key_source = self._key_source(cache, mask, kwargs)
        tables = rotary_tables(self.config, inputs_embeds, positions, attention_mask, mask, key_source)
        position_embeddings = (*tables, positions.slots)
        attn_implementation = self.config._attn_implementation

        linear = linear_for(inputs_embeds)
        hidden_states = inputs_embeds
        for layer in itertools.islice(self.layers, num_layers):
            hidden_states = layer(
                hidden_states,
                attention_mask=mask,
                position_ids=positions.new,
                position_embeddings=position_embeddings,
                attn_implementation=attn_implementation,
                cache=cache,
                linear=linear,
                **kwargs,
            )
        with_cache: dict[str, Any] = {CACHE: library_cache}
        return BaseModelOutputWithPast(last_hidden_state=self.norm(hidden_states), **with_cache)

    def _sees_all_keys(
        self, inputs_embeds: torch.Tensor, attention_mask: torch.Tensor | None, cache: Cache | None
    ) -> bool:
        """Whether there is nothing to mask: one new token, no padding, no empty slots as in a static cache."""
        single = inputs_embeds.shape[1] == 1 and attention_mask is None and not getattr(cache, "is_compileable", False)
        return single and self.config._attn_implementation == "sdpa"

    def _key_source(self, cache: Any, mask: Any, attention_kwargs: dict[str, Any]) -> Any:
        """Of `rotary_tables`: generate_batch passes a cache that is no library cache, vLLM and SGLang an argument."""
        if "attention_instances" in attention_kwargs:
            return "engine"
        if cache is None or isinstance(cache, Cache):
            return "forward" if cache is None else "cache"
        return "pages" if PAGES_ARE_EXACT and is_dense(mask) else "engine"


def chunked_loss(
    function: Callable, logits: torch.Tensor, labels: torch.Tensor, vocab_size: int, **kwargs: Any
) -> torch.Tensor:
    """The library's loss; of many logits in chunks, so that it never holds float32 copies of them all.

    For 16,384 tokens and a vocabulary of 103,168 each of its copies takes 6.8 GB. Every chunk is recomputed in the
    backward pass, and divided by the number of all labels, so that the sum is the loss of the whole.
    """
    size = max(1, _LOSS_CHUNK_NUMEL // vocab_size)
    if labels.numel() <= size or function is not ForCausalLMLoss:  # a custom loss may not be a sum over tokens
        return function(logits=logits, labels=labels, vocab_size=vocab_size, **kwargs)
    targets, count = kwargs.pop("shift_labels", None), kwargs.pop("num_items_in_batch", None)
    ignored = kwargs.get("ignore_index", -100)
    if targets is None:
        targets = nn.functional.pad(labels, (0, 1), value=ignored)[..., 1:]
    if count is None:
        count = (targets != ignored).sum()
    chunks = zip(logits.reshape(-1, vocab_size).split(size), targets.reshape(-1).split(size), strict=True)
    shared = {"labels": None, "vocab_size": vocab_size, "num_items_in_batch": count, **kwargs}
    losses = [
        checkpoint(function, chunk, use_reentrant=False, preserve_rng_state=False, shift_labels=target, **shared)
        for chunk, target in chunks
    ]
    return torch.stack(losses).sum()


class InternLMForCausalLM(InternLMBatchingMixin, InternLMPreTrainedModel, InternLMChatMixin, GenerationMixin):
    _auto_class = "AutoModelForCausalLM"
    _tied_weights_keys = TIED_WEIGHTS
    _tp_plan = {"lm_head": LM_HEAD_PLAN}
    _pp_plan: Any = {"lm_head": (["hidden_states"], ["logits"])}
    _fsdp_plan = {"lm_head": "keep_full_weight"}

    def __init__(self, config: InternLMConfig) -> None:
        super().__init__(config)
        self.model = InternLMModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def _get_name(self) -> str:
        """Llama's: the Trainer's label smoothing shifts labels only for class names that the library knows."""
        return "LlamaForCausalLM"

    def __repr__(self) -> str:
        return super().__repr__().replace(self._get_name(), type(self).__name__, 1)

    @deprecate_past_key_values
    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        cache: Cache | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """
        Args:
            labels: Token ids, (B, Q), -100 where a token does not count; the loss shifts them by one.
            logits_to_keep: Logits of the last N tokens only, or of the token indices given; 0 is all, (B, Q, V).

        The other arguments are `InternLMModel.forward`'s.
        """
        past = past_key_values if cache is None else cache
        decoding = getattr(past, "decoding", None)
        if decoding is not None and inputs_embeds is None and labels is None and isinstance(logits_to_keep, int):
            logits = decoding.logits(past, input_ids, attention_mask, position_ids, kwargs)
            if logits is not None:
                captured: dict[str, Any] = {"logits": logits, CACHE: past}
                return CausalLMOutputWithPast(**captured)
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            cache=past,
            **kwargs,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        hidden_states = outputs.last_hidden_state[:, kept]
        logits = linear_for(hidden_states)(self.lm_head, hidden_states)
        loss = None
        if labels is not None:
            loss = chunked_loss(self.loss_function, logits, labels, self.config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            **{CACHE: getattr(outputs, CACHE)},
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )

    def _prepare_cache_for_generation(
        self, generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> Any:
        """The library's, except that the DynamicCache it makes by default is one that appends in place.

        It is not public, but transformers' own models override it likewise, and nothing public knows whether the user
        passed a cache, and how long generation may become.
        """
        passed, library = model_kwargs.get(CACHE), cast("Any", super())
        result = library._prepare_cache_for_generation(generation_config, model_kwargs, *args, **kwargs)
        made = model_kwargs.get(CACHE)  # 5.0 makes none and leaves that to the forward, which knows no length
        plain = generation_config.use_cache if made is None else type(made) is DynamicCache and not made.offloading
        if passed is None and plain:
            cache = model_kwargs[CACHE] = default_cache(self.config, generation_config.max_length - 1)
            if isinstance(cache, GrowingCache) and not generation_config.disable_compile:
                cache.decoding = Decoding(self)
        elif isinstance(passed, GrowingCache):
            passed.decoding = None
        return result


class InternLMForSequenceClassification(GenericForSequenceClassification, InternLMPreTrainedModel):
    _auto_class = "AutoModelForSequenceClassification"

    # The three heads build their own base model: the generic __init__ goes through AutoModel, which requires
    # trust_remote_code.
    def __init__(self, config: InternLMConfig) -> None:
        InternLMPreTrainedModel.__init__(self, config)
        self.num_labels = config.num_labels
        self.model = InternLMModel(config)
        self.score = nn.Linear(config.hidden_size, config.num_labels, bias=False)
        self.post_init()


class InternLMForTokenClassification(GenericForTokenClassification, InternLMPreTrainedModel):
    _auto_class = "AutoModelForTokenClassification"

    def __init__(self, config: InternLMConfig) -> None:
        InternLMPreTrainedModel.__init__(self, config)
        self.num_labels = config.num_labels
        self.model = InternLMModel(config)
        self.dropout = nn.Dropout(getattr(config, "classifier_dropout", None) or 0.0)
        self.score = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()


class InternLMForQuestionAnswering(GenericForQuestionAnswering, InternLMPreTrainedModel):
    _auto_class = "AutoModelForQuestionAnswering"

    def __init__(self, config: InternLMConfig) -> None:
        InternLMPreTrainedModel.__init__(self, config)
        self.model = InternLMModel(config)
        self.qa_outputs = nn.Linear(config.hidden_size, 2)
        self.post_init()


__all__ = [
    "InternLMForCausalLM",
    "InternLMForQuestionAnswering",
    "InternLMForSequenceClassification",
    "InternLMForTokenClassification",
    "InternLMModel",
    "InternLMPreTrainedModel",
]
