"""The demo of ``make demo`` and ``icportrait sweep``, through the real server."""

from __future__ import annotations

import io
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from icportrait_client import Versions
from icportrait_client.cli import main
from icportrait_client.sweep import LIGHTS, WHOLE, YAWS
from PIL import Image

from examples.comparison import CAPTION_PX, NAMES_PX, PANEL_PX, psnr_db, sheet
from examples.demo import HEADS, RANDOM_WEIGHTS, SYNTHETIC_ONLY, weights_note
from icportrait.deploy.repository import assemble
from icportrait.policy import ServingPolicy
from icportrait.server import ServerProcess
from tests.conftest import ROOT
from tests.e2e.caller import infer
from training.flow_picture import flow_picture

ROW_PX = CAPTION_PX + NAMES_PX + PANEL_PX


def test_the_demo_shows_the_portraits_and_how_they_came_about(demo_export: Path, tmp_path: Path) -> None:
    assemble(demo_export, tmp_path / "repository", ServingPolicy())
    command = [sys.executable, "-m", "examples.demo", "--export", demo_export, "--repository", tmp_path / "repository"]
    done = subprocess.run([*command, "--out", tmp_path], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    for stage in ("server start", "preprocess", "conditioning", "denoise", "decode", "postprocess", SYNTHETIC_ONLY):
        assert stage in done.stdout
    portrait, profile, reference, truth = (
        read(path) for path in (tmp_path / "portrait.png", HEADS.profile, HEADS.reference, HEADS.ground_truth)
    )
    assert portrait.size == (128, 128)
    comparison = read(tmp_path / "comparison.png")
    assert comparison.size == (6 * PANEL_PX, 2 * ROW_PX)
    heads, photographs = (
        [comparison.crop((x * PANEL_PX, y - PANEL_PX, (x + 1) * PANEL_PX, y)) for x in range(6)]
        for y in (ROW_PX, 2 * ROW_PX)
    )
    for column, picture in ((0, profile), (1, reference), (4, portrait), (5, truth)):
        shown = picture.resize((PANEL_PX, PANEL_PX), Image.Resampling.BICUBIC)
        assert heads[column].tobytes() == shown.tobytes(), column
    assert all(mine.tobytes() != other.tobytes() for mine, other in zip(photographs, heads, strict=True))
    assert photographs[5].getextrema() == ((255, 255),) * 3, "of the photographs there is no ground truth"
    figures = [float(figure) for figure in re.findall(r"([\d.]+) dB", done.stdout)]
    expected = [psnr_db(picture, truth) for picture in (portrait, reference, profile)]
    assert figures == pytest.approx(expected, abs=0.01)


def read(path: Path | None) -> Image.Image:
    assert path
    with Image.open(path) as picture:
        return picture.convert("RGB")


def test_the_demo_says_what_the_weights_are() -> None:
    assert weights_note(Versions(weights="random", preset="demo-128")) == RANDOM_WEIGHTS
    assert weights_note(Versions(weights="checkpoint", preset="demo-128")) == SYNTHETIC_ONLY
    assert weights_note(Versions(weights="checkpoint", preset="sd15-512")) == ""


def test_a_row_has_its_caption_above_its_panels() -> None:
    panel = {"flow": Image.new("RGB", (4, 4), "red")}
    with_caption, without = (sheet([("", panel), (caption, panel)]) for caption in ("photographs", ""))
    differing = np.nonzero((np.asarray(with_caption) != np.asarray(without)).any(-1))[0]
    assert ROW_PX <= differing.min() < differing.max() < ROW_PX + CAPTION_PX


def test_the_flows_colours_tell_directions_apart_and_leave_rest_white() -> None:
    side = 8
    rest = np.arange(side * side).reshape(side, side)
    assert np.asarray(flow_picture(rest)).min() == 255
    moved = rest.copy()
    moved[4, 1:3] += 2
    moved[4, 5:7] -= 2
    colours = np.asarray(flow_picture(moved))
    assert tuple(colours[4, 1]) != tuple(colours[4, 5])
    assert tuple(colours[0, 0]) == (255, 255, 255)


def test_a_sweep_asks_for_sixteen_portraits_and_shows_each(
    server: ServerProcess, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "strip.png"
    options = ["--url", server.grpc_url, "--seed", "5", "--steps", "3", "--json"]
    assert main(["sweep", "--profile", str(HEADS.profile), "--out", str(out), *options]) == 0
    printed = capsys.readouterr()
    answers = json.loads(printed.out)["portraits"]
    assert [answer.get("light", answer.get("yaw")) for answer in answers] == [each.degrees for each in (*LIGHTS, *YAWS)]
    assert {(answer["seed"], answer["steps"], answer["crops"]["reference"]["source"]) for answer in answers} == {
        (5, 3, "given")
    }
    assert printed.err.endswith("16 of 16 portraits\n")
    with Image.open(out) as picture:
        label, large = 128 // 6, 2 * 128 + 128 // 6
        assert picture.size == (large + 128 // 8 + 8 * 128, 2 * (128 + label))
        assert b"trainedAlgorithmicMedia" in picture.info["xmp"]
        strip = np.asarray(picture)
    for row, references in enumerate((LIGHTS, YAWS)):
        image = infer(
            server.grpc_url,
            profile=HEADS.profile.read_bytes(),
            reference=references[6].read(),
            reference_box=list(WHOLE),
            seed=5,
            num_inference_steps=3,
        )[0][0]
        x, y = large + 128 // 8 + 6 * 128, row * (128 + label) + label
        alone = np.asarray(Image.open(io.BytesIO(image)))
        np.testing.assert_array_equal(strip[y : y + 128, x : x + 128], alone)
