"""Evaluation of portraits: batches equal the reference pipeline, figures equal known values."""

from __future__ import annotations

import json
import math
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from icportrait.errors import InvalidRequest
from icportrait.nn import Checkpoint, ReferencePipeline, engine_modules, random_checkpoint, save_checkpoint
from tests.tiny import TINY
from training import evaluate as command
from training import evaluation as evaluation_module
from training.appearance import Part
from training.correspondence import correspondence
from training.evaluation import IDENTITY_PARTS, evaluate, picture_figures, warped
from training.evaluation_pairs import EvaluationPairs, evaluation_pairs, grids
from training.grids import flow_colours, picture_grid
from training.metrics import (
    colour_error,
    end_point_error,
    feature_distance,
    lab,
    matching_figures,
    mean_colour_error,
    psnr,
    ssim,
    ssim_map,
    vae_features,
)
from training.pairs import render_pairs
from training.portraits import Portraits, make_portraits, through_vae, whole_levels

SIDE, CELLS = TINY.image_size, TINY.latent_size
METHODS = ["portrait", "copy_reference", "copy_profile", "warp_only", "true_warp", "vae_ceiling"]
pytestmark = pytest.mark.usefixtures("one_thread_and_one_seed")


@pytest.fixture
def tiny() -> Checkpoint:
    return random_checkpoint(TINY)


@pytest.fixture(scope="module")
def rendered() -> EvaluationPairs:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    pairs = evaluation_pairs(TINY, seed=3, count=4)
    torch.set_num_threads(before)
    return pairs


def pictures(count: int, seed: int = 0, side: int = SIDE) -> Tensor:
    """Smooth random pictures ``[count, 3, side, side]`` uint8."""
    coarse = np.random.default_rng(seed).integers(0, 256, (count, 4, 4, 3), dtype=np.uint8)
    smooth = [cv2.resize(item, (side, side), interpolation=cv2.INTER_CUBIC) for item in coarse]
    return torch.from_numpy(np.stack(smooth)).permute(0, 3, 1, 2)


def columns(pictures_: Tensor, start: int, stop: int) -> Tensor:
    """Make a mask of whole columns, ``[N, h, w]`` bool."""
    mask = torch.zeros(len(pictures_), *pictures_.shape[2:], dtype=torch.bool)
    mask[:, :, start:stop] = True
    return mask


# Portraits


@pytest.mark.parametrize("guidance_scale", [None, 2.5])
def test_each_row_is_the_reference_pipelines_portrait(tiny: Checkpoint, guidance_scale: float | None) -> None:
    tiny = replace(tiny, guidance_scale=1.5)
    profile, reference, seeds = pictures(3, 1), pictures(3, 2), [7, 2**40, 0]
    options: dict[str, Any] = {"num_inference_steps": 3, "guidance_scale": guidance_scale, "mask_ratio": 0.6}
    made = make_portraits(tiny, profile, reference, seeds, batch_size=2, **options)
    pipeline = ReferencePipeline.of(tiny)
    for row, seed in enumerate(seeds):
        pixels = [picture[row].permute(1, 2, 0).numpy() for picture in (profile, reference)]
        expected = pipeline(*pixels, seed=seed, **options)
        assert np.array_equal(made.visible[row].permute(1, 2, 0), expected.visible_pixels)
        assert np.array_equal(made.flows[0][row].view(CELLS, CELLS), expected.flow)
        assert made.match_confidence[row].item() == pytest.approx(expected.match_confidence, abs=1e-5)
        np.testing.assert_allclose(made.latent[row], expected.latents[0], atol=1e-3)
        portrait = made.picture[row].permute(1, 2, 0).numpy().astype(int)
        assert np.abs(portrait - expected.portraits[0]).max() <= 1
    assert [flow.shape for flow in made.flows] == [(3, grid**2) for grid in grids(TINY)]
    assert not torch.equal(make_portraits(tiny, profile, reference, [1, 2, 3], **options).latent, made.latent)


