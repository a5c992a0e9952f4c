"""The two adaptations, each as a loss over a batch of pairs."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

from icportrait.nn.matching import best_match, join_canvas, split_canvas
from training.canvas_stage import CanvasStage
from training.data import Batch
from training.portrait_stages import DecoderStage, RefineStage
from training.recipe import AppearanceRecipe, MatchingRecipe, RecipeError
from training.stage import Stage
from training.vae_stage import VaeStage


class MatchingStage(CanvasStage):
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


class AppearanceStage(CanvasStage):
    """Appearance net, zero convolutions and UNet, by the diffusion loss over the canvas's right half.

    The left half is held as in serving: the profile's latent with its own noise at the row's level. Matches are hard,
    as they are served, so that nothing is lost when the softmax that matching was trained with goes away.
    """

    recipe: AppearanceRecipe

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
        signal, noise_level = self.levels(timestep)
        clean = join_canvas(profile, target)
        noise = torch.randn(clean.shape, generator=generator).to(self.device)
        noisy = signal * clean + noise_level * noise
        prediction = self.predict(self.checkpoint, noisy, timestep, f_ref)
        wanted = noise if self.schedule.prediction_type == "epsilon" else signal * noise - noise_level * clean
        _, right = split_canvas((prediction - wanted).square())
        by_row = (right * self.weights(batch)).flatten(1).mean(1)
        with torch.no_grad():
            # The error of the clean latent that the prediction stands for, where the noise is strongest.
            early = (kept & (timestep >= total // 2)).nonzero().flatten().to(self.device)
        losses = {"loss": by_row.mean(), "early": by_row[early].mean() if len(early) else by_row.mean()}
        if self.recipe.decoded_rows:
            rows = kept.nonzero().flatten()[: self.recipe.decoded_rows].to(self.device)
            portrait = split_canvas(self.restored(noisy, prediction, timestep))[1][rows]
            losses["decoded"] = self.decoded_loss(portrait, batch, rows, self.recipe.head_weight)
            losses["loss"] = losses["loss"] + self.recipe.decoded_weight * losses["decoded"]
        return losses

    def weights(self, batch: Batch) -> Tensor:
        """Return the weights of latent cells' errors, 1 on average over the batch: ``[B, 1, s, s]``, or a single 1."""
        if batch.head is None or self.recipe.head_weight == 1:
            return torch.ones((), device=self.device)
        head = functional.avg_pool2d(batch.head.float().unsqueeze(1), self.preset.vae_factor)
        weights = 1 + (self.recipe.head_weight - 1) * head
        return weights / weights.mean()


STAGE_CLASSES: dict[str, type[Stage]] = {
    "vae": VaeStage,
    "matching": MatchingStage,
    "appearance": AppearanceStage,
    "decoder": DecoderStage,
    "refine": RefineStage,
}
