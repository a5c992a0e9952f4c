"""The two adaptations, each as a loss over a batch of pairs."""

from __future__ import annotations

import math

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional

from icportrait.diffusion.masking import HIDDEN_LEVEL, reference_visibility
from icportrait.diffusion.sampling import NoiseSchedule
from icportrait.nn.checkpoint import Checkpoint
from icportrait.nn.engine_modules import decode, encode
from icportrait.nn.matching import best_match, cost_volume, join_canvas, split_canvas
from icportrait.request import MAX_SEED
from training.data import Batch, Source
from training.grids import flow_colours, picture_grid
from training.metrics import ssim_map
from training.portraits import make_portraits, whole_levels
from training.recipe import AppearanceRecipe, DecoderRecipe, MatchingRecipe, Recipe, RecipeError
from training.stage import Stage
from training.vae_stage import VaeStage

SAMPLE_STEPS = 10
_HIDDEN = HIDDEN_LEVEL / 127.5 - 1


class _CanvasStage(Stage):
    """A stage that sees canvases: the profile's latent and the hidden reference's."""

    def __init__(self, checkpoint: Checkpoint, source: Source, recipe: Recipe) -> None:
        super().__init__(checkpoint, source, recipe)
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
        visibility = self.visibility(len(numbers), generator).to(self.device)
        factor = self.preset.vae_factor
        shown = visibility.repeat_interleave(factor, 2).repeat_interleave(factor, 3)
        hidden = batch.reference.masked_fill(shown == 0, _HIDDEN)
        profile = self.encode_known("profile", numbers, batch.profile)
        return profile, self.checkpoint.warping_network.canvas(profile, self.encode(hidden), visibility)

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
        picture, target = decode(self.checkpoint.vae, latent).float(), batch.target[rows]
        error = (picture - target).abs().mean(1)
        likeness = ssim_map((picture + 1) * 127.5, (target + 1) * 127.5)
        if batch.head is None:
            return error.mean() + likeness_weight * (1 - likeness.mean())
        weight = 1 + (head_weight - 1) * batch.head[rows].float()
        margin = (error.shape[-1] - likeness.shape[-1]) // 2
        inner = weight[:, margin:-margin, margin:-margin]
        unlike = ((1 - likeness) * inner).sum() / inner.sum()
        return (error * weight).sum() / weight.sum() + likeness_weight * unlike

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


class MatchingStage(_CanvasStage):
    """The matching net, through a softmax over the cost volume, since the argmax that is served has no gradient.

    Where the data has the true correspondence: the cross entropy between the softmax and a Gaussian about the true
    source cell. Target cells without a head have cell 0 for theirs, so that what is warped tells the UNet where the
    head is; what the profile doesn't show of the head has the nearest place that it does.

    Where the data has none, self-supervision (as in arXiv 1806.09594): the mean absolute difference between the
    target's latent and the profile's, moved by the softmax, which two views of one person make small only where the
    same places are found.
    """

    recipe: MatchingRecipe

    def modules(self) -> nn.ModuleDict:
        network = self.checkpoint.warping_network
        return nn.ModuleDict({"matching_net": network.matching_net, "matching_head": network.matching_head})

    def loss(self, progress: float, generator: torch.Generator) -> dict[str, Tensor]:
        batch, numbers = self.draw(generator)
        profile, canvas = self.canvas(batch, numbers, generator)
        costs = self.costs(canvas)
        start, end = self.recipe.temperature, self.recipe.final_temperature
        temperature = start * (end / start) ** progress
        if batch.flows is None or batch.visibles is None:
            target = self.encode_known("target", numbers, batch.target)
            terms = [_photometric(cost / temperature, profile, target) for cost in costs]
            return {"loss": torch.stack(terms).mean()}
        terms, shares = [], []
        for cost, flow, visible in zip(costs, batch.flows, batch.visibles, strict=True):
            squared_distances = _squared_distances(math.isqrt(cost.shape[-1]), cost.device)
            drawn = torch.rand(flow.shape, generator=generator).to(self.device) < self.recipe.unseen_share
            taken = visible | drawn
            rows, wanted = cost[taken], squared_distances[flow[taken]]
            truth = functional.softmax(-wanted / (2 * self.recipe.spread_cells**2), dim=1)
            terms.append(functional.cross_entropy(rows / temperature, truth))
            with torch.no_grad():
                found, _ = best_match(rows)
                shares.append((wanted.gather(1, found[:, None])[visible[taken]] <= 1).float().mean())
        return {"loss": torch.stack(terms).mean(), "finest": terms[0], "within_one_cell": shares[0]}


def _squared_distances(side: int, device: torch.device) -> Tensor:
    """Return squared distances in cells between all cells y * side + x: ``[side * side, side * side]`` float32."""
    cells = torch.arange(side * side, device=device)
    y, x = torch.div(cells, side, rounding_mode="floor"), cells % side
    return ((y[:, None] - y) ** 2 + (x[:, None] - x) ** 2).float()


