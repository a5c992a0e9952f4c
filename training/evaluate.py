"""Measure a checkpoint's portraits on people it never saw: ``python -m training.evaluate``."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

from icportrait.errors import CheckpointError, IcPortraitError, InvalidRequest, RuntimeNotAvailable
from icportrait.phases import ALL_STEPS, guided_steps, phases_of, row_steps
from training.recipe import VARIETIES, Data

if TYPE_CHECKING:
    from icportrait.nn import Checkpoint
    from training.evaluation_pairs import EvaluationPairs

DEFAULT_CHECKPOINT = Path(__file__).parents[1] / "checkpoints" / "demo-128"
PAIRS, SWEEP_PAIRS = 200, 24
SWEEP_STEPS = (2, 4, 6, 10, 20)
SWEEP_GUIDANCE = (1.0, 1.5, 2.0, 3.0)
SWEEP_INTERVALS = (
    (0.0, 0.0),
    (0.0, 0.3),
    (0.0, 0.5),
    (0.2, 0.6),
    (0.2, 0.8),
    (0.2, 1.0),
    (0.5, 1.0),
    (0.7, 1.0),
    ALL_STEPS,
)
"""The first is without guidance."""
_RENDERED_TOGETHER = 8


def sweep(
    checkpoint: Checkpoint,
    pairs: EvaluationPairs,
    steps: Sequence[int],
    guidance_scales: Sequence[float],
    guidance_intervals: Sequence[tuple[float, float]] = (ALL_STEPS,),
    *,
    seed: int = 0,
    batch_size: int = 16,
    progress: Callable[[int], object] = lambda _: None,
) -> list[dict[str, Any]]:
    """Try numbers of steps, guidance scales and intervals on the same pairs.

    Returns:
        For each combination ``num_inference_steps``, ``guidance_scale``, ``guidance_interval``, ``unet_rows`` (what a
        portrait costs) and the means of ``evaluation.picture_figures``; the highest PSNR over the head first.
    """
    from training.evaluation import means, picture_figures
    from training.portraits import make_portraits

    trials: list[dict[str, Any]] = []
    for count, scale, interval in product(steps, guidance_scales, guidance_intervals):
        made = make_portraits(
            checkpoint,
            pairs.profile,
            pairs.reference,
            range(seed, seed + len(pairs)),
            num_inference_steps=count,
            guidance_scale=scale,
            guidance_interval=interval,
            batch_size=batch_size,
            progress=progress,
        )
        trial = {
            "num_inference_steps": count,
            "guidance_scale": scale,
            "guidance_interval": interval,
            "unet_rows": row_steps(phases_of(1, guided_steps(scale, interval, count), count)),
        }
        trials.append(trial | means(picture_figures(made.picture, pairs, checkpoint.vae)))
    return sorted(trials, key=lambda trial: -trial["head_psnr_db"])


def sweep_table(trials: list[dict[str, Any]]) -> str:
    """Write a line for each trial in the order of steps, guidance and interval, with a star at the best."""
    from training.evaluation import FIGURE_TITLES, figure_row

    settings = ("num_inference_steps", "guidance_scale", "guidance_interval")
    lines = [
        f"{'':<39}{FIGURE_TITLES[0]}",
        f"{'steps':>7}{'guidance':>10}{'interval':>11}{'UNet rows':>11}{FIGURE_TITLES[1]}",
    ]
    for trial in sorted(trials, key=lambda trial: [trial[name] for name in settings]):
        steps, scale, (begin, end) = (trial[name] for name in settings)
        setting = f"{steps:>7}{scale:>10g}{f'{begin:g}..{end:g}':>11}{trial['unet_rows']:>11}"
        lines.append(setting + figure_row(trial) + ("  *" if trial is trials[0] else ""))
    lines += ["", "* highest PSNR over the head"]
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m training.evaluate", description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", type=Path, default=DEFAULT_CHECKPOINT, help="default: %(default)s")
    parser.add_argument(
        "--pairs", type=positive_int, metavar="N", help=f"default: {PAIRS}, or {SWEEP_PAIRS} for each trial of --sweep"
    )
    parser.add_argument(
        "--seed",
        type=int,
        help="of the pairs, what is hidden, and noise (default: 0; with --sweep 1, so that settings aren't chosen on "
        "the pairs that they are measured on)",
    )
    parser.add_argument(
        "--variety",
        choices=VARIETIES,
        default=Data.variety,
        help="of people and views: those that the demo is trained for, or beyond (default: %(default)s)",
    )
    parser.add_argument("--steps", type=positive_int, metavar="N", help="default: the checkpoint's")
    parser.add_argument("--guidance", type=float, metavar="SCALE", help="1 or more (default: the checkpoint's)")
    parser.add_argument(
        "--guidance-interval",
        type=float,
        nargs=2,
        metavar=("BEGIN", "END"),
        default=ALL_STEPS,
        help="the steps with guidance, as shares of all (default: all)",
    )
    parser.add_argument("--batch", type=positive_int, metavar="N", default=16, help="default: %(default)s")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda where there is one")
    parser.add_argument(
        "--sweep",
        action="store_true",
        help=f"try steps {_listed(SWEEP_STEPS)} with guidance {_listed(SWEEP_GUIDANCE)} in place of one evaluation",
    )
    parser.add_argument(
        "--sweep-intervals",
        action="store_true",
        help=f"try the intervals {', '.join(f'{begin:g}..{end:g}' for begin, end in SWEEP_INTERVALS)} at --steps and "
        "--guidance in place of one evaluation",
    )
    parser.add_argument(
        "--json",
        nargs="?",
        const="-",
        metavar="FILE",
        help="print the figures as JSON instead of a table; with FILE write them there and print the table",
    )
    parser.add_argument(
        "--out", type=Path, default=Path("build/evaluation"), help="for grid.png (default: %(default)s)"
    )
    args = parser.parse_args(argv)
    if args.guidance is not None and not args.guidance >= 1:
        parser.error(f"--guidance is {args.guidance:g}, expected 1 or more")
    if not 0 <= args.guidance_interval[0] <= args.guidance_interval[1] <= 1:
        parser.error(f"--guidance-interval is {args.guidance_interval}, expected 0 <= BEGIN <= END <= 1")
    if args.sweep and args.sweep_intervals:
        parser.error("--sweep and --sweep-intervals: expected one of them")
    if args.seed is None:
        args.seed = 1 if args.sweep or args.sweep_intervals else 0
    if args.seed < 0:
        parser.error(f"--seed is {args.seed}, expected 0 or more")
    try:
        _run(args)
    except (IcPortraitError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


def _run(args: argparse.Namespace) -> None:
    # What can't be read or written is found before the portraits are paid for.
    if not args.checkpoint.is_dir():
        raise CheckpointError(
            f"{args.checkpoint}: there is no such directory; name a checkpoint with --checkpoint, or bring the demo's "
            "back with: git checkout -- checkpoints/demo-128"
        )
    if args.json not in (None, "-") and (Path(args.json).is_dir() or not Path(args.json).parent.is_dir()):
        raise InvalidRequest(f"--json: '{args.json}', expected a file's path in a directory that exists")
    args.out.mkdir(parents=True, exist_ok=True)
    print("loading torch and the checkpoint", file=sys.stderr, flush=True)
    import torch

    from icportrait.diffusion.sampling import NoiseSchedule
    from icportrait.nn import load_checkpoint
    from training import drawing
    from training.evaluation import evaluate, finite
    from training.evaluation_pairs import EvaluationPairs, evaluation_pairs
    from training.grids import picture_grid

    checkpoint = load_checkpoint(args.checkpoint)
    args.steps = args.steps or checkpoint.num_inference_steps
    args.guidance = args.guidance or checkpoint.guidance_scale
    tried: tuple[Sequence[int], Sequence[float], Sequence[tuple[float, float]]] | None = None
    if args.sweep:
        tried = SWEEP_STEPS, SWEEP_GUIDANCE, (ALL_STEPS,)
    elif args.sweep_intervals:
        tried = (args.steps,), (args.guidance,), SWEEP_INTERVALS
    for steps in tried[0] if tried else (args.steps,):
        NoiseSchedule.from_config(checkpoint.scheduler_config).trajectory("dpmpp_2m", steps)
    if args.device == "cuda" and not torch.cuda.is_available():
        raise RuntimeNotAvailable("--device: torch finds no GPU here, use cpu")
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    for network in checkpoint.models:
        network.to(device)
    count = args.pairs or (SWEEP_PAIRS if tried else PAIRS)
    variety = drawing.VARIETIES[args.variety]
    parts = []
    with _progress("rendering pairs", count) as progress:
        for first in range(0, count, _RENDERED_TOGETHER):
            size = min(_RENDERED_TOGETHER, count - first)
            parts.append(evaluation_pairs(checkpoint.preset, args.seed, size, first, device, variety))
            progress(size)
    pairs = EvaluationPairs.cat(parts)
    options: dict[str, Any] = {"seed": args.seed, "batch_size": args.batch}
    if tried:
        steps_of_all = count * sum(tried[0]) * len(tried[1]) * len(tried[2])
        with _progress("making portraits, in steps", steps_of_all) as progress:
            trials = sweep(checkpoint, pairs, *tried, progress=progress, **options)
        _show(
            args,
            {"variety": args.variety, "seed": args.seed, "pairs": count, "trials": finite(trials)},
            sweep_table(trials),
        )
        return
    with _progress("making portraits, in steps", count * (args.steps + 1)) as progress:
        options |= {
            "num_inference_steps": args.steps,
            "guidance_scale": args.guidance,
            "guidance_interval": tuple(args.guidance_interval),
        }
        evaluation = evaluate(checkpoint, pairs, progress=progress, **options)
    picture_grid(evaluation.samples).save(args.out / "grid.png")
    _show(args, {"variety": args.variety, "seed": args.seed, **evaluation.to_dict()}, evaluation.table())
    print(f"pictures: {args.out / 'grid.png'}", file=sys.stderr)


def _show(args: argparse.Namespace, figures: dict[str, Any], table: str) -> None:
    text = json.dumps({"checkpoint": str(args.checkpoint), **figures}, indent=2)
    if args.json == "-":
        print(text)
        return
    print(table)
    if args.json:
        Path(args.json).write_text(text + "\n", encoding="utf-8")


@contextmanager
def _progress(title: str, total: int) -> Iterator[Callable[[int], object]]:
    """Show a bar on a terminal; elsewhere print a line at the start."""
    from tqdm import tqdm

    if not sys.stderr.isatty():
        print(f"{title}: {total}", file=sys.stderr, flush=True)
    with tqdm(total=total, desc=title, file=sys.stderr, disable=not sys.stderr.isatty()) as bar:
        yield bar.update


def positive_int(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text}, expected 1 or more")
    return number


def _listed(numbers: Sequence[float]) -> str:
    return ", ".join(f"{number:g}" for number in numbers)


if __name__ == "__main__":
    sys.exit(main())
