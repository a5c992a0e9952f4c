"""CUDA as the TensorRT runner needs it, as far as it needs no GPU."""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from cuda.bindings import runtime as cuda

from icportrait.errors import ContractError, RuntimeNotAvailable
from icportrait.runtime.cuda import CudaError, DeviceArray, DeviceMemory, Stream, as_device_array, call, find_gpu
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
    }
    for name in answers:
        monkeypatch.setattr(cuda, name, lambda *_, name=name: answers[name])
    return answers


def test_the_gpu_is_described(driver: dict[str, tuple[Any, ...]]) -> None:
    gpu = find_gpu()
    assert (gpu.name, gpu.compute_capability) == ("NVIDIA Test", "8.9")
    assert (gpu.free_bytes, gpu.total_bytes) == (3 * 10**9, 8 * 10**9)
    assert gpu.driver_cuda_version == "13.1"


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
