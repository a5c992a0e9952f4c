"""Each stage's loss is least where the truth is, and teaches what it should."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from icportrait.nn import random_checkpoint
from icportrait.nn.matching import gather_features, split_canvas
from icportrait.nn.random_weights import SCHEDULER_CONFIG
from icportrait.sampling import NoiseSchedule
from tests.tiny import TINY
from tests.tiny_training import generator, mean, stage, train, write_views
from training import stages
from training.data import PictureFolder, RenderedPairs
from training.recipe import Data, RecipeError

SIDE = TINY.latent_size
LEVELS = [TINY.level_size(level) for level in range(TINY.levels)]
NO = torch.zeros(8, dtype=torch.bool)
pytestmark = pytest.mark.usefixtures("one_thread_and_one_seed")


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
    """The flows with every match so many cells too far to the right, round the edge."""
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


# Appearance


@pytest.fixture
def appearance(tiny_pairs: RenderedPairs) -> Callable[..., Any]:
    def build(prediction_type: str = "v_prediction", **settings: Any) -> Any:
        scheduler = SCHEDULER_CONFIG | {"prediction_type": prediction_type}
        checkpoint = replace(random_checkpoint(TINY), scheduler_config=scheduler)
        return stage("appearance", tiny_pairs, checkpoint, **settings)

    return build


def levels(trained: Any, timestep: Tensor) -> tuple[Tensor, Tensor]:
    """How much of the clean latent and of the noise each row has."""
    schedule = NoiseSchedule.from_config(trained.checkpoint.scheduler_config)
    signal = torch.tensor(schedule.alphas_cumprod)[timestep].view(-1, 1, 1, 1).sqrt().float()
    return signal, (1 - signal**2).sqrt()


def latents_seen(trained: Any) -> dict[str, Tensor]:
    """Latents by kind, once the stage has encoded them."""
    seen: dict[str, Tensor] = {}
    encode = trained.encode_known
    trained.encode_known = lambda kind, *rest: seen.setdefault(kind, encode(kind, *rest))
    return seen


def test_only_the_right_half_counts(appearance: Callable[..., Any]) -> None:
    trained = appearance()
    expected = float(trained.loss(0.0, generator())["loss"].detach())
    for half, counts in ((slice(0, SIDE), False), (slice(SIDE, None), True)):

        def change(_module: Any, _inputs: Any, output: tuple[Tensor], half: slice = half) -> tuple[Tensor]:
            changed = output[0].clone()
            changed[..., half] += 1
            return (changed,)

        hook = trained.checkpoint.unet.register_forward_hook(change)
        assert (float(trained.loss(0.0, generator())["loss"].detach()) != expected) is counts
        hook.remove()


def test_the_left_half_is_held_as_in_serving(appearance: Callable[..., Any]) -> None:
    trained = appearance(batch=8)
    seen, inputs = latents_seen(trained), []
    trained.checkpoint.unet.register_forward_pre_hook(lambda _module, given: inputs.extend(given))
    trained.loss(0.0, generator())
    canvas, timestep, prompt = inputs
    signal, noise_level = levels(trained, timestep)
    left, right = split_canvas(canvas)
    noises = [(left - signal * seen["profile"]) / noise_level, (right - signal * seen["target"]) / noise_level]
    for noise in noises:
        assert abs(noise.mean()) < 0.05 and abs(noise.flatten(1).std(1) - 1).max() < 0.1
    assert abs((noises[0] * noises[1]).mean()) < 0.05  # each half has its own
    assert len(timestep.unique()) > 4
    assert torch.equal(prompt, trained.checkpoint.prompt_embedding.expand(8, -1, -1))


@pytest.mark.parametrize(("bias", "expected"), [(1.0, 1 / 2), (4.0, 4 / 5)])
def test_strong_noise_comes_as_often_as_the_recipe_says(
    appearance: Callable[..., Any], bias: float, expected: float
) -> None:
    trained, timesteps = appearance(batch=64, noise_bias=bias), []

    def unet(canvas: Tensor, timestep: Tensor, *_: Any, **__: Any) -> tuple[Tensor]:
        timesteps.extend(timestep.tolist())
        return (canvas,)

    trained.checkpoint.unet.forward = unet
    trained.loss(0.0, generator())
    assert len(timesteps) == 64 and min(timesteps) >= 0 and max(timesteps) < 1000
    assert sum(timesteps) / 64 / 1000 == pytest.approx(expected, abs=0.1)
    assert bias > 1 or min(timesteps) < 100


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_the_unet_is_to_predict_what_the_scheduler_says(appearance: Callable[..., Any], prediction_type: str) -> None:
    trained = appearance(prediction_type)
    seen = latents_seen(trained)
    losses = {}
    for told in ("epsilon", "v_prediction"):

        def oracle(canvas: Tensor, timestep: Tensor, *_: Any, told: str = told, **__: Any) -> tuple[Tensor]:
            signal, noise_level = levels(trained, timestep)
            clean = torch.cat((seen["profile"], seen["target"]), dim=3)
            noise = (canvas - signal * clean) / noise_level
            return (noise if told == "epsilon" else signal * noise - noise_level * clean,)

        trained.checkpoint.unet.forward = oracle
        losses[told] = float(trained.loss(0.0, generator())["loss"])
    assert losses.pop(prediction_type) < 1e-6
    assert min(losses.values()) > 0.1


def test_rows_lose_all_of_f_ref_or_nothing(appearance: Callable[..., Any]) -> None:
    trained = appearance(batch=16, f_ref_drop=0.5)
    given: list[Tensor] = []

    def record(_module: Any, _inputs: Any, named: dict[str, Any]) -> None:
        given.extend([*named["down_block_additional_residuals"], named["mid_block_additional_residual"]])

    trained.checkpoint.unet.register_forward_pre_hook(record, with_kwargs=True)
    trained.loss(0.0, generator())
    reached = torch.stack([residual.flatten(1).any(1) for residual in given])
    assert len(given) == len(TINY.residuals) and torch.equal(reached, reached[:1].expand_as(reached))
    assert 3 < reached[0].sum() < 13


def test_what_is_dropped_teaches_the_appearance_net_nothing(appearance: Callable[..., Any]) -> None:
    for drop, learns in ((0.0, True), (1.0, False)):
        trained = appearance(f_ref_drop=drop)
        trained.loss(0.0, generator())["loss"].backward()
        for name in ("appearance_net", "zero_convs"):
            gradients = [parameter.grad for parameter in trained.trained[name].parameters()]
            assert any(gradient is not None and bool(gradient.any()) for gradient in gradients) is learns
        assert trained.checkpoint.unet.conv_out.weight.grad.any()
        network = trained.checkpoint.warping_network
        assert not any(parameter.requires_grad for parameter in network.matching_net.parameters())
        assert not any(parameter.requires_grad for parameter in trained.checkpoint.vae.parameters())
    frozen = appearance(train_unet=False)
    assert not any(parameter.requires_grad for parameter in frozen.checkpoint.unet.parameters())
    assert set(frozen.trained) == {"appearance_net", "zero_convs"}


@pytest.mark.parametrize("flows", ["true", "matched"])
def test_features_are_warped_by_the_flows_of_the_recipe(appearance: Callable[..., Any], flows: str) -> None:
    trained = appearance(flows=flows)
    network, used = trained.checkpoint.warping_network, []
    inject = network.inject
    network.inject = lambda appearance, flows: used.extend(flows) or inject(appearance, flows)
    trained.loss(0.0, generator())
    network.inject = inject
    drawn = generator()
    batch, numbers = trained.draw(drawn)
    _, canvas = trained.canvas(batch, numbers, drawn)
    with torch.no_grad():
        latents, visibility = split_canvas(canvas[:, :4]), split_canvas(canvas[:, 4:])[1]
        found = network(*latents, visibility)[len(TINY.residuals) : -1]
    expected = batch.flows if flows == "true" else [flow.flatten(1).long() for flow in found]
    assert all(torch.equal(got, wanted) for got, wanted in zip(used, expected, strict=True))
    assert not torch.equal(batch.flows[0], found[0].flatten(1).long())


def test_true_flows_need_rendered_pairs(folder: PictureFolder) -> None:
    with pytest.raises(RecipeError, match='flows is "true", but no correspondence is known'):
        stage("appearance", folder, flows="true").loss(0.0, generator())


@pytest.mark.parametrize("kind", ["matching", "appearance"])
def test_matches_are_compared_in_full_precision(
    tiny_pairs: RenderedPairs, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    types = []

    def spy(costs: Tensor) -> tuple[Tensor, Tensor]:
        types.append(costs.dtype)
        confidence, flow = costs.max(dim=-1)
        return flow, confidence

    monkeypatch.setattr(stages, "best_match", spy)
    with torch.autocast("cpu", torch.bfloat16):
        loss = stage(kind, tiny_pairs).loss(0.0, generator())["loss"]
    assert set(types) == {torch.float32} and len(types) == TINY.levels
    loss.backward()
