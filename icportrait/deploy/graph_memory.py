"""The memory that an engine takes on a CPU, read from its graph without a run.

A graph lists its operators in an order in which they can run. A tensor is held from the operator that makes it to the
last operator that reads it. A run takes the most that is held at once. CPU runtimes compute in float32, so weights and
tensors of half precision take four bytes an element too.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from icportrait.errors import CheckpointError

if TYPE_CHECKING:
    import onnx

SAME_MEMORY = ("Cast", "Flatten", "Identity", "Reshape", "Squeeze", "Unsqueeze")
"""Operators whose output is their first input's memory, or takes its place."""
LARGEST_SHAPE = 16
"""Elements of a constant that a shape may be computed from."""


@dataclass(frozen=True)
class GraphMemory:
    """The bytes that a graph's weights and one of its runs take."""

    weights_bytes: int
    row_bytes: int
    """The most that is held at once, for each row of the batch."""


def graph_memory(path: Path) -> GraphMemory:
    """Add up an ONNX graph. Its external data isn't read."""
    import onnx

    model = onnx.load(path, load_external_data=False)
    weights = sum(4 * math.prod(weight.dims) for weight in model.graph.initializer)
    graph = _one_row(model)
    if unknown := _unknown(graph):
        raise CheckpointError(f"{path}: the size of {min(unknown)} can't be found; export again")
    return GraphMemory(weights, _most_held_at_once(graph))


def _one_row(model: onnx.ModelProto) -> onnx.GraphProto:
    """Return the graph with every tensor's sizes at one row.

    The exporter leaves sizes out behind a reshape that is computed: below opset 23 every attention's scores.
    """
    import onnx

    graph = model.graph
    for weight in graph.initializer:
        if math.prod(weight.dims) > LARGEST_SHAPE:  # sizes aren't computed from it, and inference copies it
            weight.ClearField("raw_data")
    for info in (*graph.value_info, *graph.input, *graph.output):
        for dim in info.type.tensor_type.shape.dim:
            if dim.dim_param:
                dim.dim_value = 1
    return onnx.shape_inference.infer_shapes(model, data_prop=True).graph if _unknown(graph) else graph


def _unknown(graph: onnx.GraphProto) -> set[str]:
    """Return the tensors whose sizes the graph doesn't say."""
    known = {
        info.name
        for info in (*graph.value_info, *graph.output)
        if all(dim.HasField("dim_value") for dim in info.type.tensor_type.shape.dim)
    }
    return {name for node in graph.node for name in node.output if name} - known


def _most_held_at_once(graph: onnx.GraphProto) -> int:
    sizes = {info.name: _row_bytes(info) for info in (*graph.value_info, *graph.input, *graph.output)}
    owner: dict[str, str] = {}
    for node in graph.node:
        for output in node.output:
            owner[output] = owner.get(node.input[0], node.input[0]) if node.op_type in SAME_MEMORY else output
    last_reader = {output.name: len(graph.node) for output in graph.output}
    for index, node in enumerate(graph.node):
        for name in node.input:
            last_reader[owner.get(name, name)] = max(index, last_reader.get(owner.get(name, name), 0))
    for output in graph.output:
        last_reader[owner.get(output.name, output.name)] = len(graph.node)
    held = _total(sizes, (tensor.name for tensor in graph.input))
    most = held
    ends: dict[int, list[str]] = {}
    for index, node in enumerate(graph.node):
        made = [name for name in node.output if owner[name] == name]
        held += _total(sizes, made)
        most = max(most, held)
        for name in made:
            ends.setdefault(last_reader.get(name, index), []).append(name)
        held -= _total(sizes, ends.get(index, []))
    return most


def _total(sizes: dict[str, int], names: Iterable[str]) -> int:
    return sum(sizes.get(name, 0) for name in names)


def _row_bytes(info: onnx.ValueInfoProto) -> int:
    import onnx

    kind = info.type.tensor_type
    sizes: list[int] = [dim.dim_value for dim in kind.shape.dim]
    return math.prod(sizes) * (1 if kind.elem_type == onnx.TensorProto.UINT8 else 4)