@pytest.mark.parametrize("scheduler", ["ddim", "euler"])
def test_other_schedulers_are_followed_too(tiny: Checkpoint, scheduler: str) -> None:
    profile, reference = pictures(1, 1), pictures(1, 2)
    made = make_portraits(tiny, profile, reference, [5], num_inference_steps=3, scheduler=scheduler)
    pixels = [picture[0].permute(1, 2, 0).numpy() for picture in (profile, reference)]
    expected = ReferencePipeline.of(tiny)(*pixels, seed=5, num_inference_steps=3, scheduler=scheduler)
    np.testing.assert_allclose(made.latent, expected.latents, atol=1e-3)


def test_pictures_may_be_floating_point(tiny: Checkpoint) -> None:
    profile, reference = pictures(2, 1), pictures(2, 2)
    floating = [picture.float() / 127.5 - 1 for picture in (profile, reference)]
    assert torch.equal(whole_levels(floating[0]), profile)
    assert whole_levels(torch.tensor([-1.2, 1.2])).tolist() == [0, 255]
    whole = make_portraits(tiny, profile, reference, [1, 2], num_inference_steps=2)
    made = make_portraits(tiny, *floating, [1, 2], num_inference_steps=2)
    assert torch.equal(made.picture, whole.picture) and torch.equal(made.visible, whole.visible)


def test_known_flows_are_warped_by_and_the_matches_are_told(tiny: Checkpoint) -> None:
    arguments = (tiny, pictures(3, 1), pictures(3, 2), [1, 2, 3])
    matched = make_portraits(*arguments, num_inference_steps=2, batch_size=2)
    same = make_portraits(*arguments, num_inference_steps=2, batch_size=2, known_flows=matched.flows)
    assert torch.equal(same.latent, matched.latent)
    others = [flow.roll(1, 0) for flow in matched.flows]
    known = make_portraits(*arguments, num_inference_steps=2, batch_size=2, known_flows=others)
    assert all((a - b).abs().max() > 1e-3 for a, b in zip(known.latent, matched.latent, strict=True))
    for flow, found in zip(known.flows, matched.flows, strict=True):
        assert torch.equal(flow, found)


def test_a_trainers_models_stay_in_training(tiny: Checkpoint) -> None:
    tiny.unet.train()
    seen: list[bool] = []
    tiny.unet.register_forward_hook(lambda module, _inputs, _output: seen.append(module.training))
    counts: list[int] = []
    make_portraits(
        tiny, pictures(3), pictures(3), range(3), num_inference_steps=2, batch_size=2, progress=counts.append
    )
    assert seen == [False] * 4
    assert counts == [2, 2, 1, 1]
    assert all(module.training for module in tiny.unet.modules())
    assert not any(module.training for module in tiny.vae.modules())


def test_pictures_that_do_not_fit_are_refused(tiny: Checkpoint) -> None:
    with pytest.raises(ValueError, match=r"profile: \[2, 3, 32, 32\], expected \[3, 3, 32, 32\]"):
        make_portraits(tiny, pictures(2), pictures(2), range(3))
    with pytest.raises(ValueError, match=r"reference: \[2, 3, 16, 16\]"):
        make_portraits(tiny, pictures(2), pictures(2, side=16), range(2))
    with pytest.raises(InvalidRequest, match="scheduler"):
        make_portraits(tiny, pictures(2), pictures(2), range(2), scheduler="heun")


def test_through_vae_encodes_and_decodes(tiny: Checkpoint) -> None:
    originals, modules = pictures(3), engine_modules(tiny)
    with torch.no_grad():
        expected = modules["vae_decoder"](modules["vae_encoder"](originals.permute(0, 2, 3, 1)))
    got = through_vae(tiny, originals, batch_size=2)
    assert (got.int() - expected.permute(0, 3, 1, 2).int()).abs().max() <= 1


# Metrics


def test_psnr_of_known_errors() -> None:
    truth = torch.full((2, 3, 8, 8), 100, dtype=torch.uint8)
    wrong = truth.clone()
    wrong[0] += 10
    wrong[1, :, :, :4] -= 20
    expected = [20 * math.log10(255 / 10), 20 * math.log10(255 / 20) + 10 * math.log10(2)]
    torch.testing.assert_close(psnr(wrong, truth), torch.tensor(expected))
    assert psnr(truth, truth).tolist() == [math.inf, math.inf]
    left, right = columns(truth, 0, 4), columns(truth, 4, 8)
    torch.testing.assert_close(psnr(wrong, truth, left)[1], torch.tensor(20 * math.log10(255 / 20)))
    assert psnr(wrong, truth, right)[1] == math.inf
    assert psnr(wrong, truth, torch.zeros_like(left)).isnan().all()


