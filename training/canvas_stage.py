"""The common part of the stages that see canvases, and the comparison of decoded portraits with their targets."""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from icportrait.diffusion.masking import HIDDEN_LEVEL, reference_visibility
from icportrait.diffusion.sampling import NoiseSchedule
from icportrait.nn.checkpoint import Checkpoint
from icportrait.nn.engine_modules import decode, encode
from icportrait.nn.matching import cost_volume
from icportrait.request import MAX_SEED
from training.data import Batch, Source
from training.grids import flow_colours, picture_grid
from training.metrics import ssim_map
from training.portraits import make_portraits, whole_levels
from training.recipe import Recipe
from training.stage import Stage

SAMPLE_STEPS = 10
_HIDDEN = HIDDEN_LEVEL / 127.5 - 1


class CanvasStage(Stage):
    """A stage that sees canvases: the profile's latent and the hidden reference's."""

    def __init__(self, checkpoint: Checkpoint, source: Source, recipe: Recipe) -> None:
        super().__init__(checkpoint, source, recipe)
        self.schedule = NoiseSchedule.from_config(checkpoint.scheduler_config)
        self.alphas_cumprod = torch.tensor(self.schedule.alphas_cumprod, dtype=torch.float32)
        self._kept: dict[tuple[str, int], Tensor] = {}

    @torch.no_grad()
    def encode(self, pictures: Tensor) -> Tensor:
        """Encode pictures ``[B, 3, S, S]`` in -1..1 as latents ``[B, C, s, s]``."""
        return encode(self.checkpoint.vae, pictures)

    def encode_known(self, kind: str, numbers: Tensor, pictures: Tensor) -> Tensor:
        """Encode pictures as ``encode`` does, and keep their latents by number, because the pictures come again."""
        if not self.recipe.keep_latents:
            return self.encode(pictures)
        keys = [(kind, number) for number in numbers.tolist()]
        for row, key in enumerate(keys):
            if key not in self._kept:
                # By itself: its last bits depend on its neighbours, and a resumed run meets it among others.
                self._kept[key] = self.encode(pictures[row : row + 1])[0].half()
        return torch.stack([self._kept[key].float() for key in keys])

    def canvas(self, batch: Batch, numbers: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Return the profile's latent ``[B, C, s, s]``, and the canvas with it and the hidden reference."""
        hidden, visibility = self.hide(batch.reference, generator)
        profile = self.encode_known("profile", numbers, batch.profile)
        return profile, self.checkpoint.warping_network.canvas(profile, self.encode(hidden), visibility)

    def hide(self, references: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Cover cells of references ``[B, 3, S, S]``, and return the visibility ``[B, 1, s, s]`` too."""
        visibility = self.visibility(len(references), generator).to(self.device)
        factor = self.preset.vae_factor
        shown = visibility.repeat_interleave(factor, 2).repeat_interleave(factor, 3)
        return references.masked_fill(shown == 0, _HIDDEN), visibility

    def costs(self, canvas: Tensor) -> list[Tensor]:
        """Return the cost volumes ``[B, s_L^2, s_L^2]``, finest level first."""
        halves = self.checkpoint.warping_network.matching_features(canvas)
        with torch.autocast(self.device.type, enabled=False):  # bfloat16 can't tell neighbouring cells apart
            return [cost_volume(source, target) for source, target in halves]

    def decoded_loss(
        self, latent: Tensor, batch: Batch, rows: Tensor, head_weight: float, likeness_weight: float = 1.0
    ) -> Tensor:
        """Compare the decoded pictures of ``latent`` with the targets of ``rows``.

        The loss is the mean absolute error of a pixel in -1..1, and 1 - SSIM by its weight. Pixels of the head count
        ``head_weight`` times. The loss is 0 where there are no rows.
        """
        if not len(rows):
            return latent.sum()
        head = None if batch.head is None else batch.head[rows]
        picture = decode(self.checkpoint.vae, latent).float()
        return compared(picture, batch.target[rows], head, head_weight, likeness_weight)

    def levels(self, timestep: Tensor) -> tuple[Tensor, Tensor]:
        """Return the signal's and the noise's share at timesteps ``[B]``: ``[B, 1, 1, 1]`` each."""
        signal = self.alphas_cumprod[timestep].sqrt().view(-1, 1, 1, 1).to(self.device)
        return signal, (1 - signal**2).sqrt()

    def predict(self, checkpoint: Checkpoint, noisy: Tensor, timestep: Tensor, f_ref: list[Tensor]) -> Tensor:
        """Return what a checkpoint's UNet predicts of noisy canvases at timesteps ``[B]``."""
        prediction: Tensor = checkpoint.unet(
            noisy,
            timestep.to(self.device),
            checkpoint.prompt_embedding.to(self.device).expand(len(noisy), -1, -1),
            down_block_additional_residuals=f_ref[:-1],
            mid_block_additional_residual=f_ref[-1],
            return_dict=False,
        )[0]
        return prediction.float()

    def restored(self, noisy: Tensor, prediction: Tensor, timestep: Tensor) -> Tensor:
        """Return the clean canvases that predictions stand for."""
        signal, noise_level = self.levels(timestep)
        if self.schedule.prediction_type == "epsilon":
            return (noisy - noise_level * prediction) / signal
        return signal * noisy - noise_level * prediction

    def visibility(self, count: int, generator: torch.Generator) -> Tensor:
        """Draw masks ``[count, 1, s, s]`` as serving draws them."""
        seeds = torch.randint(MAX_SEED, (count,), generator=generator).tolist()
        masks = [reference_visibility(self.preset, self.recipe.mask_ratio, seed) for seed in seeds]
        return torch.from_numpy(np.concatenate(masks))

    def samples(self) -> Image.Image:
        examples = self.source.examples()
        known = getattr(self.recipe, "flows", "") == "true"
        made = make_portraits(
            self.checkpoint,
            examples.profile,
            examples.reference,
            range(len(examples.profile)),
            num_inference_steps=SAMPLE_STEPS,
            mask_ratio=self.recipe.mask_ratio,
            known_flows=examples.flows if known else None,
        )
        columns = {
            "profile": whole_levels(examples.profile),
            "reference": whole_levels(examples.reference),
            "visible": made.visible,
            "flow": flow_colours(made.flows[0]),
            "portrait": made.picture,
            "target": whole_levels(examples.target),
        }
        if examples.flows is not None:
            columns["true flow"] = flow_colours(examples.flows[0])
        return picture_grid(columns)


def compared(
    picture: Tensor, target: Tensor, head: Tensor | None, head_weight: float, likeness_weight: float
) -> Tensor:
    """Compare pictures with their targets; the loss of ``CanvasStage.decoded_loss``.

    Args:
        picture: ``[B, 3, S, S]`` in -1..1.
        target: like ``picture``.
        head: True where the target shows the head, ``[B, S, S]``; None where that isn't known.
        head_weight: weight of the head's pixels, beside 1 elsewhere.
        likeness_weight: weight of 1 - SSIM.
    """
    error = (picture - target).abs().mean(1)
    likeness = ssim_map((picture + 1) * 127.5, (target + 1) * 127.5)
    if head is None:
        return error.mean() + likeness_weight * (1 - likeness.mean())
    weight = 1 + (head_weight - 1) * head.float()
    margin = (error.shape[-1] - likeness.shape[-1]) // 2
    inner = weight[:, margin:-margin, margin:-margin]
    unlike = ((1 - likeness) * inner).sum() / inner.sum()
    return (error * weight).sum() / weight.sum() + likeness_weight * unlike
