"""The pipeline from files to files on a bare tritonserver, which knows nothing of a gateway."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import tritonclient.grpc as grpc_client
from PIL import Image
from tritonclient.utils import InferenceServerException

from benchmarks.bare_triton import BareTriton, bare_triton
from benchmarks.pairs import run_pairs
from benchmarks.settings import PairsSettings
from icportrait.contract import ENGINES, STANDALONE_ENSEMBLE
from icportrait.deploy.repository import assemble
from icportrait.pictures.imaging import DIGITAL_SOURCE_TYPE
from icportrait.policy import ServingPolicy
from icportrait.presets import DEMO_128
from tests.e2e.caller import series, tensors
from tests.trivial_engines import write_trivial_export

UNET_MS = 20


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> Iterator[BareTriton]:
    """Start a tritonserver with two slots, and places for two more."""
    folder = tmp_path_factory.mktemp("standalone")
    write_trivial_export(folder / "export", DEMO_128)
    engines = {name: {"1": 1.0} for name in ENGINES} | {"unet": {"1": UNET_MS}}
    (folder / "table.json").write_text(json.dumps({"device": "test device", "engines": engines}))
    table = str(folder / "table.json")
    policy = ServingPolicy(runtime="simulated", latency_table=table, slots=2, max_queued_slots=2)
    assemble(folder / "export", folder / "repository", policy, standalone=True)
    with bare_triton(folder / "repository", folder / "log") as running:
        yield running


def ask(bare: BareTriton, pictures: dict[str, bytes], **options: Any) -> tuple[list[bytes], dict[str, Any]]:
    with grpc_client.InferenceServerClient(bare.grpc_url) as client:
        result = client.infer(STANDALONE_ENSEMBLE, tensors({**pictures, "request": json.dumps(options)}))
    return list(result.as_numpy("image")), json.loads(result.as_numpy("metadata")[0])


def refused(bare: BareTriton, pictures: dict[str, bytes], **options: Any) -> str:
    with pytest.raises(InferenceServerException) as refusal:
        ask(bare, pictures, **options)
    where = f"in ensemble '{STANDALONE_ENSEMBLE}', "
    return f"{refusal.value.status().removeprefix('StatusCode.')}: {refusal.value.message().replace(where, '')}"


def test_files_come_back_with_metadata_and_no_lease_is_needed(bare: BareTriton, pictures: dict[str, bytes]) -> None:
    images, metadata = ask(bare, pictures, seed=5, num_portraits=2, num_inference_steps=4, output_format="webp")
    side = DEMO_128.image_size
    assert [(Image.open(io.BytesIO(image)).size, Image.open(io.BytesIO(image)).format) for image in images] == [
        ((side, side), "WEBP")
    ] * 2
    assert all(DIGITAL_SOURCE_TYPE.encode() in image for image in images)
    assert (metadata["seed"], metadata["steps"], metadata["simulated"]) == (5, 4, True)
    assert metadata["stage_ms"]["denoise"] >= 4 * UNET_MS and metadata["rows_shared"] == 2


def test_callers_at_once_share_steps(bare: BareTriton, pictures: dict[str, bytes]) -> None:
    with ThreadPoolExecutor(2) as threads:
        answers = list(threads.map(lambda seed: ask(bare, pictures, seed=seed, num_inference_steps=20), range(2)))
    assert max(metadata["rows_shared"] for _, metadata in answers) > 1


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"num_portraits": 2**32 + 1}, "INVALID_ARGUMENT: num_portraits: 4294967297, expected INT32"),
        ({"mask_ratio": 3}, "INVALID_ARGUMENT: mask_ratio: 3.0, expected 0.0..0.98"),
        ({"num_portraits": 3}, "INVALID_ARGUMENT: num_portraits: 3 portraits at guidance_scale 1 need 3 slots"),
        ({"colour": 1}, "INVALID_ARGUMENT: colour: no such input"),
    ],
)
def test_a_callers_mistake_is_named_under_its_code(
    bare: BareTriton, pictures: dict[str, bytes], options: dict[str, Any], text: str
) -> None:
    assert text in refused(bare, pictures, **options)


def test_a_picture_that_is_none_is_the_callers_mistake(bare: BareTriton, pictures: dict[str, bytes]) -> None:
    assert "INVALID_ARGUMENT: profile: " in refused(bare, {**pictures, "profile": b"no picture"})


def test_a_full_queue_is_unavailable_and_says_when_to_try_again(bare: BareTriton, pictures: dict[str, bytes]) -> None:
    def outcome(seed: int) -> str:
        try:
            ask(bare, pictures, seed=seed, num_inference_steps=60)
        except InferenceServerException as error:
            return f"{error.status()}: {error.message()}"
        return "served"

    with ThreadPoolExecutor(6) as threads:
        outcomes = list(threads.map(outcome, range(6)))
    assert outcomes.count("served") == 4
    for text in set(outcomes) - {"served"}:
        assert text.startswith("StatusCode.UNAVAILABLE") and "the queue is full" in text and "retry_after_ms: " in text
    assert series(bare.metrics_url)['icportrait_refusals_total{reason="queue_slots"}'] == 2


def test_a_deadline_is_kept_or_told(bare: BareTriton, pictures: dict[str, bytes]) -> None:
    text = refused(bare, pictures, num_inference_steps=150, deadline_ms=200)
    assert text.startswith("UNAVAILABLE: ") and "deadline_ms: " in text


def test_it_can_be_timed_beside_another_server(bare: BareTriton) -> None:
    report = run_pairs(PairsSettings(bare.grpc_url, bare.grpc_url, rounds=1, requests=2, num_inference_steps=2))
    for medians in report["rounds"][0]["median_ms"]:
        assert 2 * UNET_MS <= medians["denoise"] < medians["whole"] and medians["beside_stages"] > 0


def test_the_private_pipeline_is_not_there(bare: BareTriton) -> None:
    with grpc_client.InferenceServerClient(bare.grpc_url) as client:
        models = {model["name"] for model in client.get_model_repository_index(as_json=True)["models"]}
    assert models == {STANDALONE_ENSEMBLE, "preprocess", "denoise", "postprocess", "vae_encoder", "vae_decoder"}