def test_ssim_is_that_of_gaussian_windows() -> None:
    first, second = pictures(2, 1), pictures(2, 2)
    second[1] = (first[1].float() * 0.5 + 40).to(torch.uint8)

    def blur(values: np.ndarray) -> np.ndarray:
        return cv2.GaussianBlur(values, (11, 11), 1.5)[5:-5, 5:-5]

    for row in range(2):
        x, y = (picture[row].permute(1, 2, 0).numpy().astype(np.float64) for picture in (first, second))
        luminance = (2 * blur(x) * blur(y) + 6.5025) / (blur(x) ** 2 + blur(y) ** 2 + 6.5025)
        deviations = blur(x**2) - blur(x) ** 2 + blur(y**2) - blur(y) ** 2
        structure = (2 * (blur(x * y) - blur(x) * blur(y)) + 58.5225) / (deviations + 58.5225)
        expected = (luminance * structure).mean(axis=2)
        np.testing.assert_allclose(ssim_map(first, second)[row], expected, atol=2e-4)
        assert ssim(first, second)[row].item() == pytest.approx(expected.mean(), abs=1e-4)
        mask = columns(first, 0, 12)
        assert ssim(first, second, mask)[row].item() == pytest.approx(expected[:, :7].mean(), abs=1e-4)
    assert ssim(first, first).tolist() == [1, 1]
    in_full = ssim_map(first, second)
    with torch.autocast("cpu", torch.bfloat16):  # as where a trainer's loss asks for it
        torch.testing.assert_close(ssim_map(first, second), in_full)


def test_features_are_those_of_the_vaes_down_blocks(tiny: Checkpoint) -> None:
    seen: list[Tensor] = []
    for block in tiny.vae.encoder.down_blocks:
        block.register_forward_hook(lambda _module, _inputs, output: seen.append(output))
    shown = pictures(2)
    features = vae_features(tiny.vae, shown)
    with torch.no_grad():
        tiny.vae.encode(shown.float() / 127.5 - 1)
    assert len(features) == len(tiny.vae.encoder.down_blocks) == len(seen) // 2
    for own, encoded in zip(features, seen[len(features) :], strict=True):
        torch.testing.assert_close(own, encoded)


def test_feature_distance_is_lpips_form_without_layer_weights() -> None:
    features, truth = ([torch.randn(2, 5, side, side) for side in (8, 4)] for _ in range(2))
    mask = torch.zeros(2, 16, 16, dtype=torch.bool)
    mask[:, :, :6] = True  # three columns of eight, one and a half of four

    def at(picture: int, layer: int, y: int, x: int) -> float:
        a, b = (each[layer][picture, :, y, x].double() for each in (features, truth))
        return float((a / a.norm() - b / b.norm()).square().sum())

    for picture in range(2):
        whole = sum(np.mean([at(picture, i, y, x) for y in range(n) for x in range(n)]) for i, n in ((0, 8), (1, 4)))
        assert feature_distance(features, truth)[picture].item() == pytest.approx(whole, abs=1e-5)
        fine = np.mean([at(picture, 0, y, x) for y in range(8) for x in range(3)])
        coarse = sum(at(picture, 1, y, 0) + 0.5 * at(picture, 1, y, 1) for y in range(4)) / 6
        assert feature_distance(features, truth, mask)[picture].item() == pytest.approx(fine + coarse, abs=1e-5)
    assert feature_distance([3 * layer for layer in truth], truth).tolist() == pytest.approx([0, 0], abs=1e-5)
    assert feature_distance([-layer for layer in truth], truth).tolist() == pytest.approx([8, 8])
    assert feature_distance(features, truth, torch.zeros_like(mask)).isnan().all()


