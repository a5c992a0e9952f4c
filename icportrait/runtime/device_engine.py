"""Engines on a GPU, apart from the executor that computes: static buffers, batch buckets, and a CUDA graph for each.

    DeviceEngine    inputs and outputs at addresses that never change; a bucket of b uses their first b rows
    Executor        computes a bucket in these buffers: a TensorRT plan, or a torch module

A bucket always runs whole. Buffers are of the largest batch. A caller that keeps its data in ``inputs`` copies nothing
from step to step.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Protocol

import numpy as np

from icportrait.contract import Array, ModelSpec, TensorSpec
from icportrait.errors import IcPortraitError, RuntimeNotAvailable
from icportrait.runtime.cuda import DeviceArray, DeviceMemory, Gpu, Stream, as_device_array, is_lost, pinned_array

logger = logging.getLogger(__name__)
BUCKETS = (1, 2, 3, 4, 6, 8, 10, 12, 14, 16)
"""Batches that are run, where an executor has room for them; the largest batch of an engine is always one. Powers of
two alone would waste a fifth of a large model's time (ADR 0005)."""
Buffers = Mapping[str, DeviceArray]


class NotRecordable(IcPortraitError):
    """A bucket can't be recorded as a CUDA graph."""


class Recorded(Protocol):
    """A bucket's work as a CUDA graph."""

    def launch(self) -> None:
        """Put the work on the stream."""
        ...


class Executor(Protocol):
    """Computes an engine's buckets on one stream, in buffers that it is given once. Not thread-safe."""

    version: str
    """The runtime and its version."""

    @property
    def buckets(self) -> tuple[int, ...]:
        """Return the batches that it computes, smallest first."""
        ...

    def bind(self, inputs: Buffers, outputs: Buffers) -> None:
        """Take the buffers by tensor name, each of the largest batch; called once, before anything runs."""
        ...

    def enqueue(self, bucket: int) -> None:
        """Put a bucket's work on the stream."""
        ...

    def record(self, bucket: int) -> Recorded:
        """Record a bucket's work, which has run before.

        Raises:
            Exception: it can't be recorded; the stream then takes work as before.
        """
        ...


class DeviceEngine:
    """An engine on the GPU, behind the ``Engine`` protocol.

    Not thread-safe: one thread at a time warms it up and runs it.
    """

    def __init__(self, spec: ModelSpec, executor: Executor, stream: Stream) -> None:
        """Make the buffers.

        Args:
            spec: the tensors.
            executor: computes on ``stream``.
            stream: everything is done on it.
        """
        self.spec, self.stream, self.version = spec, stream, executor.version
        self._executor = executor
        self.inputs, self.outputs = _buffers(spec.inputs), _buffers(spec.outputs)
        for array in self.inputs.values():
            stream.fill(array, 0)  # what lies in a bucket's unused rows is computed with
        executor.bind(self.inputs, self.outputs)
        self._pinned: dict[str, Array] = {}
        """Pinned memory of what ``run`` moves, by tensor. It is made when first used, because slots have their own."""
        self.unrecorded: dict[int, str] = {}
        """Why a bucket runs without a CUDA graph, by bucket; known once the engine is warm."""
        self._launches: dict[int, Callable[[], None]] = {
            bucket: partial(executor.enqueue, bucket) for bucket in executor.buckets
        }

    def warm_up(self) -> None:
        """Run every bucket and record it, so that no request waits for it.

        A bucket that can't be recorded runs directly from then on, and the log says why, once.
        """
        reasons = self.unrecorded
        for bucket in self.buckets:
            self._executor.enqueue(bucket)  # a runtime finishes its lazy work outside of the recording
            self.stream.synchronize()
            try:
                self._launches[bucket] = self._executor.record(bucket).launch
            except Exception as error:
                if is_lost():
                    raise
                reasons[bucket] = _reason(error)
        if reasons:
            rows, why = ", ".join(map(str, reasons)), "; ".join(dict.fromkeys(reasons.values()))
            logger.warning("%s: batches of %s rows run without a CUDA graph: %s", self.spec.name, rows, why)

    @property
    def buckets(self) -> tuple[int, ...]:
        """Return the batches that the engine computes, smallest first."""
        return self._executor.buckets

    def bucket(self, batch: int) -> int:
        """Return the smallest bucket that holds ``batch`` rows."""
        return min(size for size in self.buckets if size >= batch)

    def execute(self, batch: int) -> None:
        """Start the bucket that holds the first ``batch`` rows of the buffers; it is done when the stream says so.

        Rows up to the bucket's size are computed too.
        """
        self._launches[self.bucket(batch)]()

    def execute_directly(self, batch: int) -> None:
        """Execute a batch without a CUDA graph, for comparison with ``execute``."""
        self._executor.enqueue(self.bucket(batch))

    def fill_outputs(self, byte: int) -> None:
        """Set every byte of the output buffers: what a run leaves of it, it didn't write."""
        for array in self.outputs.values():
            self.stream.fill(array, byte)

    def run(self, inputs: Mapping[str, Any], *, directly: bool = False) -> dict[str, Array]:
        """Run one batch; see ``Engine.run``. Inputs may also be arrays in GPU memory, of any library.

        Args:
            inputs: by name.
            directly: without a CUDA graph.
        """
        batch = self.spec.check_inputs(inputs)[self.spec.batch.name]
        keep: list[Any] = []
        for spec in self.spec.inputs:
            target = self.inputs[spec.name].rows(0, batch)
            if isinstance(inputs[spec.name], np.ndarray):
                staged = self._staged(spec.name, self.inputs[spec.name])[:batch]
                staged[...] = inputs[spec.name]
                self.stream.upload(staged, target)
            else:
                keep.append(as_device_array(inputs[spec.name], self.stream))
                self.stream.copy(keep[-1], target)
        if directly:
            self.execute_directly(batch)
        else:
            self.execute(batch)
        found = {
            name: self.stream.download(array.rows(0, batch), self._staged(name, array)[:batch])
            for name, array in self.outputs.items()
        }
        self.stream.synchronize()
        return {name: array.copy() for name, array in found.items()}

    def _staged(self, name: str, array: DeviceArray) -> Array:
        """Return the pinned array of a tensor."""
        if name not in self._pinned:
            self._pinned[name] = pinned_array(array.shape, array.dtype)
        return self._pinned[name]


