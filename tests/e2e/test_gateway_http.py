"""The HTTP door before a small service, as real clients see it: tritonclient, curl, urllib, and sockets.

Time-outs are short here and waited for; nothing else is timed.
"""

from __future__ import annotations

import asyncio
import gc
import gzip
import http.client
import io
import json
import re
import select
import socket
import subprocess
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

import pytest
import tritonclient.http as http_client
from tritonclient.utils import InferenceServerException

from benchmarks.perf_analyzer import input_data
from benchmarks.perf_analyzer_program import PerfAnalyzerError, find_program
from icportrait.errors import (
    Cancelled,
    DeadlineMissed,
    IcPortraitError,
    InvalidRequest,
    PermissionDenied,
    TooMuch,
    Unavailable,
)
from icportrait.gateway.access import Access, new_key
from icportrait.gateway.api import ServerLimits, Unread
from icportrait.gateway.http_door import HttpDoor, serve_http
from icportrait.gateway.kserve import KserveModels
from icportrait.gateway.records import Records
from icportrait.policy import ServingPolicy
from tests.e2e.caller import generate, tensors
from tests.e2e.gateway_service import IMAGE, SmallService

PICTURES = {"profile": b"\xffprofile", "reference": b"\x00reference!"}
TEXTS = {"profile": "cA==", "reference": "cg==", "encoding": "base64"}
INFER = "/v2/models/ic_portrait/infer"
GENERATE = "/v2/models/ic_portrait/generate"
STREAM = "/v2/models/ic_portrait_stream/generate_stream"


@dataclass
class Settings:
    host: str = "127.0.0.1"
    http_port: int = 0
    limits: ServerLimits = field(default_factory=ServerLimits)
    tls_certificate: Path | None = None
    tls_key: Path | None = None
    tls_client_ca: Path | None = None


