"""Types and shapes of every tensor in a graph, found out anew."""

from __future__ import annotations

from collections.abc import Iterator

import onnx
from onnx import helper, shape_inference


def infer(model: onnx.ModelProto, *, strict: bool) -> onnx.ModelProto:
    """Infer shapes and types with ONNX, without regard to what the exporter has noted of inner tensors.

    Args:
        model: stays as it is. Its large weights needn't be loaded.
        strict: raise an onnx.shape_inference.InferenceError for whatever can't be inferred; otherwise such tensors are
            without a type.

    Returns:
        A copy with the found value_infos, and node for node as ``model``, but for the group norms.
    """
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    for graph in subgraphs(copy.graph):
        del graph.value_info[:]
        for node in graph.node:
            if node.op_type == "GroupNormalization":  # onnx can't infer its output, which is as its first input
                node.CopyFrom(helper.make_node("Identity", node.input[:1], node.output, name=node.name))
    return shape_inference.infer_shapes(copy, strict_mode=strict, data_prop=True)


def subgraphs(graph: onnx.GraphProto) -> Iterator[onnx.GraphProto]:
    """Yield a graph and, after it, the graphs that its nodes hold."""
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            for inner in (*([attribute.g] if attribute.HasField("g") else []), *attribute.graphs):
                yield from subgraphs(inner)
