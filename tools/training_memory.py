"""The memory that training an adapter takes, computed from the shapes of the tensors: docs/finetuning.md.

Not included: the CUDA context, buffers inside an operation (one chunk of logits is the largest) and fragmentation.
"""

from typing import Any


def memory(config: Any, rank: int = 16, tokens: int = 2048, qlora: bool = False, checkpointing: bool = False) -> dict:
    """Bytes of `weights`, `adapter` (with its gradients and optimizer) and `activations`, in bfloat16 or nf4.

    Args:
        config: An InternLMConfig.
        rank: The adapter's rank; it has all seven linear layers of each decoder layer.
        tokens: Tokens in memory at once, padding included.
        qlora: Whether the linear layers of the decoder are in nf4, and the adapter in bfloat16 instead of float32.
        checkpointing: Whether the decoder layers keep only their inputs.
    """
    layers, hidden, inner = config.num_hidden_layers, config.hidden_size, config.intermediate_size
    linear = layers * (4 * hidden * hidden + 3 * hidden * inner)
    biases = 4 * layers * hidden if config.bias else 0
    rest = 2 * config.vocab_size * hidden + (2 * layers + 1) * hidden + biases
    weights = linear * (0.5 + 4 / 64 if qlora else 2) + 2 * rest
    adapter = layers * rank * (4 * 2 * hidden + 3 * (hidden + inner))
    return {
        "weights": round(weights),
        "adapter": adapter * (8 if qlora else 16),  # itself, its gradient and Adam's two averages
        "activations": activations(config, rank, tokens, checkpointing),
    }


def activations(config: Any, rank: int, tokens: int, checkpointing: bool) -> int:
    """Bytes that the decoder layers keep for the backward pass, with an attention that does not keep its scores."""
    layers, hidden, inner = config.num_hidden_layers, config.hidden_size, config.intermediate_size
    token = 28 * hidden + 8 * inner + 14 * rank + 4 * config.num_attention_heads + 8
    cast = 2 * rank * (4 * 2 * hidden + 3 * (hidden + inner))  # autocast's copy of the adapter
    layer = tokens * token + cast
    return layers * tokens * 2 * hidden + layer if checkpointing else layers * layer
