"""The gateway before its real engine: callers who leave, send much, or share a server with others."""

from __future__ import annotations

import base64
import io
import json
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tritonclient.grpc as grpc_client
from PIL import Image
from tritonclient.utils import InferenceServerException

from icportrait.server import HOST
from icportrait.serving.counters import HITS, MISSES
from tests.conftest import ROOT
from tests.e2e.caller import StreamCall, infer, series, settled, tensors, until_metric
from tests.e2e.conftest import simulated_repository
from tests.e2e.supervised import Supervised, supervised

ACTIVE, STEPS, PENDING = "icportrait_active_slots", "icportrait_step_ms_count", "icportrait_gateway_pending_requests"
CALLERS = 8


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Supervised]:
    folder = tmp_path_factory.mktemp("quick")
    with supervised(simulated_repository(folder, {"unet": 5}), folder) as running:
        yield running


def held(metrics: dict[str, float]) -> dict[str, float]:
    """Return what a server holds for requests that are on their way."""
    names = (ACTIVE, PENDING, "icportrait_queued_slots", "icportrait_admitted_bytes", "icportrait_gateway_unread_bytes")
    return {name: metrics[name] for name in names}


def test_streams_whose_callers_leave_after_a_preview_leave_nothing_behind(
    quick: Supervised, pictures: dict[str, bytes]
) -> None:
    """Send 128 streams, which stopped a server that had Triton's own front."""
    triton = quick.tritonserver

    def leave(number: int) -> None:
        # A deadline ends every fourth, after a preview or before.
        values: dict[str, Any] = {"deadline_ms": 200 + number} if number % 4 == 0 else {}
        with StreamCall(quick.url, num_inference_steps=100, preview_every=1, **values, **pictures) as stream:
            try:
                while "image" not in stream.next():
                    pass
                if not values:
                    stream.cancel()
                list(stream)
            except InferenceServerException as error:
                assert "deadline_ms: " in error.message() or "CANCELLED" in str(error.status())

    with ThreadPoolExecutor(CALLERS) as threads:
        list(threads.map(leave, range(128)))
    assert set(held(settled(quick.metrics_url)).values()) == {0}
    with StreamCall(quick.url, num_inference_steps=3, preview_every=1, **pictures) as stream:
        assert [answer["step"].item() for answer in stream] == [1, 2, 3]
    assert (quick.tritonserver, series(quick.metrics_url)["icportrait_gateway_engine_starts_total"]) == (triton, 1)


def form(fields: dict[str, bytes]) -> tuple[bytes, str]:
    """Make a multipart form and its type."""
    parts = [
        f'--b\r\nContent-Disposition: form-data; name="{name}"; filename="f"\r\n\r\n'.encode() + data + b"\r\n"
        for name, data in fields.items()
    ]
    return b"".join(parts) + b"--b--\r\n", "multipart/form-data; boundary=b"


ROUTES = {
    "generate": "/v2/models/ic_portrait/generate",
    "generate_stream": "/v2/models/ic_portrait_stream/generate_stream",
    "infer": "/v2/models/ic_portrait/infer",
    "portraits": "/v1/portraits",
    "portraits as a stream": "/v1/portraits?stream=1",
}


@pytest.mark.parametrize("route", ROUTES)
def test_a_caller_who_hangs_up_frees_the_slots_on_every_route(
    quick: Supervised, pictures: dict[str, bytes], route: str
) -> None:
    kind = "application/json"
    if "portraits" in route:
        body, kind = form({**pictures, "num_inference_steps": b"150"})
    else:
        values = {name: base64.b64encode(data).decode() for name, data in pictures.items()}
        values |= {"encoding": "base64", "num_inference_steps": 150}  # type: ignore[dict-item]
        if route == "infer":
            types = {"num_inference_steps": "INT32"}
            inputs = [
                {"name": name, "shape": [1], "datatype": types.get(name, "BYTES"), "data": [value]}
                for name, value in values.items()
            ]
            body = json.dumps({"inputs": inputs}).encode()
        else:
            body = json.dumps(values).encode()
    before = settled(quick.metrics_url)[STEPS]
    with socket.create_connection((HOST, quick.ports.http)) as connection:
        head = f"POST {ROUTES[route]} HTTP/1.1\r\nHost: test\r\nContent-Type: {kind}\r\n"
        head += f"Content-Length: {len(body)}\r\n\r\n"
        connection.sendall(head.encode() + body)
        until_metric(quick.metrics_url, ACTIVE, 1)
    after = settled(quick.metrics_url)
    assert after[STEPS] - before < 140, "it was denoised to its end"
    assert set(held(after).values()) == {0}


def large_picture() -> bytes:
    """Make 29 megapixels in 6 MB, because a worker takes longer over it than a caller takes to send it."""
    buffer = io.BytesIO()
    pixels = np.random.default_rng(0).integers(0, 256, (300, 300, 3), np.uint8)
    Image.fromarray(pixels).resize((5400, 5400)).save(buffer, "JPEG", quality=92)
    return buffer.getvalue()


