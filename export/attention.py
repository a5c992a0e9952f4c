"""Attention in a graph whose operator set has no attention: a block of queries at a time.

Before opset 23 the exporter writes two products and a softmax, and ONNX Runtime holds all scores between them: 2 GB for
each row at Stable Diffusion's finest level (8 heads, 8192 x 8192), several times over. OpenVINO finds attention in
either form and holds none; TensorRT gets opset 23, where attention is one operator.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode

ATTENTION_OPSET = 23
"""The first with attention as one operator."""
MAX_SCORES_BYTES = 2**27
"""Limit of one row's scores in float32. Attention with fewer is written whole, as all is at the coarser levels."""


class AttentionInBlocks(TorchFunctionMode):
    """While this lasts, ``scaled_dot_product_attention`` is computed for a block of queries after another.

    Every query's softmax is over all keys in any case, so that blocks change nothing but the order of the work.
    """

    def __torch_function__(
        self,
        function: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Call ``function``; where it is an attention with large scores, for each block."""
        if function is not functional.scaled_dot_product_attention:
            return function(*args, **(kwargs or {}))
        call = inspect.signature(_arguments).bind(*args, **(kwargs or {}))
        query, key = call.arguments["query"], call.arguments["key"]
        # A mask has its queries' rows, and a causal one knows where a block begins: no network here has either.
        is_masked = call.arguments.get("attn_mask") is not None or call.arguments.get("is_causal", False)
        if is_masked or query.ndim != 4 or (count := queries_at_once(query, key)) >= query.shape[2]:
            return function(*args, **(kwargs or {}))
        others = {name: value for name, value in call.arguments.items() if name != "query"}
        return torch.cat([function(block, **others) for block in query.split(count, dim=2)], dim=2)


def _arguments(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> None:
    """Take what ``scaled_dot_product_attention`` does; its own signature is torch's C code's."""


def queries_at_once(query: Tensor, key: Tensor) -> int:
    """Return the number of queries [batch, heads, n, d] that may see keys [batch, heads, m, d] together."""
    return max(1, MAX_SCORES_BYTES // (4 * query.shape[1] * key.shape[2]))
