"""The ensemble's stages without Triton."""

from __future__ import annotations

import base64
import json
from dataclasses import replace

import numpy as np
import pytest

from icportrait.contract import Tensors, bytes_tensor, engine_specs, pipeline_spec, stage_specs
from icportrait.diffusion.masking import HIDDEN_LEVEL
from icportrait.errors import InvalidRequest
from icportrait.manifest import Manifest
from icportrait.metrics import STAGES
from icportrait.pictures.imaging import MAX_FILE_BYTES
from icportrait.policy import ServingPolicy
from icportrait.presets import DEMO_128
from icportrait.request import PortraitRequest
from icportrait.serving.stages import FrontStage, PostprocessStage, PreprocessStage, StandalonePreprocessStage
from tests.conftest import EXAMPLES
from tests.trivial_engines import write_trivial_export

HOPPER, ASTRONAUT = ((EXAMPLES / f"{name}.jpg").read_bytes() for name in ("hopper", "astronaut"))


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    return write_trivial_export(tmp_path_factory.mktemp("export"), DEMO_128)


def public(profile: bytes = HOPPER, reference: bytes = ASTRONAUT, **tensors: np.ndarray) -> Tensors:
    return {"profile": bytes_tensor(profile), "reference": bytes_tensor(reference), **tensors}


@pytest.mark.parametrize("is_stream", [False, True])
def test_the_front_passes_pictures_on_untouched_and_fills_in_the_rest(manifest: Manifest, is_stream: bool) -> None:
    checked, inputs = FrontStage(manifest, ServingPolicy(), is_stream)(public(seed=np.array([3])), "a key")
    assert list(inputs) == [tensor.name for tensor in stage_specs(DEMO_128)["preprocess"].inputs]
    assert inputs["profile"][0] == HOPPER
    request = PortraitRequest.from_json(inputs["request"][0])
    assert (request.seed, request.guidance_scale) == (3, manifest.defaults["guidance_scale"])
    assert request.num_inference_steps == manifest.defaults["num_inference_steps"]
    assert (request.key, request.is_streamed, request.preview_every) == ("a key", is_stream, 0)
    assert request == checked


def test_only_a_streams_front_takes_previews(manifest: Manifest) -> None:
    tensors = public(preview_every=np.array([5], np.int32))
    with pytest.raises(InvalidRequest, match="preview_every: 5, expected 0: ic_portrait answers once"):
        FrontStage(manifest, ServingPolicy(), is_stream=False)(tensors)
    request, _ = FrontStage(manifest, ServingPolicy(), is_stream=True)(tensors)
    assert request.preview_every == 5