def test_lab_has_the_known_values_of_primaries_and_opencvs_elsewhere() -> None:
    colours = torch.randint(0, 256, (500, 3), dtype=torch.uint8)
    known = {
        (0, 0, 0): (0, 0, 0),
        (255, 255, 255): (100, 0, 0),
        (255, 0, 0): (53.24, 80.09, 67.20),
        (0, 255, 0): (87.73, -86.18, 83.18),
        (0, 0, 255): (32.30, 79.19, -107.86),
    }
    torch.testing.assert_close(lab(torch.tensor(list(known))), torch.tensor(list(known.values())), atol=0.03, rtol=0)
    expected = cv2.cvtColor(colours.float().div(255).numpy()[None], cv2.COLOR_RGB2LAB)[0]
    np.testing.assert_allclose(lab(colours), expected, atol=0.3)  # OpenCV's table has steps of a quarter


def test_colour_error_is_a_distance_in_lab_under_the_mask() -> None:
    truth = torch.zeros(1, 3, 4, 4, dtype=torch.uint8)
    wrong = truth.clone()
    wrong[..., :2] = 255
    torch.testing.assert_close(colour_error(wrong, truth), torch.tensor([50.0]), atol=1e-3, rtol=0)
    torch.testing.assert_close(
        colour_error(wrong, truth, columns(truth, 0, 2)), torch.tensor([100.0]), atol=1e-3, rtol=0
    )
    assert colour_error(wrong, truth, columns(truth, 2, 4)).item() == 0


def test_mean_colours_forgive_places_and_need_enough_pixels() -> None:
    truth = pictures(2)
    mirrored = truth.flip(3)
    mask = columns(truth, 8, 24)
    assert mean_colour_error(mirrored, truth, mask, 1).max() < 1e-3 < colour_error(mirrored, truth, mask).min()
    mask[1] = False
    mask[1, 0, :5] = True
    assert mean_colour_error(mirrored, truth, mask, 6).isnan().tolist() == [False, True]
    assert mean_colour_error(mirrored, truth, mask, 5)[1] > 0
    white, black = (torch.full((1, 3, 4, 4), level, dtype=torch.uint8) for level in (255, 0))
    error = mean_colour_error(white, black, columns(white, 0, 2), 1)
    torch.testing.assert_close(error, torch.tensor([100.0]), atol=1e-3, rtol=0)


def test_end_point_errors_are_euclidean() -> None:
    truth = torch.tensor([[0, 5, 15, 3]])
    flow = torch.tensor([[0, 10, 3, 8]])  # by 0 and 0, 1 and 1, 3 down, 2 down and 3 across of a grid of 4
    expected = torch.tensor([[0, math.sqrt(2), 3, math.sqrt(13)]])
    torch.testing.assert_close(end_point_error(flow, truth, 4), expected)


def test_matching_figures_count_visible_cells_in_latent_cells() -> None:
    truth = torch.arange(16).view(1, 16)
    flow, visible = truth.clone(), torch.zeros(1, 16, dtype=torch.bool)
    visible[0, :4] = True
    flow[0, 1], flow[0, 2], flow[0, 9] = 2, 10, 0  # one cell off, two cells off, and one that doesn't count
    figures = matching_figures(flow, truth, visible, grid=4, latent_size=8)
    assert (figures.end_point_error, figures.within_one_latent_cell, figures.within_one_own_cell) == (1.5, 0.5, 0.75)
    assert figures.unmoved_within_one_own_cell == 1
    moved = matching_figures(flow, truth.roll(2), visible, grid=4, latent_size=4)
    assert moved.unmoved_within_one_own_cell == 0
    assert math.isnan(matching_figures(flow, truth, torch.zeros_like(visible), 4, 8).end_point_error)


# Pairs and their evaluation


