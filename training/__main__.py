"""Train one stage: python -m training vae | matching | appearance | decoder | refine."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from icportrait.errors import IcPortraitError
from training.recipe import STAGES, Data, Recipe, RecipeError, load_recipe

if TYPE_CHECKING:
    from icportrait.nn import Checkpoint

RECIPES = Path(__file__).parent / "recipes"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m training", description=__doc__)
    parser.add_argument("stage", choices=STAGES)
    parser.add_argument("--recipe", type=Path, default=RECIPES / "demo-128.toml", help="default: %(default)s")
    parser.add_argument("--base", type=Path, help="checkpoint to start from, ours or Stable Diffusion 1.5's layout")
    parser.add_argument("--out", type=Path, required=True, help="the run's directory")
    parser.add_argument("--resume", action="store_true", help="go on with the run in --out")
    parser.add_argument(
        "--until", type=int, metavar="STEP", help="stop there; --resume goes on (default: recipe's end)"
    )
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="change the recipe; repeatable")
    parser.add_argument("--device", help="default: cuda where there is one, else cpu")
    parser.add_argument("--threads", type=int, help="CPU threads (default: torch's choice)")
    args = parser.parse_args(argv)
    try:
        preset, data, recipe = load_recipe(args.recipe, args.stage, args.set)
        _train(args, preset, data, recipe)
    except (IcPortraitError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"stopped; go on from the last saved step with --resume: {args.out}", file=sys.stderr)
        return 130
    return 0


def _train(args: argparse.Namespace, preset: str, data: Data, recipe: Recipe) -> None:
    print("loading torch and the checkpoint", file=sys.stderr, flush=True)
    import torch

    from training.data import open_source
    from training.stages import STAGE_CLASSES
    from training.trainer import Trainer

    if args.threads:
        torch.set_num_threads(args.threads)
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    checkpoint = _base(args.base, preset, recipe.seed)
    for model in checkpoint.models:
        model.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    source = open_source(data, checkpoint.preset, device)
    trainer = Trainer(STAGE_CLASSES[args.stage](checkpoint, source, recipe), args.out)
    if args.resume:
        trainer.resume()
    trainer.run(args.until)


def _base(directory: Path | None, preset: str, seed: int) -> Checkpoint:
    """Load the weights that training starts from: our checkpoint, a Stable Diffusion model, or new weights."""
    from icportrait.nn import load_checkpoint
    from icportrait.nn.adaptation import from_stable_diffusion
    from icportrait.nn.checkpoint import PIPELINE_CLASS
    from icportrait.nn.component_files import read_json
    from icportrait.presets import PRESETS
    from training.new_weights import new_checkpoint

    if directory is None:
        if preset not in PRESETS:
            raise RecipeError(f"preset is {preset!r}, expected one of {', '.join(PRESETS)}; or name a --base")
        return new_checkpoint(PRESETS[preset], seed)
    index = directory / "model_index.json"
    if index.is_file() and read_json(index).get("_class_name") == PIPELINE_CLASS:
        return load_checkpoint(directory)
    return from_stable_diffusion(directory)


if __name__ == "__main__":
    sys.exit(main())
