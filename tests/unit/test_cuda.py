"""CUDA as the TensorRT runner needs it, as far as it needs no GPU."""

from __future__ import annotations

import ctypes
import gc
import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import pytest
from cuda.bindings import runtime as cuda

from icportrait.errors import ContractError, RuntimeNotAvailable
from icportrait.runtime.cuda import (
    CudaError,
    DeviceArray,
    DeviceMemory,
    Graph,
    Stream,
    Timer,
    as_device_array,
    attribute,
    call,
    find_gpu,
    is_lost,
    pinned_array,
)
from tests.host_cuda import HostCuda, view

SUCCESS = cuda.cudaError_t.cudaSuccess
ARRAY = DeviceArray(4096, (6, 5, 7), np.dtype(np.float16), None)


# Arrays


def test_rows_are_the_same_memory() -> None:
    rows = ARRAY.rows(2, 3)
    assert (rows.pointer, rows.shape, rows.nbytes) == (4096 + 2 * 5 * 7 * 2, (3, 5, 7), 3 * 5 * 7 * 2)
    assert ARRAY.rows(0, 6) == ARRAY
    assert rows.rows(1, 2) == ARRAY.rows(3, 2)
    assert ARRAY.rows(6, 0).nbytes == 0


def test_rows_of_one_axis_are_its_items() -> None:
    assert DeviceArray(8, (4,), np.dtype(np.int64), None).rows(3, 1).pointer == 8 + 3 * 8


@pytest.mark.parametrize(("first", "count"), [(-1, 2), (0, 7), (4, 3), (7, 0), (3, -1)])
def test_rows_outside_are_refused(first: int, count: int) -> None:
    with pytest.raises(IndexError, match=rf"rows {first} to {first + count} of 6"):
        ARRAY.rows(first, count)


def test_memory_lives_as_long_as_its_arrays() -> None:
    owner = object()
    assert DeviceArray(0, (2, 2), np.dtype(np.float32), owner).rows(1, 1).owner is owner


def test_other_libraries_see_the_same_array() -> None:
    assert ARRAY.rows(1, 2).__cuda_array_interface__ == {
        "shape": (2, 5, 7),
        "typestr": "<f2",
        "data": (4096 + 5 * 7 * 2, False),
        "strides": None,
        "version": 3,
    }


@pytest.mark.parametrize("array", [np.zeros((2, 3), np.float32), 3, "text"])
def test_what_is_not_in_gpu_memory_is_refused(array: Any) -> None:
    stream: Any = SimpleNamespace(handle=1)
    assert as_device_array(ARRAY, stream) is ARRAY
    with pytest.raises(ContractError, match=f"{type(array).__name__}: expected an array in GPU memory"):
        as_device_array(array, stream)


# Calls


def test_a_call_gives_its_values() -> None:
    assert call((SUCCESS,)) is None
    assert call((SUCCESS, 3)) == 3
    assert call((SUCCESS, 3, 4)) == (3, 4)


def test_a_failed_call_says_which_error() -> None:
    with pytest.raises(CudaError, match="CUDA: cudaErrorMemoryAllocation: out of memory"):
        call((cuda.cudaError_t.cudaErrorMemoryAllocation, None))


def test_a_failed_recording_is_ended_and_leaves_no_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    ended = []
    monkeypatch.setattr(cuda, "cudaStreamCreateWithFlags", lambda flags: (SUCCESS, 7))
    monkeypatch.setattr(cuda, "cudaStreamBeginCapture", lambda stream, mode: (SUCCESS,))
    monkeypatch.setattr(cuda, "cudaStreamEndCapture", lambda stream: ended.append(stream) or (SUCCESS, None))
    with pytest.raises(ZeroDivisionError), Stream().capture() as graph:
        _ = 1 / 0
    assert ended == [7] and graph.executable is None


