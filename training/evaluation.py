"""The quality of a checkpoint's portraits, on identities that no training ever sees.

References show another person, as in use. The truth is what the renderer makes of the profile's identity in the
reference's view and light, so every figure compares like with like, pixel by pixel.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers import AutoencoderKL
from torch import Tensor
from torch.nn.functional import pixel_shuffle, pixel_unshuffle

from icportrait.nn import Checkpoint
from icportrait.nn.matching import gather_features
from icportrait.phases import ALL_STEPS
from training.appearance import Part
from training.evaluation_pairs import EvaluationPairs, grids
from training.grids import flow_colours
from training.metrics import (
    MatchingFigures,
    colour_error,
    feature_distance,
    matching_figures,
    mean_colour_error,
    psnr,
    ssim,
    vae_features,
)
from training.portraits import Portraits, make_portraits, through_vae

COPIES = ("copy_reference", "copy_profile")
IDENTITY_PARTS = (Part.SKIN, Part.HAIR, Part.IRIS, Part.LIPS)
LEAST_PIXELS = 8
"""A part of a target with fewer pixels, such as the iris of an eye that is turned away, has no colour to compare."""
SAMPLES = 8
_MEASURED_TOGETHER = 32  # one picture's SSIM takes some MB on the way
FIGURE_TITLES = (
    f"{'head':^32}{'whole picture':^32}{'  delta E of mean colours'}",
    f"{'PSNR dB':>9}{'SSIM':>7}{'VAE':>8}{'dE':>8}" * 2 + "".join(f"{part.name.lower():>7}" for part in IDENTITY_PARTS),
)
"""Two lines above a column of ``figure_row``."""


@dataclass(frozen=True)
class Evaluation:
    """Means over pairs."""

    pairs: int
    num_inference_steps: int
    guidance_scale: float
    guidance_interval: tuple[float, float]
    pictures: dict[str, dict[str, float]]
    """``picture_figures`` of the portraits, the baselines and the VAE's ceiling, by name."""
    pairs_with_part: dict[str, int]
    """Number of pairs that the error of each part's colour is a mean over."""
    best_copy: str
    """The baseline of ``COPIES`` that has the higher PSNR over the head."""
    gain_db: float
    """PSNR over the head: portrait minus ``best_copy``."""
    gain_half_width_db: float
    """Half the 95 % confidence interval of ``gain_db``, from the pairs' own differences."""
    below_ceiling_db: float
    """PSNR over the head: VAE ceiling minus portrait."""
    matching: tuple[MatchingFigures, ...]
    """Finest level first."""
    samples: dict[str, Tensor] = field(repr=False)
    """The first pairs' pictures by title, for ``grids.picture_grid``."""

    def to_dict(self) -> dict[str, Any]:
        """Return everything but the samples, for JSON. A figure that isn't a finite number is None."""
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "samples"}
        fields["matching"] = [dataclasses.asdict(level) for level in self.matching]
        figures: dict[str, Any] = finite(fields)
        return figures

    def table(self) -> str:
        """Write the figures as text."""
        lines = [
            f"{self.pairs} pairs, {self.num_inference_steps} steps, guidance {self.guidance_scale:g} in "
            "{:g}..{:g}".format(*self.guidance_interval),
            "",
            *(f"{'':<20}{line}" for line in FIGURE_TITLES),
            *(f"{name.replace('_', ' '):<20}{figure_row(figures)}" for name, figures in self.pictures.items()),
            f"{'pairs that show it':<84}" + "".join(f"{count:>7}" for count in self.pairs_with_part.values()),
            "",
            f"head PSNR: {self.gain_db:+.2f} dB (95 %: +-{self.gain_half_width_db:.2f}) over "
            f"{self.best_copy.replace('_', ' ')}, {self.below_ceiling_db:.2f} dB below the VAE's ceiling",
            "",
            f"{'matching':<20}{'end-point error':>20}{'within 1 latent cell':>24}{'1 own cell':>14}{'if unmoved':>14}",
        ]
        for level in self.matching:
            lines.append(
                f"{f'{level.grid} x {level.grid}':<20}{level.end_point_error:>14.2f} cells"
                f"{level.within_one_latent_cell:>24.1%}{level.within_one_own_cell:>14.1%}"
                f"{level.unmoved_within_one_own_cell:>14.1%}"
            )
        return "\n".join(lines)


