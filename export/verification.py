"""An exported graph is believed only after it was compared with what it was made from.

In stages, cheapest first: names and types, axes, shapes at the largest batch (ONNX shape inference), then values
against torch in fp32 with the same rounded weights. Each stage raises VerificationError naming the tensor and the
figures.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import onnx
import torch
from onnx import TensorProto

from export.inference import infer
from export.tensorrt_support import check_operators
from export.widening import save, widened
from icportrait.contract import Array, DType, ModelSpec, TensorSpec
from icportrait.errors import VerificationError
from icportrait.runtime.engine import Engine
from icportrait.runtime.ort import OrtEngine
from icportrait.runtime.ov import OpenVinoEngine

WEIGHT_TYPES = {
    "fp32": torch.float32,
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
    "int8": torch.float16,
    "fp8": torch.float16,
}
"""Type of the weights in an export's modules; for int8 and fp8, before they are quantised."""


@dataclass(frozen=True)
class Tolerance:
    """The allowed distance of a graph from torch.

    ``relative_rms`` is |a - b| / |b| over a tensor of numbers; ``levels`` the largest difference of a uint8 picture and
    ``mean_levels`` its mean; ``flow_disagreement`` the share of positions whose match differs and
    ``flow_error_cells`` the mean distance between the matches over all positions.
    """

    relative_rms: float
    levels: int = 0
    mean_levels: float = 0.0
    flow_disagreement: float = 0.0
    flow_error_cells: float = 0.0


TOLERANCES: dict[str, dict[str, Tolerance]] = {
    "fp32": {
        "vae_encoder": Tolerance(1e-4),
        "warping_network": Tolerance(1e-4, flow_disagreement=0.002, flow_error_cells=0.05),
        "unet": Tolerance(1e-4),
        "vae_decoder": Tolerance(1e-4, levels=1, mean_levels=0.01),
    },
    "fp16": {
        "vae_encoder": Tolerance(1e-2),
        "warping_network": Tolerance(1e-2, flow_disagreement=0.05, flow_error_cells=1.0),
        "unet": Tolerance(1e-2),
        "vae_decoder": Tolerance(1e-2, levels=4, mean_levels=0.5),
    },
    "bf16": {
        "vae_encoder": Tolerance(3e-2),
        "warping_network": Tolerance(3e-2, flow_disagreement=0.15, flow_error_cells=2.0),
        "unet": Tolerance(3e-2),
        "vae_decoder": Tolerance(3e-2, levels=8, mean_levels=1.0),
    },
    "int8": {"unet": Tolerance(0.15)},
    "fp8": {"unet": Tolerance(0.15)},
}
"""Tolerances by an engine's precision and name.

fp32: two runtimes sum in another order. fp16, bf16: weights are equal, activations are rounded; matches that are nearly
tied fall the other way. int8, fp8: the quantiser did its work; ``export.quality`` measures the cost to a portrait.
"""


@dataclass(frozen=True)
class Figure:
    """The distance of one tensor from its expected values."""

    tensor: str
    name: str
    value: float
    limit: float

    @property
    def passed(self) -> bool:
        return self.value <= self.limit  # of a NaN this is false

    def __str__(self) -> str:
        return f"{self.name} is {self.value:.3g}, allowed {self.limit:g}"


def verify(
    path: Path,
    spec: ModelSpec,
    module: torch.nn.Module,
    precision: str,
    opset: int,
    batches: Sequence[Mapping[str, Array]],
    progress: Callable[[str], None],
    runtime: str = "onnxruntime",
) -> None:
    """Run all stages for one graph; ``precision`` is the graph's own, the other arguments are as in the stages."""
    progress(f"{spec.name}: names and types")
    check_names_and_types(path, spec, opset)
    progress(f"{spec.name}: operators and their types")
    check_operators(path, opset)
    progress(f"{spec.name}: axes")
    check_axes(path, spec)
    progress(f"{spec.name}: shapes at batch {spec.batch.max}")
    check_shapes(path, spec)
    sizes = " and ".join(str(len(next(iter(inputs.values())))) for inputs in batches)
    progress(f"{spec.name}: values at batch {sizes}")
    # Of a bfloat16 graph only what was folded at export is rounded here: see _widened_outputs.
    tolerance = TOLERANCES["fp16" if precision == "bf16" else precision][spec.name]
    figures = check_values(path, spec, module, tolerance, batches, runtime)
    progress(f"{spec.name}: " + ", ".join(f"{figure} {value:.2g}" for figure, value in figures.items()))