def test_pairs_are_unseen_identities_with_true_flows(rendered: EvaluationPairs) -> None:
    truth = render_pairs(3, 4, 1.0, SIDE, evaluation=True)
    assert not rendered.same_identity.any()
    for name in ("profile", "reference", "target"):
        got, expected = getattr(rendered, name), getattr(truth, name).image
        torch.testing.assert_close(got.float() / 255, expected, atol=0.5 / 255 + 1e-6, rtol=0)
    assert torch.equal(rendered.target_part, truth.target.part)
    assert torch.equal(rendered.target_head, truth.target.head_mask)
    for grid in grids(TINY):
        flow, visible = correspondence(truth.profile, truth.target, grid)
        got = rendered.flow(grid, grids(TINY))
        assert torch.equal(got[0], flow) and torch.equal(got[1], visible)
    later = evaluation_pairs(TINY, seed=3, count=1, first=2)
    assert (later.target.int() - rendered.target[2:3].int()).abs().max() <= 1


def test_warped_moves_whole_cells() -> None:
    picture = torch.arange(3 * 36, dtype=torch.uint8).view(1, 3, 6, 6)
    flow = torch.arange(9).view(1, 9)
    assert torch.equal(warped(picture, flow, 2), picture)
    flow[0, 0] = 5
    moved = warped(picture, flow, 2)
    assert torch.equal(moved[..., :2, :2], picture[..., 2:4, 4:6])
    assert torch.equal(moved[..., 2:, :], picture[..., 2:, :])


def test_a_parts_colour_counts_where_the_part_is(tiny: Checkpoint) -> None:
    blank = torch.full((1, 3, SIDE, SIDE), 90, dtype=torch.uint8)
    part = torch.full((1, SIDE, SIDE), int(Part.BACKGROUND), dtype=torch.uint8)
    part[0, 4:12], part[0, 12:14], part[0, 20, :7] = int(Part.SKIN), int(Part.LIPS), int(Part.IRIS)
    nothing = torch.zeros(1, 0)
    pairs = EvaluationPairs(blank, blank, blank, part > 0, torch.zeros(1) > 0, nothing, nothing, target_part=part)
    wrong = blank.clone()
    wrong[0, 0, 12:14] = 200
    figures = {name: value.item() for name, value in picture_figures(wrong, pairs, tiny.vae).items()}
    assert figures["skin_delta_e"] == 0 and figures["lips_delta_e"] > 20
    assert math.isnan(figures["iris_delta_e"]) and math.isnan(figures["hair_delta_e"])  # 7 pixels, and none
    assert figures["head_psnr_db"] < figures["whole_psnr_db"]
    assert figures["head_delta_e"] > figures["whole_delta_e"]
    assert figures["head_feature_distance"] > figures["whole_feature_distance"] > 0


def test_evaluation_has_every_figure_and_repeats_itself(tiny: Checkpoint, rendered: EvaluationPairs) -> None:
    counts: list[int] = []
    first = evaluate(tiny, rendered, num_inference_steps=2, batch_size=3, progress=counts.append)
    assert sum(counts) == 4 * 3
    figures = first.to_dict()
    again = evaluate(random_checkpoint(TINY), rendered, num_inference_steps=2, batch_size=3)
    assert json.dumps(again.to_dict(), allow_nan=False) == json.dumps(figures, allow_nan=False)
    assert evaluate(tiny, rendered, num_inference_steps=2, seed=9).to_dict()["gain_db"] != figures["gain_db"]
    assert "samples" not in figures
    assert list(figures["pictures"]) == METHODS
    assert (figures["pairs"], figures["num_inference_steps"], figures["guidance_scale"]) == (4, 2, 1.0)
    assert [level["grid"] for level in figures["matching"]] == grids(TINY)
    for name in METHODS:
        assert name.replace("_", " ") in first.table()
        assert f"{figures['pictures'][name]['head_psnr_db']:.2f}" in first.table()


