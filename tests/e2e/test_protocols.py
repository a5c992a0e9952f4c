"""The public contract over every protocol: answers, metadata and refusals with their codes."""

from __future__ import annotations

import base64
import io
import json
import queue
from typing import Any

import numpy as np
import pytest
import tritonclient.grpc as grpc_client
import tritonclient.http as http_client
from PIL import Image
from tritonclient.utils import InferenceServerException

from icportrait.server import ServerProcess
from tests.e2e.caller import generate, infer, series, settled, tensors

MARK = b"http://cv.iptc.org/newscodes/digitalsourcetype/trainedAlgorithmicMedia"


def png(size: tuple[int, int]) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", size, "grey").save(file, "PNG")
    return file.getvalue()


BAD: list[tuple[dict[str, Any], str]] = [
    ({"seed": -1}, "seed: -1, expected 0..9223372036854775807"),
    ({"num_portraits": 9}, "num_portraits: 9, expected 1..8"),
    ({"num_inference_steps": 0}, "num_inference_steps: 0, expected 1..150"),
    ({"guidance_scale": 20.5}, "guidance_scale: 20.5, expected 1.0..20.0"),
    ({"guidance_interval": [0.6, 0.4]}, "guidance_interval: [0.6, 0.4], expected a begin that isn't after its end"),
    ({"mask_ratio": 0.99}, "mask_ratio: 0.99, expected 0.0..0.98"),
    ({"scheduler": "heun"}, "scheduler: 'heun', expected one of ddim, euler, dpmpp_2m"),
    ({"output_format": "gif"}, "output_format: 'gif', expected one of png, jpeg, webp"),
    ({"encoding": "hex"}, "encoding: 'hex', expected one of binary, base64"),
    ({"profile_box": [0.6, 0.0, 0.4, 1.0]}, "profile_box"),
    ({"reference_box": [0.0, 0.0, 1.0, 1.5]}, "reference_box"),
    ({"profile": b"not a picture"}, "profile: "),
    ({"reference": b""}, "reference: "),
    ({"reference": b"\xff\xd8\xff\xe0 cut off"}, "reference: "),
    ({"profile": b"\x00" * (20 * 2**20 + 1)}, "profile: "),
]


def engine_runs(server: ServerProcess) -> float:
    """Count the requests of the engines' models so far; Triton counts one a little after its answer has left."""
    settled(server.metrics_url)
    counts = series(server.metrics_url, "nv_inference_count")
    names = ("vae_encoder", "denoise", "vae_decoder")
    return sum(counts[f'nv_inference_count{{model="{name}",version="1"}}'] for name in names)


@pytest.mark.parametrize(("change", "message"), BAD, ids=[next(iter(change)) for change, _ in BAD])
def test_a_bad_request_is_invalid_argument_over_grpc(
    server: ServerProcess, pictures: dict[str, bytes], change: dict[str, Any], message: str
) -> None:
    with pytest.raises(InferenceServerException) as refusal:
        infer(server.grpc_url, **{**pictures, **change})
    assert refusal.value.status() == "StatusCode.INVALID_ARGUMENT"
    assert refusal.value.message().startswith(message)
    assert "\n" not in refusal.value.message()
    assert len(refusal.value.message()) < 300


def test_bad_requests_run_no_engine(server: ServerProcess, pictures: dict[str, bytes]) -> None:
    before = engine_runs(server)
    for change, _ in BAD:
        with pytest.raises(InferenceServerException):
            infer(server.grpc_url, **{**pictures, **change})
    assert engine_runs(server) == before


def test_a_picture_over_40_megapixels_is_refused(server: ServerProcess, pictures: dict[str, bytes]) -> None:
    with pytest.raises(InferenceServerException, match=r"profile: .*40 megapixels") as refusal:
        infer(server.grpc_url, **{**pictures, "profile": png((8000, 5100))})
    assert refusal.value.status() == "StatusCode.INVALID_ARGUMENT"


@pytest.mark.parametrize(
    ("name", "array", "kind"),
    [
        ("seed", np.array([1], np.int32), "INT32"),
        ("seed", np.array([1, 2], np.int64), "INT64"),
        ("mask_ratio", np.array([1], np.float64), "FP64"),
        ("colour", np.array([1], np.int32), "INT32"),
    ],
)
def test_a_wrong_type_shape_or_name_is_invalid_argument_and_named(
    server: ServerProcess, pictures: dict[str, bytes], name: str, array: np.ndarray, kind: str
) -> None:
    wrong = grpc_client.InferInput(name, array.shape, kind)
    wrong.set_data_from_numpy(array)
    with (
        grpc_client.InferenceServerClient(server.grpc_url) as client,
        pytest.raises(InferenceServerException, match=name) as refusal,
    ):
        client.infer("ic_portrait", [*tensors(pictures), wrong])
    assert refusal.value.status() == "StatusCode.INVALID_ARGUMENT"


def test_a_missing_picture_is_invalid_argument_and_named(server: ServerProcess, pictures: dict[str, bytes]) -> None:
    with pytest.raises(InferenceServerException, match="reference") as refusal:
        infer(server.grpc_url, profile=pictures["profile"])
    assert refusal.value.status() == "StatusCode.INVALID_ARGUMENT"


