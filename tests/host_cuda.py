"""CUDA's runtime calls done in the host's memory, so that what only moves arrays runs without a GPU.

Each stream has a queue of its own. Work is put off until its stream is synchronised, as late as a GPU may do it: an
array that is given back, changed or read too early shows, and work on another stream than the one that is waited for.
What is put on a stream while it is captured is recorded and not done, and every launch of the graph does it again, with
the addresses that it was recorded with.
"""

from __future__ import annotations

import ctypes
import itertools
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import pytest
from cuda.bindings import runtime as cuda

SUCCESS = cuda.cudaError_t.cudaSuccess
UNSUPPORTED = cuda.cudaError_t.cudaErrorStreamCaptureUnsupported
INVALIDATED = cuda.cudaError_t.cudaErrorStreamCaptureInvalidated
NOT_READY = cuda.cudaError_t.cudaErrorNotReady
INVALID_VALUE = cuda.cudaError_t.cudaErrorInvalidValue
ORDER = cuda.cudaMemcpySrcAccessOrder
ALIGNMENT = 512
DEFAULT_STREAM = 0


@dataclass(frozen=True)
class Work:
    """Something on a stream."""

    name: str
    nbytes: int
    do: Callable[[], object]


@dataclass
class Queue:
    """A stream's work that is still to be done, and what is recorded while the stream is captured."""

    work: list[Callable[[], object]] = field(default_factory=list)
    recorded: list[Work] | None = None
    is_invalid: bool = False


class Moment(cuda.cudaEvent_t):
    """An event; as a handle it is null, which CUDA itself refuses, because it may outlive its test."""

    at_s: float | None = None
    """None until the stream is there."""

    def note(self) -> None:
        self.at_s = time.perf_counter()


class RecordedGraph(cuda.cudaGraph_t):
    work: tuple[Work, ...] = ()


class ExecutableGraph(cuda.cudaGraphExec_t):
    """A null handle, which CUDA itself refuses, because a graph that outlives its test may still be given back."""

    work: tuple[Work, ...] = ()