def test_baselines_are_what_they_are_called(tiny: Checkpoint, rendered: EvaluationPairs) -> None:
    evaluation = evaluate(tiny, rendered, num_inference_steps=2)
    made = make_portraits(tiny, rendered.profile, rendered.reference, range(4), num_inference_steps=2)
    expected = {
        "portrait": made.picture,
        "copy_reference": rendered.reference,
        "copy_profile": rendered.profile,
        "warp_only": warped(rendered.profile, made.flows[0], TINY.vae_factor),
        "vae_ceiling": through_vae(tiny, rendered.target),
    }
    for name, picture in expected.items():
        head = psnr(picture, rendered.target, rendered.target_head)
        assert evaluation.pictures[name]["head_psnr_db"] == pytest.approx(head.mean().item(), abs=1e-3), name
        whole = ssim(picture, rendered.target).mean().item()
        assert evaluation.pictures[name]["whole_ssim"] == pytest.approx(whole, abs=1e-3), name
        features = [vae_features(tiny.vae, each) for each in (picture, rendered.target)]
        for region, mask in (("head", rendered.target_head), ("whole", None)):
            distance = feature_distance(*features, mask).mean().item()
            assert evaluation.pictures[name][f"{region}_feature_distance"] == pytest.approx(distance, abs=1e-5), name
    heads = {name: psnr(picture, rendered.target, rendered.target_head) for name, picture in expected.items()}
    best = max("copy_reference", "copy_profile", key=lambda name: heads[name].mean())
    gains = heads["portrait"] - heads[best]
    assert evaluation.best_copy == best
    assert evaluation.gain_db == pytest.approx(gains.mean().item(), abs=1e-3)
    assert evaluation.gain_half_width_db == pytest.approx(1.96 * gains.std().item() / 2, abs=1e-3)
    below = (heads["vae_ceiling"] - heads["portrait"]).mean().item()
    assert evaluation.below_ceiling_db == pytest.approx(below, abs=1e-3)
    true_flow, _ = rendered.flow(CELLS, grids(TINY))
    off_head = true_flow == 0
    true_flow[off_head] = torch.arange(CELLS**2).expand_as(true_flow)[off_head]
    true_warp = warped(rendered.profile, true_flow, TINY.vae_factor)
    for region, mask in (("head", rendered.target_head), ("whole", None)):
        expected_db = psnr(true_warp, rendered.target, mask).mean().item()
        assert evaluation.pictures["true_warp"][f"{region}_psnr_db"] == pytest.approx(expected_db, abs=1e-3)
    assert evaluation.pictures["true_warp"]["head_psnr_db"] > evaluation.pictures["warp_only"]["head_psnr_db"] + 1


def test_the_truth_itself_has_no_error(
    tiny: Checkpoint, rendered: EvaluationPairs, monkeypatch: pytest.MonkeyPatch
) -> None:
    true_flows = tuple(rendered.flow(grid, grids(TINY))[0] for grid in grids(TINY))
    perfect = Portraits(rendered.target, torch.zeros(4), rendered.reference, true_flows, torch.ones(4))
    monkeypatch.setattr(evaluation_module, "make_portraits", lambda *_args, **_options: perfect)
    evaluation = evaluate(tiny, rendered)
    portrait = evaluation.pictures["portrait"]
    assert portrait["head_psnr_db"] == portrait["whole_psnr_db"] == math.inf
    assert portrait["head_ssim"] == portrait["whole_ssim"] == 1
    assert portrait["head_feature_distance"] == portrait["whole_feature_distance"] == 0
    assert {portrait[f"{name}_delta_e"] for name in ("head", "whole", "skin", "lips")} == {0.0}
    assert evaluation.pictures["copy_reference"]["skin_delta_e"] > 1
    assert evaluation.to_dict()["pictures"]["portrait"]["head_psnr_db"] is None  # JSON knows no infinity
    for level in evaluation.matching:
        assert (level.end_point_error, level.within_one_latent_cell, level.within_one_own_cell) == (0, 1, 1)
        assert level.unmoved_within_one_own_cell < 1
    assert 0 < evaluation.pairs_with_part["skin"] <= 4
    assert list(evaluation.pairs_with_part) == [part.name.lower() for part in IDENTITY_PARTS]
    assert torch.equal(evaluation.samples["ground truth"], rendered.target)


# Grids


def test_a_grid_has_each_picture_in_its_place() -> None:
    red, blue = torch.zeros(2, 3, 8, 8, dtype=torch.uint8), torch.zeros(2, 3, 4, 4, dtype=torch.uint8)
    red[0, 0], blue[1, 2] = 200, 100
    sheet = np.asarray(picture_grid({"red": red, "blue": blue}, panel_px=16))
    assert sheet.shape == (24 + 2 * 16 + 4, 2 * 16 + 4, 3)
    assert sheet[24:40, :16].reshape(-1, 3).tolist() == [[200, 0, 0]] * 256
    assert sheet[44:60, 20:].reshape(-1, 3).tolist() == [[0, 0, 100]] * 256
    assert not sheet[24:40, 20:].any() and not sheet[44:60, :16].any()
    assert (sheet[:24, :18] < 255).any() and (sheet[:24, 20:] < 255).any()  # titles


