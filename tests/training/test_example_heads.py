"""The committed rendered heads are what the committed command renders."""

from __future__ import annotations

import tomllib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from icportrait_client.sweep import LIGHTS, YAWS
from PIL import Image

from tests.conftest import ROOT
from training.example_heads import DEMO_FOLDER, SWEEP_FOLDER, demo_pictures, main, sweep_pictures

LEVELS_APART = 0.02
"""Mean absolute difference, in levels of 0..255, that another CPU's rounding may make. Between torch's instruction sets
it was 0.00004 at most: single pixels by one level. A light or a view one degree off makes 0.2 or more."""


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def committed(path: Path) -> np.ndarray:
    with Image.open(ROOT / path) as picture:
        return np.asarray(picture)


@pytest.mark.parametrize("pictures", [demo_pictures, sweep_pictures])
def test_the_committed_heads_are_rendered_again(pictures) -> None:
    for path, rendered in pictures().items():
        kept = committed(path)
        assert kept.shape == rendered.shape == (128, 128, 3)
        apart = np.abs(kept.astype(float) - rendered).mean()
        assert apart < LEVELS_APART, f'{path}: {apart:.2f} levels apart; run "python -m training.example_heads"'


def test_the_command_writes_every_file_and_the_repository_has_no_other(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--out", str(tmp_path)]) == 0
    printed = {Path(line) for line in capsys.readouterr().out.splitlines()}
    for root in (tmp_path, ROOT):
        assert {path.relative_to(root) for f in (DEMO_FOLDER, SWEEP_FOLDER) for path in (root / f).iterdir()} == printed
    assert len(printed) == 3 + 16
    assert sum((tmp_path / path).stat().st_size for path in printed if path.is_relative_to(SWEEP_FOLDER)) < 300_000


def test_the_clients_wheel_takes_the_references_along() -> None:
    settings = tomllib.loads((ROOT / "client" / "pyproject.toml").read_text())
    package = ROOT / "client" / "src" / "icportrait_client"
    packed = {
        path
        for pattern in settings["tool"]["setuptools"]["package-data"]["icportrait_client"]
        for path in package.glob(pattern)
    }
    assert packed >= set((ROOT / SWEEP_FOLDER).iterdir())


def test_the_light_comes_from_where_the_label_says() -> None:
    for reference in LIGHTS:
        pixels = committed(SWEEP_FOLDER / reference.file_name).astype(float)
        left_cheek, right_cheek = pixels[60:72, 50:60].mean(), pixels[60:72, 74:84].mean()
        assert (right_cheek - left_cheek) * np.sign(reference.degrees) > 5, reference


def test_the_head_turns_to_where_the_label_says() -> None:
    """Check that brows and pupils, all that is dark at that height, move to the picture's right with the yaw."""
    places = []
    for reference in YAWS:
        pixels = committed(SWEEP_FOLDER / reference.file_name)[40:60]
        places.append(float(np.nonzero(pixels.max(-1) < 110)[1].mean()))
    assert places == sorted(places)
    assert places[-1] - places[0] > 30


def test_the_ground_truth_has_the_references_surroundings_and_the_profiles_hair() -> None:
    profile, reference, truth = (
        committed(DEMO_FOLDER / f"{name}.png").astype(float) for name in ("profile", "reference", "ground_truth")
    )
    top = slice(0, 3)
    assert np.abs(truth[top] - reference[top]).max() < 2
    assert np.abs(truth[top] - profile[top]).mean() > 20

    def orange(pixels: np.ndarray) -> int:
        red, green, blue = np.moveaxis(pixels, -1, 0)
        return int(((red > 120) & (red - blue > 80) & (green < 0.65 * red)).sum())

    assert orange(profile) > 1000
    assert orange(truth) > 1000
    assert orange(reference) < 200
