"""The gRPC door as callers see it: real clients, and callers that mean no good. No engine runs."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import hashlib
import json
import os
import queue
import resource
import shutil
import socket
import subprocess
import sys
import threading
import time
import warnings
from asyncio.sslproto import SSLProtocol
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import grpc
import h2.errors
import h2.events
import h2.exceptions
import numpy as np
import pytest
import tritonclient.grpc as grpc_client
from grpclib.health.v1.health_pb2 import HealthCheckRequest, HealthCheckResponse
from hyperframe.frame import PingFrame
from icportrait_client import (
    InvalidRequest,
    NotAllowed,
    Portrait,
    PortraitClient,
    ServerOverloaded,
    ServerUnavailable,
    Tls,
)
from icportrait_client.cli import main
from tritonclient.grpc import service_pb2, service_pb2_grpc
from tritonclient.utils import InferenceServerException

from icportrait.errors import Unavailable
from icportrait.gateway.access import Access, new_key
from icportrait.gateway.api import OWN_DESCRIPTORS, ServerLimits
from icportrait.gateway.grpc_connections import (
    EVERY_STREAM,
    OWN_FRAMES_AT_ONCE,
    READ_BYTES,
    STREAMS_OF_CONNECTION,
    Connection,
)
from icportrait.gateway.wire import MAX_HEAD_BYTES
from tests.conftest import EXAMPLES, ROOT
from tests.e2e.caller import StreamCall, infer, tensors
from tests.e2e.gateway_door import BUG, HELD, IMPATIENT, PICTURES, BareCaller, DoorSettings, Running, message, open_door

JPEGS = {name: b"\xff\xd8\xff" + data for name, data in PICTURES.items()}
"""Bytes that the client takes for pictures."""
TRACE = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
UNLIMITED = [("grpc.max_send_message_length", -1), ("grpc.max_receive_message_length", -1)]
CODES = [("INVALID_ARGUMENT", "one"), ("UNAVAILABLE", "UNAVAILABLE: two")]
CODES += [("CANCELLED", "CANCELLED: three"), ("INTERNAL", "INTERNAL: four")]


@pytest.fixture
def running() -> Iterator[Running]:
    with open_door() as door:
        yield door


@contextlib.contextmanager
def limited(**limits: Any) -> Iterator[Running]:
    with open_door(settings=DoorSettings(limits=ServerLimits(**limits))) as door:
        yield door


@contextlib.contextmanager
def raw_stub(running: Running, **options: Any) -> Iterator[Any]:
    with grpc.insecure_channel(running.url, options=[*UNLIMITED, *options.items()]) as channel:
        yield service_pb2_grpc.GRPCInferenceServiceStub(channel)


def request(model: str = "ic_portrait", key: str = "7", **values: Any) -> Any:
    made = service_pb2.ModelInferRequest(model_name=model, id=key)
    for tensor in tensors({**PICTURES, **values}):
        made.inputs.append(tensor._get_tensor())
        made.raw_input_contents.append(tensor._get_content())
    return made


def connected(running: Running) -> socket.socket:
    return socket.create_connection(("127.0.0.1", running.door.port), timeout=30)


def until_closed(connection: socket.socket) -> None:
    with contextlib.suppress(ConnectionResetError):
        while connection.recv(1000):
            pass


def until(running: Running, holds: Any) -> None:
    end_s = time.monotonic() + 30
    while not running.call(holds):
        assert time.monotonic() < end_s
        time.sleep(0.01)


def refused(call: Any, *args: Any, **options: Any) -> tuple[str, str]:
    """Return the code and the text that a call of grpcio ends with."""
    with pytest.raises(grpc.RpcError) as refusal:
        list(answer) if hasattr(answer := call(*args, **options), "__next__") else answer
    return refusal.value.code().name, refusal.value.details()


def answers(running: Running, *requests: Any, **options: Any) -> list[Any]:
    with raw_stub(running) as stub:
        return list(stub.ModelStreamInfer(iter(requests), timeout=60, **options))


class TestInference:
    def test_tritonclient_gets_the_portraits_and_the_metadata(self, running: Running) -> None:
        images, metadata = infer(running.url, seed=5, num_portraits=2, **PICTURES)
        assert [len(image) for image in images] == [100, 100]
        assert metadata["seed"] == 5
        inputs, caller = running.service.seen[0]
        assert {name: array.tolist() for name, array in inputs.items() if name != "seed"} == {
            "profile": [b"a profile"],
            "reference": [b"a reference"],
            "num_portraits": [2],
        }
        assert caller.name == ""
        assert caller.deadline_ms is not None
        assert 0 < caller.deadline_ms <= 120_000

    def test_an_answer_has_the_id_the_version_and_the_outputs_asked_for(self, running: Running) -> None:
        asked = request(key="some id")
        asked.outputs.add(name="metadata")
        with raw_stub(running) as stub:
            answer = stub.ModelInfer(asked)
        assert (answer.model_name, answer.model_version, answer.id) == ("ic_portrait", "1", "some id")
        assert [(output.name, output.datatype, list(output.shape)) for output in answer.outputs] == [
            ("metadata", "BYTES", [1])
        ]

    def test_the_door_keeps_no_pictures_while_the_service_works(self, running: Running) -> None:
        running.service.keeps_inputs = False
        with raw_stub(running) as stub:
            unary = stub.ModelInfer.future(request(seed=HELD))
            stream = stub.ModelStreamInfer(iter([request("ic_portrait_stream", seed=HELD)]))
            running.service.until(begun=2)
            until(running, lambda: [profile() for profile in running.service.profiles] == [None, None])
            running.call(running.service.release)
            assert unary.result(30).id == list(stream)[-1].infer_response.id == "7"

    def test_typed_contents_are_read_like_raw_ones(self, running: Running) -> None:
        asked = service_pb2.ModelInferRequest(model_name="ic_portrait")
        picture = bytes(range(256)) * 100
        for name, datatype, contents in (
            ("profile", "BYTES", {"bytes_contents": [picture]}),
            ("reference", "BYTES", {"bytes_contents": [b"small"]}),
            ("seed", "INT64", {"int64_contents": [4]}),
            ("num_portraits", "INT32", {"int_contents": [2]}),
            ("profile_box", "FP32", {"fp32_contents": [0.0, 0.0, 1.0, 0.5]}),
        ):
            shape = [len(next(iter(contents.values())))]
            asked.inputs.add(name=name, datatype=datatype, shape=shape, contents=contents)
        with raw_stub(running) as stub:
            stub.ModelInfer(asked)
        inputs, _ = running.service.seen[0]
        read = {name: array.tolist() for name, array in inputs.items()}
        assert read == {
            "profile": [picture],
            "reference": [b"small"],
            "seed": [4],
            "num_portraits": [2],
            "profile_box": [0.0, 0.0, 1.0, 0.5],
        }

    def test_the_twenty_line_script_needs_no_proxy(self, running: Running, tmp_path: Path) -> None:
        script, environment = EXAMPLES / "minimal.py", {**os.environ, "http_proxy": "http://127.0.0.1:1"}
        paths = [EXAMPLES / "hopper.jpg", EXAMPLES / "astronaut.jpg", tmp_path / "out.png"]
        answer = subprocess.run(
            [sys.executable, script, running.url, *paths], env=environment, capture_output=True, text=True, timeout=60
        )
        assert answer.returncode == 0, answer.stderr
        assert (tmp_path / "out.png").stat().st_size == 100

    def test_traces_and_request_ids_come_back(self, running: Running) -> None:
        with raw_stub(running) as stub:
            _, call = stub.ModelInfer.with_call(
                request(), metadata=[("traceparent", TRACE), ("x-request-id", "abc"), ("x-other", "no")]
            )
            came = dict(call.initial_metadata())
            assert (came["traceparent"], came["x-request-id"]) == (TRACE, "abc")
            assert "x-other" not in came
            _, call = stub.ModelInfer.with_call(request(), metadata=[("traceparent", "made up")])
            assert "traceparent" not in dict(call.initial_metadata())

    @pytest.mark.parametrize("index", range(4))
    def test_codes_are_the_same_for_a_call_and_for_a_stream(self, running: Running, index: int) -> None:
        code, text = CODES[index]
        with raw_stub(running) as stub:
            assert refused(stub.ModelInfer, request(seed=1000 + index)) == (code, text)
            asked = [request("ic_portrait_stream", seed=1000 + index)]
            (answer,) = stub.ModelStreamInfer(iter(asked))
            assert answer.error_message == text
            assert answer.infer_response.id == "7"
            assert answer.infer_response.parameters["triton_final_response"].bool_param
            with_codes = [("triton_grpc_error", "true")]
            assert refused(stub.ModelStreamInfer, iter(asked), metadata=with_codes) == (code, text)

    def test_a_bug_is_the_servers_fault_and_its_text_stays_here(
        self, running: Running, caplog: pytest.LogCaptureFixture
    ) -> None:
        with raw_stub(running) as stub:
            code, text = refused(stub.ModelInfer, request(seed=BUG))
            (answer,) = stub.ModelStreamInfer(iter([request("ic_portrait_stream", seed=BUG)]))
        assert code == "INTERNAL"
        assert "unforeseen" not in text + answer.error_message
        assert answer.error_message.startswith("INTERNAL: ")
        assert caplog.text.count("RuntimeError: unforeseen") == 2

    def test_a_wrong_request_is_the_callers_fault_and_named(self, running: Running) -> None:
        cases: list[tuple[Any, str, str]] = []
        for change, code, text in (
            ({"seed": -1}, "INVALID_ARGUMENT", "seed: -1, expected 0..9223372036854775807"),
            ({"colour": 1}, "INVALID_ARGUMENT", "colour: no such input, expected some of profile"),
            ({"model": "nobody"}, "NOT_FOUND", "NOT_FOUND: Request for unknown model: 'nobody' is not found"),
            ({"model": "ic_portrait_stream"}, "UNIMPLEMENTED", "UNIMPLEMENTED: ModelInfer RPC doesn't support"),
        ):
            cases.append((request(**change), code, text))
        twice = request()
        twice.inputs.append(twice.inputs[0])
        twice.raw_input_contents.append(twice.raw_input_contents[0])
        cases.append((twice, "INVALID_ARGUMENT", "profile: there twice"))
        lacking = request()
        del lacking.raw_input_contents[1]
        cases.append((lacking, "INVALID_ARGUMENT", "raw_input_contents: 1 entries, expected one for each of 2"))
        both = request()
        both.inputs[0].contents.bytes_contents.append(b"again")
        cases.append((both, "INVALID_ARGUMENT", "profile: contents beside raw_input_contents"))
        old = request()
        old.model_version = "3"
        cases.append((old, "NOT_FOUND", "NOT_FOUND: Request for unknown model: 'ic_portrait' version 3"))
        with raw_stub(running) as stub:
            for asked, code, text in cases:
                assert (found := refused(stub.ModelInfer, asked))[0] == code, found
                assert found[1].startswith(text)
        assert running.service.begun == 0

    def test_unknown_parameters_are_ignored_and_extensions_refused_by_name(self, running: Running) -> None:
        asked = request()
        asked.parameters["anything"].string_param = "x"
        asked.inputs[0].parameters["something"].int64_param = 1
        asked.outputs.add(name="image").parameters["binary_data"].bool_param = True
        with raw_stub(running) as stub:
            stub.ModelInfer(asked)
            for name, parameter, text in (
                ("outputs", "classification", "classification is not offered"),
                ("outputs", "shared_memory_region", "shared memory is not offered"),
                ("inputs", "shared_memory_region", "shared memory is not offered"),
            ):
                asked = request()
                asked.outputs.add(name="image")
                getattr(asked, name)[0].parameters[parameter].int64_param = 1
                code, details = refused(stub.ModelInfer, asked)
                assert (code, text in details) == ("INVALID_ARGUMENT", True)

    def test_a_deadline_of_the_call_ends_the_request(self, running: Running) -> None:
        with raw_stub(running) as stub:
            assert refused(stub.ModelInfer, request(seed=HELD), timeout=0.3)[0] == "DEADLINE_EXCEEDED"
            running.service.until(begun=1, cancelled=1)
        with BareCaller(running.url) as caller:
            stream = caller.begin("ModelInfer", ("grpc-timeout", "1n"))
            assert caller.status(stream) == (4, "Deadline Exceeded")

    def test_a_caller_who_leaves_ends_the_request(self, running: Running) -> None:
        with raw_stub(running) as stub:
            call = stub.ModelInfer.future(request(seed=HELD))
            running.service.until(begun=1)
            call.cancel()
            running.service.until(cancelled=1)
            stream = stub.ModelStreamInfer(iter([request("ic_portrait_stream", seed=HELD)] * 3))
            running.service.until(begun=4)
            stream.cancel()
            running.service.until(cancelled=4)
        with BareCaller(running.url) as caller:
            stream = caller.begin("ModelInfer")
            caller.send(stream, message(request(seed=HELD).SerializeToString()), end=True)
            running.service.until(begun=5)
        running.service.until(cancelled=5)

    def test_compressed_messages_are_read(self, running: Running) -> None:
        with raw_stub(running) as stub:
            for compression in (grpc.Compression.Gzip, grpc.Compression.Deflate):
                stub.ModelInfer(request(profile=bytes(300_000)), compression=compression)
        assert [len(inputs["profile"][0]) for inputs, _ in running.service.seen] == [300_000, 300_000]


class TestStreams:
    def test_steps_and_previews_come_before_the_portraits(self, running: Running) -> None:
        with StreamCall(running.url, num_inference_steps=4, preview_every=2, **PICTURES) as call:
            *progress, last = call
        assert [(int(each["step"][0]), "image" in each) for each in progress] == [(1, False), (2, True), (3, False)]
        assert set(last) == {"image", "metadata", "step", "total_steps"}

    def test_the_last_answer_says_so(self, running: Running) -> None:
        came = answers(running, request("ic_portrait_stream"), request("ic_portrait", "8"))
        finals = {"7": [], "8": []}
        for answer in came:
            response = answer.infer_response
            finals[response.id].append(response.parameters["triton_final_response"].bool_param)
        assert finals == {"7": [False, False, True], "8": [True]}

    def test_an_empty_last_answer_comes_where_it_is_asked_for(self, running: Running) -> None:
        asked = request("ic_portrait_stream")
        asked.parameters["triton_enable_empty_final_response"].bool_param = True
        *_, portraits, last = answers(running, asked)
        assert len(portraits.infer_response.outputs) == 4
        assert not portraits.infer_response.parameters["triton_final_response"].bool_param
        assert len(last.infer_response.outputs) == 0
        assert last.infer_response.parameters["triton_final_response"].bool_param

    def test_requests_of_one_stream_run_at_once_and_an_error_ends_its_own_alone(self, running: Running) -> None:
        asked: queue.SimpleQueue[Any] = queue.SimpleQueue()
        with raw_stub(running) as stub:
            stream = stub.ModelStreamInfer(iter(asked.get, None))
            asked.put(request("ic_portrait_stream", "held", seed=HELD, num_inference_steps=1))
            running.service.until(begun=1)
            asked.put(request("ic_portrait_stream", "wrong", seed=-1))
            asked.put(request("ic_portrait_stream", "quick", seed=1, num_inference_steps=1))
            assert [next(stream).infer_response.id for _ in range(2)] == ["wrong", "quick"]
            running.call(running.service.release)
            assert next(stream).infer_response.id == "held"
            asked.put(None)
            assert list(stream) == []

    def test_a_request_that_ends_within_an_answer_leaves_the_others_whole(self, running: Running) -> None:
        """Let a deadline pass while its request's preview isn't read."""
        running.service.image_bytes = 50_000
        with BareCaller(running.url, window_bytes=20_000) as caller:
            stream = caller.begin("ModelStreamInfer")
            asked = request("ic_portrait_stream", "late", seed=IMPATIENT, preview_every=1)
            caller.send(stream, message(asked.SerializeToString()), end=True)
            running.service.until(impatient=1)
            received = b""
            while not any(isinstance(event, h2.events.StreamEnded) for event in caller.events):
                for event in caller.receive():
                    if isinstance(event, h2.events.DataReceived):
                        received += event.data
                        caller.h2.acknowledge_received_data(event.flow_controlled_length, stream)
                caller.flush()
        came = []
        while received:
            size = int.from_bytes(received[1:5], "big")
            came.append(service_pb2.ModelStreamInferResponse.FromString(received[5 : 5 + size]))
            received = received[5 + size :]
        preview, error = came
        assert len(preview.infer_response.raw_output_contents[0]) == 50_004
        assert error.error_message == "UNAVAILABLE: too late"

    def test_tritonclients_stream_goes_on_after_an_error(self, running: Running) -> None:
        came: queue.SimpleQueue[Any] = queue.SimpleQueue()
        with grpc_client.InferenceServerClient(running.url) as client:
            client.start_stream(lambda result, error: came.put((result, error)))
            client.async_stream_infer("ic_portrait_stream", tensors({**PICTURES, "num_portraits": 0}))
            result, error = came.get(timeout=30)
            assert result is None
            assert "num_portraits: 0, expected 1..8" in str(error)
            client.async_stream_infer("ic_portrait_stream", tensors({**PICTURES, "num_inference_steps": 1}))
            result, error = came.get(timeout=30)
            assert error is None
            assert result.as_numpy("step").tolist() == [1]
            client.stop_stream()


class TestOtherCalls:
    def test_a_server_says_what_it_is(self, running: Running) -> None:
        with grpc_client.InferenceServerClient(running.url) as client:
            assert client.is_server_live()
            assert client.is_server_ready()
            assert client.get_server_metadata().name == "icportrait"
            for model in ("ic_portrait", "ic_portrait_stream"):
                assert client.is_model_ready(model)
                assert client.is_model_ready(model, "1")
                assert client.get_model_metadata(model).versions == ["1"]
                config = client.get_model_config(model).config
                assert config.model_transaction_policy.decoupled == (model == "ic_portrait_stream")
            assert not client.is_model_ready("denoise")
            infer(running.url, **PICTURES)
            (model,) = client.get_inference_statistics("ic_portrait").model_stats
            assert (model.inference_count, model.inference_stats.success.count) == (1, 1)
            with pytest.raises(InferenceServerException, match="unknown model"):
                client.get_model_metadata("denoise")
            running.service.is_ready = False
            assert client.is_server_live()
            assert not client.is_server_ready()
            assert not client.is_model_ready("ic_portrait")

    def test_what_could_change_the_server_is_not_there(self, running: Running) -> None:
        pb = service_pb2
        with raw_stub(running) as stub:
            for method, asked in (
                ("RepositoryIndex", pb.RepositoryIndexRequest()),
                ("RepositoryModelUnload", pb.RepositoryModelUnloadRequest(model_name="denoise")),
                ("SystemSharedMemoryRegister", pb.SystemSharedMemoryRegisterRequest(name="a", key="/b", byte_size=8)),
                ("SystemSharedMemoryStatus", pb.SystemSharedMemoryStatusRequest()),
                ("CudaSharedMemoryStatus", pb.CudaSharedMemoryStatusRequest()),
                ("TraceSetting", pb.TraceSettingRequest()),
                ("LogSettings", pb.LogSettingsRequest()),
            ):
                assert refused(getattr(stub, method), asked)[0] == "UNIMPLEMENTED"

    def test_health_is_told_and_watched(self, running: Running) -> None:
        with grpc.insecure_channel(running.url) as channel:
            serialize, parse = HealthCheckRequest.SerializeToString, HealthCheckResponse.FromString
            check = channel.unary_unary("/grpc.health.v1.Health/Check", serialize, parse)
            watch = channel.unary_stream("/grpc.health.v1.Health/Watch", serialize, parse)
            names = HealthCheckResponse.ServingStatus.Name
            for service in ("", "inference.GRPCInferenceService", "ic_portrait"):
                assert names(check(HealthCheckRequest(service=service)).status) == "SERVING"
            assert refused(check, HealthCheckRequest(service="nobody"))[0] == "NOT_FOUND"
            watching = watch(HealthCheckRequest())
            unknown = watch(HealthCheckRequest(service="nobody"))
            assert names(next(watching).status) == "SERVING"
            assert names(next(unknown).status) == "SERVICE_UNKNOWN"
            running.service.is_ready = False
            assert names(next(watching).status) == "NOT_SERVING"
            assert names(check(HealthCheckRequest()).status) == "NOT_SERVING"
            running.service.is_ready = True
            assert names(next(watching).status) == "SERVING"
            watching.cancel()
            unknown.cancel()

    def test_pytritons_clients_are_served(self, running: Running) -> None:
        client = pytest.importorskip("pytriton.client", exc_type=ImportError)
        arrays: dict[str, Any] = {name: np.array([data]) for name, data in PICTURES.items()}
        steps = np.array([3], np.int32)
        with warnings.catch_warnings():
            # It says at every start which of its time limits gRPC hasn't.
            warnings.simplefilter("ignore")
            with client.ModelClient(f"grpc://{running.url}", "ic_portrait") as unary:
                answer = unary.infer_sample(**arrays, num_inference_steps=steps)
            assert json.loads(answer["metadata"][0])["steps"] == 3
            with client.DecoupledModelClient(f"grpc://{running.url}", "ic_portrait_stream") as stream:
                *progress, last = stream.infer_sample(**arrays, num_inference_steps=steps)
        assert [each["step"].tolist() for each in progress] == [[1], [2]]
        assert len(last["image"][0]) == 100

    def test_perf_analyzer_measures(self, running: Running, tmp_path: Path) -> None:
        from benchmarks.perf_analyzer_program import PerfAnalyzerError, find_program

        try:
            find_program(tmp_path)
        except PerfAnalyzerError as error:
            pytest.skip(str(error))
        pictures = f"--profile {EXAMPLES / 'hopper.jpg'} --reference {EXAMPLES / 'astronaut.jpg'}"
        options = f"--url {running.url} --concurrency 1:8:7 --steps 2 --window 0.5 --stability 1000 {pictures} --json"
        command = [sys.executable, "-m", "benchmarks", "perf-analyzer", *options.split()]
        answer = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
        assert answer.returncode == 0, answer.stderr
        assert [level["concurrency"] for level in json.loads(answer.stdout)["levels"]] == [1, 8]


class TestAccess:
    @pytest.fixture
    def guarded(self, tmp_path: Path) -> Iterator[Running]:
        digest = hashlib.sha256(b"sesame").hexdigest()
        limits = "priorities = [1]\nrequests_per_s = 0.001\nburst = 2\n"
        (tmp_path / "keys.toml").write_text(f'[keys.studio]\nsha256 = "{digest}"\n{limits}')
        with open_door(Access(tmp_path / "keys.toml")) as door:
            yield door

    def test_health_needs_no_key_and_everything_else_does(self, guarded: Running) -> None:
        with raw_stub(guarded) as stub:
            pb = service_pb2
            assert stub.ServerReady(pb.ServerReadyRequest()).ready
            for call, asked in (
                (stub.ModelInfer, request()),
                (stub.ModelStreamInfer, iter([request()])),
                (stub.ServerMetadata, pb.ServerMetadataRequest()),
                (stub.ModelConfig, pb.ModelConfigRequest(name="ic_portrait")),
                (stub.ModelStatistics, pb.ModelStatisticsRequest()),
            ):
                assert refused(call, asked)[0] == "UNAUTHENTICATED"
                assert refused(call, asked, metadata=[("authorization", "Bearer no")])[0] == "UNAUTHENTICATED"
        assert guarded.service.begun == 0

    def test_a_key_names_the_caller_and_limits_how_often_it_asks(self, guarded: Running) -> None:
        key = [("authorization", "Bearer sesame")]
        with raw_stub(guarded) as stub:
            stub.ModelInfer(request(), metadata=key)
            _, caller = guarded.service.seen[0]
            assert (caller.name, caller.priorities) == ("studio", {1})
            *_, last, late = stub.ModelStreamInfer(iter([request(), request(key="8")]), metadata=key)
            assert {bool(last.error_message), bool(late.error_message)} == {True, False}
            code, text = refused(stub.ModelInfer, request(), metadata=key)
            assert code == "RESOURCE_EXHAUSTED"
            assert "key 'studio' allows 0.001 requests a second; retry_after_ms: " in text

    def test_the_client_sends_its_key_and_says_what_is_refused(
        self, guarded: Running, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        with PortraitClient(guarded.url, api_key="wrong") as client:
            with pytest.raises(NotAllowed, match="no valid API key"):
                client.generate(**JPEGS)
            with pytest.raises(NotAllowed, match="no valid API key"):
                list(client.stream(**JPEGS))
        with pytest.raises(InvalidRequest, match="api_key"):
            PortraitClient(guarded.url, api_key="open sesame")
        with PortraitClient(guarded.url, api_key="sesame") as client:
            assert client.generate(**JPEGS).metadata.steps == 3
            with closing(client.stream(**JPEGS)) as events:
                *_, last = events
            assert isinstance(last, Portrait)
            for ask in (client.generate, lambda **pictures: list(client.stream(**pictures))):
                with pytest.raises(ServerOverloaded, match=r"allows 0\.001 requests a second") as refusal:
                    ask(**JPEGS)
                assert refusal.value.retry_after_ms > 900_000
        monkeypatch.setenv("ICPORTRAIT_API_KEY", "wrong")
        for name, data in JPEGS.items():
            (tmp_path / name).write_bytes(data)
        pictures = [f"--{name}={tmp_path / name}" for name in PICTURES]
        assert main(["generate", f"--url={guarded.url}", *pictures, f"--out={tmp_path / 'out.png'}"]) == 1
        assert "no valid API key" in capsys.readouterr().err

    def test_a_refusal_comes_before_the_body_is_read(self, guarded: Running) -> None:
        with BareCaller(guarded.url) as caller:
            assert caller.status(caller.begin("ModelInfer"))[0] == grpc.StatusCode.UNAUTHENTICATED.value[0]
            guarded.service.refuses = Unavailable("the queue is full; retry_after_ms: 70")
            stream = caller.begin("ModelInfer", ("authorization", "Bearer sesame"))
            assert caller.status(stream) == (14, "UNAVAILABLE: the queue is full; retry_after_ms: 70")

    def test_what_is_refused_whoever_asks_is_not_counted_against_a_key(self, guarded: Running) -> None:
        key = [("authorization", "Bearer sesame")]
        guarded.service.refuses = Unavailable("the queue is full; retry_after_ms: 70")
        with raw_stub(guarded) as stub:
            for _ in range(3):
                assert refused(stub.ModelInfer, request(), metadata=key)[0] == "UNAVAILABLE"
                (answer,) = stub.ModelStreamInfer(iter([request()]), metadata=key)
                assert answer.error_message.startswith("UNAVAILABLE: the queue is full")
            guarded.service.refuses = None
            stub.ModelInfer(request(), metadata=key)
            (answer,) = stub.ModelStreamInfer(iter([request()]), metadata=key)
            assert not answer.error_message


class TestRecords:
    """Each answer is counted once, under its code, early refusals too."""

    def until_counted(self, running: Running, **expected: int) -> None:
        """Wait for so many answers of ``kind__code``, and see no others."""
        wanted = {("grpc", *name.split("__")): count for name, count in expected.items()}
        until(running, lambda: dict(running.records.counts) == wanted)

    def test_answers_and_refusals_of_calls(self, tmp_path: Path) -> None:
        key, section = new_key("studio")
        (tmp_path / "keys.toml").write_text(section + "requests_per_day = 3\n")
        settings = DoorSettings(limits=ServerLimits(message_bytes=1000))
        headers = [("authorization", f"Bearer {key}")]
        with open_door(Access(tmp_path / "keys.toml"), settings) as running, raw_stub(running) as stub:
            stub.ModelInfer(request(), metadata=headers)
            codes = [refused(stub.ModelInfer, request())[0]]
            codes += [refused(stub.ModelInfer, request(seed=1000), metadata=headers)[0]]
            codes += [refused(stub.ModelInfer, request(profile=b"x" * 2000), metadata=headers)[0]]
            codes += [refused(stub.ModelInfer, request(), metadata=headers)[0]]
            stub.ServerLive(service_pb2.ServerLiveRequest())
            assert codes == ["UNAUTHENTICATED", "INVALID_ARGUMENT", "RESOURCE_EXHAUSTED", "RESOURCE_EXHAUSTED"]
            self.until_counted(
                running,
                portraits__OK=1,
                portraits__UNAUTHENTICATED=1,
                portraits__INVALID_ARGUMENT=1,
                portraits__RESOURCE_EXHAUSTED=2,
                other__OK=1,
            )
            usage = running.records.usage["studio"]
            assert usage.answers == {"OK": 1, "INVALID_ARGUMENT": 1, "RESOURCE_EXHAUSTED": 2}
            assert usage.portraits == 1 and usage.received_bytes > 0 and usage.sent_bytes > 100

    def test_each_request_of_a_stream_is_counted_and_the_stream_is_not(self, running: Running) -> None:
        with raw_stub(running) as stub:
            sent = [request("ic_portrait_stream"), request("ic_portrait_stream", seed=1001), request("none")]
            assert len(list(stub.ModelStreamInfer(iter(sent)))) >= 3
            self.until_counted(running, portraits__OK=1, portraits__UNAVAILABLE=1, portraits__NOT_FOUND=1)

    def test_a_request_that_ends_its_stream_is_counted_once(self, running: Running) -> None:
        with raw_stub(running) as stub:
            call = stub.ModelStreamInfer(
                iter([request("ic_portrait_stream", seed=1001)]), metadata=[("triton_grpc_error", "true")]
            )
            assert refused(list, call)[0] == "UNAVAILABLE"
            self.until_counted(running, portraits__UNAVAILABLE=1)
            assert running.records.usage[""].received_bytes > 0, "the request's record, not the stream's"

    def test_a_call_whose_caller_leaves_is_counted_as_cancelled(self, running: Running) -> None:
        with raw_stub(running) as stub:
            call = stub.ModelInfer.future(request(seed=HELD))
            running.service.until(begun=1)
            call.cancel()
            self.until_counted(running, portraits__CANCELLED=1)


class TestTls:
    @pytest.fixture
    def certificates(self, tmp_path: Path) -> Path:
        if shutil.which("openssl") is None:
            pytest.skip("openssl, which makes certificates, isn't installed")

        def openssl(*arguments: str) -> None:
            subprocess.run(["openssl", *arguments], cwd=tmp_path, check=True, capture_output=True)

        new = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2"]
        for name in ("server", "client"):
            names = ["-subj", f"/CN={name}", "-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1"]
            openssl("req", "-x509", *new, *names, "-keyout", f"{name}.key", "-out", f"{name}.pem")
        return tmp_path

    def settings(self, certificates: Path, **others: Any) -> DoorSettings:
        files = {"tls_certificate": certificates / "server.pem", "tls_key": certificates / "server.key"}
        return DoorSettings(**files, **others)

    def ready(self, running: Running, root: Path, key: bytes | None = None, chain: bytes | None = None) -> bool:
        credentials = grpc.ssl_channel_credentials(root.read_bytes(), key, chain)
        with grpc.secure_channel(f"localhost:{running.door.port}", credentials) as channel:
            stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
            return bool(stub.ServerReady(service_pb2.ServerReadyRequest(), timeout=30).ready)

    def test_the_client_reaches_a_door_with_certificates_of_both_sides(self, certificates: Path) -> None:
        settings = self.settings(certificates, tls_client_ca=certificates / "client.pem")
        files = [certificates / name for name in ("server.pem", "client.pem", "client.key")]
        with open_door(settings=settings) as running:
            with PortraitClient(f"https://localhost:{running.door.port}", tls=Tls(*files)) as client:
                assert client.generate(**JPEGS).metadata.steps == 3
            options: Any = {"tls": Tls(files[0]), "attempts": 1, "timeout_s": 10}
            with (
                PortraitClient(f"localhost:{running.door.port}", **options) as client,
                pytest.raises(ServerUnavailable),
            ):
                client.generate(**JPEGS)

    def test_with_a_certificate_the_door_speaks_tls_alone(self, certificates: Path) -> None:
        settings = self.settings(certificates)
        with open_door(settings=settings) as running:
            assert self.ready(running, certificates / "server.pem")
            with PortraitClient(f"localhost:{running.door.port}", tls=certificates / "server.pem") as client:
                assert client.generate(**JPEGS).metadata.steps == 3
            with connected(running) as bare:
                bare.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n")
                until_closed(bare)

    def test_callers_must_show_a_certificate_where_that_is_set(self, certificates: Path) -> None:
        settings = self.settings(certificates, tls_client_ca=certificates / "client.pem")
        own = [(certificates / f"client.{end}").read_bytes() for end in ("key", "pem")]
        with open_door(settings=settings) as running:
            assert self.ready(running, certificates / "server.pem", *own)
            with pytest.raises(grpc.RpcError):
                self.ready(running, certificates / "server.pem")

    def test_connections_that_begin_no_handshake_make_room(self, certificates: Path) -> None:
        settings = self.settings(certificates, limits=ServerLimits(header_timeout_s=1000, connections=2))
        with open_door(settings=settings) as running, contextlib.ExitStack() as stack:
            first, *_ = [stack.enter_context(connected(running)) for _ in range(3)]
            until_closed(first)
            assert self.ready(running, certificates / "server.pem")

    def test_very_many_at_once_leave_nothing_behind(self, certificates: Path) -> None:
        settings = self.settings(certificates, limits=ServerLimits(header_timeout_s=1000, connections=3))
        with open_door(settings=settings) as running, contextlib.ExitStack() as stack:
            busy = threading.Event()
            threading.Thread(target=running.call, args=(lambda: busy.wait(30),)).start()
            connections = [stack.enter_context(connected(running)) for _ in range(50)]
            busy.set()  # they are all taken in one turn of the loop
            for connection in connections[:-3]:
                until_closed(connection)

            def handshakes() -> int:
                gc.collect()
                return sum(type(each) is SSLProtocol for each in gc.get_objects())

            until(running, lambda: handshakes() <= 3)


class TestLimits:
    def test_the_clients_pings_are_never_too_many(self, running: Running) -> None:
        """Send four pings on a connection that carries nothing else. gRPC's own servers end it at the third."""
        with PortraitClient(running.url, keepalive_s=1.0, attempts=1, timeout_s=30) as client:
            handle = client.submit(**JPEGS, seed=HELD)
            running.service.until(begun=1)
            (connection,) = running.door.calls.connections
            pings = 0
            take = connection._take_frame

            def counted(frame: Any) -> Any:
                nonlocal pings
                pings += isinstance(frame, PingFrame)
                return take(frame)

            connection._take_frame = counted
            until(running, lambda: pings >= 4)
            running.call(running.service.release)
            assert handle.result().metadata.seed == HELD

    def test_a_message_that_is_too_long_is_refused_before_it_is_sent(self, running: Running) -> None:
        with BareCaller(running.url) as caller:
            for method in ("ModelInfer", "ModelStreamInfer"):
                stream = caller.begin(method)
                caller.send(stream, b"\0" + (400 * 2**20).to_bytes(4, "big"))
                code, text = caller.status(stream)
                assert (code, text) == (
                    grpc.StatusCode.RESOURCE_EXHAUSTED.value[0],
                    "RESOURCE_EXHAUSTED: a message of 419430400 bytes; this server takes 50331648",
                )

    def test_a_message_that_grows_too_long_is_not_inflated_further(self) -> None:
        with limited(message_bytes=2**20) as running, raw_stub(running) as stub:
            asked = request(profile=bytes(2**20))
            code, text = refused(stub.ModelInfer, asked, compression=grpc.Compression.Gzip)
            assert code == "RESOURCE_EXHAUSTED"
            assert "once it is inflated" in text

    def test_48_mb_pass(self, running: Running) -> None:
        size = 48 * 2**20 - 2000
        with raw_stub(running) as stub:
            stub.ModelInfer(request(profile=bytes(size)))
        inputs, _ = running.service.seen[0]
        assert len(inputs["profile"][0]) == size

    def test_what_is_being_sent_of_all_calls_is_limited_and_the_slowest_goes(self) -> None:
        with limited(incoming_bytes=100_000, message_bytes=90_000) as running, contextlib.ExitStack() as stack:
            first, second = (stack.enter_context(BareCaller(running.url)) for _ in range(2))
            streams = [caller.begin("ModelInfer") for caller in (first, second)]
            first.send(streams[0], b"\0" + (80_000).to_bytes(4, "big") + bytes(60_000))
            until(running, lambda: running.door.calls.incoming_bytes == 60_005)
            second.send(streams[1], b"\0" + (80_000).to_bytes(4, "big") + bytes(60_000))
            text = "UNAVAILABLE: too much is being sent to this server at once; retry_after_ms: 1000"
            assert first.status(streams[0]) == (14, text)
            second.send(streams[1], bytes(20_000), end=True)
            assert second.status(streams[1])[0] == grpc.StatusCode.INVALID_ARGUMENT.value[0], "it was read to its end"

    @pytest.mark.parametrize(
        "data",
        [
            b"\x2a\x00" * 10_000_000,  # empty inputs
            b"\x3a\x00" * 10_000_000,  # empty raw contents
            b"\x22\x00" * 10_000_000,  # empty parameters
            b"\x2a\x85\xad\xe2\x04\x2a\x80\xad\xe2\x04" + b"\x42\x00" * 5_000_000,  # a tensor's empty elements
        ],
        ids=["inputs", "raw", "parameters", "elements"],
    )
    def test_millions_of_empty_fields_are_refused_unparsed(self, running: Running, data: bytes) -> None:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        with grpc.insecure_channel(running.url, options=UNLIMITED) as channel:
            # Without a serializer bytes are sent as they are.
            code, text = refused(channel.unary_unary("/inference.GRPCInferenceService/ModelInfer"), data)
        assert code == "INVALID_ARGUMENT"
        assert f"more than {MAX_HEAD_BYTES} bytes" in text or "more than 64 entries" in text
        grown_mb = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
        assert grown_mb < 200

    def test_a_body_that_does_not_come_is_waited_for_no_longer_than_is_set(self) -> None:
        with limited(body_timeout_s=0.2) as running, BareCaller(running.url) as caller:
            unary, stream, begun = (caller.begin(name) for name in ("ModelInfer", "ModelStreamInfer", "ModelInfer"))
            caller.send(begun, b"\0\0\0\1\0" + bytes(100))
            late = (grpc.StatusCode.DEADLINE_EXCEEDED.value[0], "the message wasn't sent within 0.2 s")
            assert caller.status(unary) == late
            assert caller.status(begun) == late
            # A stream may be silent between two messages, for as long as it likes.
            caller.send(stream, message(request("ic_portrait", seed=-1).SerializeToString()), end=True)
            assert caller.status(stream) == (0, "")

    @pytest.mark.parametrize("sent", [b"", b"PRI * HTTP/2.0\r\n", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\6\4"])
    def test_a_connection_that_does_not_begin_is_closed(self, sent: bytes) -> None:
        with limited(header_timeout_s=0.2) as running, connected(running) as connection:
            connection.sendall(sent)
            until_closed(connection)

    @pytest.mark.parametrize(
        "sent",
        [
            b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
            b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\xff" * 100,
            b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\xff\xff\xff\0\0\0\0\0\1" + bytes(100_000),  # one frame of 16 MB
            b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\4\1\4\0\0\0\1\xff\xff\xff\xff",  # headers that aren't HPACK
        ],
    )
    def test_what_is_not_http2_ends_its_connection_alone(self, sent: bytes) -> None:
        with limited(header_timeout_s=0.5) as running:
            with connected(running) as connection, contextlib.suppress(ConnectionResetError, BrokenPipeError):
                connection.sendall(sent)
                until_closed(connection)
            infer(running.url, **PICTURES)

    def test_idle_connections_make_room_for_callers(self) -> None:
        _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        with limited() as running, contextlib.ExitStack() as idle, BareCaller(running.url) as busy:
            stream = busy.begin("ModelInfer")
            busy.send(stream, message(request(seed=HELD).SerializeToString()), end=True)
            running.service.until(begun=1)
            for _ in range(1050):
                idle.enter_context(connected(running))
            infer(running.url, **PICTURES)
            assert running.call(lambda: len(running.door.calls.connections)) <= 1024
            running.call(running.service.release)
            assert busy.status(stream) == (0, "")

    def test_an_old_connection_answers_and_asks_for_another_one(self) -> None:
        with limited(connection_age_s=0.05) as running, BareCaller(running.url) as caller:
            while not any(isinstance(event, h2.events.ConnectionTerminated) for event in caller.events):
                caller.receive()
            (asked,) = [event for event in caller.events if isinstance(event, h2.events.ConnectionTerminated)]
            assert (asked.error_code, asked.last_stream_id) == (h2.errors.ErrorCodes.NO_ERROR, EVERY_STREAM)
            # A client of gRPC asks on a new connection, and the old one's call is answered.
            with raw_stub(running) as stub:
                held = stub.ModelInfer.future(request(seed=HELD))
                running.service.until(begun=1)
                connections = set[Connection]()
                while len(connections) < 4:
                    assert stub.ModelInfer(request()).outputs
                    connections |= running.call(lambda: set(running.door.calls.connections))
                running.call(running.service.release)
                assert held.result(30).outputs

    def test_where_descriptors_are_few_connections_are_fewer(self) -> None:
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (OWN_DESCRIPTORS + 100, hard))
        try:
            with limited() as running, contextlib.ExitStack() as idle:
                for _ in range(100):
                    idle.enter_context(connected(running))
                infer(running.url, **PICTURES)
                assert running.call(lambda: len(running.door.calls.connections)) <= 50
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))

    def test_many_calls_may_begin_before_the_settings_are_acknowledged(self, running: Running) -> None:
        with BareCaller(running.url) as caller:
            streams = [caller.begin("ServerLive") for _ in range(STREAMS_OF_CONNECTION)]
            for stream in streams:
                caller.send(stream, message(b""), end=True)
            assert {caller.status(stream) for stream in streams} == {(0, "")}

    def test_pings_are_never_too_many(self, running: Running) -> None:
        with BareCaller(running.url) as caller:
            stream = caller.begin("ModelInfer")
            caller.send(stream, message(request(seed=HELD).SerializeToString()), end=True)
            running.service.until(begun=1)
            for index in range(100):
                caller.h2.ping(index.to_bytes(8, "big"))
                caller.flush()
            while sum(isinstance(event, h2.events.PingAckReceived) for event in caller.events) < 100:
                caller.receive()
            running.call(running.service.release)
            assert caller.status(stream) == (0, "")

    def test_a_connection_remembers_few_of_its_calls_and_bears_late_frames_of_the_others(
        self, running: Running, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("icportrait.gateway.grpc_connections.ENDED_STREAMS", 3)

        def live() -> tuple[int, str]:
            stream = caller.begin("ServerLive")
            caller.send(stream, message(b""), end=True)
            return caller.status(stream)

        with BareCaller(running.url) as caller:
            assert [live() for _ in range(10)] == 10 * [(0, "")]
            (connection,) = running.door.calls.connections
            assert len(connection._h2._closed_streams) == 3
            for late in (
                b"\0\0\4\x08\0\0\0\0\1\0\0\0\1",  # a window's update
                b"\0\0\4\x03\0\0\0\0\1\0\0\0\x08",  # a reset
                b"\0\0\5\0\0\0\0\0\1" + message(b""),  # data
            ):
                caller.socket.sendall(late)
                assert live() == (0, "")

    @pytest.mark.parametrize(
        "frame",
        [
            b"\0\0\x08\x06\0\0\0\0\0" + bytes(8),  # a ping
            b"\0\0\0\x04\0\0\0\0\0",  # settings
            b"\0\0\5\x02\0\0\0\0\1\0\0\0\3\x10",  # a priority
            b"\0\0\4\x08\0\0\0\0\0\0\0\0\1",  # a window's update
            b"\0\0\0\x77\0\0\0\0\0",  # of no known type
        ],
        ids=["ping", "settings", "priority", "window", "unknown"],
    )
    def test_a_connection_that_sends_too_many_frames_of_http2_itself_is_closed(
        self, running: Running, monkeypatch: pytest.MonkeyPatch, frame: bytes
    ) -> None:
        monkeypatch.setattr("icportrait.gateway.grpc_connections.OWN_FRAMES_PER_S", 0)
        with BareCaller(running.url) as caller:
            caller.socket.sendall(frame * OWN_FRAMES_AT_ONCE)
            with pytest.raises(ConnectionError):
                while True:
                    caller.receive()
            last = caller.events[-1]
            assert isinstance(last, h2.events.ConnectionTerminated)
            assert last.error_code == h2.errors.ErrorCodes.ENHANCE_YOUR_CALM
        infer(running.url, **PICTURES)

    def test_a_call_of_many_small_frames_is_closed(self, running: Running, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("icportrait.gateway.grpc_connections.OWN_FRAMES_PER_S", 0)
        with BareCaller(running.url) as caller:
            stream = caller.begin("ModelInfer")
            with pytest.raises(ConnectionError):
                for _ in range(OWN_FRAMES_AT_ONCE):
                    caller.h2.send_data(stream, b"")
                caller.flush()
                while True:
                    caller.receive()

    def test_who_reads_much_may_say_so_often(self, running: Running, monkeypatch: pytest.MonkeyPatch) -> None:
        """Read a large answer, and acknowledge each kilobyte by itself."""
        monkeypatch.setattr("icportrait.gateway.grpc_connections.OWN_FRAMES_PER_S", 0)
        running.service.image_bytes = 4 * 2**20
        with BareCaller(running.url, window_bytes=1000) as caller:
            stream = caller.begin("ModelInfer")
            caller.send(stream, message(request().SerializeToString()), end=True)
            updates = 0
            while not any(isinstance(event, h2.events.StreamEnded) for event in caller.events):
                for event in caller.receive():
                    if isinstance(event, h2.events.DataReceived) and event.data:
                        caller.h2.increment_flow_control_window(len(event.data))
                        with contextlib.suppress(h2.exceptions.StreamClosedError):  # that was the last of it
                            caller.h2.increment_flow_control_window(len(event.data), stream)
                        updates += 2
                caller.flush()
            assert caller.status(stream) == (0, "")
            assert updates > 2 * OWN_FRAMES_AT_ONCE

    def test_no_more_is_taken_from_a_connection_at_once_than_is_set(
        self, running: Running, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        taken: list[int] = []
        take = Connection.data_received

        def data_received(connection: Connection, data: bytes) -> None:
            taken.append(len(data))
            take(connection, data)

        monkeypatch.setattr(Connection, "data_received", data_received)
        with raw_stub(running) as stub:
            stub.ModelInfer(request(profile=bytes(40 * 2**20)))
        assert sum(taken) > 40 * 2**20
        assert max(taken) <= READ_BYTES

    def test_connections_that_only_watch_make_room_for_callers(self) -> None:
        with limited(connections=4) as running, contextlib.ExitStack() as stack:
            busy = stack.enter_context(BareCaller(running.url))
            stream = busy.begin("ModelInfer")
            busy.send(stream, message(request(seed=HELD).SerializeToString()), end=True)
            running.service.until(begun=1)
            watches = []
            for _ in range(3):
                own = [("grpc.use_local_subchannel_pool", 1)]
                channel = stack.enter_context(grpc.insecure_channel(running.url, options=own))
                watches.append(channel.unary_stream("/grpc.health.v1.Health/Watch")(b""))
                next(watches[-1])
            infer(running.url, **PICTURES)
            assert refused(lambda: watches[0])[0] == "UNAVAILABLE", "the one that was idle for longest"
            running.call(running.service.release)
            assert busy.status(stream) == (0, "")

    def test_calls_that_only_watch_make_room_for_others(
        self, running: Running, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("icportrait.gateway.grpc_calls.MAX_CALLS", 2)
        with raw_stub(running) as stub, grpc.insecure_channel(running.url) as channel:
            held = stub.ModelInfer.future(request(seed=HELD))
            running.service.until(begun=1)
            watch = channel.unary_stream("/grpc.health.v1.Health/Watch")(b"", timeout=30)
            next(watch)
            also_held = stub.ModelInfer.future(request(seed=HELD))
            assert refused(lambda: watch) == ("UNAVAILABLE", "UNAVAILABLE: others need the room; try again later")
            running.service.until(begun=2)
            assert refused(stub.ModelInfer, request())[0] == "RESOURCE_EXHAUSTED", "those that have keys stay"
            running.call(running.service.release)
            assert held.result(30).id == also_held.result(30).id == "7"

    @pytest.mark.parametrize("method", ["ModelInfer", "ModelStreamInfer"])
    def test_answers_of_which_nothing_is_read_are_waited_for_no_longer_than_is_set(self, method: str) -> None:
        with limited(body_timeout_s=0.2) as running, BareCaller(running.url, window_bytes=1000) as caller:
            running.service.image_bytes = 200_000
            stream = caller.begin(method)
            model = "ic_portrait_stream" if method == "ModelStreamInfer" else "ic_portrait"
            caller.send(stream, message(request(model, preview_every=1).SerializeToString()), end=True)
            assert caller.status(stream) == (8, "RESOURCE_EXHAUSTED: its answers weren't read for 0.2 s")
            until(running, lambda: (len(running.door.calls.calls), running.unread.nbytes) == (0, 0))
            running.service.until(cancelled=method == "ModelStreamInfer")

    def test_a_connection_that_takes_nothing_at_all_is_closed(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("icportrait.gateway.grpc_calls.END_TIMEOUT_S", 1000)
        with limited(body_timeout_s=0.2) as running, BareCaller(running.url, window_bytes=2**30) as caller:
            running.service.image_bytes = 32 * 2**20
            caller.h2.increment_flow_control_window(2**30)
            stream = caller.begin("ModelInfer")
            caller.send(stream, message(request().SerializeToString()), end=True)
            running.service.until(begun=1)
            until(running, lambda: not running.door.calls.connections)

    def test_answers_that_are_read_slowly_are_waited_for(self) -> None:
        """Read an answer so slowly that the whole takes longer than a caller who reads nothing has."""
        with limited(body_timeout_s=1.0) as running, BareCaller(running.url, window_bytes=1000) as caller:
            running.service.image_bytes = 20_000
            stream = caller.begin("ModelInfer")
            caller.send(stream, message(request().SerializeToString()), end=True)
            while not any(isinstance(event, h2.events.StreamEnded) for event in caller.events):
                for event in caller.receive():
                    if isinstance(event, h2.events.DataReceived) and event.data:
                        time.sleep(0.1)
                        with contextlib.suppress(h2.exceptions.StreamClosedError):  # that was the last of it
                            caller.h2.increment_flow_control_window(len(event.data), stream)
                caller.flush()
            assert caller.status(stream) == (0, "")

    def test_answers_that_are_not_read_are_limited_for_a_call(self) -> None:
        with limited(unread_bytes_call=100_000) as running, BareCaller(running.url, window_bytes=1000) as caller:
            running.service.image_bytes = 60_000
            stream = caller.begin("ModelStreamInfer")
            for key in ("1", "2"):
                caller.send(stream, message(request("ic_portrait", key).SerializeToString()))
            code, text = caller.status(stream)
            assert (code, "bytes of answers aren't read" in text) == (8, True)

    def test_a_stream_that_is_not_read_takes_no_more_requests(self) -> None:
        with limited() as running, BareCaller(running.url, window_bytes=1000) as caller:
            running.service.image_bytes = 100_000
            stream = caller.begin("ModelStreamInfer")
            asked = message(request("ic_portrait").SerializeToString())
            caller.send(stream, asked)
            running.service.until(begun=1)
            caller.h2.ping(bytes(8))
            for _ in range(20):
                caller.send(stream, asked)
            while not any(isinstance(event, h2.events.PingAckReceived) for event in caller.events):
                caller.receive()
            infer(running.url, **PICTURES)
            assert running.service.begun <= 3

    def test_where_all_have_too_much_unread_the_slowest_goes(self) -> None:
        with limited(unread_bytes=250_000) as running, contextlib.ExitStack() as stack:
            running.service.image_bytes = 100_000
            callers = [stack.enter_context(BareCaller(running.url, window_bytes=1000)) for _ in range(2)]
            streams = []
            for index, caller in enumerate(callers):
                streams.append(caller.begin("ModelInfer"))
                caller.send(streams[-1], message(request().SerializeToString()), end=True)
                until(running, lambda count=index + 1: running.unread.nbytes >= 100_000 * count)
            infer(running.url, **PICTURES)
            code, text = callers[0].status(streams[0])
            assert (code, "others need the room" in text) == (8, True)


class TestClosing:
    def test_what_is_under_way_is_answered_and_idle_streams_end(self, running: Running) -> None:
        with raw_stub(running) as stub, grpc.insecure_channel(running.url) as other:
            held = stub.ModelInfer.future(request(seed=HELD))
            running.service.until(begun=1)
            idle = stub.ModelStreamInfer(iter(queue.SimpleQueue().get, None))
            watch = other.unary_stream(
                "/grpc.health.v1.Health/Watch", HealthCheckRequest.SerializeToString, HealthCheckResponse.FromString
            )(HealthCheckRequest())
            next(watch)
            closing = asyncio.run_coroutine_threadsafe(running.door.close(30.0), running.loop)
            assert list(watch) == []
            assert list(idle) == []
            running.call(running.service.release)
            assert held.result(30).model_name == "ic_portrait"
            closing.result(30)

    def test_what_is_not_answered_in_time_is_told_so(self, running: Running) -> None:
        with raw_stub(running) as stub:
            held = stub.ModelInfer.future(request(seed=HELD))
            running.service.until(begun=1)
            running.call(running.door.close, 0.0)
            assert held.code().name == "UNAVAILABLE"
            assert held.details() == "UNAVAILABLE: the server is stopping; try again later"