def _photometric(logits: Tensor, profile: Tensor, target: Tensor) -> Tensor:
    side = math.isqrt(logits.shape[-1])
    source, wanted = (functional.adaptive_avg_pool2d(latent, side).flatten(2) for latent in (profile, target))
    moved = source @ logits.softmax(-1).transpose(1, 2)
    return (moved - wanted).abs().mean()


class AppearanceStage(_CanvasStage):
    """Appearance net, zero convolutions and UNet, by the diffusion loss over the canvas's right half.

    The left half is held as in serving: the profile's latent with its own noise at the row's level. Matches are hard,
    as they are served, so that nothing is lost when the softmax that matching was trained with goes away.
    """

    recipe: AppearanceRecipe

    def __init__(self, checkpoint: Checkpoint, source: Source, recipe: Recipe) -> None:
        super().__init__(checkpoint, source, recipe)
        self.schedule = NoiseSchedule.from_config(checkpoint.scheduler_config)
        self.alphas_cumprod = torch.tensor(self.schedule.alphas_cumprod, dtype=torch.float32)

    def modules(self) -> nn.ModuleDict:
        network = self.checkpoint.warping_network
        modules = nn.ModuleDict({"appearance_net": network.appearance_net, "zero_convs": network.zero_convs})
        if self.recipe.train_unet:
            modules["unet"] = self.checkpoint.unet
        return modules

    def loss(self, progress: float, generator: torch.Generator) -> dict[str, Tensor]:
        batch, numbers = self.draw(generator)
        profile, canvas = self.canvas(batch, numbers, generator)
        target = self.encode_known("target", numbers, batch.target)
        if self.recipe.flows == "true" and batch.flows is None:
            raise RecipeError('flows is "true", but no correspondence is known for a folder of pictures')
        network = self.checkpoint.warping_network
        flows = batch.flows
        if flows is None or self.recipe.flows == "matched":
            with torch.no_grad():
                flows = [best_match(costs)[0] for costs in self.costs(canvas)]
        f_ref = network.inject(network.appearance_net(canvas, network.prompt_embedding), flows)
        kept = torch.rand(len(numbers), generator=generator) >= self.recipe.f_ref_drop
        f_ref = [residual * kept.to(self.device).view(-1, 1, 1, 1) for residual in f_ref]

        uniform, total = torch.rand(len(numbers), generator=generator), len(self.alphas_cumprod)
        timestep = ((1 - uniform**self.recipe.noise_bias) * total).long().clamp(max=total - 1)
        signal = self.alphas_cumprod[timestep].sqrt().view(-1, 1, 1, 1).to(self.device)
        noise_level = (1 - signal**2).sqrt()
        clean = join_canvas(profile, target)
        noise = torch.randn(clean.shape, generator=generator).to(self.device)
        prediction = self.checkpoint.unet(
            signal * clean + noise_level * noise,
            timestep.to(self.device),
            self.checkpoint.prompt_embedding.to(self.device).expand(len(numbers), -1, -1),
            down_block_additional_residuals=f_ref[:-1],
            mid_block_additional_residual=f_ref[-1],
            return_dict=False,
        )[0].float()
        wanted = noise if self.schedule.prediction_type == "epsilon" else signal * noise - noise_level * clean
        _, right = split_canvas((prediction - wanted).square())
        by_row = (right * self.weights(batch)).flatten(1).mean(1)
        with torch.no_grad():
            # The error of the clean latent that the prediction stands for, where the noise is strongest.
            early = (kept & (timestep >= total // 2)).nonzero().flatten().to(self.device)
        losses = {"loss": by_row.mean(), "early": by_row[early].mean() if len(early) else by_row.mean()}
        if self.recipe.decoded_rows:
            rows = kept.nonzero().flatten()[: self.recipe.decoded_rows].to(self.device)
            noisy = signal * clean + noise_level * noise
            if self.schedule.prediction_type == "epsilon":
                restored = (noisy - noise_level * prediction) / signal
            else:
                restored = signal * noisy - noise_level * prediction
            losses["decoded"] = self.decoded_loss(split_canvas(restored)[1][rows], batch, rows, self.recipe.head_weight)
            losses["loss"] = losses["loss"] + self.recipe.decoded_weight * losses["decoded"]
        return losses

    def weights(self, batch: Batch) -> Tensor:
        """Return the weights of latent cells' errors, 1 on average over the batch: ``[B, 1, s, s]``, or a single 1."""
        if batch.head is None or self.recipe.head_weight == 1:
            return torch.ones((), device=self.device)
        head = functional.avg_pool2d(batch.head.float().unsqueeze(1), self.preset.vae_factor)
        weights = 1 + (self.recipe.head_weight - 1) * head
        return weights / weights.mean()


class DecoderStage(_CanvasStage):
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


STAGE_CLASSES: dict[str, type[Stage]] = {
    "vae": VaeStage,
    "matching": MatchingStage,
    "appearance": AppearanceStage,
    "decoder": DecoderStage,
}
