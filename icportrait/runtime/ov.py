"""OpenVINO behind the ``Engine`` protocol."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from icportrait.contract import Array, DType, ModelSpec, TensorSpec
from icportrait.errors import CheckpointError, RuntimeNotAvailable

CACHE_NAME = "openvino"
"""Beside the repository: compiled graphs, which OpenVINO finds again by the graph's content and its own version."""


class OpenVinoEngine:
    """An ONNX graph on the CPU, compiled once for each bucket of rows: with static shapes OpenVINO is much faster."""

    def __init__(
        self, path: Path, spec: ModelSpec, buckets: tuple[int, ...], threads: int = 0, cache: Path | None = None
    ) -> None:
        """Load the graph, compare its inputs and outputs with the specification, and compile it.

        Args:
            path: the ONNX file; its external data, if any, lies beside it.
            spec: what the graph must take and give.
            buckets: numbers of rows to compile for, ascending, the first of them 1. Each holds weights of its own.
            threads: threads for one run; 0 takes one per physical core.
            cache: a directory for compiled graphs; None compiles anew each time.

        Raises:
            CheckpointError: the file is missing, or its names, types or fixed sizes aren't the specification's.
        """
        try:
            import openvino
        except ImportError as error:
            raise RuntimeNotAvailable(f'runtime openvino is not installed ({error}); run "make setup"') from error
        if not path.is_file():
            raise CheckpointError(f'{path} is missing; make it with "python -m export"')
        core = openvino.Core()
        self.spec = spec
        self.precision = inference_precision(spec, core.get_property("CPU", "OPTIMIZATION_CAPABILITIES"))
        self.version = f"openvino-{openvino.__version__.partition('-')[0]}-{self.precision}"
        settings: dict[str, Any] = {
            "INFERENCE_PRECISION_HINT": self.precision,
            "INFERENCE_NUM_THREADS": threads,
            "NUM_STREAMS": 1,
            # Several engines share the cores, each in its own process: pinned, all would take the same ones.
            "ENABLE_CPU_PINNING": False,
        }
        if cache:
            settings["CACHE_DIR"] = str(cache)
        graph = core.read_model(path)
        _compare(path, spec.inputs, graph.inputs)
        _compare(path, spec.outputs, graph.outputs)
        self._requests = {}
        for rows in buckets:
            graph.reshape({tensor.name: list(tensor.shape(batch=rows)) for tensor in spec.inputs})
            self._requests[rows] = core.compile_model(graph, "CPU", settings).create_infer_request()

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Run one batch, in portions of whole buckets; see ``Engine.run``."""
        batch = self.spec.check_inputs(inputs)[self.spec.batch.name]
        outputs = {spec.name: np.empty(spec.shape(batch=batch), spec.dtype.numpy) for spec in self.spec.outputs}
        given = {name: np.ascontiguousarray(array) for name, array in inputs.items()}
        for rows in portions(batch, self._requests):
            request = self._requests[rows.stop - rows.start]
            request.infer({name: array[rows] for name, array in given.items()}, share_inputs=True)
            for name, array in outputs.items():
                array[rows] = request.get_tensor(name).data
        return outputs


def portions(batch: int, buckets: Mapping[int, object] | tuple[int, ...]) -> Iterator[slice]:
    """Rows 0 to ``batch`` in runs of whole buckets, the largest first: on a CPU a row that fills up costs a row's time.

    Args:
        batch: how many rows there are.
        buckets: numbers of rows; 1 is among them.
    """
    first = 0
    while first < batch:
        rows = max(bucket for bucket in buckets if bucket <= batch - first)
        yield slice(first, first + rows)
        first += rows


def inference_precision(spec: ModelSpec, capabilities: list[str]) -> str:
    """What OpenVINO computes in: bfloat16 for the UNet of a half-precision export where the CPU has it, else float32.

    The UNet is nearly all of the work. In the others half a picture's precision would be lost for little: matches are
    told apart in float32, and the VAE's rounding is seen as it is.

    Args:
        spec: of the engine.
        capabilities: of the CPU, by OpenVINO's names.
    """
    is_half = any(tensor.dtype is DType.FLOAT16 for tensor in spec.inputs)
    return "bf16" if spec.name == "unet" and is_half and "BF16" in capabilities else "f32"


def _compare(path: Path, specs: tuple[TensorSpec, ...], ports: list[Any]) -> None:
    found = {port.get_any_name(): port for port in ports}
    expected = [spec.name for spec in specs]
    if list(found) != expected:
        raise CheckpointError(f"{path}: tensors are {', '.join(found)}, expected {', '.join(expected)}; export again")
    for spec in specs:
        port = found[spec.name]
        if (dtype := port.element_type.to_dtype().name) != spec.dtype.numpy:
            raise CheckpointError(f"{path}: {spec.name} is {dtype}, expected {spec.dtype.numpy}; export again")
        for axis, size in zip(spec.axes, port.partial_shape, strict=True):
            if not axis.is_dynamic and str(size) != str(axis.min):
                raise CheckpointError(f"{path}: {spec.name}: {axis.name} is {size}, expected {axis}; export again")
