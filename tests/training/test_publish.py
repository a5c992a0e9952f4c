"""A checkpoint as it is given away: half precision, its defaults, and the mean of several runs."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from icportrait.nn import Checkpoint, load_checkpoint, random_checkpoint, save_checkpoint
from icportrait.nn.random_weights import SCHEDULER_CONFIG
from tests.tiny import SMALL, TINY
from training.publish import main


@pytest.fixture
def runs(tmp_path: Path) -> list[Path]:
    """Write two runs' checkpoints of one geometry."""
    checkpoint = random_checkpoint(TINY)
    save_checkpoint(checkpoint, tmp_path / "run0")
    with torch.no_grad():
        for network in (checkpoint.unet, checkpoint.vae, checkpoint.warping_network.appearance_net):
            for parameter in network.parameters():
                parameter.add_(torch.randn_like(parameter))
    save_checkpoint(checkpoint, tmp_path / "run1")
    return [tmp_path / f"run{seed}" for seed in range(2)]


def publish(tmp_path: Path, *runs: Path) -> int:
    given = [argument for run in runs for argument in ("--checkpoint", str(run))]
    return main([*given, "--out", str(tmp_path / "out"), "--steps", "3", "--guidance", "1.5"])


@pytest.mark.parametrize("count", [1, 2])
def test_weights_are_the_runs_mean_in_half_precision(tmp_path: Path, runs: list[Path], count: int) -> None:
    assert publish(tmp_path, *runs[:count]) == 0
    published, *given = (load_checkpoint(path) for path in (tmp_path / "out", *runs[:count]))
    assert (published.num_inference_steps, published.guidance_scale) == (3, 1.5)
    for models in zip(published.models, *(each.models for each in given), strict=True):
        found, *expected = (model.state_dict() for model in models)
        for name, value in found.items():
            mean = torch.stack([each[name] for each in expected]).mean(0)
            torch.testing.assert_close(value, mean.half().float(), rtol=1e-3, atol=1e-6)
    assert next((tmp_path / "out" / "unet").glob("*.safetensors")).stat().st_size < 0.6 * (
        next((runs[0] / "unet").glob("*.safetensors")).stat().st_size
    )


@pytest.mark.parametrize(
    "other",
    [
        random_checkpoint(SMALL),
        random_checkpoint(TINY, 1),
        replace(random_checkpoint(TINY), scheduler_config={**SCHEDULER_CONFIG, "prediction_type": "epsilon"}),
    ],
    ids=["geometry", "prompt", "schedule"],
)
def test_runs_of_two_bases_have_no_mean(
    tmp_path: Path, runs: list[Path], capsys: pytest.CaptureFixture[str], other: Checkpoint
) -> None:
    save_checkpoint(other, tmp_path / "other")
    assert publish(tmp_path, *runs, tmp_path / "other") == 1
    assert (
        f"{tmp_path / 'other'}: isn't of the geometry, the schedule and the prompt of {runs[0]}"
        in capsys.readouterr().err
    )
    assert not (tmp_path / "out").exists()
