"""Stages that learn from whole portraits: the decoder alone, and all that follows the matches together."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from icportrait.nn.checkpoint import Checkpoint
from icportrait.nn.engine_modules import decode
from icportrait.nn.matching import best_match, join_canvas, split_canvas
from icportrait.request import MAX_SEED
from training.canvas_stage import CanvasStage, compared
from training.data import Source
from training.portraits import make_portraits
from training.recipe import DecoderRecipe, Recipe, RecipeError, RefineRecipe

TEACHER_NOISE = 0.5
"""Share of the noise that the teacher starts from: with half of it a portrait is nearer to the truth."""


class DecoderStage(CanvasStage):
    """The autoencoder's decoder, by the pictures that it makes of what the UNet predicts.

    A portrait's latent is a mean of what the portrait may be. To a decoder that has only seen encoded pictures it is
    the latent of a blurred one. This one learns what such a mean stands for; no latent changes by it.
    """

    recipe: DecoderRecipe

    def modules(self) -> nn.ModuleDict:
        vae = self.checkpoint.vae
        return nn.ModuleDict({"decoder": vae.decoder, "post_quant_conv": vae.post_quant_conv})

    def loss(self, progress: float, generator: torch.Generator) -> dict[str, Tensor]:
        batch, numbers = self.draw(generator)
        seeds = torch.randint(MAX_SEED, (len(numbers),), generator=generator).tolist()
        made = make_portraits(
            self.checkpoint,
            batch.profile,
            batch.reference,
            seeds,
            num_inference_steps=self.recipe.num_inference_steps,
            guidance_scale=1.0,
            mask_ratio=self.recipe.mask_ratio,
        )
        is_true = torch.rand(len(numbers), generator=generator) < self.recipe.true_share
        true = self.encode_known("target", numbers, batch.target)
        latent = torch.where(is_true.view(-1, 1, 1, 1).to(self.device), true, made.latent.to(self.device))
        rows = torch.arange(len(numbers), device=self.device)
        weights = self.recipe.head_weight, self.recipe.likeness_weight
        return {"loss": self.decoded_loss(latent, batch, rows, *weights)}


class RefineStage(CanvasStage):
    """Appearance net, zero convolutions, UNet and decoder together, by portraits of one step.

    A portrait is compared with the truth, and with a teacher: the mean of what the base makes of the pair and of its
    mirror image. Much of the truth can't be known from two pictures, and what one batch teaches of it is mostly chance.
    The teacher has less error than the base, and differs from it only where the base is at odds with itself. The base
    is the one that the stage was made with: a resumed run needs the same.
    """

    recipe: RefineRecipe

    def __init__(self, checkpoint: Checkpoint, source: Source, recipe: Recipe) -> None:
        self.teacher = copy.deepcopy(checkpoint)
        for model in self.teacher.models:
            model.eval()
        super().__init__(checkpoint, source, recipe)
        if self.schedule.prediction_type != "v_prediction":
            raise RecipeError(
                f"refine: the base predicts {self.schedule.prediction_type}, expected v_prediction; other predictions"
                " hold little of the portrait where the noise is strongest"
            )

    def modules(self) -> nn.ModuleDict:
        network = self.checkpoint.warping_network
        return nn.ModuleDict(
            {
                "appearance_net": network.appearance_net,
                "zero_convs": network.zero_convs,
                "unet": self.checkpoint.unet,
                "decoder": self.checkpoint.vae.decoder,
            }
        )

    def loss(self, progress: float, generator: torch.Generator) -> dict[str, Tensor]:
        batch, numbers = self.draw(generator)
        hidden, visibility = self.hide(batch.reference, generator)
        profile = self.encode_known("profile", numbers, batch.profile)
        mirrored = self.encode_known("profile", numbers ^ 1, batch.profile.flip(3))
        with torch.no_grad():
            taught = self.portraits(self.teacher, profile, hidden, visibility, TEACHER_NOISE, generator)
            other = (mirrored, hidden.flip(3), visibility.flip(3))
            taught = (taught + self.portraits(self.teacher, *other, TEACHER_NOISE, generator).flip(3)) / 2
        made = self.portraits(self.checkpoint, profile, hidden, visibility, 1.0, generator)
        weights = (batch.head, self.recipe.head_weight, self.recipe.likeness_weight)
        losses = {"taught": compared(made, taught, *weights), "truth": compared(made, batch.target, *weights)}
        share = self.recipe.truth_weight
        return {"loss": share * losses["truth"] + (1 - share) * losses["taught"], **losses}

    def portraits(
        self,
        checkpoint: Checkpoint,
        profile: Tensor,
        hidden: Tensor,
        visibility: Tensor,
        noise_scale: float,
        generator: torch.Generator,
    ) -> Tensor:
        """Make portraits of one step.

        Args:
            checkpoint: whose appearance net, UNet and decoder to use.
            profile: latents ``[B, C, s, s]``.
            hidden: the references' pictures ``[B, 3, S, S]`` in -1..1, hidden.
            visibility: ``[B, 1, s, s]``.
            noise_scale: of the noise that is started from; 1 is as in serving.
            generator: of the noise.

        Returns:
            Pictures ``[B, 3, S, S]`` in -1..1, not clamped.
        """
        network = checkpoint.warping_network
        canvas = network.canvas(profile, self.encode(hidden), visibility)
        with torch.no_grad():
            flows = [best_match(costs)[0] for costs in self.costs(canvas)]
        f_ref = network.inject(network.appearance_net(canvas, network.prompt_embedding), flows)
        timestep = torch.full((len(profile),), len(self.alphas_cumprod) - 1)
        signal, noise_level = self.levels(timestep)
        drawn = torch.randn(join_canvas(profile, profile).shape, generator=generator).to(self.device)
        left, right = split_canvas(noise_scale * drawn)
        noisy = join_canvas(signal * profile + noise_level * left, right)
        prediction = self.predict(checkpoint, noisy, timestep, f_ref)
        return decode(checkpoint.vae, split_canvas(self.restored(noisy, prediction, timestep))[1]).float()
