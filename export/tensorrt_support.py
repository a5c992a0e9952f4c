"""A stage of an export's verification: every node is something that the full TensorRT product documents as supported.

Every graph is checked, also the graphs for ONNX Runtime, because an exported graph may go to a GPU without another
export.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from export.inference import infer, subgraphs
from export.tensorrt_operators import (
    AUXILIARY,
    LARGEST_TOP_K,
    OPSETS,
    RESIZE_COORDINATES,
    SOURCE,
    SUPPORTED,
    UNSUPPORTED,
    UNTRUSTED,
)
from icportrait.contract import Array
from icportrait.errors import VerificationError


def check_operators(path: Path, opset: int) -> None:
    """Check that TensorRT's parser documents every node as supported in its types, also in subgraphs.

    Args:
        path: the graph; its large weights, if any, lie beside it and aren't read.
        opset: its ONNX operator set.

    Raises:
        VerificationError: the first node that isn't, by name, with its operator, the type and what is supported.
    """
    if opset not in OPSETS:
        raise VerificationError(
            f"{path}: opset is {opset}, and TensorRT takes {OPSETS[0]} to {OPSETS[-1]}; export with --opset"
        )
    model = onnx.load(path, load_external_data=False)
    # Not strict: behind a node that isn't ONNX's own nothing is known, and it is that node that is to be named.
    inferred = infer(model, strict=False)
    ends = {tensor.name for tensor in (*model.graph.input, *model.graph.output)}
    values: dict[str, onnx.ValueInfoProto] = {}
    constants: dict[str, onnx.TensorProto | None] = {}
    nodes = []
    for graph, found in zip(subgraphs(model.graph), subgraphs(inferred.graph), strict=True):
        # New ones for each graph, which sees what is around it: branches may give the same name to different things.
        values = values | {value.name: value for value in (*found.input, *found.output, *found.value_info)}
        constants = constants | {tensor.name: tensor for tensor in graph.initializer}
        constants |= {node.output[0]: _value(node) for node in graph.node if node.op_type == "Constant"}
        nodes += [_Node(node, opset, path, values, constants, ends) for node in graph.node]
    # Operators first: where one isn't supported, types behind it may be unknown.
    for problem_of in (_operator_problem, _type_problem, _restriction):
        for seen in nodes:
            if problem := problem_of(seen):
                raise VerificationError(f"{path}: {seen.name}: {problem}")


@dataclass
class _Node:
    """A node among what can be seen from it."""

    node: onnx.NodeProto
    opset: int
    path: Path
    values: dict[str, onnx.ValueInfoProto]
    constants: dict[str, onnx.TensorProto | None]
    """Values of initializers and Constant nodes; None where a value isn't a tensor."""
    ends: set[str]
    """The network's own inputs and outputs."""

    @property
    def name(self) -> str:
        name = f"node {self.node.name}" if self.node.name else f"the node that gives {', '.join(self.node.output)}"
        return f"{name} ({self.node.op_type})"

    def type(self, name: str) -> str:
        """Return ONNX's name of a tensor's type, empty where the type isn't known."""
        constant, value = self.constants.get(name), self.values.get(name)
        found = constant.data_type if constant else value.type.tensor_type.elem_type if value else TensorProto.UNDEFINED
        return TensorProto.DataType.Name(found) if found else ""

    def rank(self, index: int) -> int | None:
        """Return the rank of an input; None where it isn't known."""
        name = self.node.input[index]
        if constant := self.constants.get(name):
            return len(constant.dims)
        value = self.values.get(name)
        return len(value.type.tensor_type.shape.dim) if value and value.type.tensor_type.HasField("shape") else None

    def attribute(self, name: str, default: object) -> object:
        for attribute in self.node.attribute:
            if attribute.name == name:
                value = helper.get_attribute_value(attribute)
                return value.decode() if isinstance(value, bytes) else value
        return default

    def given(self, indices: Iterable[int], names: Iterable[str]) -> str:
        """Return the first of these names that is there, else an empty name."""
        names = list(names)
        return next((names[index] for index in indices if index < len(names) and names[index]), "")

    def constant(self, index: int) -> Array | None:
        """Return an input's value; None where the input isn't a constant tensor."""
        found = self.constants.get(self.given([index], self.node.input))
        return None if found is None else numpy_helper.to_array(found, str(self.path.parent))


def _value(node: onnx.NodeProto) -> onnx.TensorProto | None:
    return next((attribute.t for attribute in node.attribute if attribute.name == "value"), None)