def test_metadata_says_what_was_done(server: ServerProcess, pictures: dict[str, bytes]) -> None:
    _, metadata = infer(
        server.grpc_url,
        seed=4,
        num_inference_steps=3,
        mask_ratio=0.7,
        scheduler="euler",
        guidance_scale=1.5,
        guidance_interval=[0.3, 0.7],
        reference_box=[0.1, 0.1, 0.6, 0.6],
        **pictures,
    )
    assert (metadata["seed"], metadata["steps"], metadata["scheduler"]) == (4, 3, "euler")
    assert (metadata["guidance_scale"], metadata["guidance_interval"]) == (1.5, [0.3, 0.7])
    assert (metadata["mask_ratio"], metadata["size"]) == (0.7, [128, 128])
    assert metadata["crops"]["profile"]["source"] == "face"
    assert metadata["crops"]["reference"]["source"] == "given"
    assert metadata["crops"]["reference"]["box"] == pytest.approx([0.1, 0.1, 0.6, 0.6], abs=0.01)
    assert -1 <= metadata["match_confidence"] <= 1
    assert list(metadata["stage_ms"]) == ["preprocess", "conditioning", "denoise", "decode", "postprocess"]
    assert all(duration > 0 for duration in metadata["stage_ms"].values())
    assert metadata["versions"]["preset"] == "demo-128"
    assert metadata["versions"]["engine"].startswith("onnxruntime-")


def test_an_absent_seed_is_drawn_and_reported(server: ServerProcess, pictures: dict[str, bytes]) -> None:
    (image,), metadata = infer(server.grpc_url, num_inference_steps=2, **pictures)
    (other,), _ = infer(server.grpc_url, num_inference_steps=2, **pictures)
    (again,), _ = infer(server.grpc_url, num_inference_steps=2, seed=metadata["seed"], **pictures)
    assert image == again
    assert image != other


@pytest.mark.parametrize("output_format", ["png", "jpeg", "webp"])
def test_files_are_of_the_asked_format_and_carry_the_generated_media_mark(
    server: ServerProcess, pictures: dict[str, bytes], output_format: str
) -> None:
    (image,), _ = infer(server.grpc_url, seed=1, num_inference_steps=2, output_format=output_format, **pictures)
    assert Image.open(io.BytesIO(image)).format == output_format.upper()
    assert MARK in image


def test_binary_http_gives_what_grpc_gives(server: ServerProcess, pictures: dict[str, bytes]) -> None:
    values = {"seed": 2, "num_inference_steps": 2, "profile_box": [0.0, 0.0, 1.0, 0.8], **pictures}
    with http_client.InferenceServerClient(server.http_url) as client:
        result = client.infer("ic_portrait", tensors(values, http_client))
        assert list(result.as_numpy("image")) == infer(server.grpc_url, **values)[0]
        with pytest.raises(InferenceServerException, match="seed: -2, expected 0") as refusal:
            client.infer("ic_portrait", tensors({**values, "seed": -2}, http_client))
    assert refusal.value.status() == "400"


def test_http_generate_takes_and_gives_base64(server: ServerProcess, pictures: dict[str, bytes]) -> None:
    texts = {name: base64.b64encode(data).decode() for name, data in pictures.items()}
    options = {"seed": 2, "num_inference_steps": 2}
    status, answer = generate(server.http_url, encoding="base64", **options, **texts)
    assert status == 200
    assert [base64.b64decode(answer["image"])] == infer(server.grpc_url, **options, **pictures)[0]
    assert json.loads(answer["metadata"])["seed"] == 2

    status, answer = generate(server.http_url, encoding="base64", num_portraits=2, **options, **texts)
    assert status == 200
    assert len(answer["image"]) == 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_inference_steps": 151}, "num_inference_steps: 151, expected 1..150"),
        ({"profile": "§§§"}, "profile: "),
        ({"colour": 3}, "colour: no such input"),
        ({"profile_box": [0.9, 0.9, 0.1, 0.1]}, "profile_box"),
    ],
)
def test_http_generate_refuses_with_status_400(
    server: ServerProcess, pictures: dict[str, bytes], change: dict[str, Any], message: str
) -> None:
    texts = {name: base64.b64encode(data).decode() for name, data in pictures.items()}
    status, answer = generate(server.http_url, **{"encoding": "base64", **texts, **change})
    assert status == 400
    assert answer["error"].startswith(message)


def test_the_streaming_model_answers_and_refuses_on_one_stream(
    server: ServerProcess, pictures: dict[str, bytes]
) -> None:
    answers: queue.Queue[tuple[Any, Any]] = queue.Queue()
    values = {"seed": 2, "num_inference_steps": 2, **pictures}
    with grpc_client.InferenceServerClient(server.grpc_url) as client:
        client.start_stream(lambda result, error: answers.put((result, error)))
        client.async_stream_infer("ic_portrait_stream", tensors(values))
        result, error = answers.get(timeout=60)
        assert error is None and result.as_numpy("step") == [1] and result.as_numpy("image") is None
        result, error = answers.get(timeout=60)
        assert error is None and result.as_numpy("step") == [2]
        assert list(result.as_numpy("image")) == infer(server.grpc_url, **values)[0]
        client.async_stream_infer("ic_portrait_stream", tensors({**values, "num_portraits": 0}))
        result, error = answers.get(timeout=60)
        assert result is None
        assert "num_portraits: 0, expected 1..8" in str(error)
        client.stop_stream()


def test_a_request_after_refusals_is_served(server: ServerProcess, pictures: dict[str, bytes]) -> None:
    for change, _ in BAD[:3]:
        with pytest.raises(InferenceServerException):
            infer(server.grpc_url, **{**pictures, **change})
    assert infer(server.grpc_url, num_inference_steps=1, **pictures)[0]
