"""Python models without Triton: tensors of both placements in, every request's own rows out."""

from __future__ import annotations

import ctypes
import json
import queue
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from google.protobuf import json_format

import icportrait.runtime.placement
from icportrait.deploy.triton_config import model_configs
from icportrait.errors import Cancelled, ContractError, InvalidRequest, Unavailable, to_caller
from icportrait.metrics import Metrics
from icportrait.policy import LOOP_VARIABLE, ServingPolicy
from icportrait.presets import DEMO_128
from icportrait.runtime.cuda import DeviceArray, DeviceMemory, Stream
from icportrait.runtime.placement import join
from icportrait.serving.control import Cancel
from icportrait.serving.triton_loop import DenoiseModel, answer_with
from icportrait.serving.triton_models import EngineModel, ModelContext, attempt
from tests.host_cuda import HostCuda, view
from tests.private_client import Line
from tests.trivial_engines import write_trivial_export


class Tensor:
    """Triton's: in its own memory, which is gone when the request is."""

    def __init__(self, name: str, array: np.ndarray, on_gpu: bool = False) -> None:
        self.name, self._array, self._on_gpu = name, array, on_gpu
        if on_gpu:
            self.memory = DeviceMemory(array.nbytes).array(array.shape, array.dtype)
            ctypes.memmove(self.memory.pointer, array.ctypes.data, array.nbytes)

    def is_cpu(self) -> bool:
        return not self._on_gpu

    def as_numpy(self) -> np.ndarray:
        assert not self._on_gpu, "Triton refuses it for a tensor in GPU memory"
        return self._array

    def take_back(self) -> None:
        """Fill the memory with zeros, because the request has ended."""
        memory = view(self.memory.pointer, self.memory.shape, self.memory.dtype) if self._on_gpu else self._array
        memory[...] = 0


class Response:
    def __init__(self, tensors: list[Tensor] | None = None, error: Any = None) -> None:
        self.outputs = {tensor.name: tensor.as_numpy() for tensor in tensors or []}
        self.error = error


class Error(str):
    INVALID_ARG = INTERNAL = CANCELLED = UNAVAILABLE = 1

    def __new__(cls, text: str, code: int) -> Error:
        return super().__new__(cls, text)


class MetricFamily:
    """Triton's, which holds nothing."""

    COUNTER = GAUGE = "kind"

    def __init__(self, name: str, description: str, kind: str) -> None:
        pass

    def Metric(self, labels: dict[str, str]) -> Any:  # noqa: N802 - Triton's name
        return SimpleNamespace(set=lambda value: None, increment=lambda by: None)


class Sender:
    """Triton's for one request; it sends nothing after the last answer."""

    def __init__(self, fails: bool = False) -> None:
        self.sent: list[tuple[Any, int]] = []
        self._fails = fails

    def send(self, response: Response, flags: int) -> None:
        assert not any(flags for _, flags in self.sent), "the last answer was sent already"
        if response.outputs and self._fails:
            raise RuntimeError("no shared memory")
        self.sent.append((response.error or response.outputs, flags))


@pytest.fixture
def cuda(cuda: HostCuda, monkeypatch: pytest.MonkeyPatch) -> HostCuda:
    # DLPack itself needs a driver to say in which memory an address lies.
    monkeypatch.setattr(icportrait.runtime.placement, "as_device_array", lambda tensor, stream: tensor.memory)
    return cuda


@pytest.fixture
def arguments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """Return ``initialize``'s arguments for the VAE encoder."""
    utils = SimpleNamespace(
        get_input_tensor_by_name=lambda request, name: request.get(name),
        Tensor=Tensor,
        InferenceResponse=Response,
        TritonError=Error,
        MetricFamily=MetricFamily,
        TRITONSERVER_RESPONSE_COMPLETE_FINAL=1,
    )
    monkeypatch.setitem(sys.modules, "triton_python_backend_utils", utils)
    write_trivial_export(tmp_path / "1", DEMO_128)
    config = model_configs(DEMO_128, "fp32", ServingPolicy(runtime="tensorrt-rtx"))["vae_encoder"]
    text = json.dumps(json_format.MessageToDict(config, preserving_proto_field_name=True))
    return {"model_config": text, "model_repository": str(tmp_path), "model_version": "1"}


