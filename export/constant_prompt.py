"""Cross-attention under a prompt that never changes: its keys and values are worked out once, before the export."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from diffusers.models.attention_processor import Attention
from torch import Tensor, nn
from torch.nn import functional


@contextmanager
def constant_prompt(module: nn.Module) -> Iterator[None]:
    """Let ``module``'s cross-attentions see its ``prompt_embedding``'s keys and values as constants within the block.

    Args:
        module: an engine module; one without a ``prompt_embedding`` [1, tokens, cross_attention_dim] stays as it is.
    """
    prompt = getattr(module, "prompt_embedding", None)
    attentions = [child for child in module.modules() if isinstance(child, Attention) and child.is_cross_attention]
    before = [attention.processor for attention in attentions]
    try:
        if prompt is not None:
            for attention in attentions:
                attention.set_processor(_KnownKeysAndValues(attention, prompt))
        yield
    finally:
        for attention, processor in zip(attentions, before, strict=True):
            attention.set_processor(processor)


class _KnownKeysAndValues:
    """A diffusers attention processor that reads no prompt."""

    @torch.no_grad()
    def __init__(self, attention: Attention, prompt: Tensor) -> None:
        prompt = prompt.to(attention.to_k.weight.dtype)
        self.key, self.value = (
            _by_head(attention, projection(prompt)) for projection in (attention.to_k, attention.to_v)
        )

    def __call__(self, attention: Attention, hidden_states: Tensor, **_: object) -> Tensor:
        query = _by_head(attention, attention.to_q(hidden_states))
        # Not len(query): of it torch.export makes a constant.
        key, value = (constant.expand(query.shape[0], -1, -1, -1) for constant in (self.key, self.value))
        found = functional.scaled_dot_product_attention(query, key, value)
        output: Tensor = attention.to_out[0](found.transpose(1, 2).flatten(2))
        return output


def _by_head(attention: Attention, features: Tensor) -> Tensor:
    """Reshape ``[batch, tokens, heads * d]`` to ``[batch, heads, tokens, d]``."""
    batch, tokens, _ = features.shape
    return features.view(batch, tokens, attention.heads, -1).transpose(1, 2)
