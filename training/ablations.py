"""The worth of each part of the architecture: train without it, equally long: ``python -m training.ablations``.

Every variant starts from the same weights and sees the same pairs in the same order. The VAE and the matching net are
the base's and stay as they are; appearance net, zero convolutions and UNet are drawn anew.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from dataclasses import asdict, replace
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Any

from icportrait.errors import IcPortraitError
from training.__main__ import RECIPES
from training.evaluate import positive_int
from training.recipe import Recipe, load_recipe

if TYPE_CHECKING:
    from torch import Tensor

    from icportrait.nn import Checkpoint, WarpingNetwork
    from training.data import Source

FIGURES = {
    "head_psnr_db": "head PSNR dB",
    "head_ssim": "head SSIM",
    "head_feature_distance": "head VAE",
    "head_delta_e": "head dE",
    "whole_psnr_db": "whole PSNR dB",
    "identity_delta_e": "identity dE",
}
"""Figures to compare: from ``evaluation.picture_figures``, and the mean over the identity parts that a target shows."""
_TOGETHER = 8


class Ablation(Enum):
    """The part that a variant lacks."""

    FULL = "full"
    NO_WARP = "no warp"
    """F_ref isn't warped: its right half has the reference's own features alone."""
    NO_MASKING = "no masking"
    """The whole reference is seen, in training and in use."""
    NO_BYPASS = "no unwarped bypass"
    """F_ref's left half has nothing of the profile's features, which only come warped."""


def ablate(network: WarpingNetwork, ablation: Ablation) -> None:
    """Take the part out of this one network's ``inject``; masking isn't the network's to leave out."""
    from icportrait.nn.matching import gather_features, join_canvas, split_canvas

    def inject(appearance: list[Tensor], flows: list[Tensor]) -> list[Tensor]:
        f_ref = []
        for zero_conv, features, residual in zip(network.zero_convs, appearance, network.preset.residuals, strict=True):
            source, target = split_canvas(features)
            if ablation is not Ablation.NO_WARP:
                target = gather_features(source, flows[residual.level]) + target
            bypass = source * 0 if ablation is Ablation.NO_BYPASS else source
            f_ref.append(zero_conv(join_canvas(bypass, target)))
        return f_ref

    if ablation in (Ablation.NO_WARP, Ablation.NO_BYPASS):
        network.inject = inject  # type: ignore[method-assign]


def train(ablation: Ablation, base: Path, out: Path, recipe: Recipe, source: Source, device: str) -> Checkpoint:
    """Train a variant in ``out``, or go on where an earlier run stopped, and return what it saved."""
    from icportrait.nn import load_checkpoint
    from training.new_weights import new_checkpoint
    from training.stages import AppearanceStage
    from training.trainer import STATE, Trainer

    def prepared(checkpoint: Checkpoint) -> Checkpoint:
        ablate(checkpoint.warping_network, ablation)
        for model in checkpoint.models:
            model.to(device)
        return checkpoint

    start = load_checkpoint(base)
    fresh, network = new_checkpoint(start.preset, recipe.seed), start.warping_network
    network.appearance_net, network.zero_convs = fresh.warping_network.appearance_net, fresh.warping_network.zero_convs
    trainer = Trainer(AppearanceStage(prepared(replace(start, unet=fresh.unet)), source, recipe), out)
    if (out / STATE).is_file():
        trainer.resume()
    trainer.run()
    return prepared(load_checkpoint(out / "checkpoint"))


def difference(values: Tensor, full: Tensor) -> dict[str, float]:
    """Return the mean of ``values - full`` over the pairs that have both, and half of its 95 % confidence interval."""
    apart = values - full
    apart = apart[~apart.isnan()]
    half_width = 1.96 * float(apart.std(correction=1)) / math.sqrt(len(apart)) if len(apart) > 1 else math.nan
    return {"mean": float(apart.mean()), "half_width": half_width}


