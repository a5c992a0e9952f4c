"""The committed checkpoint, served: as good as the same weights in plain PyTorch, and better than no model at all."""

from __future__ import annotations

import io
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from PIL import Image

from icportrait.nn import Checkpoint, ReferencePipeline
from icportrait.server import ServerProcess
from tests.e2e.caller import infer
from tests.exports import DEMO_CHECKPOINT
from training.evaluation_pairs import EvaluationPairs, evaluation_pairs
from training.metrics import psnr

PAIRS = 6
WHOLE = [0.0, 0.0, 1.0, 1.0]


@pytest.fixture(scope="module")
def pairs(demo_checkpoint: Checkpoint) -> EvaluationPairs:
    return evaluation_pairs(demo_checkpoint.preset, seed=0, count=PAIRS)


def test_the_checkpoint_is_small() -> None:
    assert sum(file.stat().st_size for file in DEMO_CHECKPOINT.rglob("*") if file.is_file()) <= 30e6


def test_served_portraits_are_as_near_the_truth_as_the_reference_pipelines(
    demo_checkpoint: Checkpoint, server: ServerProcess, pairs: EvaluationPairs
) -> None:
    pipeline = ReferencePipeline.of(demo_checkpoint)
    served, expected = [], []
    for index in range(PAIRS):
        profile, reference = (
            np.ascontiguousarray(picture[index].permute(1, 2, 0).numpy())
            for picture in (pairs.profile, pairs.reference)
        )
        expected.append(torch.from_numpy(pipeline(profile, reference, seed=index).portraits[0]).permute(2, 0, 1))
        boxes = {"profile_box": WHOLE, "reference_box": WHOLE}
        images, _ = infer(server.grpc_url, seed=index, profile=png(profile), reference=png(reference), **boxes)
        with Image.open(io.BytesIO(images[0])) as picture:
            served.append(torch.from_numpy(np.asarray(picture.convert("RGB")).copy()).permute(2, 0, 1))
    for mask in (pairs.target_head, None):
        here, there = (psnr(torch.stack(made), pairs.target, mask).mean() for made in (served, expected))
        assert abs(float(here - there)) < 0.1
    copies = [psnr(copy, pairs.target, pairs.target_head).mean() for copy in (pairs.reference, pairs.profile)]
    assert psnr(torch.stack(served), pairs.target, pairs.target_head).mean() > max(copies) + 2


def test_callers_at_once_get_the_bytes_that_each_gets_alone(server: ServerProcess, pictures: dict[str, bytes]) -> None:
    """Send requests of 18 rows to 16 slots, joining and leaving while others run."""
    swapped = {"profile": pictures["reference"], "reference": pictures["profile"]}
    requests = [
        {
            "seed": 100 + index,
            "num_inference_steps": 2 + index,
            "mask_ratio": (0.8, 0.5)[index // 4],
            "guidance_scale": (1.0, 1.5, 4.0)[index % 3],
            "guidance_interval": ([0.0, 1.0], [0.3, 0.8])[index // 4],
            "num_portraits": (1, 2, 1, 1)[index % 4],
            "scheduler": ("dpmpp_2m", "euler", "ddim")[index % 3],
            **(swapped if index % 2 else pictures),
        }
        for index in range(8)
    ]
    alone = [infer(server.grpc_url, **request)[0] for request in requests]
    assert len({image for images in alone for image in images}) == 10
    spans: list[tuple[float, float]] = []

    def call(index: int, wait_s: float) -> list[bytes]:
        time.sleep(wait_s)
        started_s = time.monotonic()
        images, _ = infer(server.grpc_url, **requests[index])
        spans.append((started_s, time.monotonic()))
        return images

    generator = np.random.default_rng(0)
    order, waits_s = generator.permutation(8), generator.uniform(0, 0.3, 8)
    with ThreadPoolExecutor(8) as threads:
        together = dict(zip(order, threads.map(call, order, waits_s), strict=True))
    assert [together[index] for index in range(8)] == alone
    assert max(sum(start <= now < end for start, end in spans) for now, _ in spans) >= 4


def png(pixels: np.ndarray) -> bytes:
    data = io.BytesIO()
    Image.fromarray(pixels).save(data, "PNG")
    return data.getvalue()
