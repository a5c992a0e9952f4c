"""Half-precision graphs as float32 graphs of the same nodes and names.

ONNX Runtime's CPU kernels have no bfloat16 and keep float32 between float16 operators; a widened graph shows what a
half-precision graph computes before anything is rounded.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import onnx
from onnx import AttributeProto, TensorProto, numpy_helper

from export.graphs import EXTERNAL_DATA_BYTES

HALF_TYPES = (TensorProto.FLOAT16, TensorProto.BFLOAT16)


def widened(model: onnx.ModelProto) -> onnx.ModelProto:
    """Turn every float16 and bfloat16 of ``model``, weights, constants, casts and tensors, into float32, in place."""
    graph = model.graph
    for value in (*graph.input, *graph.output, *graph.value_info):
        if value.type.tensor_type.elem_type in HALF_TYPES:
            value.type.tensor_type.elem_type = TensorProto.FLOAT
    _widen_tensors(graph.initializer)
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.type == AttributeProto.TENSOR:
                _widen_tensors([attribute.t])
            elif attribute.name in ("to", "dtype", "output_dtype") and attribute.i in HALF_TYPES:
                attribute.i = TensorProto.FLOAT
    return model


def save(model: onnx.ModelProto, path: Path) -> None:
    """Write a graph, with its large weights in a file of their own."""
    large = sum(len(weight.raw_data) for weight in model.graph.initializer) > EXTERNAL_DATA_BYTES
    external = {"save_as_external_data": True, "location": f"{path.name}.data"} if large else {}
    onnx.save(model, str(path), **external)


def _widen_tensors(tensors: Iterable[TensorProto]) -> None:
    for tensor in tensors:
        if tensor.data_type in HALF_TYPES:
            array = numpy_helper.to_array(tensor).astype(np.float32)
            tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))