class Running:
    """A door in a loop of its own, in a thread."""

    def __init__(self, settings: Settings, keys: Path | None = None) -> None:
        self.unread = Unread(settings.limits)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever)
        self._thread.start()
        self.door = self._run(self._open(settings, keys))
        self.address = ("127.0.0.1", self.door.port)
        self.url = f"127.0.0.1:{self.door.port}"

    async def _open(self, settings: Settings, keys: Path | None) -> HttpDoor:
        self.service = SmallService()
        self.records = Records()
        models = KserveModels(ServingPolicy())
        return await serve_http(self.service, settings, Access(keys), models, self.unread, self.records)

    def _run(self, work: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(30)

    def call(self, work: Callable[[], Any]) -> Any:
        """Return what ``work`` returns in the door's loop."""

        async def run() -> Any:
            return work()

        return self._run(run())

    def go_on(self) -> None:
        self.call(self.service.go_on.set)

    def close(self, grace_s: float = 0.0) -> None:
        self._run(self.door.close(grace_s))

    def end(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()


@pytest.fixture
def opened() -> Iterator[Callable[..., Running]]:
    doors: list[Running] = []

    def open_door(keys: Path | None = None, tls: dict[str, Path] | None = None, **limits: Any) -> Running:
        doors.append(Running(Settings(limits=ServerLimits(**limits), **tls or {}), keys))
        return doors[-1]

    yield open_door
    for door in doors:
        door.close()
        held = (door.unread.nbytes, door.door.app.incoming_bytes, door.service.running, door.door.connections)
        door.end()
        assert held == (0, 0, 0, 0), "nothing of it is left"


@pytest.fixture
def door(opened: Callable[..., Running]) -> Running:
    return opened()


def until(holds: Callable[[], object], what: str) -> None:
    end_s = time.monotonic() + 30
    while not holds():
        assert time.monotonic() < end_s, what
        time.sleep(0.01)


def ask(
    door: Running, path: str, body: bytes | None = None, headers: dict[str, str] | None = None
) -> tuple[int, Any, bytes]:
    """Ask by urllib, and return an answer's status, headers and body."""
    request = urllib.request.Request(f"http://{door.url}{path}", body, headers or {})
    try:
        with urllib.request.urlopen(request, timeout=30) as answer:
            return answer.status, answer.headers, answer.read()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.headers, error.read()


def raw(door: Running, *parts: bytes) -> socket.socket:
    connection = socket.create_connection(door.address, timeout=30)
    for part in parts:
        connection.sendall(part)
    return connection


def answer_of(connection: socket.socket) -> bytes:
    """Read all that comes until the server ends the connection."""
    with connection:
        return b"".join(iter(lambda: connection.recv(2**16), b""))


def first_of(connection: socket.socket) -> bytes:
    """Read what comes first."""
    with connection:
        return connection.recv(1000)


def trickle(connection: socket.socket, data: bytes) -> bytes:
    """Send ``data`` again and again until something comes back."""
    with connection:
        while not select.select([connection], [], [], 0.03)[0]:
            connection.sendall(data)
        return connection.recv(1000)


def head_of(path: str, *headers: bytes) -> bytes:
    return b"\r\n".join([b"POST %b HTTP/1.1" % path.encode(), b"host: a", *headers, b"", b""])


def form_of(*fields: tuple[bytes, bytes]) -> bytes:
    parts = [b'--b\r\ncontent-disposition: form-data; name="%b"\r\n\r\n%b\r\n' % each for each in fields]
    return b"".join(parts) + b"--b--\r\n"


def post(path: str, body: bytes, *headers: bytes) -> bytes:
    return head_of(path, b"content-length: %d" % len(body), *headers) + body


def curl(*arguments: str) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(["curl", "-sS", "--noproxy", "*", "-m", "30", *arguments], capture_output=True, check=True)


def slow_reader(door: Running) -> socket.socket:
    """Open a connection that takes little before it is read."""
    connection = socket.socket()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2**14)
    connection.connect(door.address)
    return connection


FORM = b"content-type: multipart/form-data; boundary=b"
CHUNKED = b"transfer-encoding: chunked"
LONG = json.dumps({**TEXTS, "num_inference_steps": 150}).encode()


class TestTritonsClient:
    def test_it_gets_pictures_metadata_and_counts(self, door: Running) -> None:
        with http_client.InferenceServerClient(door.url) as client:
            values = {**PICTURES, "seed": 2**62 + 1, "num_portraits": 2, "profile_box": [0.0, 0.0, 0.5, 1.0]}
            result = client.infer("ic_portrait", tensors(values, http_client), request_id="mine")
        assert list(result.as_numpy("image")) == [IMAGE, IMAGE]
        metadata = json.loads(result.as_numpy("metadata")[0])
        assert (metadata["seed"], metadata["profile_bytes"], metadata["reference_bytes"]) == (2**62 + 1, 8, 11)
        assert metadata["box"] == [0.0, 0.0, 0.5, 1.0]
        assert (result.as_numpy("step"), result.as_numpy("total_steps")) == ([4], [4])
        assert result.get_response()["id"] == "mine"

    def test_it_gets_the_outputs_that_it_asks_for(self, door: Running) -> None:
        asked = [http_client.InferRequestedOutput("step", binary_data=False), http_client.InferRequestedOutput("image")]
        with http_client.InferenceServerClient(door.url) as client:
            result = client.infer("ic_portrait", tensors(PICTURES, http_client), outputs=asked)
        outputs = {output["name"]: output for output in result.get_response()["outputs"]}
        assert outputs["step"] == {"name": "step", "datatype": "INT32", "shape": [1], "data": [4]}
        assert set(outputs) == {"step", "image"}
        assert list(result.as_numpy("image")) == [IMAGE]

    def test_json_without_binary_data_is_taken_and_given(self, door: Running) -> None:
        data = {"profile": ["cA=="], "reference": [["cg=="]], "encoding": ["base64"]}
        given = [{"name": name, "datatype": "BYTES", "shape": [1], "data": value} for name, value in data.items()]
        status, _, answer = ask(door, INFER, json.dumps({"inputs": given}).encode())
        assert status == 200, answer
        outputs = {output["name"]: output["data"] for output in json.loads(answer)["outputs"]}
        assert outputs["image"] == ["aW1hZ2U="]
        status, _, answer = ask(door, INFER, json.dumps({"inputs": given[:2]}).encode())
        assert (status, b"expected base64" in answer) == (400, True)

    def test_it_is_told_of_the_server_and_its_models(self, door: Running) -> None:
        with http_client.InferenceServerClient(door.url) as client:
            assert client.is_server_live() and client.is_server_ready()
            assert client.is_model_ready("ic_portrait") and client.is_model_ready("ic_portrait_stream", "1")
            assert not client.is_model_ready("denoise")
            assert client.get_server_metadata()["name"] == "icportrait"
            assert client.get_model_metadata("ic_portrait", "1")["inputs"][0]["name"] == "profile"
            config = client.get_model_config("ic_portrait_stream")
            assert config["model_transaction_policy"] == {"decoupled": True}
            assert config["max_batch_size"] == 0
            statistics = client.get_inference_statistics()["model_stats"]
            assert [model["name"] for model in statistics] == ["ic_portrait", "ic_portrait_stream"]
            assert statistics[0]["inference_stats"]["success"]["count"] == 2**53 + 1
            door.service.is_ready = False
            assert client.is_server_live() and not client.is_server_ready() and not client.is_model_ready("ic_portrait")

    def test_nothing_else_of_tritons_is_there(self, door: Running) -> None:
        with http_client.InferenceServerClient(door.url) as client:
            for forbidden in (
                client.get_model_repository_index,
                client.get_system_shared_memory_status,
                client.get_log_settings,
                client.get_trace_settings,
                lambda: client.load_model("ic_portrait"),
                lambda: client.register_system_shared_memory("a", "/triton_python_backend_shm_region_1", 8),
            ):
                with pytest.raises(InferenceServerException) as refusal:
                    forbidden()
                assert refusal.value.status() == "404"

    def test_errors_have_their_status_and_text(self, door: Running) -> None:
        with http_client.InferenceServerClient(door.url) as client:
            for values, text in (
                ({"seed": -2}, "seed: -2, expected 0"),
                ({"num_portraits": 9}, "num_portraits: 9, expected 1..8"),
            ):
                with pytest.raises(InferenceServerException) as refusal:
                    client.infer("ic_portrait", tensors({**PICTURES, **values}, http_client))
                assert refusal.value.status() == "400"
                assert refusal.value.message().startswith(text)

    def test_classification_and_shared_memory_are_refused_by_name(self, door: Running) -> None:
        shared = http_client.InferInput("profile", [1], "BYTES")
        shared.set_shared_memory("region", 8)
        given = tensors({"reference": b"r"}, http_client)
        classes = [http_client.InferRequestedOutput("image", class_count=1)]
        with http_client.InferenceServerClient(door.url) as client:
            for inputs, outputs, text in (
                (tensors(PICTURES, http_client), classes, "image: classification is not offered"),
                ([shared, *given], None, "profile: shared memory is not offered"),
            ):
                with pytest.raises(InferenceServerException) as refusal:
                    client.infer("ic_portrait", inputs, outputs=outputs)
                assert refusal.value.status() == "400"
                assert refusal.value.message().startswith(text)


def test_perf_analyzer_measures_over_http(door: Running, tmp_path: Path) -> None:
    try:
        program = find_program(tmp_path)
    except PerfAnalyzerError as error:
        pytest.skip(str(error))
    (tmp_path / "input.json").write_text(json.dumps(input_data(PICTURES, {"num_inference_steps": 1})))
    arguments = ["-m", "ic_portrait", "-u", door.url, "-i", "http", "--input-data", str(tmp_path / "input.json")]
    lines = program.run([*arguments, "--concurrency-range", "1:8:7", "-p", "400", "-s", "1000"], 60, io.StringIO())
    measured = [line for line in lines if line.startswith("Concurrency: ")]
    assert [line.split(",")[0] for line in measured] == ["Concurrency: 1", "Concurrency: 8"]


class TestGenerate:
    def test_inputs_are_members_and_outputs_too(self, door: Running) -> None:
        status, answer = generate(door.url, **TEXTS, seed=7, id="mine", parameters={"unknown": 1})
        assert status == 200, answer
        metadata = json.loads(answer.pop("metadata"))
        assert answer == {
            "model_name": "ic_portrait",
            "model_version": "1",
            "id": "mine",
            "image": "aW1hZ2U=",
            "step": 4,
            "total_steps": 4,
        }
        assert (metadata["seed"], metadata["profile_bytes"]) == (7, 4)

    def test_several_portraits_are_a_list(self, door: Running) -> None:
        assert generate(door.url, **TEXTS, num_portraits=2)[1]["image"] == ["aW1hZ2U="] * 2

    @pytest.mark.parametrize(
        ("change", "text"),
        [
            ({"colour": 3}, "colour: no such input"),
            ({"num_portraits": 2**32 + 1}, "num_portraits: 4294967297, expected 1..8"),
            ({"seed": 2**64 + 3}, "seed: 18446744073709551619, expected 0.."),
            ({"num_portraits": "2"}, "num_portraits: '2', expected elements of type INT32"),
            ({"num_portraits": 2.0}, "num_portraits: 2.0, expected elements of type INT32"),
            ({"num_portraits": True}, "num_portraits: True, expected elements of type INT32"),
            ({"profile": None}, "profile: None, expected elements of type BYTES"),
            ({"profile": {"a": 1}}, "profile: a dict, expected elements of type BYTES"),
            ({"profile_box": [0.1]}, "profile_box: shape is [1], expected [4]"),
            ({"encoding": "binary"}, "encoding: 'binary', expected base64"),
            ({"guidance_scale": 1e999}, "guidance_scale: "),
        ],
    )
    def test_a_value_of_another_kind_is_the_callers_fault_and_never_wraps(
        self, door: Running, change: dict[str, Any], text: str
    ) -> None:
        status, answer = generate(door.url, **{**TEXTS, **change})
        assert status == 400
        assert answer["error"].startswith(text)
        assert door.service.served == 0

    def test_a_stream_tells_of_steps_previews_and_the_portrait(self, door: Running) -> None:
        answer = curl("-N", "-d", json.dumps({**TEXTS, "preview_every": 2}), f"http://{door.url}{STREAM}")
        events = [json.loads(line.removeprefix(b"data: ")) for line in answer.stdout.splitlines() if line]
        assert all(event.pop("model_name") == "ic_portrait_stream" for event in events)
        assert all(event.pop("model_version") == "1" for event in events)
        assert events[:3] == [
            {"step": 1, "total_steps": 4},
            {"image": "cHJldmlldw==", "step": 2, "total_steps": 4},
            {"step": 3, "total_steps": 4},
        ]
        assert events[3]["image"] == "aW1hZ2U=" and "metadata" in events[3]
        assert len(events) == 4

    def test_a_stream_of_the_unary_model_has_one_event(self, door: Running) -> None:
        status, headers, answer = ask(door, STREAM.replace("_stream/", "/"), json.dumps(TEXTS).encode())
        assert (status, headers["content-type"]) == (200, "text/event-stream")
        assert answer.count(b"data: ") == 1

    def test_an_error_before_the_first_event_is_a_status(self, door: Running) -> None:
        status, _, answer = ask(door, STREAM, json.dumps({**TEXTS, "seed": -1}).encode())
        assert (status, json.loads(answer)["error"][:8]) == (400, "seed: -1")

    def test_an_error_after_it_is_an_event(self, door: Running) -> None:
        door.service.fails = Unavailable("the engine is away; retry_after_ms: 500")
        status, _, answer = ask(door, STREAM, json.dumps(TEXTS).encode())
        events = [json.loads(line.removeprefix(b"data: ")) for line in answer.splitlines() if line]
        assert status == 200
        assert events[-1] == {"error": "UNAVAILABLE: the engine is away; retry_after_ms: 500"}
        assert len(events) == 4

    def test_infer_refuses_the_model_that_streams(self, door: Running) -> None:
        status, _, answer = ask(door, INFER.replace("portrait/", "portrait_stream/"), b"{}")
        assert (status, b"generate_stream can" in answer) == (400, True)


class TestPortraits:
    @pytest.fixture(autouse=True)
    def _files(self, tmp_path: Path) -> None:
        for name, data in PICTURES.items():
            (tmp_path / name).write_bytes(data)
        self.files = [part for name in PICTURES for part in ("-F", f"{name}=@{tmp_path / name}")]
        self.folder = tmp_path

    def test_curl_sends_two_files_and_gets_a_picture(self, door: Running) -> None:
        options = ["seed=9", "scheduler=euler", "guidance_scale=2.5", "profile_box=0,0.1,0.5,1"]
        fields = [part for option in options for part in ("-F", option)]
        out, head = self.folder / "out.png", self.folder / "head"
        curl(*self.files, *fields, "-o", str(out), "-D", str(head), f"http://{door.url}/v1/portraits")
        assert out.read_bytes() == IMAGE
        headers = dict(line.split(": ", 1) for line in head.read_text().splitlines() if ": " in line)
        metadata = json.loads(headers["icportrait-metadata"])
        assert headers["content-type"] == "image/png"
        assert metadata == {
            "seed": 9,
            "profile_bytes": 8,
            "reference_bytes": 11,
            "scheduler": "euler",
            "guidance_scale": 2.5,
            "box": [0.0, 0.1, 0.5, 1.0],
        }

    def test_a_large_file_comes_after_the_door_has_agreed(self, door: Running) -> None:
        """Send ``Expect: 100-continue``, as curl does with large files."""
        (self.folder / "profile").write_bytes(b"p" * 5 * 2**20)
        url = f"http://{door.url}/v1/portraits"
        answer = curl("-v", *self.files, "-H", "accept: application/json", "-H", "expect: 100-continue", url)
        assert b"HTTP/1.1 100 Continue" in answer.stderr
        assert json.loads(answer.stdout)["metadata"]["profile_bytes"] == 5 * 2**20
        door.service.refuses = Unavailable("the queue is full")
        answer = curl("-v", *self.files, "-H", "expect: 100-continue", url)
        assert b"HTTP/1.1 503 " in answer.stderr
        assert b"HTTP/1.1 100 Continue" not in answer.stderr

    def test_several_portraits_or_json_come_as_json(self, door: Running) -> None:
        for more, count in (["-F", "num_portraits=2"], 2), (["-H", "accept: application/json"], 1):
            answer = json.loads(curl(*self.files, *more, f"http://{door.url}/v1/portraits").stdout)
            assert len(answer["images"]) == count
            assert answer["metadata"]["profile_bytes"] == 8

    def test_a_stream_has_events_by_kind(self, door: Running) -> None:
        url = f"http://{door.url}/v1/portraits?stream=1"
        text = curl("-N", *self.files, "-F", "preview_every=3", url).stdout.decode()
        events = [event.split("\ndata: ") for event in text.strip().split("\n\n")]
        assert [kind for kind, _ in events] == ["event: step"] * 3 + ["event: portraits"]
        assert [json.loads(data).get("images") is not None for _, data in events] == [False, False, True, True]
        door.service.fails = IcPortraitError("the engine is broken")
        text = curl("-N", *self.files, url).stdout.decode()
        assert text.endswith('event: error\ndata: {"error": "INTERNAL: the engine is broken"}\n\n')

    @pytest.mark.parametrize(
        ("fields", "text"),
        [
            (["seed=x"], "seed: 'x', expected a whole number"),
            (["num_portraits=4294967297"], "num_portraits: 4294967297, expected 1..8"),
            (["seed=" + "9" * 250], "seed: a number of more than 30 digits"),
            (["guidance_scale=much"], "guidance_scale: 'much', expected a number"),
            (["guidance_scale=nan"], "guidance_scale: nan, expected"),
            (["profile_box=0,0,1"], "profile_box: shape is [3], expected [4]"),
            (["guidance_interval=0.5"], "guidance_interval: shape is [1], expected [2]"),
            (["guidance_interval=0.6,0.4"], "guidance_interval: [0.6, 0.4], expected a begin that isn't after its end"),
            (["colour=red"], "colour: no such field"),
            (["encoding=base64"], "encoding: no such field"),
            (["seed=1", "seed=2"], "seed: given twice"),
            (["scheduler=" + "x" * 300], "scheduler: more than 256 bytes"),
        ],
    )
    def test_a_bad_field_is_named(self, door: Running, fields: list[str], text: str) -> None:
        parts = [part for each in fields for part in ("-F", each)]
        answer = curl(*self.files, *parts, "-w", "%{http_code}", f"http://{door.url}/v1/portraits").stdout.decode()
        assert answer.endswith("400")
        assert json.loads(answer[:-3])["error"].startswith(text)

    def test_what_is_no_form_is_refused(self, door: Running) -> None:
        status, _, answer = ask(door, "/v1/portraits", b"{}", {"content-type": "application/json"})
        assert (status, b"expected multipart/form-data" in answer) == (400, True)
        form = {"content-type": "multipart/form-data; boundary=b"}
        for body in (b"", b"--b\r\n", b'--b\r\nContent-Disposition: form-data; name="profile"\r\n\r\nx'):
            assert ask(door, "/v1/portraits", body, form)[0] == 400


class TestStatus:
    @pytest.mark.parametrize(
        ("error", "status", "retry_after", "text"),
        [
            (InvalidRequest("one"), 400, None, "one"),
            (PermissionDenied("two"), 403, None, "PERMISSION_DENIED: two"),
            (TooMuch("three; retry_after_ms: 2500"), 429, "3", "RESOURCE_EXHAUSTED: three; retry_after_ms: 2500"),
            (Cancelled("four"), 499, None, "CANCELLED: four"),
            (IcPortraitError("five"), 500, None, "INTERNAL: five"),
            (RuntimeError("secret"), 500, None, "INTERNAL: the server made a mistake; its log says which"),
            (Unavailable("six; retry_after_ms: 10"), 503, "1", "UNAVAILABLE: six; retry_after_ms: 10"),
            (DeadlineMissed("seven"), 504, None, "UNAVAILABLE: seven"),
        ],
        ids=lambda value: type(value).__name__ if isinstance(value, Exception) else "",
    )
    def test_a_status_says_whose_fault_it_is(
        self, door: Running, error: Exception, status: int, retry_after: str | None, text: str
    ) -> None:
        door.service.fails = error
        found, headers, answer = ask(door, GENERATE, json.dumps(TEXTS).encode())
        assert (found, headers["retry-after"], json.loads(answer)) == (status, retry_after, {"error": text})

    def test_a_path_or_method_that_there_is_not_says_so(self, door: Running) -> None:
        assert ask(door, "/v2/models/vae_encoder")[0] == 404
        assert ask(door, GENERATE.replace("ic_portrait", "denoise"), b"{}")[0] == 404
        assert ask(door, "/v2/models/ic_portrait/versions/2/infer", b"{}")[0] == 404
        assert ask(door, "/v2/repository/index", b"{}")[0] == 404
        status, headers, _ = ask(door, GENERATE)
        assert (status, headers["allow"]) == (405, "POST")

    def test_ids_and_traces_come_back(self, door: Running) -> None:
        trace = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
        sent = {"traceparent": trace, "x-request-id": "mine-1"}
        for path, body in ((GENERATE, json.dumps(TEXTS).encode()), (GENERATE, b"{}"), ("/v2", None)):
            _, headers, _ = ask(door, path, body, sent)
            assert (headers["traceparent"], headers["x-request-id"]) == (trace, "mine-1")
        _, headers, _ = ask(door, "/v2", None, {"traceparent": "00-x", "x-request-id": "a" * 200})
        assert headers["traceparent"] is None
        assert re.fullmatch("[0-9a-f]{16}", headers["x-request-id"]), "one that the server has made"

    def test_the_document_and_the_page_name_every_path(self, door: Running) -> None:
        document = json.loads(ask(door, "/openapi.json")[2])
        page = ask(door, "/docs")[2].decode()
        for path, methods in document["paths"].items():
            assert path in page
            for method in methods:
                body = b"{}" if method == "post" else None
                status = ask(door, path.replace("{model}", "ic_portrait"), body)[0]
                assert status in (200, 400), path
        form = document["paths"]["/v1/portraits"]["post"]["requestBody"]["content"]["multipart/form-data"]["schema"]
        assert form["properties"]["num_portraits"] == {
            "type": "integer",
            "format": "int32",
            "minimum": 1,
            "maximum": 8,
            "default": 1,
        }
        assert form["properties"]["guidance_interval"] == {
            "type": "array",
            "items": {"type": "number", "minimum": 0.0, "maximum": 1.0},
            "minItems": 2,
            "maxItems": 2,
            "default": [0.0, 1.0],
        }
        assert form["required"] == ["profile", "reference"]


class TestRecords:
    """Each answer is counted once, under its code, early refusals too."""

    def counts(self, door: Running) -> dict[tuple[str, str, str], int]:
        return door.call(lambda: dict(door.records.counts))  # type: ignore[no-any-return]

    def until_counted(self, door: Running, **expected: int) -> None:
        """Wait for so many answers of ``kind_code``, and see no others."""
        wanted = {("http", *name.split("_")): count for name, count in expected.items()}
        until(lambda: self.counts(door) == wanted, f"{wanted}, not {self.counts(door)}")

    def test_answers_and_refusals_of_requests(self, opened: Callable[..., Running], tmp_path: Path) -> None:
        key, section = new_key("studio")
        (tmp_path / "keys.toml").write_text(section + "requests_per_day = 2\n")
        door = opened(message_bytes=1000, keys=tmp_path / "keys.toml")
        sent = {"authorization": f"Bearer {key}"}
        statuses = [
            ask(door, GENERATE, json.dumps(TEXTS).encode(), sent)[0],
            ask(door, GENERATE, b"{}", sent)[0],
            ask(door, GENERATE, json.dumps(TEXTS).encode(), sent)[0],
            ask(door, GENERATE, json.dumps(TEXTS).encode())[0],
            ask(door, GENERATE, b"x" * 2000, sent)[0],
            ask(door, "/v2/health/live", None)[0],
            ask(door, "/none", None)[0],
        ]
        assert statuses == [200, 400, 429, 401, 413, 200, 404]
        portraits = {f"portraits_{status}": 1 for status in (200, 400, 429, 401, 413)}
        self.until_counted(door, **portraits, other_200=1, other_404=1)
        usage = door.call(lambda: door.records.usage)
        assert usage["studio"].answers == {"200": 1, "400": 1, "429": 1, "413": 1}
        assert (usage["studio"].portraits, usage[""].answers) == (1, {"401": 1})
        assert usage["studio"].received_bytes == 2 * len(json.dumps(TEXTS)) + 2 + 2000

    def test_refusals_of_connections(self, opened: Callable[..., Running]) -> None:
        door = opened(connections=1, header_timeout_s=0.2)
        with raw(door, post(GENERATE, json.dumps({**TEXTS, "num_inference_steps": 150}).encode())):
            until(lambda: door.service.running, "a request runs")
            with raw(door) as second:
                assert answer_of(second).startswith(b"HTTP/1.1 503")
            self.until_counted(door, other_503=1)
        until(lambda: door.service.cancelled, "its caller's leaving was seen")
        for data, status in ((b"nothing of HTTP\r\n\r\n", 400), (b"GET / HTTP/1.1\r\na: " + b"b" * 70_000, 431)):
            with raw(door, data) as connection:
                assert answer_of(connection).startswith(b"HTTP/1.1 %d" % status)
        with raw(door, b"GET / HT") as connection:
            assert answer_of(connection).startswith(b"HTTP/1.1 408")
        self.until_counted(door, portraits_499=1, other_503=1, other_400=1, other_431=1, other_408=1)

    def test_a_stream_that_fails_is_no_answer_of_200(self, door: Running) -> None:
        door.service.fails = DeadlineMissed("deadline_ms: passed after 3 steps")
        assert ask(door, STREAM, json.dumps(TEXTS).encode())[0] == 200
        self.until_counted(door, portraits_504=1)


class TestKeys:
    def test_a_key_is_asked_for_before_a_body_is_read(self, opened: Callable[..., Running], tmp_path: Path) -> None:
        key, section = new_key("studio")
        (tmp_path / "keys").write_text(section + "requests_per_s = 0.001\n")
        door = opened(tmp_path / "keys")
        body = json.dumps(TEXTS).encode()
        status, headers, answer = ask(door, GENERATE, body)
        assert (status, headers["www-authenticate"]) == (401, "Bearer")
        assert b"UNAUTHENTICATED" in answer
        assert ask(door, "/v2/models/ic_portrait")[0] == 401
        assert ask(door, "/v2/health/ready")[0] == 200
        assert first_of(raw(door, head_of(GENERATE, b"content-length: 1000000"))).startswith(b"HTTP/1.1 401 ")

        mine = {"authorization": f"Bearer {key}"}
        assert ask(door, "/v2/models/ic_portrait", None, mine)[0] == 200
        assert ask(door, GENERATE, body, mine)[0] == 200
        assert door.service.callers[0].name == "studio"
        status, headers, _ = ask(door, GENERATE, body, mine)
        assert status == 429
        assert int(headers["retry-after"]) > 900

    def test_what_a_full_queue_refuses_costs_nothing_of_a_quota(
        self, opened: Callable[..., Running], tmp_path: Path
    ) -> None:
        key, section = new_key("studio")
        (tmp_path / "keys").write_text(section + "requests_per_day = 1\n")
        door = opened(tmp_path / "keys")
        mine, body = {"authorization": f"Bearer {key}"}, json.dumps(TEXTS).encode()
        door.service.refuses = Unavailable("the queue is full; retry_after_ms: 100")
        assert ask(door, GENERATE, body, mine)[0] == 503
        door.service.refuses = None
        assert ask(door, GENERATE, body, mine)[0] == 200


class TestLimits:
    def test_a_body_that_is_too_large_is_refused_by_its_length(self, opened: Callable[..., Running]) -> None:
        door = opened(message_bytes=1000)
        assert first_of(raw(door, head_of(GENERATE, b"content-length: 1001"))).startswith(b"HTTP/1.1 413 ")
        status, _, answer = ask(door, GENERATE, b"x" * 2**20)
        assert (status, b"may have 1000 bytes" in answer) == (413, True), "read while its caller still sends"

    def test_a_body_without_a_length_is_refused_once_it_is_too_large(self, opened: Callable[..., Running]) -> None:
        door = opened(message_bytes=1000)
        connection = raw(door, head_of(GENERATE, CHUNKED), b"3e9\r\n" + b"x" * 1001 + b"\r\n")
        assert first_of(connection).startswith(b"HTTP/1.1 413 ")

    def test_bodies_on_their_way_are_bounded_together_and_the_longest_makes_room(
        self, opened: Callable[..., Running]
    ) -> None:
        door = opened(incoming_bytes=1000, body_timeout_s=1000)
        with raw(door, head_of(GENERATE, b"content-length: 900"), b"x" * 800) as slow:
            until(lambda: door.call(lambda: door.door.app.incoming_bytes) == 800, "it is being read")
            assert ask(door, GENERATE, b" " * 100)[0] == 400
            assert ask(door, GENERATE, b" " * 300)[0] == 400
            answer = b"".join(iter(lambda: slow.recv(1000), b""))
            assert b"too much is being sent to this server at once; retry_after_ms: " in answer
        status, headers, _ = ask(door, GENERATE, b" " * 1001)
        assert (status, headers["retry-after"]) == (503, "1")
        assert ask(door, GENERATE, b" " * 1000)[0] == 400
        gc.collect()
        tracebacks = [each for each in gc.get_objects() if type(each) is TracebackType]
        assert "_make_room" not in {each.tb_frame.f_code.co_name for each in tracebacks}, "a refused body is kept"

    def test_a_compressed_body_is_refused_unread(self, door: Running) -> None:
        body = gzip.compress(json.dumps(TEXTS).encode())
        status, _, answer = ask(door, GENERATE, body, {"content-encoding": "gzip"})
        assert (status, b"expected identity" in answer) == (415, True)
        with http_client.InferenceServerClient(door.url) as client, pytest.raises(InferenceServerException) as refusal:
            client.infer("ic_portrait", tensors(PICTURES, http_client), request_compression_algorithm="gzip")
        assert refusal.value.status() == "415"

    def test_a_header_that_trickles_ends_with_a_408(self, opened: Callable[..., Running]) -> None:
        door = opened(header_timeout_s=0.3)
        answer = trickle(raw(door, b"GET /v2 HTTP/1.1\r\n"), b"a: b\r\n")
        assert answer.startswith(b"HTTP/1.1 408 ")

    def test_a_connection_that_says_nothing_ends(self, opened: Callable[..., Running]) -> None:
        assert answer_of(raw(opened(header_timeout_s=0.1))) == b""

    def test_empty_lines_are_no_request(self, opened: Callable[..., Running]) -> None:
        assert trickle(raw(opened(header_timeout_s=0.3)), b"\r\n").startswith(b"HTTP/1.1 408 ")

    def test_a_body_that_trickles_ends_with_a_408(self, opened: Callable[..., Running]) -> None:
        door = opened(body_timeout_s=0.3)
        answer = trickle(raw(door, head_of(GENERATE, b"content-length: 1000000")), b" ")
        assert answer.startswith(b"HTTP/1.1 408 ")

    @pytest.mark.parametrize("header", [b"a: " + b"x" * 2**20, b"a: b\r\n" * 2**17], ids=["long", "many"])
    def test_a_header_that_is_too_large_ends_with_a_431(self, door: Running, header: bytes) -> None:
        assert first_of(raw(door, b"GET /v2 HTTP/1.1\r\n", header)).startswith(b"HTTP/1.1 431 ")

    @pytest.mark.parametrize("pause_after", [0, 1000])
    def test_a_header_has_64_kilobytes_whatever_is_read_with_its_end(self, door: Running, pause_after: int) -> None:
        for size, status in ((60_000, b"200"), (66_000, b"431"), (120_000, b"431")):
            head = (
                b"POST /v2/health/live HTTP/1.1\r\nhost: a\r\ncontent-length: 60000\r\na: " + size * b"x" + b"\r\n\r\n"
            )
            if status == b"200":
                head = head.replace(b"POST", b"GET ", 1)
            whole = head + bytes(60_000)
            answer = first_of(raw(door, whole[:pause_after], whole[pause_after:]))
            assert answer.startswith(b"HTTP/1.1 " + status), size

    def test_very_many_parameters_are_the_callers_mistake(self, door: Running) -> None:
        query = "&".join(f"a{number}=1" for number in range(17))
        status, _, answer = ask(door, f"/v1/portraits?{query}", b"{}")
        assert (status, b"the path has more than 16 parameters" in answer) == (400, True)

    def test_what_is_no_http_is_answered(self, door: Running) -> None:
        assert first_of(raw(door, b"\x16\x03\x01 hello\r\n\r\n")).startswith(b"HTTP/1.1 400 ")

    def test_another_protocol_is_not_offered_and_its_caller_told(self, door: Running) -> None:
        url = f"http://{door.url}"
        answer = curl("--http2", "-d", json.dumps(TEXTS), "-w", "%{http_code}", f"{url}{GENERATE}").stdout
        assert answer == b'{"error": "Upgrade: not offered; leave it out (curl: --http1.1)"}400'
        assert curl("--http2", "-w", "%{http_code} %{http_version}", f"{url}/v2/health/live").stdout == b"200 1.1"

    @pytest.mark.parametrize(
        "body",
        [
            b"[" * 200_000,
            b'{"a":' * 900,
            b"[" + b"{}," * 10**6,
            b'{"profile": "' + b"\\u0041" * 10**6 + b'"}',
            b'{"seed": %b}' % (b"1" * 10**6),
            b"{",
        ],
        ids=["deep", "deep objects", "values", "signs", "digits", "cut off"],
    )
    def test_json_that_is_deep_or_of_millions_of_values_is_refused(self, door: Running, body: bytes) -> None:
        status, _, answer = ask(door, GENERATE, body)
        assert status == 400
        assert b"the request" in answer
        assert generate(door.url, **TEXTS)[0] == 200

    def test_tiny_chunks_are_refused(self, door: Running) -> None:
        """Send tiny chunks, of which 1.5 million ended tritonserver."""
        connection = raw(door, head_of(GENERATE, CHUNKED), b"1\r\nx\r\n" * 100_000)
        assert first_of(connection).startswith(b"HTTP/1.1 400 ")
        assert generate(door.url, **TEXTS)[0] == 200

    def test_chunks_of_a_kilobyte_are_taken(self, door: Running) -> None:
        body = json.dumps({**TEXTS, "profile": "A" * 2**22}).encode()
        pieces = (body[at : at + 1024] for at in range(0, len(body), 1024))
        request = urllib.request.Request(f"http://{door.url}{GENERATE}", pieces, {"transfer-encoding": "chunked"})
        with urllib.request.urlopen(request, timeout=30) as answer:
            assert json.loads(json.loads(answer.read())["metadata"])["profile_bytes"] == 2**22

    def test_idle_connections_keep_nobody_out(self, opened: Callable[..., Running]) -> None:
        door = opened(connections=20)
        idle = [raw(door, b"GET /v2 HT" if at % 2 else b"") for at in range(50)]
        for _ in range(5):
            assert generate(door.url, **TEXTS)[0] == 200
        assert door.call(lambda: door.door.connections) <= 20
        for connection in idle:
            connection.close()

    def test_connections_over_the_limit_are_told(self, opened: Callable[..., Running]) -> None:
        door = opened(connections=3)
        busy = [raw(door, post(GENERATE, LONG)) for _ in range(3)]
        until(lambda: door.service.running == 3, "three run")
        status, headers, answer = ask(door, "/v2/health/live")
        assert (status, headers["retry-after"]) == (503, "1")
        assert b"too many connections" in answer
        door.go_on()
        for connection in busy:
            assert connection.recv(100).startswith(b"HTTP/1.1 200 ")
            connection.close()

    def test_a_full_queue_refuses_before_it_reads(self, door: Running) -> None:
        door.service.refuses = Unavailable("the queue is full; retry_after_ms: 1500")
        head = first_of(raw(door, head_of(INFER, b"content-length: 1000000")))
        assert head.startswith(b"HTTP/1.1 503 ") and b"retry-after: 2\r\n" in head


class TestLeaving:
    @pytest.mark.parametrize("path", [INFER, GENERATE, STREAM, "/v1/portraits", "/v1/portraits?stream=1"])
    def test_a_hang_up_cancels(self, door: Running, path: str) -> None:
        if path == INFER:
            body = b'{"inputs": [%b]}' % b", ".join(
                b'{"name": "%b", "datatype": "%b", "shape": [1], "data": [%b]}' % tensor
                for tensor in (
                    (b"profile", b"BYTES", b'"cA=="'),
                    (b"reference", b"BYTES", b'"cg=="'),
                    (b"encoding", b"BYTES", b'"base64"'),
                    (b"num_inference_steps", b"INT32", b"150"),
                )
            )
        elif "portraits" in path:
            body = form_of((b"profile", b"a"), (b"reference", b"b"), (b"num_inference_steps", b"150"))
        else:
            body = LONG
        connection = raw(door, post(path, body, FORM))
        until(lambda: door.service.running == 1, "it runs")
        connection.close()
        until(lambda: door.service.cancelled == 1, "it is cancelled")
        assert door.service.running == 0

    def test_a_request_behind_one_that_runs_does_not_hide_a_hang_up(self, door: Running) -> None:
        connection = raw(door, post(GENERATE, LONG), post(GENERATE, LONG), b"x" * 2**20)
        until(lambda: door.service.running == 1, "it runs")
        connection.close()
        until(lambda: door.service.cancelled == 1, "it is cancelled")
        assert len(door.service.callers) == 1

    def test_a_request_behind_one_that_runs_is_not_served_and_the_first_is(self, door: Running) -> None:
        connection = raw(door, post(GENERATE, LONG), post(GENERATE, LONG))
        until(lambda: door.service.running == 1, "it runs")
        door.go_on()
        answer = answer_of(connection)
        assert answer.count(b"HTTP/1.1 200 ") == 1
        assert b"connection: close" in answer
        assert door.service.served == 1

    def test_answers_are_not_held_back_for_more(self, door: Running) -> None:
        """Check that Nagle's algorithm is off, because asyncio turns it off for some sockets alone."""
        with raw(door):
            until(lambda: door.call(lambda: door.door.connections) == 1, "it is there")
            (connection,) = door.call(lambda: list(door.door._server.server_state.connections))
            its_socket = connection.transport.get_extra_info("socket")
            assert its_socket.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)

    def test_requests_one_after_the_other_share_a_connection(self, door: Running) -> None:
        connection = http.client.HTTPConnection(door.url, timeout=30)
        connection.connect()
        mine = connection.sock
        for _ in range(3):
            connection.request("POST", GENERATE, json.dumps(TEXTS))
            with connection.getresponse() as answer:
                assert json.loads(answer.read())["image"] == "aW1hZ2U="
        assert connection.sock is mine
        connection.close()

    def test_an_answer_that_is_not_read_ends_and_is_not_kept(self, opened: Callable[..., Running]) -> None:
        door = opened(body_timeout_s=0.5)
        door.service.image = b"x" * (64 * 2**20)
        with slow_reader(door) as connection:
            connection.sendall(post("/v1/portraits", form_of((b"profile", b"x"), (b"reference", b"x")), FORM))
            until(lambda: door.unread.nbytes > 50 * 2**20, "it is sent")
            until(lambda: door.unread.nbytes == 0, "it is given up")

    def test_a_stream_that_is_not_read_holds_its_own_steps(self, opened: Callable[..., Running]) -> None:
        door = opened(body_timeout_s=0.5)
        door.go_on()
        door.service.preview = b"cHJldmlldw==" * 2**16
        with slow_reader(door) as connection:
            connection.sendall(post(STREAM, json.dumps({**json.loads(LONG), "preview_every": 1}).encode()))
            until(lambda: door.unread.nbytes > 0, "it isn't read")
            until(lambda: door.service.cancelled == 1, "its request is given up")
        until(lambda: door.unread.nbytes == 0, "nothing is kept")

    def test_an_event_is_whole_also_where_its_caller_is_given_up(self, door: Running) -> None:
        door.service.patience_s = 0.2
        door.service.preview = b"cHJldmlldw==" * 2**21
        with slow_reader(door) as connection:
            connection.sendall(post(STREAM, json.dumps({**TEXTS, "preview_every": 1}).encode(), b"connection: close"))
            until(lambda: door.service.callers and not door.service.running, "it is given up")
            with http.client.HTTPResponse(connection) as answer:
                answer.begin()
                preview, error, _ = answer.read().split(b"\n\n")
        assert json.loads(preview.removeprefix(b"data: "))["image"] == door.service.preview.decode()
        assert error == b'data: {"error": "UNAVAILABLE: deadline_ms: passed"}'

    def test_answers_over_the_limit_of_all_are_refused(self, opened: Callable[..., Running]) -> None:
        door = opened(unread_bytes=10)
        status, _, answer = ask(door, GENERATE, json.dumps(TEXTS).encode())
        assert (status, b"too many answers" in answer) == (503, True)