def test_small_pictures_pass_large_ones(tmp_path: Path, pictures: dict[str, bytes]) -> None:
    """Send twelve callers' 6 MB each first. A caller with small pictures passes those that wait."""
    large, waiting = large_picture(), 4
    with (
        supervised(simulated_repository(tmp_path, {"unet": 1}), tmp_path) as server,
        ThreadPoolExecutor(12) as threads,
    ):
        regions = {path.name: path.stat().st_size for path in server.shm_regions()}
        # A crop of its own makes each a picture that was never prepared.
        calls = [
            threads.submit(
                infer,
                server.url,
                num_inference_steps=1,
                profile=large,
                reference=pictures["reference"],
                profile_box=[0, 0, 1, 1 - number / 100],
            )
            for number in range(12)
        ]
        while series(server.metrics_url)[PENDING] < waiting:
            assert not all(call.done() for call in calls)
        done = sum(call.done() for call in calls)
        infer(server.url, num_inference_steps=1, priority=9, **pictures)
        assert sum(call.done() for call in calls) - done < waiting
        for call in calls:
            assert len(call.result(60)[0]) == 1
        # No picture crosses Triton's shared memory.
        assert {path.name: path.stat().st_size for path in server.shm_regions()} == regions


def test_keys_are_asked_for_and_share_nothing_that_is_kept(tmp_path: Path, pictures: dict[str, bytes]) -> None:
    keys = {}
    sections = ""
    for name in ("one", "two"):
        command = [sys.executable, "-m", "icportrait.server", "key", name]
        made = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
        keys[name] = made.stderr.split()[-1]
        sections += made.stdout
    (tmp_path / "keys.toml").write_text(sections + "priorities = [1, 2]\n")
    repository = simulated_repository(tmp_path, {"unet": 1})
    flags = (f"--api-keys={tmp_path / 'keys.toml'}", f"--access-log={tmp_path / 'access.log'}", "--log-format=json")

    def call(key: str | None, **values: Any) -> None:
        headers = {"authorization": f"Bearer {key}"} if key else None
        values = {**pictures, "num_inference_steps": 1, "seed": 7, **values}
        with grpc_client.InferenceServerClient(server.url) as client:
            client.infer("ic_portrait", tensors(values), headers=headers, client_timeout=60)

    def counts() -> list[float]:
        found = series(server.metrics_url)
        return [found[HITS], found[MISSES]]

    with supervised(repository, tmp_path, flags=flags) as server:
        for key in (None, "none of them"):
            with pytest.raises(InferenceServerException, match="no valid API key") as refusal:
                call(key)
            assert refusal.value.status() == "StatusCode.UNAUTHENTICATED"
        with pytest.raises(InferenceServerException, match="priority: 0, and this API key allows 1, 2") as refusal:
            call(keys["two"], priority=0)
        assert refusal.value.status() == "StatusCode.PERMISSION_DENIED"
        guided = {"num_inference_steps": 2, "guidance_scale": 2.0, "guidance_interval": [0.0, 0.5]}
        for key, expected in (("one", [0, 2]), ("one", [2, 2]), ("two", [2, 4]), ("two", [4, 4])):
            call(keys[key], **(guided if key == "two" else {}))
            assert counts() == expected, key
        authorization = {"authorization": f"Bearer {keys['one']}"}
        with grpc_client.InferenceServerClient(server.url) as client:
            client.get_model_metadata("ic_portrait", headers=authorization)
        url = f"http://{HOST}:{server.ports.http}/v2/models/ic_portrait"
        request = urllib.request.Request(url, headers=authorization)
        with urllib.request.urlopen(request, timeout=60) as answer:
            assert answer.status == 200
        found = series(server.metrics_url, "icportrait_gateway_")
        assert found['icportrait_gateway_answers_total{door="grpc",kind="portraits",code="OK"}'] == 4
        assert found['icportrait_gateway_answers_total{door="grpc",kind="portraits",code="UNAUTHENTICATED"}'] == 2
        assert found['icportrait_gateway_key_answers_total{key="two",code="PERMISSION_DENIED"}'] == 1
        assert found['icportrait_gateway_key_portraits_total{key="one"}'] == 2
        assert found['icportrait_gateway_key_row_steps_total{key="two"}'] == 2 * (2 + 1)
        (tmp_path / "keys.toml").write_text("not TOML")
        while not (warned := [line for line in server.errors().splitlines() if "read before it still count" in line]):
            with pytest.raises(InferenceServerException):
                call(None)
        assert json.loads(warned[0])["level"] == "warning" and json.loads(warned[0])["request_id"]
    lines = [json.loads(line) for line in (tmp_path / "access.log").read_text().splitlines()]
    portraits = [line for line in lines if line.get("portraits")]
    assert [line["key"] for line in portraits] == ["one", "one", "two", "two"]
    assert [line["door"] for line in lines if line["key"] == "one" and "portraits" not in line] == ["grpc", "http"]
    for line in portraits:
        assert line["stage_ms"]["denoise"] > 0 and line["sent_bytes"] > 1000 and line["code"] == "OK"
        parts = "lease", "prepare", "vae_encoder", "queue", "warping", "steps", "vae_decoder", "pipeline", "files"
        assert set(line["phases_ms"]) == set(parts)
    assert [line["code"] for line in lines[:3]] == ["UNAUTHENTICATED", "UNAUTHENTICATED", "PERMISSION_DENIED"]
    for text in (server.errors(), (tmp_path / "access.log").read_text()):
        assert not any(key in text for key in keys.values())
