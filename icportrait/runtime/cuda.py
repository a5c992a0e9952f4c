"""The CUDA calls that engines on a GPU need, through cuda-python. Every failed call raises."""

from __future__ import annotations

import gc
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
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
    compute_mode: str = "default"
    """One of ``COMPUTE_MODES``, which says which processes may use it."""
    has_mps: bool = False
    """NVIDIA's Multi-Process Service lets processes run at the same time."""


COMPUTE_MODES = ("default", "exclusive thread", "prohibited", "exclusive process")
"""Names of the modes, by CUDA's numbers."""


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
        mode = COMPUTE_MODES[attribute("ComputeMode")]
    except (CudaError, RuntimeError) as error:
        raise RuntimeNotAvailable(f"no NVIDIA GPU was found ({error})") from error
    has_mps = False
    with suppress(CudaError):  # a driver that is older than the question
        has_mps = bool(attribute("MpsEnabled"))
    capability, newest = f"{properties.major}.{properties.minor}", f"{driver // 1000}.{driver % 1000 // 10}"
    return Gpu(properties.name.decode(), capability, total, free, newest, mode, has_mps)


def only_visible(device: str | None) -> dict[str, str]:
    """Return the environment of a process that sees one GPU alone, by nvidia-smi's number or by UUID; {} for None."""
    return {"CUDA_VISIBLE_DEVICES": device, "CUDA_DEVICE_ORDER": "PCI_BUS_ID"} if device is not None else {}


def attribute(name: str) -> int:
    """Return one of the GPU's numbers.

    Args:
        name: of ``cudaDeviceAttr``, without the prefix ``cudaDevAttr``.

    Raises:
        CudaError: the driver doesn't say, as one that is older than the attribute.
    """
    from cuda.bindings import runtime as cuda

    return int(call(cuda.cudaDeviceGetAttribute(getattr(cuda.cudaDeviceAttr, f"cudaDevAttr{name}"), 0)))


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


def is_lost() -> bool:
    """Tell whether the GPU's context of this process has ended, as an illegal access ends it.

    No call works in such a process any more. An error that a process survives is cleared.
    """
    if (cuda := sys.modules.get("cuda.bindings.runtime")) is None:
        return False
    cuda.cudaGetLastError()
    (status,) = cuda.cudaDeviceSynchronize()
    errors = cuda.cudaError_t
    return status not in (errors.cudaSuccess, errors.cudaErrorNoDevice, errors.cudaErrorInsufficientDriver)


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


class PinnedMemory:
    """A block of the host's memory that the GPU reads and writes by itself, given back with the last array on it."""

    def __init__(self, nbytes: int) -> None:
        from cuda.bindings import runtime as cuda

        self._cuda, self._nbytes = cuda, nbytes
        self._pointer = int(call(cuda.cudaHostAlloc(max(nbytes, 1), cuda.cudaHostAllocDefault)))

    @property
    def __array_interface__(self) -> dict[str, Any]:
        return {"shape": (self._nbytes,), "typestr": "|u1", "data": (self._pointer, False), "version": 3}

    def __del__(self) -> None:
        if hasattr(self, "_pointer"):
            self._cuda.cudaFreeHost(self._pointer)


def pinned_array(shape: tuple[int, ...], dtype: np.dtype[Any]) -> Array:
    """Make a NumPy array in pinned memory, of which copies to and from the GPU run beside the host. It holds zeros."""
    array = np.asarray(PinnedMemory(math.prod(shape) * dtype.itemsize)).view(dtype).reshape(shape)
    array[...] = 0
    return array


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
    from cuda.bindings import runtime as cuda
    from cuda.core.utils import StridedMemoryView

    # The view asks the driver, for which a thread needs a current context; only the runtime's own calls see to that.
    with suppress(CudaError):  # where there is no GPU, the array isn't in its memory either
        call(cuda.cudaSetDevice(0))
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
    # With the view goes a DLPack capsule, and with the capsule the memory, though the array itself is still there.
    return DeviceArray(view.ptr, tuple(view.shape), np.dtype(view.dtype), (view, array))


_WITHOUT_BATCHES = ("cudaErrorCallRequiresNewerDriver", "cudaErrorNotSupported")
"""Answers of a driver that is older than CUDA 12.8 to a batch of copies."""


