"""CUDA's runtime calls done in the host's memory, so that what only moves arrays runs without a GPU.

Work is put off until its stream is synchronised, as on a GPU: an array that is given back or changed too early shows.
What is put on a stream while it is captured is recorded and not done, and every launch of the graph does it again, with
the addresses that it was recorded with.
"""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import pytest
from cuda.bindings import runtime as cuda

SUCCESS = cuda.cudaError_t.cudaSuccess
UNSUPPORTED = cuda.cudaError_t.cudaErrorStreamCaptureUnsupported
INVALIDATED = cuda.cudaError_t.cudaErrorStreamCaptureInvalidated
ALIGNMENT = 512


@dataclass(frozen=True)
class Work:
    """Something on a stream."""

    name: str
    nbytes: int
    do: Callable[[], object]


class Moment(cuda.cudaEvent_t):
    """An event; as a handle it is null, which CUDA itself refuses, because it may outlive its test."""

    at_s = 0.0

    def note(self) -> None:
        self.at_s = time.perf_counter()


class RecordedGraph(cuda.cudaGraph_t):
    work: tuple[Work, ...] = ()


class ExecutableGraph(cuda.cudaGraphExec_t):
    """A null handle, which CUDA itself refuses, because a graph that outlives its test may still be given back."""

    work: tuple[Work, ...] = ()