@pytest.mark.parametrize(
    ("encoding", "size", "refused"),
    [
        (b"binary", MAX_FILE_BYTES, False),
        (b"binary", MAX_FILE_BYTES + 1, True),
        (b"base64", MAX_FILE_BYTES * 4 // 3, False),
        (b"base64", MAX_FILE_BYTES * 4 // 3 + 2, True),
    ],
)
def test_the_front_refuses_files_that_are_too_large_for_their_encoding(
    manifest: Manifest, encoding: bytes, size: int, refused: bool
) -> None:
    front = FrontStage(manifest, ServingPolicy(), is_stream=False)
    tensors = public(profile=b"x" * size, encoding=bytes_tensor(encoding))
    if refused:
        with pytest.raises(InvalidRequest, match="profile: the file has 20,000,001 bytes"):
            front(tensors)
    else:
        front(tensors)


def test_the_front_refuses_more_slots_and_steps_than_there_are(manifest: Manifest) -> None:
    eight = public(num_portraits=np.array([8], np.int32), guidance_scale=np.array([2.0], np.float32))
    with pytest.raises(InvalidRequest, match="need 16 slots, this server has 8"):
        FrontStage(manifest, ServingPolicy(slots=8), is_stream=False)(eight)
    FrontStage(manifest, ServingPolicy(slots=16), is_stream=False)(eight)
    short = replace(manifest, scheduler_config=manifest.scheduler_config | {"num_train_timesteps": 100})
    with pytest.raises(InvalidRequest):
        FrontStage(short, ServingPolicy(), is_stream=False)(public(num_inference_steps=np.array([150], np.int32)))


def preprocessed(manifest: Manifest, **changes: object) -> Tensors:
    request, inputs = FrontStage(manifest, ServingPolicy(), is_stream=False)(public(seed=np.array([3])))
    request = replace(request, **changes)
    if request.encoding == "base64":
        for name in ("profile", "reference"):
            inputs[name] = bytes_tensor(base64.b64encode(inputs[name][0]))
    inputs["request"] = bytes_tensor(request.to_json())
    return PreprocessStage(DEMO_128)(inputs)


def standalone(manifest: Manifest, options: object, **policy: int) -> Tensors:
    text = options if isinstance(options, bytes) else json.dumps(options).encode()
    stage = StandalonePreprocessStage(manifest, ServingPolicy(**policy))
    return stage({"profile": bytes_tensor(HOPPER), "reference": bytes_tensor(ASTRONAUT), "request": bytes_tensor(text)})


def test_preprocess_gives_what_the_contract_says(manifest: Manifest) -> None:
    outputs = standalone(manifest, {"seed": 3})
    for tensor in stage_specs(DEMO_128)["preprocess"].outputs:
        assert outputs[tensor.name].shape == tensor.shape()
        assert outputs[tensor.name].dtype == np.dtype(tensor.dtype.numpy)
    pipeline = {tensor.name for tensor in pipeline_spec(DEMO_128).inputs}
    assert pipeline - {"request"} < set(preprocessed(manifest))
    encoder = engine_specs(DEMO_128)["vae_encoder"]
    assert encoder.check_inputs({"pixels": outputs["profile_pixels"]})["batch"] == 1


def test_the_reference_is_hidden_and_the_profile_is_not(manifest: Manifest) -> None:
    hidden, whole = preprocessed(manifest, mask_ratio=0.8), preprocessed(manifest, mask_ratio=0.0)
    assert np.array_equal(hidden["profile_pixels"], whole["profile_pixels"])
    share = (hidden["reference_pixels"] == HIDDEN_LEVEL).all(axis=-1).mean()
    assert share == pytest.approx(0.8, abs=0.01)
    assert hidden["visibility"].mean() == pytest.approx(0.2, abs=0.01)
    assert whole["visibility"].min() == 1


def test_base64_and_bytes_give_the_same_pixels(manifest: Manifest) -> None:
    binary, text = preprocessed(manifest), preprocessed(manifest, encoding="base64")
    assert np.array_equal(binary["reference_pixels"], text["reference_pixels"])


def test_the_report_says_where_each_crop_came_from(manifest: Manifest) -> None:
    report = json.loads(preprocessed(manifest, reference_box=(0.0, 0.0, 0.5, 0.5))["preprocess_report"][0])
    assert report["crops"]["profile"]["source"] == "face"
    assert report["crops"]["reference"]["source"] == "given"
    assert report["ended_ns"] > report["started_ns"]


# Standalone: a JSON object of options


def test_options_reach_the_request_and_the_rest_is_filled_in(manifest: Manifest) -> None:
    options = {
        "seed": 2**62,
        "num_portraits": 2,
        "guidance_scale": 2,
        "scheduler": "ddim",
        "profile_box": [0, 0.25, 1, 0.75],
    }
    request = PortraitRequest.from_json(standalone(manifest, options)["checked_request"][0])
    assert (request.seed, request.num_portraits, request.guidance_scale) == (2**62, 2, 2.0)
    assert (request.scheduler, request.profile_box) == ("ddim", (0.0, 0.25, 1.0, 0.75))
    assert request.num_inference_steps == manifest.defaults["num_inference_steps"]
    assert (request.key, request.is_streamed) == ("", False)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"num_portraits": 2**32 + 1}, "num_portraits: 4294967297, expected INT32"),
        ({"seed": 2**63}, "seed: 9223372036854775808, expected INT64"),
        ({"num_portraits": True}, "num_portraits: True, expected INT32"),
        ({"num_portraits": "1"}, "num_portraits: 1, expected INT32"),
        ({"num_portraits": 1.0}, "num_portraits: 1.0, expected INT32"),
        ({"num_portraits": None}, "num_portraits: None, expected INT32"),
        ({"num_portraits": [1, 2]}, r"num_portraits: shape is \[2\], expected \[1\]"),
        ({"guidance_scale": 1e300}, r"guidance_scale: 1e\+300, expected FP32"),
        ({"guidance_scale": float("nan")}, "guidance_scale: nan, expected FP32"),
        ({"scheduler": 3}, "scheduler: 3, expected BYTES"),
        ({"profile": "x"}, "profile: given as an option, expected a tensor"),
        ({"colour": 1}, "colour: no such input"),
        ({"preview_every": 2}, "preview_every: 2, expected 0"),
        ([1], "request: list, expected a JSON object"),
        (b"{", "request: no JSON"),
        (b"\xff", "request: no JSON"),
        (200_000 * b"[", "request: no JSON"),
    ],
)
def test_options_that_are_none_are_refused_by_name(manifest: Manifest, options: object, text: str) -> None:
    with pytest.raises(InvalidRequest, match=text):
        standalone(manifest, options)


def test_an_answer_says_where_its_time_went(manifest: Manifest) -> None:
    prepared = standalone(manifest, {"seed": 3, "num_portraits": 2, "output_format": "webp"})
    ended_ns = json.loads(prepared["preprocess_report"][0])["ended_ns"]
    times = {"arrived_ns": 2, "joined_ns": 5, "conditioned_ns": 10, "denoised_ns": 60}
    report = {name: ended_ns + milliseconds * 10**6 for name, milliseconds in times.items()}
    report |= {"match_confidence": 0.5, "engine": "labels", "numerics_id": "abc"}
    report |= {"warp_ms": 4.5, "rows_shared": 3.0, "engine_ms": 20.25}
    outputs = PostprocessStage(manifest, ServingPolicy())(
        {
            "portrait_pixels": np.zeros((2, 128, 128, 3), np.uint8),
            "request": prepared["checked_request"],
            "preprocess_report": prepared["preprocess_report"],
            "denoise_report": bytes_tensor(json.dumps(report).encode()),
        }
    )
    assert [image[8:12] for image in outputs["image"]] == [b"WEBP"] * 2
    metadata = json.loads(outputs["metadata"][0])
    assert (metadata["encode_ms"], metadata["queue_ms"], metadata["warp_ms"]) == (2, 3, 4.5)
    assert (metadata["rows_shared"], metadata["engine_ms"], metadata["numerics_id"]) == (3.0, 20.25, "abc")
    stages = metadata["stage_ms"]
    assert list(stages) == list(STAGES) and (stages["conditioning"], stages["denoise"]) == (10, 50)
    assert metadata["crops"]["profile"]["source"] == "face" and metadata["seed"] == 3
