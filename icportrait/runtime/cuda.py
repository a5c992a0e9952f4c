"""The CUDA calls that the TensorRT runner needs, through cuda-python. Every failed call raises."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from icportrait.contract import Array
from icportrait.errors import ContractError, IcPortraitError, RuntimeNotAvailable


class CudaError(IcPortraitError):
    """A CUDA call failed."""


@dataclass(frozen=True)
class Gpu:
    """The GPU that a process uses: the first that CUDA shows it."""

    name: str
    compute_capability: str
    total_bytes: int
    free_bytes: int
    driver_cuda_version: str
    """The newest that the driver supports, such as 13.0."""


def find_gpu() -> Gpu:
    """Find the GPU before anything of TensorRT is touched, because without a driver its runtime can crash.

    Raises:
        RuntimeNotAvailable: cuda-python isn't installed, or there is no NVIDIA GPU that it can use.
    """
    try:
        from cuda.bindings import runtime as cuda
    except ImportError as error:
        raise RuntimeNotAvailable(f"cuda-python is not installed ({error}); pip install cuda-python") from error
    try:
        driver = call(cuda.cudaDriverGetVersion())
        if driver == 0:  # of which the next call would say that it is too old
            raise CudaError("no NVIDIA driver is installed")
        if call(cuda.cudaGetDeviceCount()) == 0:
            raise CudaError("the driver shows none")
        properties = call(cuda.cudaGetDeviceProperties(0))
        free, total = call(cuda.cudaMemGetInfo())
    except (CudaError, RuntimeError) as error:
        raise RuntimeNotAvailable(f"no NVIDIA GPU was found ({error})") from error
    capability = f"{properties.major}.{properties.minor}"
    return Gpu(properties.name.decode(), capability, total, free, f"{driver // 1000}.{driver % 1000 // 10}")


def call(result: tuple[Any, ...]) -> Any:
    """Return the values of a cuda-python call: none, one, or several as a tuple.

    Raises:
        CudaError: the call failed.
    """
    from cuda.bindings import runtime as cuda

    status, *values = result
    if status != cuda.cudaError_t.cudaSuccess:
        raise CudaError(f"CUDA: {status.name}: {cuda.cudaGetErrorString(status)[1].decode()}")
    return None if not values else values[0] if len(values) == 1 else tuple(values)


@dataclass(frozen=True)
class DeviceArray:
    """A C-contiguous array in GPU memory of another owner; torch, CuPy and pycuda take it directly.

    Of bfloat16 they see two bytes without a meaning, as the interface has no name for it.
    """

    pointer: int
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    owner: object = field(repr=False, compare=False)
    """Keeps the memory alive."""

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        return {
            "shape": self.shape,
            "typestr": self.dtype.str,
            "data": (self.pointer, False),
            "strides": None,
            "version": 3,
        }

    def rows(self, first: int, count: int) -> DeviceArray:
        """Return rows ``first`` to ``first + count`` of the leading axis, the same memory."""
        if not 0 <= first <= first + count <= self.shape[0]:
            raise IndexError(f"rows {first} to {first + count} of {self.shape[0]}")
        row_bytes = math.prod(self.shape[1:]) * self.dtype.itemsize
        return DeviceArray(self.pointer + first * row_bytes, (count, *self.shape[1:]), self.dtype, self.owner)


class DeviceMemory:
    """A block of GPU memory, given back when the last ``DeviceArray`` on it is gone."""

    def __init__(self, nbytes: int, stream: Stream | None = None) -> None:
        """Allocate the block.

        Args:
            nbytes: its size.
            stream: get it, and give it back, in this stream's order; else both wait for all that the GPU is doing.
        """
        from cuda.bindings import runtime as cuda

        self.nbytes = nbytes
        if stream is None:
            self.pointer = int(call(cuda.cudaMalloc(max(nbytes, 1))))
            self._free: Callable[[int], object] = cuda.cudaFree
        else:
            handle = stream.handle
            self.pointer = int(call(cuda.cudaMallocAsync(max(nbytes, 1), handle)))
            self._free = lambda pointer: cuda.cudaFreeAsync(pointer, handle)

    def array(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> DeviceArray:
        """Return the block as an array. The block must be large enough."""
        array = DeviceArray(self.pointer, shape, dtype, self)
        if array.nbytes > self.nbytes:
            raise ValueError(f"{list(shape)} {dtype} needs {array.nbytes} bytes of a block of {self.nbytes}")
        return array

    def __del__(self) -> None:
        if hasattr(self, "_free"):
            self._free(self.pointer)


def as_device_array(array: Any, stream: Stream) -> DeviceArray:
    """Take anything with ``__cuda_array_interface__`` or DLPack, torch's, CuPy's and pycuda's arrays for example.

    Args:
        array: stays as it is.
        stream: what is put on it from now on waits for what the array's library still has to do.

    Raises:
        ContractError: it isn't in GPU memory, or isn't C-contiguous.
    """
    if isinstance(array, DeviceArray):
        return array
    from cuda.core.utils import StridedMemoryView

    try:
        view = StridedMemoryView.from_any_interface(array, stream_ptr=stream.handle)
    except (AssertionError, BufferError, RuntimeError) as error:  # NumPy and torch refuse a stream for host memory
        raise ContractError(f"{type(array).__name__}: expected an array in GPU memory ({error})") from error
    contiguous, expected = True, 1
    for size, stride in zip(reversed(view.shape), reversed(view.strides or ()), strict=False):
        contiguous &= size == 1 or stride == expected
        expected *= size
    if not view.is_device_accessible or not contiguous:
        raise ContractError("a device array must be C-contiguous and in GPU memory; make a contiguous copy of it")
    return DeviceArray(view.ptr, tuple(view.shape), np.dtype(view.dtype), array)


class Stream:
    """A private stream that doesn't wait for the default one."""

    def __init__(self) -> None:
        from cuda.bindings import runtime as cuda

        self._cuda = cuda
        self.handle = int(call(cuda.cudaStreamCreateWithFlags(cuda.cudaStreamNonBlocking)))

    def synchronize(self) -> None:
        """Wait until everything on the stream is done."""
        call(self._cuda.cudaStreamSynchronize(self.handle))

    def upload(self, source: Array, target: DeviceArray) -> None:
        """Copy a host array; ``source`` must live until the stream is synchronised."""
        self._copy(target.pointer, source.ctypes.data, source.nbytes)

    def download(self, source: DeviceArray) -> Array:
        """Copy an array to the host; the copy is whole once the stream is synchronised."""
        target = np.empty(source.shape, source.dtype)
        self._copy(target.ctypes.data, source.pointer, source.nbytes)
        return target

    def copy(self, source: DeviceArray, target: DeviceArray) -> None:
        """Copy within the GPU's memory."""
        self._copy(target.pointer, source.pointer, source.nbytes)

    def fill(self, target: DeviceArray, byte: int) -> None:
        """Set every byte."""
        call(self._cuda.cudaMemsetAsync(target.pointer, byte, target.nbytes, self.handle))

    def _copy(self, target: int, source: int, nbytes: int) -> None:
        kind = self._cuda.cudaMemcpyKind.cudaMemcpyDefault
        call(self._cuda.cudaMemcpyAsync(target, source, nbytes, kind, self.handle))

    def time_ms(self, work: Callable[[], object]) -> float:
        """Measure the GPU's milliseconds from the first to the last work that ``work`` queues, gaps included."""
        cuda = self._cuda
        events = []
        try:
            for _ in range(2):
                events.append(call(cuda.cudaEventCreate()))
            call(cuda.cudaEventRecord(events[0], self.handle))
            work()
            call(cuda.cudaEventRecord(events[1], self.handle))
            self.synchronize()
            return float(call(cuda.cudaEventElapsedTime(*events)))
        finally:
            for event in events:
                cuda.cudaEventDestroy(event)

    @contextmanager
    def capture(self) -> Iterator[Graph]:
        """Record what is put on the stream instead of doing it: the graph is whole after the ``with`` block."""
        graph = Graph(self)
        mode = self._cuda.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
        call(self._cuda.cudaStreamBeginCapture(self.handle, mode))
        try:
            yield graph
        except BaseException:
            self._cuda.cudaStreamEndCapture(self.handle)  # may fail too, for what is being raised
            raise
        recorded = call(self._cuda.cudaStreamEndCapture(self.handle))
        graph.executable = call(self._cuda.cudaGraphInstantiate(recorded, 0))
        call(self._cuda.cudaGraphDestroy(recorded))


class Graph:
    """Recorded work that is started with one call."""

    def __init__(self, stream: Stream) -> None:
        self._stream = stream
        self.executable: Any = None

    def __del__(self) -> None:
        if self.executable is not None:
            self._stream._cuda.cudaGraphExecDestroy(self.executable)

    def launch(self) -> None:
        """Put the work on the stream that it was recorded from."""
        cuda = self._stream._cuda
        call(cuda.cudaGraphLaunch(self.executable, self._stream.handle))