def check_names_and_types(path: Path, spec: ModelSpec, opset: int) -> None:
    """Check that the graph is valid ONNX of the asked-for opset and has the specification's tensors, in its order."""
    onnx.checker.check_model(str(path))
    model = onnx.load(path, load_external_data=False)
    found_opset = next(entry.version for entry in model.opset_import if entry.domain == "")
    if found_opset != opset:
        raise VerificationError(f"{spec.name}: opset is {found_opset}, expected {opset}")
    for kind, nodes, specs in (("input", model.graph.input, spec.inputs), ("output", model.graph.output, spec.outputs)):
        names, expected = [node.name for node in nodes], [tensor.name for tensor in specs]
        if names != expected:
            raise VerificationError(f"{spec.name}: {kind}s are {', '.join(names)}, expected {', '.join(expected)}")
        for node, tensor in zip(nodes, specs, strict=True):
            found = TensorProto.DataType.Name(node.type.tensor_type.elem_type)
            if found != tensor.dtype.onnx:
                raise VerificationError(f"{spec.name}: {tensor.name} is {found}, expected {tensor.dtype.onnx}")


def check_axes(path: Path, spec: ModelSpec) -> None:
    """Check that exactly the dynamic axes are symbolic, under their names, and that the fixed ones have their sizes."""
    graph = onnx.load(path, load_external_data=False).graph
    nodes = {node.name: node for node in (*graph.input, *graph.output)}
    for tensor in (*spec.inputs, *spec.outputs):
        found = [dim.dim_param or dim.dim_value for dim in nodes[tensor.name].type.tensor_type.shape.dim]
        expected = [axis.name if axis.is_dynamic else axis.min for axis in tensor.axes]
        if found != expected:
            raise VerificationError(f"{spec.name}: {tensor.name}: axes are {found}, expected {expected}")


def check_shapes(path: Path, spec: ModelSpec) -> None:
    """Check that ONNX shape inference finds the specification's output shapes at the largest batch."""
    model = onnx.load(path, load_external_data=False)
    batch = spec.batch.max
    for node in model.graph.input:
        node.type.tensor_type.shape.dim[0].dim_value = batch
    for node in model.graph.output:
        node.type.tensor_type.ClearField("shape")
    nodes = {node.name: node for node in infer(model, strict=True).graph.output}
    for tensor in spec.outputs:
        found = [dim.dim_value for dim in nodes[tensor.name].type.tensor_type.shape.dim]
        expected = list(tensor.shape(batch=batch))
        if found != expected:
            raise VerificationError(
                f"{spec.name}: {tensor.name}: shape at batch {batch} is {found}, expected {expected}"
            )


def check_values(
    path: Path,
    spec: ModelSpec,
    module: torch.nn.Module,
    tolerance: Tolerance,
    batches: Sequence[Mapping[str, Array]],
    runtime: str = "onnxruntime",
) -> dict[str, float]:
    """Run the graph and the module on the same inputs and compare.

    The module and the graph's session are never in memory in fp32 at the same time: each holds gigabytes.

    Args:
        path: the graph. One in bfloat16 is compared before its activations are rounded: see ``widening``.
        spec: its specification.
        module: what it was made from, with the graph's own, rounded weights; computes in fp32 and keeps its type.
        tolerance: how far the two may differ.
        batches: inputs by name.
        runtime: what runs the graph: ``onnxruntime``, or ``openvino``, which computes in float32 here and takes half
            the time for the largest graphs. One in bfloat16 always runs on ONNX Runtime.

    Returns:
        The largest figure of each kind that was compared.

    Raises:
        VerificationError: a figure is over its tolerance, or an output isn't finite.
    """
    expected = [torch_outputs(module, spec, inputs) for inputs in batches]
    is_bf16 = next(module.parameters()).dtype == torch.bfloat16
    found = _widened_outputs(path, spec, batches) if is_bf16 else _graph_outputs(path, spec, batches, runtime)
    worst: dict[str, float] = {}
    for inputs, outputs, reference in zip(batches, found, expected, strict=True):
        wanted = with_flows_of(outputs, reference, partial(torch_outputs, module, spec, inputs))
        for tensor in spec.outputs:
            for figure in compare(tensor, outputs[tensor.name], wanted[tensor.name], tolerance):
                if not figure.passed:
                    batch = len(outputs[tensor.name])
                    raise VerificationError(f"{spec.name}: {tensor.name} at batch {batch}: {figure}")
                worst[figure.name] = max(worst.get(figure.name, 0.0), figure.value)
    return worst


def _graph_outputs(
    path: Path, spec: ModelSpec, batches: Sequence[Mapping[str, Array]], runtime: str
) -> list[dict[str, Array]]:
    engine: Engine
    if runtime == "openvino":
        rows = {len(next(iter(inputs.values()))) for inputs in batches}
        engine = OpenVinoEngine(path, spec, tuple(sorted({1, *rows})), precision="f32")
    else:
        engine = OrtEngine(path, spec)
    return [engine.run(inputs) for inputs in batches]


