"""Torch modules as the executor of a ``DeviceEngine``: any GPU that torch runs on serves, and needs no plans.

The modules are the export's, in its precision and channels-last. Attention is fused or refused, because unfused scores
take a gigabyte a row and layer at 512 px. TF32 is off: the cost volume's best matches are float32's. cuDNN chooses
among deterministic kernels alone, so that equal batches give equal bytes (docs/determinism.md).
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from icportrait.contract import DType, ModelSpec, TensorSpec, engine_specs
from icportrait.errors import RuntimeNotAvailable
from icportrait.manifest import Manifest
from icportrait.policy import ServingPolicy
from icportrait.runtime.cuda import DeviceArray, Stream, collector_off, find_gpu
from icportrait.runtime.device_engine import (
    Buffers,
    DeviceEngine,
    Recorded,
    buckets_up_to,
    buffer_bytes,
    check_memory,
)
from icportrait.runtime.eager import source_modules

logger = logging.getLogger(__name__)
TYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
"""Type of the weights and activations by an export's precision."""
FUSED = [SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION, SDPBackend.EFFICIENT_ATTENTION]


class TorchExecutor:
    """A torch module that reads and writes an engine's buffers, recorded by torch with its own memory pool."""

    version = f"torch-{torch.__version__}"

    def __init__(
        self, module: torch.nn.Module, spec: ModelSpec, stream: Stream, row_by_row: bool = False, pool: Any = None
    ) -> None:
        """Take the module.

        Args:
            module: on the GPU and in the engine's precision; takes and gives the specification's tensors in order.
            spec: of the engine.
            stream: everything is done on it.
            row_by_row: compute a bucket's rows one after the other, so that no row's bits depend on how many there are.
            pool: torch's memory for graphs; engines that never run at once share one.
        """
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
        torch.backends.cudnn.deterministic = True  # else some of its convolutions add up in any order
        self.spec, self.buckets = spec, buckets_up_to(spec.batch.max)
        self._module = module.eval().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self._stream, self._rows, self._pool = stream, 1 if row_by_row else spec.batch.max, pool
        self._inputs: list[torch.Tensor] = []
        self._outputs: list[torch.Tensor] = []

    def bind(self, inputs: Buffers, outputs: Buffers) -> None:
        """Implement ``Executor.bind``."""
        self._inputs, self._outputs = (
            [self._view(spec, buffers[spec.name]) for spec in specs]
            for specs, buffers in ((self.spec.inputs, inputs), (self.spec.outputs, outputs))
        )

    def enqueue(self, bucket: int) -> None:
        """Implement ``Executor.enqueue``."""
        with self._on_stream():
            self.compute(bucket)

    def record(self, bucket: int) -> Recorded:
        """Implement ``Executor.record``."""
        graph = torch.cuda.CUDAGraph()
        with (
            collector_off(),
            self._on_stream(),  # ``torch.cuda.graph`` leaves its stream the current one where the recording fails
            torch.cuda.graph(graph, self._pool, self._external(), capture_error_mode="thread_local"),
        ):
            self.compute(bucket)
        return _Replay(self, graph)

    @torch.inference_mode()
    def compute(self, bucket: int) -> None:
        """Run the module over the first rows of the inputs, into the first rows of the outputs."""
        for first in range(0, bucket, self._rows):
            rows = slice(first, min(first + self._rows, bucket))
            given = [_channels_last(tensor[rows]) for tensor in self._inputs]
            with sdpa_kernel(FUSED):
                found = self._module(*given)
            for target, output in zip(self._outputs, found if isinstance(found, tuple) else (found,), strict=True):
                target[rows].copy_(output)

    @contextmanager
    def _on_stream(self) -> Iterator[None]:
        with torch.cuda.stream(self._external()):
            yield

    def _external(self) -> torch.cuda.ExternalStream:
        return torch.cuda.ExternalStream(self._stream.handle)  # type: ignore[no-untyped-call]

    def _view(self, spec: TensorSpec, array: DeviceArray) -> torch.Tensor:
        """Return a buffer as a tensor. Torch can't read the name of bfloat16 in the arrays' interface."""
        if spec.dtype is not DType.BFLOAT16:
            return torch.as_tensor(array, device="cuda")
        import numpy as np

        words = DeviceArray(array.pointer, array.shape, np.dtype(np.int16), array.owner)
        return torch.as_tensor(words, device="cuda").view(torch.bfloat16)


class _Replay:
    """A graph that torch has recorded."""

    def __init__(self, executor: TorchExecutor, graph: torch.cuda.CUDAGraph) -> None:
        self._executor, self._graph = executor, graph

    def launch(self) -> None:
        """Implement ``Recorded.launch``."""
        with self._executor._on_stream():
            self._graph.replay()


def load_modules(names: Iterable[str], manifest: Manifest, policy: ServingPolicy) -> dict[str, DeviceEngine]:
    """Load engines that never run at once as torch modules on the GPU; every bucket has run and is recorded.

    Args:
        names: of ``contract.ENGINES``.
        manifest: the export's.
        policy: says whether rows are computed one after the other.

    Raises:
        RuntimeNotAvailable: the export's precision is none of torch's, or the engines won't fit into the GPU's memory.
    """
    if manifest.precision not in TYPES:
        raise RuntimeNotAvailable(
            f"precision: {manifest.precision}, expected one of {', '.join(TYPES)}: torch runs no quantised export"
        )
    modules, specs = source_modules(manifest), engine_specs(manifest.preset, manifest.precision)
    kept = {name: to_type(modules[name], TYPES[manifest.precision]) for name in names}
    needs = {
        name: sum(value.nbytes for value in module.state_dict().values()) + buffer_bytes(specs[name])
        for name, module in kept.items()
    }
    check_memory(needs, find_gpu())
    stream, pool = Stream(), torch.cuda.graph_pool_handle()
    row_by_row = policy.deterministic or policy.rows_at_once == 1
    engines = {}
    for name, module in kept.items():
        executor = TorchExecutor(module.to("cuda"), specs[name], stream, row_by_row, pool)
        torch.cuda.synchronize()  # the weights were copied on another stream
        engines[name] = DeviceEngine(specs[name], executor, stream)
        engines[name].warm_up()
    return engines


def to_type(module: torch.nn.Module, dtype: torch.dtype) -> torch.nn.Module:
    """Convert a module as ``module.to(dtype)`` does, of which diffusers' modules warn."""
    return {torch.float32: module.float, torch.float16: module.half, torch.bfloat16: module.bfloat16}[dtype]()


def _channels_last(tensor: torch.Tensor) -> torch.Tensor:
    is_map = tensor.ndim == 4 and tensor.is_floating_point()
    return tensor.contiguous(memory_format=torch.channels_last) if is_map else tensor