class Stream:
    """A private stream that doesn't wait for the default one."""

    def __init__(self) -> None:
        from cuda.bindings import runtime as cuda

        self._cuda = cuda
        self.has_batches = True
        """True where the driver takes copies in batches, as far as it was asked."""
        self.handle = int(call(cuda.cudaStreamCreateWithFlags(cuda.cudaStreamNonBlocking)))

    def synchronize(self) -> None:
        """Wait until everything on the stream is done."""
        call(self._cuda.cudaStreamSynchronize(self.handle))

    def upload(self, source: Array, target: DeviceArray) -> None:
        """Copy a host array; ``source`` must live until the stream is synchronised."""
        self._copy(target.pointer, source.ctypes.data, source.nbytes)

    def download(self, source: DeviceArray, target: Array | None = None) -> Array:
        """Copy an array to the host, into ``target`` or fresh memory; it is whole once the stream is synchronised."""
        if target is None:
            target = np.empty(source.shape, source.dtype)
        self._copy(target.ctypes.data, source.pointer, source.nbytes)
        return target

    def copy(self, source: DeviceArray, target: DeviceArray) -> None:
        """Copy within the GPU's memory."""
        self._copy(target.pointer, source.pointer, source.nbytes)

    def copy_all(self, pairs: Sequence[tuple[DeviceArray, DeviceArray]]) -> None:
        """Copy from each pair's first array to its second, in one call, because each call gives up Python's lock.

        Args:
            pairs: arrays in the GPU's memory, of which none overlaps another that is written.
        """
        cuda, count = self._cuda, len(pairs)
        if not pairs:
            return
        if self.has_batches:
            order = cuda.cudaMemcpyAttributes()
            order.srcAccessOrder = cuda.cudaMemcpySrcAccessOrder.cudaMemcpySrcAccessOrderStream
            sources, targets = ([pair[side].pointer for pair in pairs] for side in (0, 1))
            sizes = [source.nbytes for source, _ in pairs]
            (status,) = cuda.cudaMemcpyBatchAsync(targets, sources, sizes, count, [order], [0], 1, self.handle)
            if status.name not in _WITHOUT_BATCHES:
                call((status,))
                return
            cuda.cudaGetLastError()
            self.has_batches = False
        for source, target in pairs:
            self.copy(source, target)

    def fill(self, target: DeviceArray, byte: int) -> None:
        """Set every byte."""
        call(self._cuda.cudaMemsetAsync(target.pointer, byte, target.nbytes, self.handle))

    def _copy(self, target: int, source: int, nbytes: int) -> None:
        kind = self._cuda.cudaMemcpyKind.cudaMemcpyDefault
        call(self._cuda.cudaMemcpyAsync(target, source, nbytes, kind, self.handle))

    def time_ms(self, work: Callable[[], object]) -> float:
        """Measure the GPU's milliseconds from the first to the last work that ``work`` queues, gaps included."""
        timer = Timer(self)
        with timer:
            work()
        self.synchronize()
        return 1000 * timer.seconds()

    @contextmanager
    def capture(self) -> Iterator[Graph]:
        """Record what is put on the stream instead of doing it: the graph is whole after the ``with`` block.

        Python's collector is off meanwhile, because memory that it gives back to the GPU would end the recording.
        """
        graph = Graph(self)
        mode = self._cuda.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
        with collector_off():
            call(self._cuda.cudaStreamBeginCapture(self.handle, mode))
            try:
                yield graph
            except BaseException:
                self._cuda.cudaStreamEndCapture(self.handle)  # may fail too, for what is being raised
                raise
            recorded = call(self._cuda.cudaStreamEndCapture(self.handle))
        graph.executable = call(self._cuda.cudaGraphInstantiate(recorded, 0))
        call(self._cuda.cudaGraphDestroy(recorded))


@contextmanager
def collector_off() -> Iterator[None]:
    """Let Python's collector give back nothing within the block."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


class Timer:
    """Measures the GPU's time between the begin and the end of a ``with`` block, by two events that are kept."""

    def __init__(self, stream: Stream) -> None:
        self._cuda, self._stream = stream._cuda, stream
        self._events: list[Any] = []
        for _ in range(2):
            self._events.append(call(self._cuda.cudaEventCreate()))

    def __enter__(self) -> None:
        call(self._cuda.cudaEventRecord(self._events[0], self._stream.handle))

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is None:
            call(self._cuda.cudaEventRecord(self._events[1], self._stream.handle))

    def seconds(self) -> float:
        """Return the time of the last block; the stream must have been synchronised since."""
        return float(call(self._cuda.cudaEventElapsedTime(*self._events))) / 1000

    def __del__(self) -> None:
        for event in getattr(self, "_events", ()):
            self._cuda.cudaEventDestroy(event)


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
