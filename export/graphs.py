"""Torch modules to ONNX files, with the contract's names and axes."""

from __future__ import annotations

import gc
import inspect
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import ml_dtypes  # noqa: F401 - NumPy learns bfloat16
import numpy as np
import torch

from export.attention import ATTENTION_OPSET, AttentionInBlocks
from export.constant_prompt import constant_prompt
from icportrait.contract import Array, ModelSpec

EXTERNAL_DATA_BYTES = 2**30
"""Graphs with more weights than this keep them in a file of their own: a protobuf message ends at 2 GiB, and parsers
hold a message in memory twice."""


def export_graph(module: torch.nn.Module, spec: ModelSpec, directory: Path, opset: int) -> list[Path]:
    """Write ``<directory>/<spec.name>.onnx``.

    Args:
        module: takes and gives the specification's tensors in its order, with weights already in the wanted precision.
        spec: names, types and axes of the graph's inputs and outputs.
        directory: receives the graph and, where its weights are large, ``<spec.name>.onnx.data``.
        opset: the ONNX operator set.

    Returns:
        The files written, the graph first.
    """
    # A batch of 2 for tracing: torch.export takes an axis of size 1 for a constant.
    inputs = tuple(as_tensor(array) for array in spec.dummy_inputs(batch=2).values())
    path = directory / f"{spec.name}.onnx"
    weights_bytes = sum(tensor.nbytes for tensor in (*module.parameters(), *module.buffers()))
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    attention = AttentionInBlocks() if opset < ATTENTION_OPSET else nullcontext()
    with warnings.catch_warnings(), torch.no_grad(), constant_prompt(module), attention, _without_garbage_collection():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            module,
            inputs,
            input_names=[tensor.name for tensor in spec.inputs],
            output_names=[tensor.name for tensor in spec.outputs],
            dynamic_shapes=_dynamic_shapes(module, spec),
            opset_version=opset,
            dynamo=True,
            verbose=False,
        )
    assert program is not None
    for node in program.model.graph.all_nodes():
        # The exporter notes a stack trace for every node: a megabyte of the exporting machine's paths.
        node.metadata_props.clear()
    program.save(path, external_data=weights_bytes > EXTERNAL_DATA_BYTES)
    data = path.with_name(f"{path.name}.data")
    return [path, data] if data.exists() else [path]


@contextmanager
def _without_garbage_collection() -> Iterator[None]:
    """Hold the collector still, because its walks through the exporter's objects take a seventh of an export."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def as_tensor(array: Array) -> torch.Tensor:
    """Convert like ``torch.from_numpy``, bfloat16 too."""
    if array.dtype.name == "bfloat16":
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def _dynamic_shapes(module: torch.nn.Module, spec: ModelSpec) -> tuple[object, ...]:
    """Return every input's dynamic axes, nested as ``forward``'s arguments: what a ``*args`` takes is one entry."""
    dims = {spec.batch.name: torch.export.Dim(spec.batch.name, min=spec.batch.min, max=spec.batch.max)}
    shapes: tuple[object, ...] = tuple(
        {index: dims[axis.name] for index, axis in enumerate(tensor.axes) if axis.is_dynamic} for tensor in spec.inputs
    )
    kinds = [parameter.kind for parameter in inspect.signature(module.forward).parameters.values()]
    if inspect.Parameter.VAR_POSITIONAL in kinds:
        named = kinds.index(inspect.Parameter.VAR_POSITIONAL)
        return (*shapes[:named], shapes[named:])
    return shapes
