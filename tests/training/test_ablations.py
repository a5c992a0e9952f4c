"""Each ablation takes away what it says and nothing else, and the command compares them."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from icportrait.nn import Checkpoint, load_checkpoint, random_checkpoint, save_checkpoint
from icportrait.nn.matching import split_canvas
from tests.tiny import TINY
from training import portraits
from training.ablations import FIGURES, Ablation, ablate, difference, main
from training.data import RenderedPairs
from training.evaluation_pairs import evaluation_pairs

pytestmark = pytest.mark.usefixtures("one_thread_and_one_seed")


def halves(ablation: Ablation, features: list[Tensor], flows: list[Tensor]) -> list[tuple[Tensor, Tensor]]:
    network = random_checkpoint(TINY).warping_network
    ablate(network, ablation)
    with torch.no_grad():
        for zero_conv in network.zero_convs:
            zero_conv.bias.fill_(0.5)
        return [split_canvas(residual) for residual in network.inject(features, flows)]


def test_each_ablation_changes_what_it_says() -> None:
    features = [
        torch.randn(2, item.channels, TINY.level_size(item.level), 2 * TINY.level_size(item.level))
        for item in TINY.residuals
    ]
    flows = [
        torch.randint(TINY.level_size(level) ** 2, (2, TINY.level_size(level) ** 2)) for level in range(TINY.levels)
    ]
    made = {ablation: halves(ablation, features, flows) for ablation in Ablation}
    # Where the profile's features are zero, the reference's own are all that F_ref's right half can have.
    unwarped = [torch.cat((torch.zeros_like(half), half), dim=3) for _, half in map(split_canvas, features)]
    reference_only = halves(Ablation.FULL, unwarped, flows)
    for index, (left, right) in enumerate(made[Ablation.FULL]):
        assert torch.equal(made[Ablation.NO_WARP][index][0], left)
        torch.testing.assert_close(made[Ablation.NO_WARP][index][1], reference_only[index][1])
        assert not torch.allclose(made[Ablation.NO_WARP][index][1], right, atol=0.01)
        assert (made[Ablation.NO_BYPASS][index][0] == 0.5).all() and not (left == 0.5).any()
        assert torch.equal(made[Ablation.NO_BYPASS][index][1], right)
        assert all(map(torch.equal, made[Ablation.NO_MASKING][index], (left, right)))


def test_differences_are_the_pairs_own() -> None:
    full = torch.tensor([10.0, 20.0, 30.0, torch.nan])
    apart = difference(full - torch.tensor([1.0, 2.0, 3.0, 4.0]), full)
    assert apart["mean"] == pytest.approx(-2) and apart["half_width"] == pytest.approx(1.96 / math.sqrt(3))
    assert math.isnan(difference(full[:1], full[:1])["half_width"])


@pytest.fixture
def command(tmp_path: Path, tiny_pairs: RenderedPairs, pair_cache: Path) -> Callable[..., int]:
    assert len(tiny_pairs) == 64  # rendered by now, so that the command finds them
    save_checkpoint(replace(random_checkpoint(TINY), num_inference_steps=3), tmp_path / "base")
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(
        f'[data]\npairs = 64\ncache = "{pair_cache}"\n[appearance]\nbatch = 2\nwarmup_steps = 0\nbf16 = false'
    )

    def run(*options: str) -> int:
        places = ["--base", str(tmp_path / "base"), "--out", str(tmp_path / "out"), "--recipe", str(recipe)]
        return main([*places, "--steps", "2", "--pairs", "2", "--threads", "1", "--device", "cpu", *options])

    return run


@pytest.mark.full
@pytest.mark.usefixtures("no_pictures")
def test_the_command_trains_and_compares_all_variants(
    command: Callable[..., int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    used: list[tuple[Checkpoint, dict[str, Any]]] = []
    make = portraits.make_portraits

    def spy(checkpoint: Checkpoint, *arguments: Any, **settings: Any) -> portraits.Portraits:
        used.append((checkpoint, settings))
        return make(checkpoint, *arguments, **settings)

    monkeypatch.setattr(portraits, "make_portraits", spy)
    assert command("--json", str(tmp_path / "figures.json")) == 0
    assert [settings["mask_ratio"] for _, settings in used] == [0.8, 0.8, 0.0, 0.8]
    ablated = ["inject" in vars(checkpoint.warping_network) for checkpoint, _ in used]
    assert ablated == [False, True, False, True]

    base = load_checkpoint(tmp_path / "base")
    for ablation, (checkpoint, _) in zip(Ablation, used, strict=True):
        directory = tmp_path / "out" / ablation.value.replace(" ", "-")
        record = json.loads((directory / "run.json").read_text())
        assert (record["step"], record["recipe"]["mask_ratio"]) == (2, 0.0 if ablation is Ablation.NO_MASKING else 0.8)
        for name in ("vae", "warping_network.matching_net", "warping_network.matching_head"):
            trained = _part(checkpoint, name)
            assert all(torch.equal(trained[key], value) for key, value in _part(base, name).items())
        # Drawn anew: it stays where a few steps of training take it, far from the base's.
        assert (_part(checkpoint, "unet")["conv_in.weight"] - _part(base, "unet")["conv_in.weight"]).abs().max() > 0.1

    written = json.loads((tmp_path / "figures.json").read_text())
    assert list(written["variants"]) == [ablation.value for ablation in Ablation]
    for variant in written["variants"].values():
        assert set(variant["figures"]) == set(variant["from_full"]) == set(FIGURES)
        for figure, value in variant["figures"].items():
            apart = value - written["variants"]["full"]["figures"][figure]
            assert variant["from_full"][figure]["mean"] == pytest.approx(apart, abs=1e-4)
    assert written["variants"]["full"]["figures"]["head_psnr_db"] == pytest.approx(_head_psnr(used[0][0]), abs=1e-3)
    printed = capsys.readouterr().out
    assert "2 training steps, 2 unseen pairs, 3 steps, guidance 1" in printed
    assert printed.count("from full (95 %)") == 3 and all(ablation.value in printed for ablation in Ablation)
    with Image.open(tmp_path / "out" / "ablations.png") as grid:
        assert grid.size == (7 * 132 - 4, 24 + 2 * 132 - 4)

    # A second call trains nothing: the runs are there.
    seconds = [path.stat().st_mtime_ns for path in sorted((tmp_path / "out").glob("*/state.pt"))]
    assert command() == 0
    assert [path.stat().st_mtime_ns for path in sorted((tmp_path / "out").glob("*/state.pt"))] == seconds
    assert capsys.readouterr().out == printed


def _part(checkpoint: Checkpoint, name: str) -> dict[str, Tensor]:
    module: Any = checkpoint
    for attribute in name.split("."):
        module = getattr(module, attribute)
    weights: dict[str, Tensor] = module.state_dict()
    return weights


def _head_psnr(checkpoint: Checkpoint) -> float:
    from training.evaluation import evaluate

    return evaluate(checkpoint, evaluation_pairs(TINY, 0, 2), guidance_scale=1.0).pictures["portrait"]["head_psnr_db"]


def test_errors_are_told_in_a_line(command: Callable[..., int], capsys: pytest.CaptureFixture[str]) -> None:
    assert command("--set", "step=1") == 1
    assert "step is unknown to AppearanceRecipe" in capsys.readouterr().err
    assert command("--base", "nowhere") == 1
    assert "nowhere" in capsys.readouterr().err
    for wrong in (["--pairs", "0"], ["--steps", "-1"]):
        with pytest.raises(SystemExit):
            command(*wrong)
