"""CUDA's runtime calls done in the host's memory, so that what only moves arrays runs without a GPU.

Work is put off until its stream is synchronised, as on a GPU: an array that is given back or changed too early shows.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any, ClassVar

import numpy as np
import pytest
from cuda.bindings import runtime as cuda

SUCCESS = cuda.cudaError_t.cudaSuccess
ALIGNMENT = 512


class HostCuda:
    """The calls, and what they were: ``log`` has (name, bytes) of all that was put on streams."""

    # All tests': what one leaves to the garbage collector is given back while another runs.
    _blocks: ClassVar[dict[int, np.ndarray]] = {}

    def __init__(self) -> None:
        self.log: list[tuple[str, int]] = []
        self.free_bytes = 8 * 10**9
        self._work: list[Callable[[], object]] = []

    def install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        answers: dict[str, Callable[..., tuple[Any, ...]]] = {
            "cudaMalloc": self._allocate,
            "cudaMallocAsync": lambda nbytes, stream: self._allocate(nbytes),
            "cudaFree": self._give_back,
            "cudaFreeAsync": lambda pointer, stream: self._give_back(pointer),
            "cudaMemcpyAsync": self._copy,
            "cudaMemsetAsync": self._fill,
            "cudaStreamCreateWithFlags": lambda flags: (SUCCESS, 7),
            "cudaStreamSynchronize": self._synchronize,
        }
        for name, answer in answers.items():
            monkeypatch.setattr(cuda, name, answer)

    def put(self, name: str, work: Callable[[], object], nbytes: int = 0) -> None:
        """Put work on the stream, such as an engine's."""
        self.log.append((name, nbytes))
        self._work.append(work)

    def is_on_device(self, pointer: int) -> bool:
        return any(start <= pointer < start + block.nbytes - ALIGNMENT for start, block in self._blocks.items())

    def _allocate(self, nbytes: int) -> tuple[Any, ...]:
        block = np.full(nbytes + ALIGNMENT, 0xFF, np.uint8)  # as floats NaN: nothing may rely on fresh memory
        pointer = -(-block.ctypes.data // ALIGNMENT) * ALIGNMENT
        self._blocks[pointer] = block
        return SUCCESS, pointer

    def _give_back(self, pointer: int) -> tuple[Any, ...]:
        block = self._blocks.pop(pointer)
        self._work.append(lambda: block)
        return (SUCCESS,)

    def _copy(self, target: int, source: int, nbytes: int, kind: object, stream: int) -> tuple[Any, ...]:
        way = {(False, True): "upload", (True, False): "download", (True, True): "copy"}
        name = way[self.is_on_device(source), self.is_on_device(target)]
        self.put(name, lambda: ctypes.memmove(target, source, nbytes), nbytes)
        return (SUCCESS,)

    def _fill(self, target: int, byte: int, nbytes: int, stream: int) -> tuple[Any, ...]:
        self.put("fill", lambda: ctypes.memset(target, byte, nbytes), nbytes)
        return (SUCCESS,)

    def _synchronize(self, stream: int) -> tuple[Any, ...]:
        for work in self._work:
            work()
        self._work.clear()
        return (SUCCESS,)


def view(pointer: int, shape: tuple[int, ...], dtype: np.dtype[Any]) -> np.ndarray:
    """The memory at an address as an array."""
    nbytes = int(np.prod(shape)) * dtype.itemsize
    return np.frombuffer((ctypes.c_char * nbytes).from_address(pointer), dtype).reshape(shape)