def evaluate(
    checkpoint: Checkpoint,
    pairs: EvaluationPairs,
    *,
    num_inference_steps: int | None = None,
    guidance_scale: float | None = None,
    guidance_interval: tuple[float, float] = ALL_STEPS,
    seed: int = 0,
    batch_size: int = 16,
    progress: Callable[[int], object] = lambda _: None,
) -> Evaluation:
    """Make the pairs' portraits and measure them.

    Args:
        checkpoint: what to evaluate; it runs where its models are.
        pairs: see ``evaluation_pairs``.
        num_inference_steps: UNet calls per portrait; None takes the checkpoint's.
        guidance_scale: weight of the conditioning; None takes the checkpoint's.
        guidance_interval: begin and end of the steps with guidance, as shares of all.
        seed: pair i is hidden and sampled with ``seed + i``.
        batch_size: portraits that are made together.
        progress: called with numbers of finished steps, which add up to ``len(pairs) * (num_inference_steps + 1)``:
            the VAE's ceiling counts as one more.

    Raises:
        InvalidRequest: a setting is out of range.
        ValueError: the pairs aren't of the checkpoint's size.
    """
    guidance_scale = checkpoint.guidance_scale if guidance_scale is None else guidance_scale
    num_inference_steps = num_inference_steps or checkpoint.num_inference_steps
    levels = grids(checkpoint.preset)
    portraits = make_portraits(
        checkpoint,
        pairs.profile,
        pairs.reference,
        range(seed, seed + len(pairs)),
        num_inference_steps=num_inference_steps,
        guidance_scale=guidance_scale,
        guidance_interval=guidance_interval,
        batch_size=batch_size,
        progress=progress,
    )
    pictures = compared_pictures(checkpoint, pairs, portraits, batch_size, progress)
    figures = {name: picture_figures(picture, pairs, checkpoint.vae) for name, picture in pictures.items()}
    head = {name: values["head_psnr_db"] for name, values in figures.items()}
    best_copy = max(COPIES, key=lambda name: float(head[name].mean()))
    gain = head["portrait"] - head[best_copy]
    samples = {
        "profile": pairs.profile,
        "reference": pairs.reference,
        "visible": portraits.visible,
        "flow": flow_colours(portraits.flows[0][:SAMPLES]),
        "warp only": pictures["warp_only"],
        "portrait": portraits.picture,
        "ground truth": pairs.target,
        "VAE ceiling": pictures["vae_ceiling"],
    }
    return Evaluation(
        pairs=len(pairs),
        num_inference_steps=num_inference_steps,
        guidance_scale=guidance_scale,
        guidance_interval=guidance_interval,
        pictures={name: means(values) for name, values in figures.items()},
        pairs_with_part={
            part.name.lower(): int((~figures["portrait"][_part(part)].isnan()).sum()) for part in IDENTITY_PARTS
        },
        best_copy=best_copy,
        gain_db=float(gain.mean()),
        gain_half_width_db=1.96 * float(gain.std(correction=1)) / math.sqrt(len(gain)) if len(gain) > 1 else math.nan,
        below_ceiling_db=float((head["vae_ceiling"] - head["portrait"]).mean()),
        matching=tuple(
            matching_figures(flow, *pairs.flow(grid, levels), grid, levels[0])
            for grid, flow in zip(levels, portraits.flows, strict=True)
        ),
        samples={title: picture[:SAMPLES] for title, picture in samples.items()},
    )