class Doubled(EngineModel):
    """An engine that doubles its input, wherever that lies."""

    def load(self, context: ModelContext) -> Any:
        self.given: list[Any] = []

        def run(inputs: dict[str, Any]) -> dict[str, np.ndarray]:
            pixels = inputs["pixels"]
            self.given.append(pixels)
            on_gpu = isinstance(pixels, DeviceArray)
            array = view(pixels.pointer, pixels.shape, pixels.dtype) if on_gpu else pixels
            return {"latent": 2 * array.astype(np.float32)}

        return run


def pixels(rows: int, first: int, on_gpu: bool = False) -> Tensor:
    values = np.arange(first, first + rows, dtype=np.uint8)
    return Tensor("pixels", np.broadcast_to(values[:, None, None, None], (rows, 4, 4, 3)).copy(), on_gpu)


@pytest.mark.parametrize("placements", [(False, False, False), (True, True, True), (False, True, False)])
def test_a_batch_of_either_placement_gives_each_request_its_rows(
    arguments: dict[str, str], cuda: HostCuda, placements: tuple[bool, ...]
) -> None:
    model = Doubled()
    model.initialize(arguments)
    rows = (1, 3, 2)
    tensors = [
        pixels(count, 10 * index, on_gpu) for index, (count, on_gpu) in enumerate(zip(rows, placements, strict=True))
    ]
    responses = model.execute([{"pixels": tensor} for tensor in tensors])
    assert isinstance(model.given[0], DeviceArray) is any(placements)
    for index, (count, response) in enumerate(zip(rows, responses, strict=True)):
        expected = [2 * (10 * index + row) for row in range(count)]
        assert response.outputs["latent"].shape == (count, 4, 4, 3)
        assert response.outputs["latent"][:, 0, 0, 0].tolist() == expected


def test_a_model_on_the_cpu_makes_no_stream(arguments: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Stream, "__init__", lambda self: pytest.fail("CUDA was called"))
    model = Doubled()
    model.initialize(arguments)
    (response,) = model.execute([{"pixels": pixels(2, 5)}])
    assert response.outputs["latent"][:, 0, 0, 0].tolist() == [10, 12]


def stage_stand_in(**methods: Any) -> SimpleNamespace:
    """Make what ``DenoiseModel`` needs of a ``DenoiseStage``."""
    nothing = {name: lambda *_: None for name in ("submit", "handle", "peer_has_gone", "close")}
    return SimpleNamespace(metrics=Metrics(), **(nothing | methods))


@pytest.mark.parametrize("on_gpu", [False, True])
def test_a_stage_that_runs_later_has_its_own_copy(arguments: dict[str, str], cuda: HostCuda, on_gpu: bool) -> None:
    kept: list[Any] = []

    class Later(DenoiseModel):
        def load(self, context: ModelContext) -> Any:
            return stage_stand_in(submit=lambda tensors, answer: kept.append(tensors["pixels"]))

    model, tensor = Later(), pixels(2, 7, on_gpu)
    model.initialize(arguments)
    model.execute([SimpleNamespace(get=lambda name: tensor, get_response_sender=lambda: None)])
    tensor.take_back()
    (array,) = kept
    assert isinstance(array, DeviceArray) is on_gpu
    values = view(array.pointer, array.shape, array.dtype) if on_gpu else array
    assert values[:, 0, 0, 0].tolist() == [7, 8]
    model.finalize()