def _widened_outputs(path: Path, spec: ModelSpec, batches: Sequence[Mapping[str, Array]]) -> list[dict[str, Array]]:
    wide_spec = replace(spec, inputs=tuple(map(_wide, spec.inputs)), outputs=tuple(map(_wide, spec.outputs)))
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        wide = Path(folder) / path.name
        save(widened(onnx.load(path)), wide)
        engine = OrtEngine(wide, wide_spec)
    return [engine.run({name: _float32(array) for name, array in inputs.items()}) for inputs in batches]


def _wide(tensor: TensorSpec) -> TensorSpec:
    return replace(tensor, dtype=DType.FLOAT32) if tensor.dtype is DType.BFLOAT16 else tensor


def _float32(array: Array) -> Array:
    """Return half precision as float32, other types unchanged."""
    return array.astype(np.float32) if array.dtype.name in ("float16", "bfloat16") else array


def torch_outputs(
    module: torch.nn.Module,
    spec: ModelSpec,
    inputs: Mapping[str, Array],
    known_flows: Mapping[str, Array] | None = None,
) -> dict[str, Array]:
    """Compute the module's outputs in fp32, on the device where the module is.

    Args:
        module: takes and gives the specification's tensors in its order; keeps its type.
        spec: the engine.
        inputs: by name, of the specification's types.
        known_flows: for the warping network, ``flow_L`` by name: warp by these and not by the matches found.
    """
    weight = next(module.parameters())
    dtype, device = weight.dtype, weight.device
    tensors = [torch.from_numpy(_float32(inputs[tensor.name])).to(device) for tensor in spec.inputs]
    extra = {}
    if known_flows:
        # Of a wrong engine a flow may be anything, and a gather from outside of the grid ends a process on a GPU.
        extra["known_flows"] = [
            torch.from_numpy(flow).long().flatten(1).clamp(0, flow[0].size - 1).to(device)
            for flow in known_flows.values()
        ]
    module.float()
    with torch.inference_mode():
        outputs = module(*tensors, **extra)
    cast(module, dtype)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    return {tensor.name: output.cpu().numpy() for tensor, output in zip(spec.outputs, outputs, strict=True)}


def cast(module: torch.nn.Module, dtype: torch.dtype) -> None:
    """Convert a module as ``module.to(dtype)`` does, of which diffusers' modules warn."""
    {torch.float32: module.float, torch.float16: module.half, torch.bfloat16: module.bfloat16}[dtype]()


def with_flows_of(
    found: Mapping[str, Array],
    expected: Mapping[str, Array],
    again: Callable[[Mapping[str, Array]], Mapping[str, Array]],
) -> dict[str, Array]:
    """Return the outputs to compare ``found`` with.

    A match that falls the other way moves features, and would drown every other difference in F_ref. The flow is
    therefore judged by itself, and F_ref with the flow that was found.

    Args:
        found: an engine's outputs.
        expected: torch's outputs.
        again: gives torch's outputs for known flows; called where the flows differ.
    """
    flows = {name: array for name, array in found.items() if name.startswith("flow_")}
    if all(np.array_equal(flow, expected[name]) for name, flow in flows.items()):
        return dict(expected)
    moved = again(flows)
    return {name: moved[name] if name.startswith("f_ref_") else array for name, array in expected.items()}


def compare(tensor: TensorSpec, found: Array, expected: Array, tolerance: Tolerance) -> list[Figure]:
    """Return the figures by which this kind of tensor is judged. Both arrays have the same shape."""
    name = tensor.name
    if name.startswith("flow_"):
        # One match is always allowed: the coarse levels have too few for a share to say much.
        share = max(tolerance.flow_disagreement, 1 / found.size)
        distance = end_point_error(found, expected)
        return [
            Figure(name, "flow disagreement", float(np.mean(found != expected)), share),
            Figure(name, "flow end-point error (cells)", distance, tolerance.flow_error_cells),
        ]
    reference = expected.astype(np.float64)
    difference = found.astype(np.float64) - reference
    if found.dtype == np.uint8:
        levels = np.abs(difference)
        return [
            Figure(name, "largest difference (levels)", float(levels.max()), tolerance.levels),
            Figure(name, "mean difference (levels)", float(levels.mean()), tolerance.mean_levels),
        ]
    relative = float(np.linalg.norm(difference) / max(float(np.linalg.norm(reference)), 1e-12))
    return [Figure(name, "relative RMS error", relative, tolerance.relative_rms)]


def end_point_error(found: Array, expected: Array) -> float:
    """Return the mean distance in cells between two flows [batch, h, w] of positions y * w + x."""
    width = found.shape[-1]
    rows = found.astype(np.int64) // width - expected.astype(np.int64) // width
    columns = found.astype(np.int64) % width - expected.astype(np.int64) % width
    return float(np.hypot(rows, columns).mean())
