"""Graphs with the contract's inputs and outputs and next to no work in them, for tests of the serving path alone.

Every output is the mean of the first input, row by row, in the output's shape: a row depends on nothing but itself.
"""

from __future__ import annotations

from pathlib import Path

import onnx
from onnx import TensorProto, helper

from icportrait.contract import ModelSpec, TensorSpec, contract_hash, engine_specs
from icportrait.manifest import EngineFile, Manifest, file_sha256
from icportrait.presets import Preset

OPSET = 20
SD15_SCHEDULER = {
    "_class_name": "PNDMScheduler",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "num_train_timesteps": 1000,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
    "clip_sample": False,
}


def write_trivial_export(directory: Path, preset: Preset, precision: str = "fp32") -> Manifest:
    """Write the four graphs and their manifest, as ``python -m export`` would."""
    directory.mkdir(parents=True, exist_ok=True)
    engines = {}
    for name, spec in engine_specs(preset, precision).items():
        path = directory / f"{name}.onnx"
        onnx.save(_graph(spec), path)
        engines[name] = EngineFile(path.name, file_sha256(path), path.stat().st_size, "fp32")
    manifest = Manifest(
        preset=preset,
        precision=precision,
        opset=OPSET,
        contract_hash=contract_hash(preset, precision),
        engines=engines,
        scheduler_config=SD15_SCHEDULER,
        defaults={"guidance_scale": 1.0, "num_inference_steps": 20},
        source={"random_weights": 0},
        versions={},
    )
    manifest.write(directory)
    return manifest


def _graph(spec: ModelSpec) -> onnx.ModelProto:
    first = spec.inputs[0]
    nodes = [
        helper.make_node("Cast", [first.name], ["values"], to=TensorProto.FLOAT),
        helper.make_node("ReduceMean", ["values", "axes"], ["mean"], keepdims=0),
        helper.make_node("Shape", ["mean"], ["batch"]),
    ]
    axes = list(range(1, len(first.axes)))
    constants = [helper.make_tensor("axes", TensorProto.INT64, [len(axes)], axes)]
    for spec_out in spec.outputs:
        nodes += _output_nodes(spec_out, constants)
    graph = helper.make_graph(nodes, spec.name, _infos(spec.inputs), _infos(spec.outputs), constants)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=10)


def _output_nodes(spec: TensorSpec, constants: list[onnx.TensorProto]) -> list[onnx.NodeProto]:
    name, dims = spec.name, [axis.min for axis in spec.axes[1:]]
    constants.append(helper.make_tensor(f"{name}_ones", TensorProto.INT64, [len(dims)], [1] * len(dims)))
    constants.append(helper.make_tensor(f"{name}_dims", TensorProto.INT64, [len(dims)], dims))
    return [
        helper.make_node("Concat", ["batch", f"{name}_ones"], [f"{name}_rank"], axis=0),
        helper.make_node("Reshape", ["mean", f"{name}_rank"], [f"{name}_mean"]),
        helper.make_node("Concat", ["batch", f"{name}_dims"], [f"{name}_shape"], axis=0),
        helper.make_node("Expand", [f"{name}_mean", f"{name}_shape"], [f"{name}_values"]),
        helper.make_node("Cast", [f"{name}_values"], [name], to=TensorProto.DataType.Value(spec.dtype.onnx)),
    ]


def _infos(specs: tuple[TensorSpec, ...]) -> list[onnx.ValueInfoProto]:
    return [
        helper.make_tensor_value_info(
            spec.name,
            TensorProto.DataType.Value(spec.dtype.onnx),
            [axis.name if axis.is_dynamic else axis.min for axis in spec.axes],
        )
        for spec in specs
    ]
