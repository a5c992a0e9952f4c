"""A portrait of Stable Diffusion's size, served on this CPU: ``make test-full``. Its time and memory are printed."""

from __future__ import annotations

import io
import time
from pathlib import Path

import numpy as np
import pytest
from icportrait_client import PortraitClient, Portraits
from PIL import Image

from examples.comparison import psnr_db
from icportrait.contract import Array
from icportrait.presets import SD15_512
from icportrait.stub_processes import descendants
from tests.conftest import EXAMPLES, ROOT
from tests.e2e.supervised import supervised
from tests.full.conftest import CHECKPOINT, WHAT, Step, make

pytestmark = [pytest.mark.full, pytest.mark.timeout(3600)]

MEMORY_BUDGET_BYTES = 16 * 10**9
LEAST_PSNR_DB = 40.0
STEPS, SEED = 2, 7
WHOLE = (0.0, 0.0, 1.0, 1.0)
READY_TIMEOUT_S, ANSWER_TIMEOUT_S = 600, 1200


def pixels_of(name: str) -> Array:
    """An example's photograph, in the preset's size: nothing is cropped on the way."""
    with Image.open(EXAMPLES / name) as picture:
        return np.asarray(picture.convert("RGB").resize((SD15_512.image_size,) * 2))


PROFILE, REFERENCE = pixels_of("hopper.jpg"), pixels_of("astronaut.jpg")


def png(pixels: Array) -> bytes:
    data = io.BytesIO()
    Image.fromarray(pixels).save(data, "PNG")
    return data.getvalue()


def ask(url: str) -> Portraits:
    with PortraitClient(url, timeout_s=ANSWER_TIMEOUT_S) as client:
        return client.generate(
            profile=png(PROFILE),
            reference=png(REFERENCE),
            seed=SEED,
            num_inference_steps=STEPS,
            guidance_scale=1.0,
            profile_box=WHOLE,
            reference_box=WHOLE,
        )


def peak_bytes(pid: int) -> int:
    """The sum of what it and each process below took at its most, which all together never took more than."""
    status = [Path(f"/proc/{each}/status").read_text() for each in (pid, *descendants(pid))]
    return sum(int(text.partition("VmHWM:")[2].split()[0]) * 1024 for text in status)


def reference_portrait() -> Array:
    """The reference pipeline's, from the weights as they were exported."""
    import torch

    from icportrait.nn import ReferencePipeline, engine_modules, load_checkpoint

    torch.set_num_threads(2)
    checkpoint = load_checkpoint(CHECKPOINT)
    for module in engine_modules(checkpoint).values():
        module.half().float()
    pipeline = ReferencePipeline.of(checkpoint)
    made = pipeline(PROFILE, REFERENCE, seed=SEED, num_inference_steps=STEPS, guidance_scale=1.0)
    return made.portraits[0]


def test_a_served_portrait_is_the_reference_pipelines_and_the_same_twice(steps: list[Step], tmp_path: Path) -> None:
    assert "openvino" in make("repository", *WHAT).output
    began = time.monotonic()
    with supervised(ROOT / "build/repository/openvino", tmp_path, ready_timeout_s=READY_TIMEOUT_S) as server:
        ready = time.monotonic()
        first = ask(server.url)
        answered = time.monotonic()
        second = ask(server.url)
        peak = peak_bytes(server.process.pid)
    assert first.images == second.images
    assert first.metadata["versions"]["engine"].startswith("openvino-")
    expected = reference_portrait()
    likeness = psnr_db(first.picture(), Image.fromarray(expected))
    print(
        f"\nserved: ready after {ready - began:.0f} s, {STEPS} steps in {answered - ready:.0f} s, "
        f"all processes at most {peak / 1e9:.1f} GB, {likeness:.1f} dB to the reference pipeline"
    )
    assert expected.std() > 10, "or any two grey pictures would do"
    assert likeness >= LEAST_PSNR_DB
    assert peak <= MEMORY_BUDGET_BYTES