def table(variants: dict[str, dict[str, Any]]) -> str:
    """Write two lines a variant: its figures, and how far they are from the full model's."""
    lines = [f"{'':<20}" + "".join(f"{title:>18}" for title in FIGURES.values())]
    for name, variant in variants.items():
        lines.append(f"{name:<20}" + "".join(f"{variant['figures'][figure]:>18.3f}" for figure in FIGURES))
        if name != Ablation.FULL.value:
            apart = [variant["from_full"][figure] for figure in FIGURES]
            cells = [f"{value['mean']:+.3f} +-{value['half_width']:.3f}" for value in apart]
            lines.append(f"{'  from full (95 %)':<20}" + "".join(f"{cell:>18}" for cell in cells))
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m training.ablations", description=__doc__.splitlines()[0])
    parser.add_argument("--base", type=Path, required=True, help="checkpoint with a trained VAE and matching net")
    parser.add_argument("--out", type=Path, required=True, help="a run for each variant; goes on with those it has")
    parser.add_argument("--recipe", type=Path, default=RECIPES / "demo-128.toml", help="default: %(default)s")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="change the recipe; repeatable")
    parser.add_argument("--steps", type=positive_int, metavar="N", help="of each training (default: the recipe's)")
    parser.add_argument("--pairs", type=positive_int, metavar="N", default=100, help="unseen pairs (default: 100)")
    parser.add_argument("--device", help="default: cuda where there is one, else cpu")
    parser.add_argument("--threads", type=positive_int, help="CPU threads (default: torch's choice)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures there")
    args = parser.parse_args(argv)
    try:
        _run(args)
    except (IcPortraitError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


def _run(args: argparse.Namespace) -> None:
    steps = [f"steps={args.steps}"] if args.steps else []
    _, data, recipe = load_recipe(args.recipe, "appearance", [*args.set, *steps])
    print("loading torch and the checkpoint", file=sys.stderr, flush=True)
    import torch
    from tqdm import tqdm

    from icportrait.nn import load_checkpoint
    from training.data import open_source
    from training.evaluation import IDENTITY_PARTS, finite, means, picture_figures
    from training.evaluation_pairs import EvaluationPairs, evaluation_pairs
    from training.grids import picture_grid
    from training.portraits import make_portraits

    if args.threads:
        torch.set_num_threads(args.threads)
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    base = load_checkpoint(args.base)
    preset, inference_steps = base.preset, base.num_inference_steps
    source = open_source(data, preset, device)
    firsts = tqdm(range(0, args.pairs, _TOGETHER), "unseen pairs", unit=f"x{_TOGETHER}")
    parts = [evaluation_pairs(preset, 0, min(_TOGETHER, args.pairs - i), i, device) for i in firsts]
    pairs = EvaluationPairs.cat(parts)

    columns = {"profile": pairs.profile, "reference": pairs.reference, "ground truth": pairs.target}
    by_pair, variants = {}, {}
    for ablation in Ablation:
        own = replace(recipe, mask_ratio=0.0) if ablation is Ablation.NO_MASKING else recipe
        checkpoint = train(ablation, args.base, args.out / ablation.value.replace(" ", "-"), own, source, device)
        with tqdm(total=args.pairs * inference_steps, desc=f"portraits, {ablation.value}", unit="step") as bar:
            settings: dict[str, Any] = {"num_inference_steps": inference_steps, "mask_ratio": own.mask_ratio}
            settings |= {"guidance_scale": 1.0, "progress": bar.update}
            made = make_portraits(checkpoint, pairs.profile, pairs.reference, range(args.pairs), **settings)
        measured = picture_figures(made.picture, pairs, checkpoint.vae)
        identity = torch.stack([measured[f"{part.name.lower()}_delta_e"] for part in IDENTITY_PARTS])
        measured["identity_delta_e"] = identity.nanmean(dim=0)
        by_pair[ablation] = figures = {figure: measured[figure] for figure in FIGURES}
        apart = {figure: difference(figures[figure], by_pair[Ablation.FULL][figure]) for figure in FIGURES}
        variants[ablation.value] = {"figures": means(figures), "from_full": apart}
        columns[ablation.value] = made.picture
    picture_grid({title: pictures[:_TOGETHER] for title, pictures in columns.items()}).save(args.out / "ablations.png")
    print(f"{recipe.steps} training steps, {args.pairs} unseen pairs, {inference_steps} steps, guidance 1\n")
    print(table(variants))
    if args.json:
        run = {"base": str(args.base), "recipe": asdict(recipe), "pairs": args.pairs, "variants": variants}
        args.json.write_text(json.dumps(finite(run), indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