class TestTls:
    @pytest.fixture
    def files(self, tmp_path: Path) -> Path:
        for name in ("server", "client"):
            arguments = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-subj", "/CN=localhost"]
            arguments += ["-addext", "subjectAltName=IP:127.0.0.1", "-days", "1"]
            arguments += ["-keyout", f"{name}.key", "-out", f"{name}.pem"]
            subprocess.run(["openssl", "req", "-x509", *arguments], cwd=tmp_path, check=True, capture_output=True)
        return tmp_path

    def test_a_caller_trusts_the_certificate_and_is_served(self, opened: Callable[..., Running], files: Path) -> None:
        door = opened(tls={"tls_certificate": files / "server.pem", "tls_key": files / "server.key"})
        url = f"https://{door.url}"
        answer = curl("--cacert", str(files / "server.pem"), "-d", json.dumps(TEXTS), f"{url}{GENERATE}").stdout
        assert json.loads(answer)["image"] == "aW1hZ2U="
        with pytest.raises(subprocess.CalledProcessError):
            curl(f"{url}/v2/health/live")
        # Plain HTTP, and a connection that never begins a handshake, get nothing.
        assert answer_of(raw(door, head_of(GENERATE)))[:4] != b"HTTP"

    def test_a_caller_without_a_certificate_is_not_let_in_where_one_is_asked_for(
        self, opened: Callable[..., Running], files: Path
    ) -> None:
        tls = {"tls_certificate": "server.pem", "tls_key": "server.key", "tls_client_ca": "client.pem"}
        door = opened(tls={name: files / file for name, file in tls.items()})
        trusting = ["--cacert", str(files / "server.pem"), f"https://{door.url}/v2/health/live"]
        mine = ["--cert", str(files / "client.pem"), "--key", str(files / "client.key")]
        assert curl(*mine, *trusting, "-w", "%{http_code}").stdout == b"200"
        with pytest.raises(subprocess.CalledProcessError):
            curl(*trusting)

    def test_a_handshake_that_does_not_come_ends(self, opened: Callable[..., Running], files: Path) -> None:
        tls = {"tls_certificate": files / "server.pem", "tls_key": files / "server.key"}
        assert answer_of(raw(opened(tls=tls, header_timeout_s=0.2))) == b""

    def test_connections_that_begin_no_handshake_make_room(self, opened: Callable[..., Running], files: Path) -> None:
        tls = {"tls_certificate": files / "server.pem", "tls_key": files / "server.key"}
        door = opened(tls=tls, header_timeout_s=1000, connections=2)
        first, *others = [raw(door) for _ in range(3)]
        assert answer_of(first) == b""
        live = f"https://{door.url}/v2/health/live"
        assert curl("--cacert", str(files / "server.pem"), live, "-w", "%{http_code}").stdout == b"200"
        for other in others:
            other.close()