class HostCuda:
    """The calls, and what they were: ``log`` has (name, bytes) of all that was put on streams to be done."""

    # All tests': what one leaves to the garbage collector is given back while another runs.
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
        self._work: list[Callable[[], object]] = []
        self._recorded: list[Work] | None = None
        self._is_invalid = False

    def install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        answers: dict[str, Callable[..., tuple[Any, ...]]] = {
            "cudaMalloc": self._allocate,
            "cudaMallocAsync": lambda nbytes, stream: self._allocate(nbytes),
            "cudaFree": self._give_back,
            "cudaFreeAsync": lambda pointer, stream: self._give_back(pointer),
            "cudaHostAlloc": self._allocate_pinned,
            "cudaFreeHost": self._give_back_pinned,
            "cudaMemcpyAsync": self._copy,
            "cudaMemcpyBatchAsync": self._copy_all,
            "cudaMemsetAsync": self._fill,
            "cudaStreamCreateWithFlags": lambda flags: (SUCCESS, 7),
            "cudaStreamSynchronize": self._synchronize,
            "cudaStreamBeginCapture": self._begin_capture,
            "cudaStreamEndCapture": self._end_capture,
            "cudaGraphInstantiate": self._instantiate,
            "cudaGraphLaunch": self._launch,
            "cudaGraphDestroy": self._destroy,
            "cudaGraphExecDestroy": self._destroy,
            "cudaEventCreate": lambda: (SUCCESS, Moment()),
            "cudaEventRecord": self._note_time,
            "cudaEventElapsedTime": lambda begin, end: (SUCCESS, 1000 * (end.at_s - begin.at_s)),
            "cudaEventDestroy": lambda event: (SUCCESS,),
            "cudaDriverGetVersion": lambda: (SUCCESS, 13000),
            "cudaGetDeviceCount": lambda: (SUCCESS, 1),
            "cudaGetDeviceProperties": lambda device: (SUCCESS, SimpleNamespace(name=b"NVIDIA Test", major=8, minor=9)),
            "cudaMemGetInfo": lambda: (SUCCESS, self.free_bytes, 8 * 10**9),
            "cudaDeviceGetAttribute": lambda name, device: (SUCCESS, self.attributes.get(name.name, 0)),
            "cudaSetDevice": lambda device: (SUCCESS,),
            "cudaGetLastError": lambda: (SUCCESS,),
            "cudaDeviceSynchronize": lambda: (self.sticky_error,),
        }
        for name, answer in answers.items():
            monkeypatch.setattr(cuda, name, self._counted(name, answer))

    def _counted(self, name: str, answer: Callable[..., tuple[Any, ...]]) -> Callable[..., tuple[Any, ...]]:
        def call(*arguments: Any) -> tuple[Any, ...]:
            self.calls.append(name)
            return answer(*arguments)

        return call

    def put(self, name: str, work: Callable[[], object], nbytes: int = 0) -> None:
        """Put work on the stream, such as an engine's."""
        if self._recorded is None:
            self.log.append((name, nbytes))
            self._work.append(work)
        else:
            self._recorded.append(Work(name, nbytes, work))

    def is_on_device(self, pointer: int) -> bool:
        return any(start <= pointer < start + block.nbytes - ALIGNMENT for start, block in self._blocks.items())

    def _allocate(self, nbytes: int) -> tuple[Any, ...]:
        if self._recorded is not None:
            return self._break_capture(), None
        block = np.full(nbytes + ALIGNMENT, 0xFF, np.uint8)  # as floats NaN: nothing may rely on fresh memory
        pointer = -(-block.ctypes.data // ALIGNMENT) * ALIGNMENT
        self._blocks[pointer] = block
        return SUCCESS, pointer

    def _give_back(self, pointer: int) -> tuple[Any, ...]:
        if self._recorded is not None:
            self._break_capture()
        block = self._blocks.pop(pointer)
        self._work.append(lambda: block)
        return (SUCCESS,)

    def _copy(self, target: int, source: int, nbytes: int, kind: object, stream: int) -> tuple[Any, ...]:
        way = {(False, True): "upload", (True, False): "download", (True, True): "copy"}
        name = way[self.is_on_device(source), self.is_on_device(target)]
        if name != "copy":
            self.pageable_bytes += 0 if self.is_pinned(source if name == "upload" else target) else nbytes
        self.put(name, lambda: ctypes.memmove(target, source, nbytes), nbytes)
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
        for target, source, nbytes in zip(targets, sources, sizes, strict=True):
            self._copy(target, source, nbytes, None, stream)
        return (SUCCESS,)

    def _allocate_pinned(self, nbytes: int, flags: int) -> tuple[Any, ...]:
        block = np.full(nbytes, 0xFF, np.uint8)
        self._pinned[block.ctypes.data] = block
        return SUCCESS, block.ctypes.data

    def _give_back_pinned(self, pointer: int) -> tuple[Any, ...]:
        del self._pinned[pointer]
        return (SUCCESS,)

    def is_pinned(self, pointer: int) -> bool:
        return any(start <= pointer < start + block.nbytes for start, block in self._pinned.items())

    def _note_time(self, event: Moment, stream: int) -> tuple[Any, ...]:
        self._work.append(event.note)
        return (SUCCESS,)

    def _fill(self, target: int, byte: int, nbytes: int, stream: int) -> tuple[Any, ...]:
        self.put("fill", lambda: ctypes.memset(target, byte, nbytes), nbytes)
        return (SUCCESS,)

    def _synchronize(self, stream: int) -> tuple[Any, ...]:
        if self._recorded is not None:
            return (self._break_capture(),)
        for work in self._work:
            work()
        self._work.clear()
        return (SUCCESS,)

    def _begin_capture(self, stream: int, mode: object) -> tuple[Any, ...]:
        assert self._recorded is None, "the stream is captured already"
        if not self.can_capture:
            return (UNSUPPORTED,)
        self._recorded, self._is_invalid = [], False
        return (SUCCESS,)

    def _break_capture(self) -> cuda.cudaError_t:
        self._is_invalid = True
        return UNSUPPORTED

    def _end_capture(self, stream: int) -> tuple[Any, ...]:
        assert self._recorded is not None, "the stream isn't captured"
        work, self._recorded = tuple(self._recorded), None
        if self._is_invalid:
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
            self.put(work.name, work.do, work.nbytes)
        return (SUCCESS,)

    def _destroy(self, graph: RecordedGraph | ExecutableGraph) -> tuple[Any, ...]:
        self.graphs = [alive for alive in self.graphs if alive is not graph]
        return (SUCCESS,)


def view(pointer: int, shape: tuple[int, ...], dtype: np.dtype[Any]) -> np.ndarray:
    """Return the memory at an address as an array."""
    nbytes = int(np.prod(shape)) * dtype.itemsize
    return np.frombuffer((ctypes.c_char * nbytes).from_address(pointer), dtype).reshape(shape)
