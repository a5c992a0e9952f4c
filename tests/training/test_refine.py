"""Portraits refined by the truth and by what the base makes of both mirror images."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

from icportrait.diffusion.masking import reference_visibility
from icportrait.diffusion.randomness import canvas_noise
from icportrait.nn import random_checkpoint
from icportrait.nn.matching import join_canvas
from tests.tiny import TINY
from tests.training.tiny import generator, mean, stage, train, write_views
from training import portrait_stages
from training.canvas_stage import compared
from training.data import PictureFolder, RenderedPairs
from training.portraits import make_portraits, whole_levels
from training.recipe import Data, RecipeError

NO = torch.zeros(1, dtype=torch.bool)
pytestmark = pytest.mark.usefixtures("one_thread_and_one_seed", "no_pictures")


def test_portraits_are_refined_and_their_matches_and_latents_stay(tiny_pairs: RenderedPairs, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"steps": 30, "warmup_steps": 5, "learning_rate": 1e-2, "same_identity_share": 0.0}
    trained = stage("refine", tiny_pairs, **settings)
    parts = {"unet": trained.checkpoint.unet, "vae": trained.checkpoint.vae, "warp": trained.checkpoint.warping_network}
    before = {part: {name: value.clone() for name, value in net.state_dict().items()} for part, net in parts.items()}
    losses = train(trained, tmp_path)
    assert mean(losses[-5:], "truth") < 0.9 * mean(losses[:3], "truth")
    changed = {
        f"{part}.{name}"
        for part, net in parts.items()
        for name, value in net.state_dict().items()
        if not value.equal(before[part][name])
    }
    begin = {name.split(".")[0] + "." + name.split(".")[1] for name in changed if not name.startswith("unet.")}
    assert begin == {"vae.decoder", "warp.appearance_net", "warp.zero_convs"}
    assert any(name.startswith("unet.") for name in changed)
    for net, kept in zip(trained.teacher.models, (before["unet"], before["vae"], before["warp"]), strict=True):
        assert all(value.equal(kept[name]) for name, value in net.state_dict().items()), "the teacher stays the base"


def test_a_refined_portrait_is_the_one_that_is_served(tiny_pairs: RenderedPairs) -> None:
    """Give the stage a request's mask and noise, and compare with the portrait that is made of them."""
    checkpoint, seed = random_checkpoint(TINY), 5
    trained = stage("refine", tiny_pairs, checkpoint)
    batch = tiny_pairs.batch(torch.arange(1), NO, NO)
    served = make_portraits(
        checkpoint, batch.profile, batch.reference, [seed], num_inference_steps=1, guidance_scale=1.0
    )
    visibility = torch.from_numpy(reference_visibility(TINY, trained.recipe.mask_ratio, seed))
    hidden = served.visible.float() / 127.5 - 1
    noise = torch.from_numpy(canvas_noise(TINY, seed))
    with torch.no_grad(), patch("torch.randn", lambda *_, **__: noise[None]):
        made = trained.portraits(checkpoint, trained.encode(batch.profile), hidden, visibility, 1.0, generator())
    torch.testing.assert_close(whole_levels(made).float(), served.picture.float(), rtol=0, atol=2)


def test_the_teacher_is_the_base_and_mirrors_the_pair(tiny_pairs: RenderedPairs) -> None:
    trained = stage("refine", tiny_pairs, truth_weight=0.0)
    calls: list[tuple[Any, ...]] = []

    def spy(checkpoint: Any, profile: Tensor, hidden: Tensor, visibility: Tensor, scale: float, _: Any) -> Tensor:
        calls.append((checkpoint, profile, hidden, visibility, scale))
        # Left and right are told apart: what came mirrored must be turned back.
        return hidden if len(calls) < 3 else torch.zeros_like(hidden, requires_grad=True)

    trained.portraits = spy
    with patch.object(portrait_stages, "compared", lambda made, target, *_: (made - target).abs().mean()):
        losses = trained.loss(0.0, generator())
    (teacher, profile, hidden, visibility, scale), other, student = calls
    assert teacher is other[0] is trained.teacher and student[0] is trained.checkpoint is not trained.teacher
    assert torch.equal(other[2], hidden.flip(3)) and torch.equal(other[3], visibility.flip(3))
    assert not torch.equal(other[1], profile) and torch.equal(student[1], profile)
    assert (scale, other[4], student[4]) == (0.5, 0.5, 1.0)
    torch.testing.assert_close(losses["loss"], hidden.abs().mean())