class TestClosing:
    def test_what_runs_is_answered_and_nobody_new_is_let_in(self, door: Running) -> None:
        with ThreadPoolExecutor(2) as pool:
            running = pool.submit(ask, door, GENERATE, LONG)
            until(lambda: door.service.running == 1, "it runs")
            closing = pool.submit(door.close, 30)
            # Connecting until it fails would race asyncio, which leaks what it accepts while it closes.
            until(lambda: not door.call(lambda: door.door.listens), "it has stopped listening")
            assert not listens(door)
            assert not running.done()
            door.go_on()
            assert running.result()[0] == 200
            closing.result()

    def test_what_takes_longer_than_its_grace_is_told(self, door: Running) -> None:
        with ThreadPoolExecutor(1) as pool:
            running = pool.submit(ask, door, GENERATE, LONG)
            until(lambda: door.service.running == 1, "it runs")
            door.close(0)
            status, headers, answer = running.result()
        assert (status, headers["retry-after"]) == (503, "1")
        assert b"the server is stopping" in answer
        assert door.service.cancelled == 1

    def test_a_port_that_is_taken_is_named(self, door: Running) -> None:
        async def open_again() -> None:
            models = KserveModels(ServingPolicy())
            settings = Settings(http_port=door.door.port)
            with pytest.raises(
                IcPortraitError, match=rf"http_port: 127.0.0.1:{door.door.port}: Address already in use"
            ):
                await serve_http(SmallService(), settings, Access(), models, Unread())

        asyncio.run(open_again())


def listens(door: Running) -> bool:
    try:
        socket.create_connection(door.address, timeout=5).close()
    except OSError:
        return False
    return True