def test_the_denoising_model_answers_what_it_cannot_queue_and_listens_for_a_gateway(
    arguments: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(LOOP_VARIABLE, str(tmp_path / "loop"))
    heard: queue.SimpleQueue[Any] = queue.SimpleQueue()

    def refuse(tensors: Any, answer: Any) -> None:
        raise Cancelled("the caller cancelled")

    class Refusing(DenoiseModel):
        def load(self, context: ModelContext) -> Any:
            return stage_stand_in(
                submit=refuse,
                handle=lambda peer, message: heard.put(message),
                peer_has_gone=lambda peer: heard.put("gone"),
            )

    model, sender = Refusing(), Sender()
    model.initialize(arguments)
    line = Line(str(tmp_path / "loop"))
    line.say(op="cancel", key="a key")
    assert heard.get(timeout=10) == Cancel(key="a key")
    line.close()
    assert heard.get(timeout=10) == "gone"
    model.execute([SimpleNamespace(get=lambda name: None, get_response_sender=lambda: sender)])
    assert sender.sent == [("[CANCELLED] the caller cancelled", 1)]
    model.finalize()
    assert not (tmp_path / "loop").exists()


def test_without_a_gateway_the_denoising_model_opens_no_line_and_answers_for_callers(arguments: dict[str, str]) -> None:
    def refuse(tensors: Any, answer: Any) -> None:
        raise Unavailable("the queue is full")

    class Refusing(DenoiseModel):
        def load(self, context: ModelContext) -> Any:
            assert context.loop_path is None
            return stage_stand_in(submit=refuse)

    model, sender, before = Refusing(), Sender(), set(threading.enumerate())
    model.initialize(arguments)
    assert {thread.name for thread in set(threading.enumerate()) - before} - {"parent"} == {"metrics"}
    model.execute([SimpleNamespace(get=lambda name: None, get_response_sender=lambda: sender)])
    assert sender.sent == [("UNAVAILABLE: the queue is full", 1)]
    model.finalize()


def test_an_answer_that_cannot_be_sent_becomes_one_that_can(arguments: dict[str, str], caplog: Any) -> None:
    whole, short = Sender(), Sender(fails=True)
    for sender in (whole, short):
        answer_with(sender, to_caller)({"step": np.array([1])})
    assert whole.sent == [({"step": np.array([1])}, 1)]
    ((text, flags),) = short.sent
    assert text.startswith("UNAVAILABLE: the answer could not be sent") and flags == 1
    assert "no shared memory" in caplog.text


def test_a_failure_answers_every_request_of_the_batch(
    arguments: dict[str, str], cuda: HostCuda, caplog: pytest.LogCaptureFixture
) -> None:
    model = Doubled()
    model.initialize(arguments)
    other = Tensor("pixels", np.zeros((1, 5, 4, 3), np.uint8), on_gpu=True)
    responses = model.execute([{"pixels": pixels(1, 0)}, {"pixels": other}])
    assert [response.error for response in responses] == [
        "[INTERNAL] vae_encoder failed on this server; its log has the cause"
    ] * 2
    assert "must be equal in type" in caplog.text


@pytest.mark.parametrize(
    ("error", "code"), [(InvalidRequest("seed: -1"), "INVALID_ARG"), (ContractError("axis 3"), "INTERNAL")]
)
def test_only_what_a_caller_can_mend_is_the_callers_fault(error: Exception, code: str) -> None:
    def fail() -> None:
        raise error

    outcome = attempt("denoise", fail)
    assert outcome is not None and outcome.code == code


def test_memory_of_a_copy_is_given_back_in_its_streams_order(cuda: HostCuda) -> None:
    stream = Stream()
    joined = join([np.arange(6, dtype=np.float32).reshape(2, 3), np.ones((1, 3), np.float32)], stream)
    pointer = joined.pointer
    assert view(pointer, (3, 3), joined.dtype).tolist() == [[0, 1, 2], [3, 4, 5], [1, 1, 1]]
    assert cuda.is_on_device(pointer)
    del joined
    assert not cuda.is_on_device(pointer)
    with pytest.raises(ContractError, match="equal in type"):
        join([np.ones((1, 3), np.float32), np.ones((1, 3), np.float16)], stream)


@pytest.mark.parametrize(
    ("part", "left_out"),
    [
        ("icportrait.serving.triton_models, icportrait.serving.encoder_cache", {"pydantic", "PIL", "icportrait.loop"}),
        ("icportrait.serving.triton_loop", {"PIL", "icportrait.serving.stages"}),
    ],
)
def test_a_models_process_imports_nothing_that_only_others_need(part: str, left_out: set[str]) -> None:
    """Check imports, because imports are half of a start."""
    command = [sys.executable, "-c", f"import sys, {part}; print(*sys.modules)"]
    imported = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()
    assert {name.strip() for name in part.split(",")} <= set(imported)
    assert not left_out & set(imported)