def buckets_up_to(largest: int, buckets: tuple[int, ...] = BUCKETS) -> tuple[int, ...]:
    """Return the buckets of an engine whose largest batch is ``largest``."""
    return tuple(sorted({*(bucket for bucket in buckets if bucket <= largest), largest}))


def buffer_bytes(spec: ModelSpec) -> int:
    """Return the bytes of an engine's input and output buffers."""
    return sum(tensor.nbytes(spec.batch.max) for tensor in (*spec.inputs, *spec.outputs))


def check_memory(needs: dict[str, int], gpu: Gpu, scratch: int | None = None) -> None:
    """Report in one line what all engines of a process need together.

    Args:
        needs: bytes of weights and buffers by engine.
        gpu: where they are to be loaded.
        scratch: bytes of scratch memory that the engines share; None where it isn't known yet.

    Raises:
        RuntimeNotAvailable: there isn't as much memory free.
    """
    parts = ", ".join(f"{name} {each / 1e9:.2f}" for name, each in needs.items())
    parts += ", scratch memory on top" if scratch is None else f", scratch memory {scratch / 1e9:.2f}"
    need = sum(needs.values()) + (scratch or 0)
    found = f"{gpu.name} has {gpu.free_bytes / 1e9:.1f} of {gpu.total_bytes / 1e9:.1f} GB free"
    logger.info("engines take %.2f GB (%s); %s", need / 1e9, parts, found)
    if need > gpu.free_bytes:
        raise RuntimeNotAvailable(
            f"{', '.join(needs)}: need {need / 1e9:.1f} GB ({parts}), and {found}; free some, or use a larger GPU"
        )


def _reason(error: BaseException) -> str:
    """Say in a line what has ended a recording: the first error, then the last, as torch's at the end of a capture."""
    first = error
    seen = {id(first)}
    while (earlier := first.__cause__ or first.__context__) and id(earlier) not in seen:
        first = earlier
        seen.add(id(first))
    texts = (" ".join(str(each).split()) or type(each).__name__ for each in (first, error))
    return ", then ".join(dict.fromkeys(texts))


def _buffers(specs: tuple[TensorSpec, ...]) -> dict[str, DeviceArray]:
    """Allocate arrays of the specifications' largest batches."""
    arrays = {}
    for spec in specs:
        shape = spec.shape(batch=spec.axes[0].max)
        arrays[spec.name] = DeviceMemory(spec.nbytes(shape[0])).array(shape, np.dtype(spec.dtype.numpy))
    return arrays