class HostCuda:
    """The calls, and what they were: ``log`` has (name, bytes) of all that was put on streams to be done."""

    # All tests': what one leaves to the garbage collector is given back while another runs, at any moment.
    _blocks: ClassVar[dict[int, np.ndarray]] = {}
    _pinned: ClassVar[dict[int, np.ndarray]] = {}

    def __init__(self) -> None:
        self.log: list[tuple[str, int]] = []
        self.calls: list[str] = []
        """Names of all calls."""
        self.free_bytes = 8 * 10**9
        self.attributes: dict[str, int] = {}
        """The device's numbers that aren't 0, by the names of ``cudaDeviceAttr``."""
        self.pageable_bytes = 0
        """Bytes that crossed between host and GPU from or to memory that isn't pinned."""
        self.has_batches, self.can_capture = True, True
        self.sticky_error = SUCCESS
        """The device's answer once its context has ended."""
        self.graphs: list[RecordedGraph | ExecutableGraph] = []
        """Graphs that weren't destroyed."""
        self._streams = {DEFAULT_STREAM: Queue()}
        self._handles = itertools.count(7)

    def install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        answers: dict[str, Callable[..., tuple[Any, ...]]] = {
            "cudaMalloc": self._allocate,
            "cudaMallocAsync": self._allocate,
            "cudaFree": self._give_back,
            "cudaFreeAsync": self._give_back_in_order,
            "cudaHostAlloc": self._allocate_pinned,
            "cudaFreeHost": self._give_back_pinned,
            "cudaMemcpyAsync": self._copy,
            "cudaMemcpyBatchAsync": self._copy_all,
            "cudaMemsetAsync": self._fill,
            "cudaStreamCreateWithFlags": self._create_stream,
            "cudaStreamSynchronize": self._synchronize,
            "cudaStreamBeginCapture": self._begin_capture,
            "cudaStreamEndCapture": self._end_capture,
            "cudaGraphInstantiate": self._instantiate,
            "cudaGraphLaunch": self._launch,
            "cudaGraphDestroy": self._destroy,
            "cudaGraphExecDestroy": self._destroy,
            "cudaEventCreate": lambda: (SUCCESS, Moment()),
            "cudaEventRecord": self._note_time,
            "cudaEventElapsedTime": self._elapsed_ms,
            "cudaEventDestroy": lambda event: (SUCCESS,),
            "cudaDriverGetVersion": lambda: (SUCCESS, 13000),
            "cudaGetDeviceCount": lambda: (SUCCESS, 1),
            "cudaGetDeviceProperties": lambda device: (SUCCESS, SimpleNamespace(name=b"NVIDIA Test", major=8, minor=9)),
            "cudaMemGetInfo": lambda: (SUCCESS, self.free_bytes, 8 * 10**9),
            "cudaDeviceGetAttribute": lambda name, device: (SUCCESS, self.attributes.get(name.name, 0)),
            "cudaSetDevice": lambda device: (SUCCESS,),
            "cudaGetLastError": lambda: (SUCCESS,),
            "cudaDeviceSynchronize": self._synchronize_all,
        }
        for name, answer in answers.items():
            monkeypatch.setattr(cuda, name, self._counted(name, answer))

    def _counted(self, name: str, answer: Callable[..., tuple[Any, ...]]) -> Callable[..., tuple[Any, ...]]:
        def call(*arguments: Any) -> tuple[Any, ...]:
            self.calls.append(name)
            return answer(*arguments)

        return call

    @property
    def is_capturing(self) -> bool:
        return any(queue.recorded is not None for queue in self._streams.values())

    def queue(self, stream: int) -> Queue:
        assert stream in self._streams, f"{stream} is no stream"
        return self._streams[stream]

    def put(self, stream: int, name: str, work: Callable[[], object], nbytes: int = 0) -> None:
        """Put work on a stream, such as an engine's."""
        queue = self.queue(stream)
        if queue.recorded is None:
            self.log.append((name, nbytes))
            queue.work.append(work)
        else:
            queue.recorded.append(Work(name, nbytes, work))

    def is_on_device(self, pointer: int) -> bool:
        return any(start <= pointer < start + block.nbytes - ALIGNMENT for start, block in self._blocks.copy().items())

    def _create_stream(self, flags: int) -> tuple[Any, ...]:
        assert flags == cuda.cudaStreamNonBlocking, "the default stream would wait for it"
        handle = next(self._handles)
        self._streams[handle] = Queue()
        return SUCCESS, handle

    def _allocate(self, nbytes: int, stream: int = DEFAULT_STREAM) -> tuple[Any, ...]:
        if self.is_capturing:
            return self._break_captures(), None
        self.queue(stream)
        block = np.full(nbytes + ALIGNMENT, 0xFF, np.uint8)  # as floats NaN: nothing may rely on fresh memory
        pointer = -(-block.ctypes.data // ALIGNMENT) * ALIGNMENT
        self._blocks[pointer] = block
        return SUCCESS, pointer

    def _give_back(self, pointer: int) -> tuple[Any, ...]:
        """Give a block back once all streams have done what they have to do."""
        if self.is_capturing:
            self._break_captures()
        block = self._blocks.pop(pointer)
        for queue in self._streams.values():
            queue.work.append(lambda: block)
        return (SUCCESS,)

    def _give_back_in_order(self, pointer: int, stream: int) -> tuple[Any, ...]:
        """Give a block back once its stream has done what it has to do; another may use it from then on."""
        if self.is_capturing:
            self._break_captures()
        block = self._blocks.pop(pointer)
        # A stream of another test is gone.
        self._streams.get(stream, Queue()).work.append(lambda: block.fill(0xFF))
        return (SUCCESS,)

    def _copy(self, target: int, source: int, nbytes: int, kind: object, stream: int) -> tuple[Any, ...]:
        way = {(False, True): "upload", (True, False): "download", (True, True): "copy"}
        name = way[self.is_on_device(source), self.is_on_device(target)]
        if name != "copy":
            self.pageable_bytes += 0 if self.is_pinned(source if name == "upload" else target) else nbytes
        self.put(stream, name, lambda: ctypes.memmove(target, source, nbytes), nbytes)
        return (SUCCESS,)

    def _copy_all(
        self,
        targets: Any,
        sources: Any,
        sizes: Any,
        count: int,
        attributes: Any,
        indices: Any,
        number: int,
        stream: int,
    ) -> tuple[Any, ...]:
        if not self.has_batches:
            return (cuda.cudaError_t.cudaErrorCallRequiresNewerDriver,)
        assert count == len(targets) == len(sources) == len(sizes) and (number, indices) == (1, [0])
        order = attributes[0].srcAccessOrder
        if stream == DEFAULT_STREAM or order == ORDER.cudaMemcpySrcAccessOrderInvalid:
            return (INVALID_VALUE,)
        for target, source, nbytes in zip(targets, sources, sizes, strict=True):
            if order == ORDER.cudaMemcpySrcAccessOrderStream:
                self._copy(target, source, nbytes, None, stream)
            else:  # the source is read when the call is made, or whenever the GPU likes
                self.put(
                    stream, "copy", partial(ctypes.memmove, target, ctypes.string_at(source, nbytes), nbytes), nbytes
                )
        return (SUCCESS,)

    def _allocate_pinned(self, nbytes: int, flags: int) -> tuple[Any, ...]:
        block = np.full(nbytes, 0xFF, np.uint8)
        self._pinned[block.ctypes.data] = block
        return SUCCESS, block.ctypes.data

    def _give_back_pinned(self, pointer: int) -> tuple[Any, ...]:
        del self._pinned[pointer]
        return (SUCCESS,)

    def is_pinned(self, pointer: int) -> bool:
        return any(start <= pointer < start + block.nbytes for start, block in self._pinned.copy().items())

    def _note_time(self, event: Moment, stream: int) -> tuple[Any, ...]:
        event.at_s = None
        self.queue(stream).work.append(event.note)
        return (SUCCESS,)

    def _elapsed_ms(self, begin: Moment, end: Moment) -> tuple[Any, ...]:
        if begin.at_s is None or end.at_s is None:
            return NOT_READY, None
        return SUCCESS, 1000 * (end.at_s - begin.at_s)

    def _fill(self, target: int, byte: int, nbytes: int, stream: int) -> tuple[Any, ...]:
        self.put(stream, "fill", lambda: ctypes.memset(target, byte, nbytes), nbytes)
        return (SUCCESS,)

    def _synchronize(self, stream: int) -> tuple[Any, ...]:
        queue = self.queue(stream)
        if queue.recorded is not None:
            return (self._break_captures(),)
        while queue.work:
            queue.work.pop(0)()
        return (SUCCESS,)

    def _synchronize_all(self) -> tuple[Any, ...]:
        if self.is_capturing:
            return (self._break_captures(),)
        for stream in self._streams:
            self._synchronize(stream)
        return (self.sticky_error,)

    def _begin_capture(self, stream: int, mode: object) -> tuple[Any, ...]:
        queue = self.queue(stream)
        assert queue.recorded is None, "the stream is captured already"
        if not self.can_capture or stream == DEFAULT_STREAM:
            return (UNSUPPORTED,)
        queue.recorded, queue.is_invalid = [], False
        return (SUCCESS,)

    def _break_captures(self) -> cuda.cudaError_t:
        for queue in self._streams.values():
            queue.is_invalid = True
        return UNSUPPORTED

    def _end_capture(self, stream: int) -> tuple[Any, ...]:
        queue = self.queue(stream)
        assert queue.recorded is not None, "the stream isn't captured"
        work, queue.recorded = tuple(queue.recorded), None
        if queue.is_invalid:
            return INVALIDATED, None
        graph = RecordedGraph()
        graph.work = work
        self.graphs.append(graph)
        return SUCCESS, graph

    def _instantiate(self, recorded: RecordedGraph, flags: int) -> tuple[Any, ...]:
        graph = ExecutableGraph()
        graph.work = recorded.work
        self.graphs.append(graph)
        return SUCCESS, graph

    def _launch(self, graph: ExecutableGraph, stream: int) -> tuple[Any, ...]:
        assert any(graph is alive for alive in self.graphs), "the graph was destroyed"
        for work in graph.work:
            self.put(stream, work.name, work.do, work.nbytes)
        return (SUCCESS,)

    def _destroy(self, graph: RecordedGraph | ExecutableGraph) -> tuple[Any, ...]:
        self.graphs = [alive for alive in self.graphs if alive is not graph]
        return (SUCCESS,)


def view(pointer: int, shape: tuple[int, ...], dtype: np.dtype[Any]) -> np.ndarray:
    """Return the memory at an address as an array."""
    nbytes = int(np.prod(shape)) * dtype.itemsize
    return np.frombuffer((ctypes.c_char * nbytes).from_address(pointer), dtype).reshape(shape)
