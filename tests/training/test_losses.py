"""The losses of the autoencoder and of matching are least where the truth is, and teach what they should."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from icportrait.nn import random_checkpoint
from icportrait.nn.matching import gather_features
from tests.tiny import TINY
from tests.training.tiny import generator, mean, stage, train, write_views
from training.data import PictureFolder, RenderedPairs
from training.recipe import Data

SIDE = TINY.latent_size
LEVELS = [TINY.level_size(level) for level in range(TINY.levels)]
NO = torch.zeros(8, dtype=torch.bool)
pytestmark = pytest.mark.usefixtures("one_thread_and_one_seed", "no_pictures")


# The autoencoder


def test_a_finished_autoencoder_has_standard_latents_and_the_same_pictures(tiny_pairs: RenderedPairs) -> None:
    trained = stage("vae", tiny_pairs, seed=3)
    vae, draws = trained.checkpoint.vae, generator(3)
    pictures = torch.cat([trained.draw(draws)[0].target for _ in range(8)])
    with torch.no_grad():
        vae.quant_conv.bias.add_(torch.linspace(-2, 2, 8))
        vae.quant_conv.weight.mul_(torch.tensor([0.3, 1, 2, 4, 0.01, 0.01, 0.01, 0.01]).view(8, 1, 1, 1))
        before = vae.encode(pictures).latent_dist
        expected = vae.decode(before.mode()).sample
        assert trained.finished().vae is vae
        after = vae.encode(pictures).latent_dist
        restored = vae.decode(after.mode()).sample
    latents = (after.mode() * vae.config.scaling_factor).transpose(0, 1).flatten(1)
    torch.testing.assert_close(latents.mean(1), torch.zeros(4), rtol=0, atol=1e-3)
    torch.testing.assert_close(latents.std(1), torch.ones(4), rtol=0, atol=1e-3)
    torch.testing.assert_close(restored, expected, rtol=1e-3, atol=1e-3)
    # The posterior is as narrow as before beside its means.
    spread = before.mode().transpose(0, 1).flatten(1).std(1) / after.mode().transpose(0, 1).flatten(1).std(1)
    torch.testing.assert_close(after.std * spread.view(1, 4, 1, 1), before.std, rtol=1e-3, atol=1e-4)


def test_the_autoencoder_learns(tiny_pairs: RenderedPairs, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"crop_px": 16, "batch": 8, "steps": 40, "warmup_steps": 5, "learning_rate": 1e-2}
    losses = train(stage("vae", tiny_pairs, **settings), tmp_path)
    assert mean(losses[-5:], "error") < 0.7 * mean(losses[:3], "error")
    assert mean(losses[-5:], "psnr") > mean(losses[:3], "psnr") + 2
    assert losses[0]["loss"] == pytest.approx(losses[0]["error"] + 2e-4 * losses[0]["kl"], rel=1e-5)


# Matching


def knowing(trained: Any, flows: list[Tensor], batch: Any) -> None:
    """Have the stage draw this batch, and its matching net give features that match by these flows."""

    def features(_: Tensor) -> list[tuple[Tensor, Tensor]]:
        sources = [torch.eye(side**2).view(1, side**2, side, side).expand(len(flows[0]), -1, -1, -1) for side in LEVELS]
        return [(source, gather_features(source, flow)) for source, flow in zip(sources, flows, strict=True)]

    trained.checkpoint.warping_network.matching_features = features
    trained.draw = lambda _: (batch, torch.arange(len(flows[0])) * 2)


def moved(flows: list[Tensor], cells: int) -> list[Tensor]:
    """Move every match of the flows so many cells too far to the right, round the edge."""
    return [flow // side * side + (flow % side + cells) % side for flow, side in zip(flows, LEVELS, strict=True)]


def test_the_matching_loss_is_least_at_the_true_cells(tiny_pairs: RenderedPairs) -> None:
    trained = stage("matching", tiny_pairs)
    batch = tiny_pairs.batch(torch.arange(8), NO, NO)
    assert batch.flows and batch.visibles
    losses = []
    for cells in range(4):
        knowing(trained, moved(batch.flows, cells), batch)
        losses.append(trained.loss(0.0, generator()))
    assert losses[0]["loss"] < losses[1]["loss"] < losses[2]["loss"] <= losses[3]["loss"]
    assert losses[0]["finest"] < losses[1]["finest"] < losses[2]["finest"]
    assert [float(row["within_one_cell"]) for row in losses] == pytest.approx([1, 1, 0, 0], abs=0.1)

    # Of what the profile doesn't show, as many cells count as the recipe says.
    unseen = [
        torch.where(seen, flow, other)
        for seen, flow, other in zip(batch.visibles, batch.flows, moved(batch.flows, 3), strict=True)
    ]
    excess = []
    for share in (0.0, 0.25, 1.0):
        shared = stage("matching", tiny_pairs, unseen_share=share)
        pair = []
        for flows in (batch.flows, unseen):
            knowing(shared, flows, batch)
            pair.append(float(shared.loss(0.0, generator())["loss"]))
        excess.append(pair[1] - pair[0])
    assert excess[0] == pytest.approx(0, abs=1e-5)
    assert 1e-3 < excess[1] < excess[2]


def test_the_softmax_hardens_while_training(tiny_pairs: RenderedPairs) -> None:
    checkpoint = random_checkpoint(TINY)

    def loss(progress: float, **settings: float) -> float:
        trained = stage("matching", tiny_pairs, checkpoint, **settings)
        return float(trained.loss(progress, generator())["loss"].detach())

    assert loss(1.0, temperature=0.2, final_temperature=0.05) == pytest.approx(loss(0.0, temperature=0.05), rel=1e-5)
    assert loss(0.5, temperature=0.2, final_temperature=0.05) == pytest.approx(loss(0.0, temperature=0.1), rel=1e-5)
    assert loss(0.0, temperature=0.2) != pytest.approx(loss(0.0, temperature=0.1), rel=1e-2)


def test_matching_learns(tiny_pairs: RenderedPairs, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"batch": 8, "steps": 60, "warmup_steps": 5, "learning_rate": 3e-3}
    # An easy case, so that seconds are enough: the reference is the target, in full view.
    settings |= {"mask_ratio": 0.0, "same_identity_share": 1.0, "flip": False}
    losses = train(stage("matching", tiny_pairs, **settings), tmp_path)
    chance = 5 / SIDE**2
    assert mean(losses[-10:], "within_one_cell") > max(6 * chance, 2 * mean(losses[:5], "within_one_cell"))
    assert mean(losses[-10:]) < 0.7 * mean(losses[:5])


@pytest.fixture
def folder(tmp_path: Path, tiny_pairs: RenderedPairs) -> PictureFolder:
    write_views(tmp_path / "views", tiny_pairs.pairs[:8])
    return PictureFolder(Data(pictures=str(tmp_path / "views")), TINY)


def test_views_without_a_known_correspondence_teach_matching(
    folder: PictureFolder, tiny_pairs: RenderedPairs, tmp_path: Path
) -> None:
    trained = stage("matching", folder)
    known = tiny_pairs.batch(torch.arange(8), NO, NO)
    batch = folder.batch(torch.arange(0, 16, 2), NO, NO)
    assert known.flows
    # Off the head nothing has moved.
    true = [torch.where(flow == 0, torch.arange(flow.shape[1]), flow) for flow in known.flows]
    losses = []
    for flows in (true, moved(true, 2), [flow.flip(1) for flow in true]):
        knowing(trained, flows, batch)
        losses.append(float(trained.loss(1.0, generator())["loss"]))
    assert losses[0] < 0.9 * losses[1] and losses[0] < 0.9 * losses[2]

    settings: dict[str, Any] = {"batch": 8, "steps": 40, "warmup_steps": 5, "learning_rate": 1e-2, "mask_ratio": 0.0}
    learnt = train(stage("matching", folder, **settings), tmp_path / "run")
    assert mean(learnt[-5:]) < 0.8 * mean(learnt[:3])


# The decoder once more


def test_the_decoder_learns_what_predictions_stand_for_and_no_latent_changes(
    tiny_pairs: RenderedPairs, tmp_path: Path
) -> None:
    settings: dict[str, Any] = {"steps": 30, "warmup_steps": 5, "learning_rate": 1e-2, "same_identity_share": 0.0}
    trained = stage("decoder", tiny_pairs, **settings)
    before = {name: value.clone() for name, value in trained.checkpoint.vae.state_dict().items()}
    losses = train(trained, tmp_path)
    assert mean(losses[-5:]) < 0.9 * mean(losses[:3])
    changed = {name for name, value in trained.checkpoint.vae.state_dict().items() if not value.equal(before[name])}
    assert changed and all(name.startswith(("decoder.", "post_quant_conv.")) for name in changed)


def test_the_decoder_is_trained_on_what_the_unet_predicts_and_on_true_latents(tiny_pairs: RenderedPairs) -> None:
    latents = {}
    for share in (0.0, 1.0):
        trained = stage("decoder", tiny_pairs, true_share=share)
        taken: list[Tensor] = []
        trained.decoded_loss = lambda latent, *_, taken=taken: taken.append(latent) or latent.sum()
        trained.loss(0.0, generator())
        (latents[share],) = taken
    batch, _ = trained.draw(generator())
    torch.testing.assert_close(latents[1.0], trained.encode(batch.target), rtol=0, atol=2e-3)
    assert (latents[0.0] - latents[1.0]).abs().mean() > 0.1
