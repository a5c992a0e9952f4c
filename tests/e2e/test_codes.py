"""Error codes reach callers of every protocol, whichever of our models an error comes from.

The real server, before a denoising step that answers by the request's seed.
"""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from collections.abc import Iterator
from typing import Any

import pytest
import tritonclient.grpc as grpc_client
import tritonclient.http as http_client
from tritonclient.utils import InferenceServerException

from icportrait.deploy.repository import assemble
from icportrait.policy import ServingPolicy
from icportrait.presets import DEMO_128
from icportrait.server import Ports, ServerProcess
from tests.e2e.caller import StreamCall, infer, tensors
from tests.e2e.conftest import CACHE_BYTES
from tests.trivial_engines import write_trivial_export

FAILING = """
import json

from icportrait.errors import Cancelled, IcPortraitError, InvalidRequest, Unavailable
from icportrait.metrics import Metrics
from icportrait.serving.triton_loop import DenoiseModel

ERRORS = [InvalidRequest("one"), Unavailable("two"), Cancelled("three"), IcPortraitError("four")]


class Stage:
    metrics = Metrics()

    def handle(self, peer, message):
        if message.op == "lease":
            peer.send({"op": "leased", "key": message.key, "refusal": ""})
        elif message.op == "ping":
            peer.send({"op": "pong", "id": message.id, "busy": False, "step_age_ms": 0.0, "expected_ms": 0.0})

    def peer_has_gone(self, peer):
        pass

    def submit(self, tensors, answer):
        request = json.loads(tensors["request"][0])
        raise ERRORS[request["seed"]]

    def close(self):
        pass


class TritonPythonModel(DenoiseModel):
    def load(self, context):
        return Stage()
"""
CODES = [
    # Of gRPC, and of HTTP; and the text with its code, which is all that a stream's answer has.
    ("INVALID_ARGUMENT", 400, "one"),
    ("UNAVAILABLE", 503, "UNAVAILABLE: two"),
    ("CANCELLED", 499, "CANCELLED: three"),
    ("INTERNAL", 500, "INTERNAL: four"),
]


@pytest.fixture(scope="module")
def failing(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    folder = tmp_path_factory.mktemp("failing")
    write_trivial_export(folder / "export", DEMO_128)
    assemble(folder / "export", folder / "repository", ServingPolicy(cache_bytes=CACHE_BYTES))
    (folder / "repository" / "denoise" / "1" / "model.py").write_text(FAILING)
    with ServerProcess(folder / "repository", Ports.free(), folder / "server.log") as running:
        yield running


@pytest.mark.parametrize("seed", range(4))
def test_a_code_is_the_same_over_every_protocol(failing: ServerProcess, pictures: dict[str, bytes], seed: int) -> None:
    code, status, text = CODES[seed]
    values: dict[str, Any] = {"seed": seed, **pictures}
    with pytest.raises(InferenceServerException) as unary:
        infer(failing.grpc_url, **values)
    assert (unary.value.status(), unary.value.message()) == (f"StatusCode.{code}", text)

    with http_client.InferenceServerClient(failing.http_url) as client, pytest.raises(InferenceServerException) as http:
        client.infer("ic_portrait", tensors(values, http_client))
    assert http.value.status() == str(status)
    assert text in http.value.message()

    with StreamCall(failing.grpc_url, **values) as stream, pytest.raises(InferenceServerException) as streamed:
        stream.next()
    assert streamed.value.message() == text


@pytest.mark.parametrize("seed", range(4))
def test_a_stream_that_asks_for_codes_gets_them(failing: ServerProcess, pictures: dict[str, bytes], seed: int) -> None:
    """Send Triton's header that asks for codes, because a stream without it has the text alone."""
    code, _, text = CODES[seed]
    answers: list[Any] = []
    with grpc_client.InferenceServerClient(failing.grpc_url) as client:
        client.start_stream(lambda result, error: answers.append(error), headers={"triton_grpc_error": "true"})
        client.async_stream_infer("ic_portrait_stream", tensors({"seed": seed, **pictures}))
        client.stop_stream()
    assert (answers[0].status(), answers[0].message()) == (f"StatusCode.{code}", text)


def test_http_streams_tell_the_error_as_an_event(failing: ServerProcess) -> None:
    body = {"profile": "a", "reference": "b", "encoding": "base64", "seed": -1}
    url = f"http://{failing.http_url}/v2/models/ic_portrait_stream/generate_stream"
    with pytest.raises(urllib.error.HTTPError) as refusal:
        urllib.request.urlopen(urllib.request.Request(url, json.dumps(body).encode()), timeout=60)
    with refusal.value as answer:
        assert (refusal.value.code, b"seed: -1, expected 0" in answer.read()) == (400, True)
