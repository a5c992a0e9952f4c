"""The appearance stage: the diffusion loss of the right half, the left half held, F_ref dropped, warped and taught."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from icportrait.diffusion.sampling import NoiseSchedule
from icportrait.nn import random_checkpoint
from icportrait.nn.engine_modules import decode
from icportrait.nn.matching import split_canvas
from icportrait.nn.random_weights import SCHEDULER_CONFIG
from tests.tiny import TINY
from tests.training.tiny import generator, stage, write_views
from training import stages
from training.data import PictureFolder, RenderedPairs
from training.recipe import Data, RecipeError

SIDE = TINY.latent_size
pytestmark = pytest.mark.usefixtures("one_thread_and_one_seed")


@pytest.fixture
def appearance(tiny_pairs: RenderedPairs) -> Callable[..., Any]:
    def build(prediction_type: str = "v_prediction", **settings: Any) -> Any:
        scheduler = SCHEDULER_CONFIG | {"prediction_type": prediction_type}
        checkpoint = replace(random_checkpoint(TINY), scheduler_config=scheduler)
        return stage("appearance", tiny_pairs, checkpoint, **settings)

    return build


def levels(trained: Any, timestep: Tensor) -> tuple[Tensor, Tensor]:
    """Return how much of the clean latent and of the noise each row has."""
    schedule = NoiseSchedule.from_config(trained.checkpoint.scheduler_config)
    signal = torch.tensor(schedule.alphas_cumprod)[timestep].view(-1, 1, 1, 1).sqrt().float()
    return signal, (1 - signal**2).sqrt()


def latents_seen(trained: Any) -> dict[str, Tensor]:
    """Return latents by kind, once the stage has encoded them."""
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


def test_true_flows_need_rendered_pairs(tiny_pairs: RenderedPairs, tmp_path: Path) -> None:
    write_views(tmp_path, tiny_pairs.pairs[:2])
    folder = PictureFolder(Data(pictures=str(tmp_path)), TINY)
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


def test_errors_on_the_head_weigh_more(appearance: Callable[..., Any], tiny_pairs: RenderedPairs) -> None:
    batch = tiny_pairs.batch(torch.arange(4), torch.zeros(4, dtype=torch.bool), torch.zeros(4, dtype=torch.bool))
    weights = appearance(head_weight=3.0).weights(batch)
    assert weights.shape == (4, 1, SIDE, SIDE) and float(weights.mean()) == pytest.approx(1)
    head = torch.nn.functional.avg_pool2d(batch.head.float().unsqueeze(1), TINY.vae_factor)
    on, off = weights[head == 1], weights[head == 0]
    assert len(on) and len(off)
    torch.testing.assert_close(on, 3 * off[:1].expand_as(on))
    assert float(appearance().weights(batch)) == 1
    assert float(appearance(head_weight=3.0).weights(replace(batch, head=None))) == 1


def test_heads_are_mirrored_with_their_pictures(tiny_pairs: RenderedPairs) -> None:
    index, no = torch.arange(4), torch.zeros(4, dtype=torch.bool)
    plain, mirrored = (tiny_pairs.batch(index, flip, no) for flip in (no, ~no))
    assert torch.equal(mirrored.head, plain.head.flip(2)) and not torch.equal(mirrored.head, plain.head)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_decoded_portraits_are_compared_with_the_targets(appearance: Callable[..., Any], prediction_type: str) -> None:
    trained = appearance(prediction_type, batch=4, decoded_rows=2, head_weight=2.0, f_ref_drop=0.0)
    seen, compared = latents_seen(trained), []
    decoded = trained.decoded_loss
    trained.decoded_loss = lambda *given: compared.append(given) or decoded(*given)

    def oracle(canvas: Tensor, timestep: Tensor, *_: Any, **__: Any) -> tuple[Tensor]:
        signal, noise_level = levels(trained, timestep)
        clean = torch.cat((seen["profile"], seen["target"]), dim=3)
        noise = (canvas - signal * clean) / noise_level
        return (noise if prediction_type == "epsilon" else signal * noise - noise_level * clean,)

    trained.checkpoint.unet.forward = oracle
    losses = trained.loss(0.0, generator())
    ((latent, batch, rows, head_weight),) = compared
    assert rows.tolist() == [0, 1] and head_weight == 2.0
    torch.testing.assert_close(latent, seen["target"][:2], rtol=0, atol=1e-2)
    torch.testing.assert_close(losses["loss"], 0.5 * losses["decoded"], rtol=0, atol=1e-4)
    exact = decode(trained.checkpoint.vae, latent).float().detach()
    assert float(decoded(latent, replace(batch, target=exact), rows, 2.0)) == pytest.approx(0, abs=1e-5)


def test_decoded_portraits_teach_the_unet(appearance: Callable[..., Any]) -> None:
    trained = appearance(batch=2, decoded_rows=2)
    trained.loss(0.0, generator())["decoded"].backward()
    assert trained.checkpoint.unet.conv_out.weight.grad.abs().max() > 0
    assert all(parameter.grad is None for parameter in trained.checkpoint.vae.parameters())


def test_rows_without_f_ref_are_not_decoded(appearance: Callable[..., Any]) -> None:
    assert appearance(decoded_rows=2, f_ref_drop=1.0).loss(0.0, generator())["decoded"].detach() == 0
    assert "decoded" not in appearance().loss(0.0, generator())