def test_what_is_recorded_is_done_at_every_launch_and_only_then(monkeypatch: pytest.MonkeyPatch) -> None:
    emulated = HostCuda()
    emulated.install(monkeypatch)
    stream = Stream()
    source, target = (DeviceMemory(4).array((4,), np.dtype(np.uint8)) for _ in range(2))

    def seen() -> list[int]:
        stream.synchronize()
        return [int(view(array.pointer, array.shape, array.dtype)[0]) for array in (source, target)]

    for array in (source, target):
        stream.fill(array, 0)
    with stream.capture() as graph:
        stream.copy(source, target)
        stream.fill(source, 5)
    assert seen() == [0, 0] and len(emulated.graphs) == 1
    for byte in (1, 2):
        stream.fill(source, byte)
        graph.launch()
        assert seen() == [5, byte]
    del graph
    assert not emulated.graphs


def test_waiting_while_recording_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    emulated = HostCuda()
    emulated.install(monkeypatch)
    stream = Stream()
    # The cause, and not that the recording was then invalid.
    with pytest.raises(CudaError, match="CaptureUnsupported"), stream.capture():
        stream.synchronize()
    assert not emulated.graphs


@pytest.fixture
def events(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Record what a stream is asked for with events 1 and 2, in order."""
    done: list[str] = []
    made = iter((1, 2))
    answers = {
        "cudaStreamCreateWithFlags": lambda flags: (SUCCESS, 7),
        "cudaEventCreate": lambda: (SUCCESS, next(made)),
        "cudaEventRecord": lambda event, stream: done.append(f"record {event} on {stream}") or (SUCCESS,),
        "cudaStreamSynchronize": lambda stream: done.append("wait") or (SUCCESS,),
        "cudaEventElapsedTime": lambda start, end: (SUCCESS, 10.0 * end + start),
        "cudaEventDestroy": lambda event: done.append(f"destroy {event}") or (SUCCESS,),
    }
    for name, answer in answers.items():
        monkeypatch.setattr(cuda, name, answer)
    return done


def test_work_is_timed_between_two_events(events: list[str]) -> None:
    assert Stream().time_ms(lambda: events.append("work")) == 21.0
    assert events == ["record 1 on 7", "work", "record 2 on 7", "wait", "destroy 1", "destroy 2"]


def test_failed_work_leaves_no_event(events: list[str]) -> None:
    with pytest.raises(ZeroDivisionError):
        Stream().time_ms(lambda: 1 / 0)
    assert events[-2:] == ["destroy 1", "destroy 2"]


def test_a_time_is_read_only_once_its_own_stream_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    HostCuda().install(monkeypatch)
    stream, other = Stream(), Stream()
    with (timer := Timer(stream)):
        pass
    other.synchronize()
    with pytest.raises(CudaError, match="cudaErrorNotReady"):
        timer.seconds()
    stream.synchronize()
    assert timer.seconds() >= 0


def test_copies_of_a_batch_are_one_call_and_a_driver_without_them_is_asked_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    emulated = HostCuda()
    emulated.install(monkeypatch)
    emulated.has_batches = False
    stream = Stream()
    block = DeviceMemory(8).array((8,), np.dtype(np.uint8))
    for byte in range(8):
        stream.fill(block.rows(byte, 1), byte)
    stream.synchronize()  # the other stream doesn't wait for this one
    for batches in (False, True):
        emulated.calls.clear()
        stream = Stream() if batches else stream
        emulated.has_batches = batches
        for _ in range(2):
            stream.copy_all([(block.rows(0, 2), block.rows(2, 2)), (block.rows(4, 2), block.rows(6, 2))])
        counts = [emulated.calls.count(f"cudaMemcpy{kind}Async") for kind in ("Batch", "")]
        assert counts == ([2, 0] if batches else [1, 4])
    stream.copy_all([])
    stream.synchronize()
    assert view(block.pointer, block.shape, block.dtype).tolist() == [0, 1, 0, 1, 4, 5, 4, 5]


def test_a_pinned_array_keeps_its_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    emulated = HostCuda()
    emulated.install(monkeypatch)
    rows = pinned_array((4, 3), np.dtype(np.float32))[1:]
    assert not rows.any() and emulated.is_pinned(rows.ctypes.data)
    assert "cudaFreeHost" not in emulated.calls
    del rows
    assert emulated.calls[-1] == "cudaFreeHost"


def bare_stream() -> Stream:
    """Make a stream whose calls reach the real CUDA, which has no driver here."""
    stream = Stream.__new__(Stream)
    stream._cuda, stream.handle, stream.has_batches = cuda, 7, True
    return stream


def bare_timer(stream: Stream) -> Timer:
    timer = Timer.__new__(Timer)
    timer._cuda, timer._stream, timer._events = cuda, stream, [cuda.cudaEvent_t(), cuda.cudaEvent_t()]
    return timer


def bare_graph(stream: Stream) -> Graph:
    graph = Graph(stream)
    graph.executable = cuda.cudaGraphExec_t()
    return graph


def record(stream: Stream) -> None:
    with stream.capture():
        pass


HOST = np.zeros(4, np.uint8)
BYTES = DeviceArray(4096, (4,), np.dtype(np.uint8), None)
REAL_CALLS: dict[str, Callable[[Stream], object]] = {
    "a stream": lambda stream: Stream(),
    "memory": lambda stream: DeviceMemory(8),
    "memory of a stream": lambda stream: DeviceMemory(8, stream),
    "pinned memory": lambda stream: pinned_array((2,), np.dtype(np.uint8)),
    "synchronize": lambda stream: stream.synchronize(),
    "upload": lambda stream: stream.upload(HOST, BYTES),
    "download": lambda stream: stream.download(BYTES),
    "copy": lambda stream: stream.copy(BYTES, BYTES),
    "copy_all": lambda stream: stream.copy_all([(BYTES, BYTES), (BYTES, BYTES)]),
    "fill": lambda stream: stream.fill(BYTES, 255),
    "capture": record,
    "launch": lambda stream: bare_graph(stream).launch(),
    "an attribute": lambda stream: attribute("ComputeMode"),
    "an event": lambda stream: Timer(stream),
    "an event's record": lambda stream: bare_timer(stream).__enter__(),
    "an event's end": lambda stream: bare_timer(stream).__exit__(None),
    "an event's time": lambda stream: bare_timer(stream).seconds(),
    "giving back": lambda stream: (
        [
            call(given_back)
            for given_back in (
                cuda.cudaFree(4096),
                cuda.cudaFreeAsync(4096, 7),
                cuda.cudaFreeHost(4096),
                cuda.cudaEventDestroy(cuda.cudaEvent_t()),
                cuda.cudaGraphExecDestroy(cuda.cudaGraphExec_t()),
                cuda.cudaGraphDestroy(cuda.cudaGraph_t()),
                cuda.cudaStreamEndCapture(7)[:1],
                cuda.cudaGraphInstantiate(cuda.cudaGraph_t(), 0)[:1],
            )
            if given_back[0] != NO_DRIVER
        ]
        or call((NO_DRIVER,))
    ),
}
NO_DRIVER = cuda.cudaError_t.cudaErrorInsufficientDriver


@pytest.mark.parametrize("what", REAL_CALLS)
def test_without_a_driver_each_real_call_says_so(what: str) -> None:
    """Call cuda-python itself, so that an argument of a wrong type or number is seen."""
    if cuda.cudaGetDeviceCount()[0] != NO_DRIVER:
        pytest.skip("there is a driver here")
    with pytest.raises(CudaError, match="cudaErrorInsufficientDriver"):
        REAL_CALLS[what](bare_stream())


def test_a_device_is_lost_only_by_an_error_that_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not is_lost()  # as far as the real CUDA can tell here
    emulated = HostCuda()
    emulated.install(monkeypatch)
    assert not is_lost()
    emulated.sticky_error = cuda.cudaError_t.cudaErrorIllegalAddress
    assert is_lost() and emulated.calls[-2:] == ["cudaGetLastError", "cudaDeviceSynchronize"]


# DLPack


class DLTensor(ctypes.Structure):
    """``DLManagedTensor``, with the fields of its ``DLTensor`` in place."""

    _fields_: ClassVar = [
        ("data", ctypes.c_void_p),
        ("device_type", ctypes.c_int32),
        ("device_id", ctypes.c_int32),
        ("ndim", ctypes.c_int32),
        ("code", ctypes.c_uint8),
        ("bits", ctypes.c_uint8),
        ("lanes", ctypes.c_uint16),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
        ("manager", ctypes.c_void_p),
        ("deleter", ctypes.c_void_p),
    ]


class StubTensor:
    """A tensor as Triton's stub makes it: ``__dlpack__`` takes a stream alone, and its capsule owns the memory."""

    def __init__(self, given_back: list[int]) -> None:
        self._shape = (ctypes.c_int64 * 2)(3, 4)
        self._delete = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(given_back.append)
        self._tensor = DLTensor(
            4096, CUDA_DEVICE, 0, 2, 2, 32, 1, self._shape, None, 0, None, ctypes.cast(self._delete, ctypes.c_void_p)
        )

    def __dlpack_device__(self) -> tuple[int, int]:
        return CUDA_DEVICE, 0

    def __dlpack__(self, stream: object = None) -> Any:
        make = ctypes.pythonapi.PyCapsule_New
        make.restype, make.argtypes = ctypes.py_object, (ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p)
        return make(ctypes.addressof(self._tensor), b"dltensor", None)


CUDA_DEVICE = 2


def test_a_capsule_of_tritons_stub_is_taken_and_lives_as_long_as_the_array() -> None:
    given_back: list[int] = []
    theirs, stream = StubTensor(given_back), bare_stream()
    ours = as_device_array(theirs, stream)
    assert (ours.pointer, ours.shape, ours.dtype) == (4096, (3, 4), np.dtype(np.float32))
    rows = ours.rows(1, 2)
    del ours
    gc.collect()
    assert not given_back
    del rows
    gc.collect()
    assert len(given_back) == 1


# The GPU


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> dict[str, tuple[Any, ...]]:
    """Return what the driver answers, without one."""
    properties = SimpleNamespace(name=b"NVIDIA Test", major=8, minor=9)
    answers: dict[str, tuple[Any, ...]] = {
        "cudaDriverGetVersion": (SUCCESS, 13010),
        "cudaGetDeviceCount": (SUCCESS, 1),
        "cudaGetDeviceProperties": (SUCCESS, properties),
        "cudaMemGetInfo": (SUCCESS, 3 * 10**9, 8 * 10**9),
        "cudaDeviceGetAttribute": (SUCCESS, 0),
    }
    for name in answers:
        monkeypatch.setattr(cuda, name, lambda *_, name=name: answers[name])
    return answers


def test_the_gpu_is_described(driver: dict[str, tuple[Any, ...]]) -> None:
    gpu = find_gpu()
    assert (gpu.name, gpu.compute_capability) == ("NVIDIA Test", "8.9")
    assert (gpu.free_bytes, gpu.total_bytes) == (3 * 10**9, 8 * 10**9)
    assert gpu.driver_cuda_version == "13.1"
    assert (gpu.compute_mode, gpu.has_mps) == ("default", False)


def test_a_driver_that_knows_no_mps_has_none(
    driver: dict[str, tuple[Any, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def answer(name: cuda.cudaDeviceAttr, device: int) -> tuple[Any, ...]:
        of_mps = name is cuda.cudaDeviceAttr.cudaDevAttrMpsEnabled
        return (cuda.cudaError_t.cudaErrorInvalidValue, None) if of_mps else (SUCCESS, 3)

    monkeypatch.setattr(cuda, "cudaDeviceGetAttribute", answer)
    gpu = find_gpu()
    assert (gpu.compute_mode, gpu.has_mps) == ("exclusive process", False)


@pytest.mark.parametrize(
    ("name", "answer", "why"),
    [
        ("cudaDriverGetVersion", (SUCCESS, 0), "no NVIDIA driver is installed"),
        ("cudaGetDeviceCount", (SUCCESS, 0), "the driver shows none"),
        (
            "cudaGetDeviceCount",
            (cuda.cudaError_t.cudaErrorNoDevice, None),
            "CUDA: cudaErrorNoDevice: no CUDA-capable device is detected",
        ),
    ],
)
def test_a_machine_without_a_gpu_says_so_in_one_line(
    name: str, answer: tuple[Any, ...], why: str, driver: dict[str, tuple[Any, ...]]
) -> None:
    driver[name] = answer
    with pytest.raises(RuntimeNotAvailable) as refusal:
        find_gpu()
    assert str(refusal.value) == f"no NVIDIA GPU was found ({why})"


def test_without_cuda_python_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cuda.bindings", None)
    with pytest.raises(RuntimeNotAvailable, match=r"cuda-python is not installed .*pip install cuda-python"):
        find_gpu()
