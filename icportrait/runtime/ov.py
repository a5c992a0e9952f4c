"""OpenVINO behind the ``Engine`` protocol."""

from __future__ import annotations

import ctypes
import fcntl
import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from icportrait.contract import Array, DType, ModelSpec, TensorSpec
from icportrait.errors import CheckpointError, RuntimeNotAvailable
from icportrait.runtime.portions import run_in_portions

logger = logging.getLogger(__name__)
SINES = "timestep_sines"
"""Input of a UNet that computes in bfloat16, in place of its timestep."""
DONT_NEED = 4
"""Advice of madvise: the memory of a mapping may go. A process that reads there again reads the file again."""


class OpenVinoEngine:
    """An ONNX graph on the CPU, compiled once for each bucket of rows: with static shapes OpenVINO is much faster."""

    def __init__(
        self,
        path: Path,
        spec: ModelSpec,
        buckets: tuple[int, ...],
        threads: int = 0,
        cache: Path | None = None,
        precision: str | None = None,
    ) -> None:
        """Load the graph, compare its inputs and outputs with the specification, and compile it.

        Args:
            path: the ONNX file; its external data, if any, lies beside it.
            spec: what the graph must take and give.
            buckets: numbers of rows to compile for, ascending, the first of them 1. Each holds weights of its own.
            threads: threads for one run; 0 takes one per physical core.
            cache: a directory for compiled graphs, which OpenVINO finds again by a graph's content and its own version.
                Without one, every start compiles, and weights stay in memory twice.
            precision: OpenVINO's name of what it computes in; None for what ``inference_precision`` says.

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
        self.precision = precision or inference_precision(spec, core.get_property("CPU", "OPTIMIZATION_CAPABILITIES"))
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
        sines = _cut_sines(graph) if self.precision == "bf16" else None
        self._requests: dict[int, Any] = {}
        self._sines: dict[int, Any] = {}
        with _alone_in(cache):
            for rows in buckets:
                shapes = {tensor.name: list(tensor.shape(batch=rows)) for tensor in spec.inputs}
                if sines:
                    sines.reshape(_of_inputs(shapes, sines))
                    in_full = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": 1}
                    self._sines[rows] = core.compile_model(sines, "CPU", in_full).create_infer_request()
                    shapes[SINES] = list(sines.output().shape)
                graph.reshape(_of_inputs(shapes, graph))
                compiled = core.compile_model(graph, "CPU", settings)
                if cache and not compiled.get_property("LOADED_FROM_CACHE"):
                    # What was compiled here keeps its weights twice, as written and as packed for the CPU. Of what
                    # comes from a file, the first are a mapping of that.
                    del compiled
                    compiled = core.compile_model(graph, "CPU", settings)
                    if not compiled.get_property("LOADED_FROM_CACHE"):
                        logger.warning("%s: can't be written; %s holds its weights twice", cache, spec.name)
                self._requests[rows] = compiled.create_infer_request()
            if cache:
                _let_go_of_mappings(cache)

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Run one batch; see ``Engine.run``."""
        return run_in_portions(self.spec, inputs, self._requests, self._run)

    def _run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        given = {name: np.ascontiguousarray(array) for name, array in inputs.items()}
        rows = len(given[self.spec.inputs[0].name])
        if sines := self._sines.get(rows):
            given[SINES] = sines.infer({0: given.pop("timestep")})[0]
        request = self._requests[rows]
        request.infer(given, share_inputs=True)
        # A copy: the next run writes over the request's own.
        return {spec.name: request.get_tensor(spec.name).data.copy() for spec in self.spec.outputs}


def inference_precision(spec: ModelSpec, capabilities: list[str]) -> str:
    """Return OpenVINO's type to compute in: bf16 for a half-precision export's UNet if the CPU has it, else f32.

    The UNet is nearly all of the work. In the others half a picture's precision would be lost for little: matches are
    told apart in float32, and the VAE's rounding is seen as it is.

    Args:
        spec: the engine's specification.
        capabilities: the CPU's, by OpenVINO's names.
    """
    is_half = any(tensor.dtype is DType.FLOAT16 for tensor in spec.inputs)
    return "bf16" if spec.name == "unet" and is_half and "BF16" in capabilities else "f32"


def _cut_sines(graph: Any) -> Any:
    """Cut the sines of the timestep out of a UNet, and return them as a graph.

    The UNet then takes them as an input, ``SINES``. With them inside, OpenVINO would round the timestep and its angles
    to bfloat16's 8 bits before it takes the sines: angles of hundreds of radians would be any.
    """
    import openvino

    node = next(each for each in graph.get_ordered_ops() if each.get_type_name() == "Sin")
    while (user := next(iter(node.output(0).get_target_inputs())).get_node()).get_type_name() != "MatMul":
        node = user
    timestep = next(port.get_node() for port in graph.inputs if port.get_any_name() == "timestep")
    sines = openvino.Model([node.output(0)], [timestep], SINES).clone()
    output = node.output(0)
    cut = openvino.op.Parameter(output.element_type, output.partial_shape)
    cut.output(0).set_names({SINES})
    for target in output.get_target_inputs():
        target.replace_source_output(cut.output(0))
    graph.remove_parameter(timestep)
    graph.add_parameters([cut])
    graph.validate_nodes_and_infer_types()
    return sines


def _of_inputs(shapes: Mapping[str, list[int]], graph: Any) -> dict[str, list[int]]:
    names = [port.get_any_name() for port in graph.inputs]
    return {name: shapes[name] for name in names}


@contextmanager
def _alone_in(folder: Path | None) -> Iterator[None]:
    """Wait for other processes that use a folder: OpenVINO writes over a file that another may have mapped."""
    if folder is None:
        yield
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def _let_go_of_mappings(folder: Path) -> None:
    """Take the files of ``folder`` out of this process's memory: their weights have been packed elsewhere."""
    libc = ctypes.CDLL(None, use_errno=True)
    for line in Path("/proc/self/maps").read_text().splitlines():
        if line.partition("/")[2].startswith(f"{folder.resolve()}/"[1:]):
            first, last = (int(address, 16) for address in line.split()[0].split("-"))
            libc.madvise(ctypes.c_void_p(first), ctypes.c_size_t(last - first), DONT_NEED)


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
