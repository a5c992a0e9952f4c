"""Progress, previews and cancels on a stream, through the real server: one slot for all."""

from __future__ import annotations

import base64
import io
import json
import urllib.request
from typing import Any

import pytest
from PIL import Image
from tritonclient.utils import InferenceServerException

from icportrait.server import ServerProcess
from tests.e2e.caller import StreamCall, infer, settled, until_metric


def call(server: ServerProcess, pictures: dict[str, bytes], **values: Any) -> StreamCall:
    return StreamCall(server.grpc_url, guidance_scale=1.0, **pictures, **values)


def size(picture: bytes) -> tuple[int, int]:
    return Image.open(io.BytesIO(picture)).size


def test_every_step_is_told_and_the_portrait_comes_last(slow: ServerProcess, pictures: dict[str, bytes]) -> None:
    with call(slow, pictures, num_inference_steps=6) as stream:
        *progress, last = stream
    assert [(answer["step"].item(), answer["total_steps"].item()) for answer in progress] == [
        (k, 6) for k in range(1, 6)
    ]
    assert all(set(answer) == {"step", "total_steps"} for answer in progress)
    assert (last["step"].item(), last["total_steps"].item()) == (6, 6)
    assert size(last["image"][0]) == (128, 128)
    assert json.loads(last["metadata"][0])["steps"] == 6


@pytest.mark.parametrize("preview_every", [1, 4])
def test_previews_come_as_often_as_asked_and_in_order(
    slow: ServerProcess, pictures: dict[str, bytes], preview_every: int
) -> None:
    with call(slow, pictures, num_inference_steps=10, num_portraits=1, preview_every=preview_every) as stream:
        *answers, last = stream
    steps = [answer["step"].item() for answer in answers]
    assert steps == sorted(set(steps))
    previews = [answer for answer in answers if "image" in answer]
    assert [answer["step"].item() for answer in previews] == list(range(preview_every, 10, preview_every))
    assert all(size(answer["image"][0]) == (128, 128) and "metadata" not in answer for answer in previews)
    assert last["metadata"] is not None


def test_previews_cost_no_step(slow: ServerProcess, pictures: dict[str, bytes]) -> None:
    before = settled(slow.metrics_url)["icportrait_step_ms_count"]
    with call(slow, pictures, num_inference_steps=12, preview_every=2) as stream:
        list(stream)
    assert settled(slow.metrics_url)["icportrait_step_ms_count"] - before == 12


def test_the_unary_model_has_no_previews(slow: ServerProcess, pictures: dict[str, bytes]) -> None:
    with pytest.raises(
        InferenceServerException, match="preview_every: 3, expected 0: ic_portrait answers once"
    ) as refusal:
        infer(slow.grpc_url, preview_every=3, **pictures)
    assert refusal.value.status() == "StatusCode.INVALID_ARGUMENT"


def test_a_stream_that_is_cancelled_frees_its_slot(slow: ServerProcess, pictures: dict[str, bytes]) -> None:
    """Cancel a stream after its third preview. Its slot, the only one, is then another's."""
    before = settled(slow.metrics_url)
    with call(slow, pictures, num_inference_steps=150, preview_every=1) as stream:
        previews = 0
        while previews < 3:
            previews += "image" in stream.next()
        stream.cancel()
    infer(slow.grpc_url, num_inference_steps=1, guidance_scale=1.0, **pictures)
    after = settled(slow.metrics_url)
    assert after["icportrait_cancellations_total"] - before["icportrait_cancellations_total"] == 1
    assert after["icportrait_step_ms_count"] - before["icportrait_step_ms_count"] < 100
    assert after["icportrait_active_slots"] == 0


def test_refusals_come_with_their_code_and_when_to_try_again(slow: ServerProcess, pictures: dict[str, bytes]) -> None:
    with call(slow, pictures, num_inference_steps=0) as stream, pytest.raises(InferenceServerException) as invalid:
        stream.next()
    assert invalid.value.message().startswith("num_inference_steps: 0, expected 1..150")
    infer(slow.grpc_url, num_inference_steps=2, **pictures)  # so that it knows how long a step takes
    before = settled(slow.metrics_url)
    with pytest.raises(InferenceServerException) as late:
        infer(slow.grpc_url, num_inference_steps=100, guidance_scale=1.0, deadline_ms=1000, **pictures)
    assert late.value.status() == "StatusCode.UNAVAILABLE"
    assert "deadline_ms: 1000, and it would take about" in late.value.message()
    assert "; retry_after_ms: " in late.value.message()
    streams = [call(slow, pictures, num_inference_steps=100)]
    streams[0].next()  # it runs, and two others fill the queue
    streams += [call(slow, pictures, num_inference_steps=100) for _ in range(2)]
    until_metric(slow.metrics_url, "icportrait_queued_slots", 2)
    with call(slow, pictures, num_inference_steps=1) as stream, pytest.raises(InferenceServerException) as full:
        stream.next()
    assert (
        "UNAVAILABLE: the queue is full (2 of 2 slots, and 1 more are asked for); retry_after_ms: "
        in full.value.message()
    )
    # Those that wait first, else the next one joins where the first has left.
    for number, stream in reversed(list(enumerate(streams))):
        stream.cancel()
        stream.__exit__()
        until_metric(slow.metrics_url, "icportrait_queued_slots", max(0, number - 1))
    after = settled(slow.metrics_url)
    more = {name: value - before.get(name, 0.0) for name, value in after.items()}  # a code's first answer is new
    assert more["icportrait_warping_ms_count"] == 1, "what was refused or left runs no engine"
    assert more['icportrait_refusals_total{reason="queue_slots"}'] == 1
    assert more['icportrait_refusals_total{reason="deadline"}'] == 1
    assert (after["icportrait_queued_slots"], after["icportrait_admitted_bytes"]) == (0, 0)


def test_http_generate_stream_tells_of_every_step_and_gives_the_portrait(
    slow: ServerProcess, pictures: dict[str, bytes]
) -> None:
    values = {name: base64.b64encode(data).decode() for name, data in pictures.items()}
    body = {**values, "encoding": "base64", "num_inference_steps": 4, "preview_every": 2, "guidance_scale": 1.0}
    request = urllib.request.Request(
        f"http://{slow.http_url}/v2/models/ic_portrait_stream/generate_stream", json.dumps(body).encode()
    )
    with urllib.request.urlopen(request, timeout=60) as answer:
        events = [json.loads(line.removeprefix(b"data: ")) for line in answer if line.startswith(b"data: ")]
    assert [event["step"] for event in events] == [1, 2, 3, 4] or [event["step"] for event in events] == [1, 2, 4]
    assert ["image" in event for event in events if event["step"] in (1, 2, 4)] == [False, True, True]
    assert size(base64.b64decode(events[-1]["image"])) == (128, 128)