def test_the_truth_and_the_teacher_weigh_as_the_recipe_says(tiny_pairs: RenderedPairs) -> None:
    for share in (0.0, 0.25, 1.0):
        given: list[tuple[Any, ...]] = []

        def spy(*arguments: Any, given: list[tuple[Any, ...]] = given) -> Tensor:
            given.append(arguments)
            return compared(*arguments)

        trained = stage("refine", tiny_pairs, truth_weight=share, head_weight=2.0, likeness_weight=5.0)
        with patch.object(portrait_stages, "compared", spy):
            losses = trained.loss(0.0, generator())
        torch.testing.assert_close(losses["loss"], share * losses["truth"] + (1 - share) * losses["taught"])
        assert losses["truth"] != losses["taught"]
        batch, _ = trained.draw(generator())
        for _, _, head, *weights in given:
            assert torch.equal(head, batch.head) and weights == [2.0, 5.0]
        assert torch.equal(given[1][1], batch.target) and not torch.equal(given[0][1], batch.target)


def test_the_noise_is_scaled(tiny_pairs: RenderedPairs) -> None:
    trained = stage("refine", tiny_pairs)
    batch, _ = trained.draw(generator())
    hidden, visibility = trained.hide(batch.reference, generator())
    profile = trained.encode(batch.profile)
    noise = torch.randn(join_canvas(profile, profile).shape, generator=generator())
    made = []
    for scale, drawn in ((1.0, noise), (0.5, noise), (1.0, noise / 2)):
        with torch.no_grad(), patch("torch.randn", lambda *_, drawn=drawn, **__: drawn):
            made.append(trained.portraits(trained.teacher, profile, hidden, visibility, scale, generator()))
    assert torch.equal(made[1], made[2]) and not torch.equal(made[0], made[1])


def test_kept_latents_are_those_of_the_pair_and_of_its_mirror_image(tiny_pairs: RenderedPairs) -> None:
    trained = stage("refine", tiny_pairs, batch=8)
    trained.loss(0.0, generator())
    _, numbers = trained.draw(generator())
    assert {number % 2 for number in numbers.tolist()} == {0, 1}
    kept = {number: latent for (kind, number), latent in trained._kept.items() if kind == "profile"}
    assert kept.keys() == {number for drawn in numbers.tolist() for number in (drawn, drawn ^ 1)}
    for number, latent in kept.items():
        batch = tiny_pairs.batch(torch.tensor([number // 2]), torch.tensor([bool(number % 2)]), NO)
        torch.testing.assert_close(latent.float(), trained.encode(batch.profile)[0], rtol=2e-3, atol=2e-3)


def test_a_folder_of_pictures_refines_too(tiny_pairs: RenderedPairs, tmp_path: Path) -> None:
    write_views(tmp_path, tiny_pairs.pairs[:4])
    folder = PictureFolder(Data(pictures=str(tmp_path)), TINY)
    stage("refine", folder, keep_latents=False).loss(0.0, generator())["loss"].backward()


def test_a_base_that_predicts_noise_is_refused(tiny_pairs: RenderedPairs) -> None:
    checkpoint = random_checkpoint(TINY)
    checkpoint = replace(checkpoint, scheduler_config={**checkpoint.scheduler_config, "prediction_type": "epsilon"})
    with pytest.raises(RecipeError, match="refine: the base predicts epsilon, expected v_prediction"):
        stage("refine", tiny_pairs, checkpoint)