def _operator_problem(seen: _Node) -> str:
    operator, domain = seen.node.op_type, seen.node.domain
    if domain not in ("", "ai.onnx"):
        return f"it is of domain {domain}, expected ONNX's own; write the module without it"
    if reason := UNTRUSTED.get(operator):
        return f"the operator isn't to be trusted: {reason}"
    if operator not in SUPPORTED:
        known = "documented as unsupported" if operator in UNSUPPORTED else "not documented as supported"
        return f"the operator is {known} ({SOURCE}); write the module without it"
    return ""


def _type_problem(seen: _Node) -> str:
    schema = onnx.defs.get_schema(seen.node.op_type, seen.opset, "")
    for names, formals in ((seen.node.input, schema.inputs), (seen.node.output, schema.outputs)):
        for index, name in enumerate(names):
            formal = formals[min(index, len(formals) - 1)]  # the last one may take several
            if name and (problem := _tensor_problem(seen, name, "tensor(float)" in formal.types)):
                return problem
    return ""


def _tensor_problem(seen: _Node, name: str, is_computed_with: bool) -> str:
    found, supported = seen.type(name), SUPPORTED[seen.node.op_type]
    if not is_computed_with:
        supported = supported | AUXILIARY
    if not found:
        return f"{name}: its type isn't known to ONNX's inference; export again"
    if found not in supported:
        return f"{name} is {found}, supported are {', '.join(sorted(supported))} ({SOURCE}); cast it before"
    if found == "UINT8" and name not in seen.ends:
        return f"{name} is UINT8, which only a network's input or output can be ({SOURCE}); compute in another type"
    return ""


def _restriction(seen: _Node) -> str:
    restriction = RESTRICTIONS.get(seen.node.op_type)
    problem = restriction(seen) if restriction else ""
    return f"{problem} ({SOURCE})" if problem else ""


def _attention(seen: _Node) -> str:
    for index in range(min(4, len(seen.node.input))):
        if seen.node.input[index] and seen.rank(index) != 4:
            return f"{seen.node.input[index]} has {seen.rank(index)} axes, expected [batch, heads, tokens, size]"
    if extra := seen.given(range(4, 7), seen.node.input) or seen.given(range(1, 4), seen.node.output):
        return f"{extra}: caches and the product of Q and K are not supported; leave them out"
    for name in ("softcap", "qk_matmul_output_mode"):
        if seen.attribute(name, 0):
            return f"{name} is {seen.attribute(name, 0)}, supported is 0"
    return ""


def _resize(seen: _Node) -> str:
    for name, default, supported in (
        ("coordinate_transformation_mode", "half_pixel", RESIZE_COORDINATES),
        ("mode", "nearest", {"nearest", "linear"}),
        ("keep_aspect_ratio_policy", "stretch", {"stretch"}),
        ("antialias", 0, {0}),
    ):
        if (found := seen.attribute(name, default)) not in supported:
            return f"{name} is {found}, supported is {' or '.join(sorted(map(str, supported)))}"
    return ""


def _zero_point(seen: _Node) -> str:
    zero = seen.given([2], seen.node.input)
    if not zero:
        return ""
    value = seen.constant(2)
    if value is None or np.any(value.astype(np.float32)):
        return f"{zero} is no constant 0, and TensorRT quantises symmetrically; give a zero point of 0"
    return ""


def _constant_axes(seen: _Node) -> str:
    axes = seen.given([1], seen.node.input)
    return f"{axes}: axes must be a constant; write them into the module" if axes not in {"", *seen.constants} else ""


def _layer_norm(seen: _Node) -> str:
    extra = seen.given([1, 2], seen.node.output)
    return f"{extra}: only the first output is supported; leave it out" if extra else ""


def _top_k(seen: _Node) -> str:
    if not seen.attribute("sorted", 1):
        return "sorted is 0, supported is 1"
    largest = seen.constant(1)
    if largest is not None and int(largest.max()) > LARGEST_TOP_K:
        return f"K is {int(largest.max())}, supported are up to {LARGEST_TOP_K}"
    return ""


RESTRICTIONS: dict[str, Callable[[_Node], str]] = {
    "Attention": _attention,
    "Resize": _resize,
    "QuantizeLinear": _zero_point,
    "DequantizeLinear": _zero_point,
    "LayerNormalization": _layer_norm,
    "TopK": _top_k,
    **dict.fromkeys(("Squeeze", "Unsqueeze"), _constant_axes),
    **{name: _constant_axes for name in SUPPORTED if name.startswith("Reduce")},
}
"""Further restrictions in the documentation on operators that image models have."""