@pytest.mark.parametrize(
    ("columns_", "message"),
    [
        ({"a": torch.zeros(2, 3, 4, 4), "b": torch.zeros(1, 3, 4, 4)}, "columns"),
        ({"flow": torch.zeros(2, 3, 4, 4)}, r"flow: .* torch.float32, expected"),
        ({"flow": torch.zeros(2, 4, 4, dtype=torch.uint8)}, r"flow: \[2, 4, 4\]"),
        ({}, "columns"),
    ],
)
def test_other_columns_are_refused(columns_: dict[str, Tensor], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        picture_grid(columns_)


def test_flow_colours_tell_directions_and_lengths() -> None:
    still = torch.arange(64)
    right, down, little = still.roll(-4), still.roll(-32), still.roll(-1)
    colours = flow_colours(torch.stack((still, right, down, little))).int()
    assert colours.shape == (4, 3, 8, 8)
    assert (colours[0] == 255).all()
    assert colours[1, :, 0, 0].tolist() == [255, 0, 0]
    assert (colours[2, :, 0, 0] - colours[1, :, 0, 0]).abs().max() > 100
    assert 100 < colours[3, 1, 0, 0] < 155  # half the strength of a quarter of the side
    assert torch.equal(flow_colours(right.view(1, 8, 8)), colours[1:2].to(torch.uint8))


# The command


@pytest.fixture
def checkpoint_directory(tmp_path: Path, tiny: Checkpoint) -> Path:
    save_checkpoint(tiny, tmp_path / "checkpoint")
    return tmp_path / "checkpoint"


def run(directory: Path, *arguments: str) -> int:
    return command.main(["--checkpoint", str(directory), "--out", str(directory.parent / "out"), *arguments])


def test_the_command_writes_figures_and_pictures(
    checkpoint_directory: Path,
    tiny: Checkpoint,
    rendered: EvaluationPairs,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(command, "_RENDERED_TOGETHER", 3)
    figures = checkpoint_directory.parent / "figures.json"
    settings = ["--pairs", "4", "--seed", "3", "--steps", "2", "--guidance", "1.5", "--device", "cpu"]
    assert run(checkpoint_directory, *settings, "--json", str(figures)) == 0
    assert "head PSNR" in capsys.readouterr().out
    expected = evaluate(tiny, rendered, num_inference_steps=2, guidance_scale=1.5, seed=3).to_dict()
    written = json.loads(figures.read_text())
    assert (written["checkpoint"], written["seed"]) == (str(checkpoint_directory), 3)
    assert written["gain_db"] == pytest.approx(expected["gain_db"], abs=0.05)
    assert set(written) == set(expected) | {"checkpoint", "seed", "variety"}
    with Image.open(checkpoint_directory.parent / "out" / "grid.png") as grid:
        assert grid.size == (8 * 132 - 4, 24 + 4 * 132 - 4)

    assert run(checkpoint_directory, *settings, "--json") == 0
    assert json.loads(capsys.readouterr().out) == written


def test_a_sweep_finds_the_best_of_all_settings(
    checkpoint_directory: Path,
    tiny: Checkpoint,
    rendered: EvaluationPairs,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(command, "SWEEP_STEPS", (2, 3))
    monkeypatch.setattr(command, "SWEEP_GUIDANCE", (1.0, 2.0))
    figures = checkpoint_directory.parent / "sweep.json"
    assert run(checkpoint_directory, "--sweep", "--pairs", "4", "--seed", "3", "--json", str(figures)) == 0
    assert "NaN" not in figures.read_text()
    trials = json.loads(figures.read_text())["trials"]
    assert {(trial["num_inference_steps"], trial["guidance_scale"]) for trial in trials} == {
        (2, 1.0),
        (2, 2.0),
        (3, 1.0),
        (3, 2.0),
    }
    for trial in trials:
        steps, scale = trial["num_inference_steps"], trial["guidance_scale"]
        assert trial["unet_rows"] == steps * (2 if scale > 1 else 1)
        expected = evaluate(tiny, rendered, num_inference_steps=steps, guidance_scale=scale, seed=3)
        assert trial["head_psnr_db"] == pytest.approx(expected.pictures["portrait"]["head_psnr_db"], abs=1e-3)
    assert trials[0]["head_psnr_db"] == max(trial["head_psnr_db"] for trial in trials)
    (starred,) = [line for line in capsys.readouterr().out.splitlines() if line.endswith("*")]
    assert starred.split()[:2] == [str(trials[0]["num_inference_steps"]), f"{trials[0]['guidance_scale']:g}"]


def test_a_sweep_tries_intervals_at_one_setting(
    checkpoint_directory: Path,
    tiny: Checkpoint,
    rendered: EvaluationPairs,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(command, "SWEEP_INTERVALS", ((0.0, 0.0), (0.0, 0.5), (0.0, 1.0)))
    settings = ("--sweep-intervals", "--pairs", "4", "--seed", "3", "--steps", "4", "--guidance", "3", "--json")
    assert run(checkpoint_directory, *settings) == 0
    trials = json.loads(capsys.readouterr().out)["trials"]
    assert {(*trial["guidance_interval"], trial["unet_rows"]) for trial in trials} == {
        (0.0, 0.0, 4),
        (0.0, 0.5, 6),
        (0.0, 1.0, 8),
    }
    found = {trial["guidance_interval"][1]: trial["head_psnr_db"] for trial in trials}
    assert len(set(found.values())) == 3
    for end, options in (0.0, {"guidance_scale": 1.0}), (0.5, {"guidance_scale": 3.0, "guidance_interval": (0.0, 0.5)}):
        expected = evaluate(tiny, rendered, num_inference_steps=4, seed=3, **options)
        assert found[end] == pytest.approx(expected.pictures["portrait"]["head_psnr_db"], abs=1e-3)


def test_settings_are_not_chosen_on_the_pairs_that_are_reported(
    checkpoint_directory: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(command, "SWEEP_STEPS", (2,))
    monkeypatch.setattr(command, "SWEEP_GUIDANCE", (1.0,))
    seeds = []
    for options in ([], ["--sweep"]):
        assert run(checkpoint_directory, "--pairs", "1", "--steps", "2", "--json", *options) == 0
        seeds.append(json.loads(capsys.readouterr().out)["seed"])
    assert seeds == [0, 1]


def test_a_missing_checkpoint_is_named_with_what_to_do(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(tmp_path / "nowhere") == 1
    message = capsys.readouterr().err
    assert str(tmp_path / "nowhere") in message and "--checkpoint" in message and "git checkout" in message
    assert not (tmp_path / "out").exists()
    (tmp_path / "empty").mkdir()
    assert run(tmp_path / "empty") == 1
    assert "model_index.json" in capsys.readouterr().err


def test_what_cannot_work_is_refused_before_any_pair_is_rendered(
    checkpoint_directory: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(checkpoint_directory, "--json", str(checkpoint_directory / "none" / "figures.json")) == 1
    assert "--json" in capsys.readouterr().err
    assert run(checkpoint_directory, "--steps", "2000") == 1
    assert "2000 steps" in capsys.readouterr().err
    for wrong in (["--guidance", "0.5"], ["--pairs", "0"], ["--seed", "-1"]):
        with pytest.raises(SystemExit):
            run(checkpoint_directory, *wrong)
        assert wrong[0] in capsys.readouterr().err


def test_every_portrait_field_has_a_row_for_each_pair(tiny: Checkpoint) -> None:
    made = make_portraits(tiny, pictures(3), pictures(3), range(3), num_inference_steps=1, batch_size=2)
    values = [getattr(made, field.name) for field in fields(made)]
    tensors = [tensor for value in values for tensor in (value if isinstance(value, tuple) else [value])]
    assert all(len(tensor) == 3 and tensor.device.type == "cpu" for tensor in tensors)
