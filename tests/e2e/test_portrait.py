"""Portraits from the real server: right, repeatable, and shaped by every input."""

from __future__ import annotations

import copy
import io
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from tritonclient.utils import InferenceServerException

from icportrait.deploy.repository import assemble
from icportrait.nn import Checkpoint, ReferencePipeline
from icportrait.nn.pipeline import ReferenceResult
from icportrait.pictures.faces import crop_to_square, find_crop
from icportrait.pictures.imaging import decode_picture
from icportrait.policy import ServingPolicy
from icportrait.presets import DEMO_128
from icportrait.server import Ports, ServerProcess
from tests.conftest import EXAMPLES, ROOT
from tests.e2e.caller import infer, until_metric

STEPS = 6
CLEAR_SEED = 17
"""Under this seed the best match of every position beats the second by 2e-5 or more, in every case below: two runtimes
agree on all of them (docs/adr/0003)."""


def pixels(image: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(image)).convert("RGB"))


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    error = np.mean((a.astype(np.float64) - b.astype(np.float64)) ** 2)
    return float("inf") if error == 0 else 10 * np.log10(255**2 / error)


def reference_portraits(checkpoint: Checkpoint, pictures: dict[str, bytes], **options: Any) -> ReferenceResult:
    """Return what plain PyTorch makes of a request."""
    crops = [
        crop_to_square(picture, find_crop(picture, None, f"{name}_box"), DEMO_128.image_size)
        for name, picture in ((name, decode_picture(data, name)) for name, data in pictures.items())
    ]
    return ReferencePipeline.of(checkpoint, "cpu")(*crops, seed=CLEAR_SEED, **options)


@pytest.mark.parametrize(
    "options",
    [
        {"num_inference_steps": 12},
        {"scheduler": "euler", "guidance_scale": 3.0, "num_portraits": 2, "num_inference_steps": STEPS},
        {"guidance_scale": 3.0, "guidance_interval": [0.3, 0.7], "num_portraits": 2, "num_inference_steps": STEPS},
        {"scheduler": "ddim", "mask_ratio": 0.25, "num_inference_steps": STEPS},
    ],
    ids=["default", "guided euler, two portraits", "guided on its way", "ddim, a quarter hidden"],
)
def test_served_portraits_equal_the_reference_pipelines(
    server: ServerProcess, demo_checkpoint: Checkpoint, pictures: dict[str, bytes], options: dict
) -> None:
    images, metadata = infer(server.grpc_url, seed=CLEAR_SEED, **pictures, **options)
    expected = reference_portraits(demo_checkpoint, pictures, **options)
    assert len(images) == options.get("num_portraits", 1)
    for image, portrait in zip(images, expected.portraits, strict=True):
        assert psnr(pixels(image), portrait) >= 50
    assert metadata["match_confidence"] == pytest.approx(expected.match_confidence, abs=1e-4)


def test_without_f_ref_they_would_not(demo_checkpoint: Checkpoint, pictures: dict[str, bytes]) -> None:
    without = copy.deepcopy(demo_checkpoint.warping_network)
    for zero_conv in without.zero_convs:
        zero_conv.weight.data.zero_()
        zero_conv.bias.data.zero_()
    portraits = [
        reference_portraits(checkpoint, pictures, num_inference_steps=STEPS).portraits[0]
        for checkpoint in (demo_checkpoint, replace(demo_checkpoint, warping_network=without))
    ]
    assert psnr(*portraits) < 40


def test_the_same_seed_gives_the_same_bytes_and_another_seed_others(
    server: ServerProcess, pictures: dict[str, bytes]
) -> None:
    first, again, other = (
        infer(server.grpc_url, seed=seed, num_inference_steps=STEPS, **pictures)[0] for seed in (5, 5, 6)
    )
    assert first == again
    assert first != other


def test_portrait_i_has_its_own_noise(server: ServerProcess, pictures: dict[str, bytes]) -> None:
    images, metadata = infer(server.grpc_url, seed=8, num_portraits=8, num_inference_steps=2, **pictures)
    assert len(set(images)) == 8
    assert metadata["num_portraits"] == 8
    assert infer(server.grpc_url, seed=8, num_inference_steps=2, **pictures)[0] == images[:1]


def test_profile_and_reference_each_shape_the_picture(server: ServerProcess, pictures: dict[str, bytes]) -> None:
    profile, reference = pictures["profile"], pictures["reference"]
    portraits = [
        pixels(infer(server.grpc_url, profile=a, reference=b, seed=5, num_inference_steps=STEPS)[0][0])
        for a, b in ((profile, reference), (reference, reference), (profile, profile))
    ]
    assert psnr(portraits[0], portraits[1]) < 40
    assert psnr(portraits[0], portraits[2]) < 40


@pytest.mark.full
def test_the_torch_runtime_serves_the_same_portrait(
    tmp_path: Path, server: ServerProcess, demo_export: Path, pictures: dict[str, bytes]
) -> None:
    assemble(demo_export, tmp_path / "repository", ServingPolicy(runtime="torch", engine_threads=1))
    assert not list((tmp_path / "repository").rglob("*.onnx"))
    with ServerProcess(tmp_path / "repository", Ports.free(), tmp_path / "server.log") as torch_server:
        images, metadata = infer(torch_server.grpc_url, seed=5, num_inference_steps=STEPS, **pictures)
    assert metadata["versions"]["engine"].startswith("torch-")
    expected, of_server = infer(server.grpc_url, seed=5, num_inference_steps=STEPS, **pictures)
    assert psnr(pixels(images[0]), pixels(expected[0])) >= 50, (metadata, of_server)


def test_the_twenty_line_script_gets_a_picture(server: ServerProcess, tmp_path: Path) -> None:
    script = EXAMPLES / "minimal.py"
    lines = [line for line in script.read_text().splitlines() if line and not line.startswith(("#", '"""'))]
    assert len(lines) <= 20
    out = tmp_path / "portrait.png"
    paths = [EXAMPLES / "hopper.jpg", EXAMPLES / "astronaut.jpg", out]
    subprocess.run([sys.executable, script, server.grpc_url, *paths], check=True, cwd=ROOT, timeout=120)
    with Image.open(out) as picture:
        assert picture.size == (128, 128)


def test_a_deadline_that_cannot_be_kept_is_refused_at_once(server: ServerProcess, pictures: dict[str, bytes]) -> None:
    """Ask for 150 steps, which take seconds here, as the server knows once it has served a request."""
    infer(server.grpc_url, num_inference_steps=1, **pictures)
    with pytest.raises(InferenceServerException, match="deadline_ms: 300, and it would take about") as refused:
        infer(server.grpc_url, num_inference_steps=150, deadline_ms=300, **pictures)
    assert refused.value.status() == "StatusCode.UNAVAILABLE"
    images, _ = infer(server.grpc_url, num_inference_steps=1, deadline_ms=60_000, **pictures)
    assert len(images) == 1


def test_a_late_request_joins_what_is_running(server: ServerProcess, pictures: dict[str, bytes]) -> None:
    """Send a short request while a long one is denoised. It doesn't wait for the long one's end."""
    with ThreadPoolExecutor(1) as pool:
        long = pool.submit(infer, server.grpc_url, num_inference_steps=60, guidance_scale=1.0, **pictures)
        until_metric(server.metrics_url, "icportrait_active_slots", 1)
        infer(server.grpc_url, num_inference_steps=1, **pictures)
        assert not long.done()
        assert len(long.result()[0]) == 1