def compared_pictures(
    checkpoint: Checkpoint,
    pairs: EvaluationPairs,
    portraits: Portraits,
    batch_size: int = 16,
    progress: Callable[[int], object] = lambda _: None,
) -> dict[str, Tensor]:
    """Return the portraits and the pictures that they are measured beside, ``[N, 3, S, S]`` uint8 by name.

    ``warp_only`` moves the profile's pixels by the finest matches, a latent cell at a time; ``true_warp`` by the true
    ones, and leaves in place what doesn't show the head. ``vae_ceiling`` is the truth, encoded and decoded.
    """
    preset = checkpoint.preset
    true_flow, _ = pairs.flow(preset.latent_size, grids(preset))
    # The true flow is 0 off the head, and no head is as far out as the first cell.
    true_flow = torch.where(true_flow == 0, torch.arange(true_flow.shape[1]), true_flow)
    return {
        "portrait": portraits.picture,
        "copy_reference": pairs.reference,
        "copy_profile": pairs.profile,
        "warp_only": warped(pairs.profile, portraits.flows[0], preset.vae_factor),
        "true_warp": warped(pairs.profile, true_flow, preset.vae_factor),
        "vae_ceiling": through_vae(checkpoint, pairs.target, batch_size, progress),
    }


def warped(pictures: Tensor, flow: Tensor, cell_px: int) -> Tensor:
    """Move whole cells of pictures ``[N, C, S, S]``: cell i shows what cell ``flow[:, i]`` did."""
    return pixel_shuffle(gather_features(pixel_unshuffle(pictures, cell_px), flow), cell_px)


def picture_figures(pictures: Tensor, pairs: EvaluationPairs, vae: AutoencoderKL) -> dict[str, Tensor]:
    """Measure the differences between pictures and the pairs' targets, ``[N]`` each, by ``training.metrics``.

    The figures are PSNR, SSIM, the distance of the VAE encoder's features and the colour error (delta E), over the
    head and over the whole picture. There is also the error of each identity part's mean colour at its true pixels.
    This error is NaN where the target shows fewer than ``LEAST_PIXELS`` of these pixels.

    Args:
        pictures: ``[N, 3, S, S]`` uint8.
        pairs: N pairs.
        vae: compares its features; distances by another VAE can't be compared with these.
    """
    starts = range(0, len(pairs), _MEASURED_TOGETHER)
    chunks = [slice(start, start + _MEASURED_TOGETHER) for start in starts]
    measured = [_chunk_figures(pictures[chunk], pairs[chunk], vae) for chunk in chunks]
    return {name: torch.cat([figures[name] for figures in measured]) for name in measured[0]}


def _chunk_figures(pictures: Tensor, pairs: EvaluationPairs, vae: AutoencoderKL) -> dict[str, Tensor]:
    figures = {}
    features, true_features = vae_features(vae, pictures), vae_features(vae, pairs.target)
    for region, mask in (("head", pairs.target_head), ("whole", None)):
        figures[f"{region}_psnr_db"] = psnr(pictures, pairs.target, mask)
        figures[f"{region}_ssim"] = ssim(pictures, pairs.target, mask)
        figures[f"{region}_feature_distance"] = feature_distance(features, true_features, mask)
        figures[f"{region}_delta_e"] = colour_error(pictures, pairs.target, mask)
    for part in IDENTITY_PARTS:
        figures[_part(part)] = mean_colour_error(pictures, pairs.target, pairs.target_part == part, LEAST_PIXELS)
    return figures


def figure_row(figures: dict[str, float]) -> str:
    """Write the means of ``picture_figures`` as one line of a table."""
    text = ""
    for region in ("head", "whole"):
        psnr_db, *rest = (figures[f"{region}_{name}"] for name in ("psnr_db", "ssim", "feature_distance", "delta_e"))
        text += "{:>9.2f}{:>7.3f}{:>8.4f}{:>8.2f}".format(psnr_db, *rest)
    return text + "".join(f"{figures[_part(part)]:>7.2f}" for part in IDENTITY_PARTS)


def means(figures: dict[str, Tensor]) -> dict[str, float]:
    """Return each figure's mean over the pairs that have it; NaN where none has."""
    return {name: float(values.nanmean()) for name, values in figures.items()}


def finite(value: Any) -> Any:
    """Return nested figures as JSON can hold them: None for infinities and NaN."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _part(part: Part) -> str:
    return f"{part.name.lower()}_delta_e"
