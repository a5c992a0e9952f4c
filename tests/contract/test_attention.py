"""Attention of graphs without an attention operator: what is written in blocks, and that it is the same attention."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import export.attention
from export.attention import AttentionInBlocks
from export.graphs import export_graph
from export.verification import Tolerance, check_values
from icportrait.contract import Axis, DType, ModelSpec, TensorSpec

HEADS, QUERIES, KEYS, CHANNELS = 2, 8, 10, 4
BATCH = Axis("batch", 1, 2, 3)


class Attention(nn.Module):
    """Attention alone."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return self.scale * functional.scaled_dot_product_attention(query, key, value)


def tensor(name: str, tokens: int) -> TensorSpec:
    axes = (
        BATCH,
        *(Axis.fixed(f"{axis}_{size}", size) for axis, size in (("h", HEADS), ("t", tokens), ("c", CHANNELS))),
    )
    return TensorSpec(name, DType.FLOAT32, axes)


SPEC = ModelSpec(
    "attention", (tensor("query", QUERIES), tensor("key", KEYS), tensor("value", KEYS)), (tensor("out", QUERIES),)
)


@pytest.mark.parametrize(
    "keywords",
    [{}, {"scale": 0.3}, {"is_causal": True}, {"attn_mask": torch.linspace(-3, 3, 36).reshape(6, 6)}],
    ids=str,
)
def test_blocks_are_the_same_attention_however_it_is_called(
    keywords: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(export.attention, "MAX_SCORES_BYTES", 4 * 2 * 6 * 3)
    attention = functional.scaled_dot_product_attention
    query, key, value = torch.randn(3, 2, 2, 6, 4)
    expected = attention(query, key, value, **keywords)
    flat = attention(query[0], key[0], value[0], **keywords)
    with AttentionInBlocks():
        assert torch.allclose(attention(query, key, value, **keywords), expected)
        assert torch.allclose(attention(query=query, key=key, value=value, **keywords), expected)
        assert torch.allclose(attention(query[0], key[0], value[0], **keywords), flat)


@pytest.mark.parametrize(
    ("opset", "scores_bytes", "operator", "count"),
    [
        (20, 4 * HEADS * KEYS * QUERIES, "Softmax", 1),
        (20, 4 * HEADS * KEYS * QUERIES - 1, "Softmax", 2),
        (20, 4 * HEADS * KEYS * 3, "Softmax", 3),
        (20, 1, "Softmax", QUERIES),
        (23, 1, "Attention", 1),
    ],
)
def test_large_scores_are_computed_a_block_of_queries_at_a_time(
    opset: int, scores_bytes: int, operator: str, count: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(export.attention, "MAX_SCORES_BYTES", scores_bytes)
    module = Attention()
    path, *_ = export_graph(module, SPEC, tmp_path, opset)
    assert [node.op_type for node in onnx.load(path).graph.node].count(operator) == count
    check_values(path, SPEC, module, Tolerance(1e-6), [SPEC.dummy_inputs(3)])
