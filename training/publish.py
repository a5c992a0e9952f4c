"""Write a checkpoint as it is given away, in fp16 and with its defaults: ``python -m training.publish``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from icportrait.errors import IcPortraitError
from training.evaluate import positive_int


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m training.publish", description=__doc__.splitlines()[0])
    parser.add_argument(
        "--checkpoint",
        type=Path,
        required=True,
        nargs="+",
        action="extend",
        help="a run's checkpoint; of several, the weights' mean",
    )
    parser.add_argument("--out", type=Path, required=True, help="directory to write")
    parser.add_argument("--steps", type=positive_int, required=True, metavar="N", help="default number of steps")
    parser.add_argument("--guidance", type=float, default=1.0, metavar="SCALE", help="default: %(default)s")
    args = parser.parse_args(argv)
    if not args.guidance >= 1:
        parser.error(f"--guidance is {args.guidance:g}, expected 1 or more")
    try:
        size_bytes = publish(args.checkpoint, args.out, args.steps, args.guidance)
    except IcPortraitError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"{args.out}: {size_bytes / 1e6:.1f} MB")
    return 0


def publish(checkpoints: Sequence[Path], out: Path, num_inference_steps: int, guidance_scale: float) -> int:
    """Write the mean of checkpoints' weights to ``out`` in half precision with its defaults.

    Runs that start from one checkpoint stay near enough to each other for their mean to be better than each
    (arXiv 2203.05482).

    Returns:
        Size in bytes.

    Raises:
        IcPortraitError: one isn't a checkpoint, or they aren't of one geometry, schedule and prompt.
    """
    from dataclasses import replace

    from icportrait.nn import load_checkpoint, save_checkpoint

    loaded, *others = (load_checkpoint(checkpoint) for checkpoint in checkpoints)
    for path, other in zip(checkpoints[1:], others, strict=True):
        is_alike = (other.preset, other.scheduler_config) == (loaded.preset, loaded.scheduler_config)
        if not is_alike or not other.prompt_embedding.equal(loaded.prompt_embedding):
            raise IcPortraitError(f"{path}: isn't of the geometry, the schedule and the prompt of {checkpoints[0]}")
    for models in zip(*(each.models for each in (loaded, *others)), strict=True):
        states = [model.state_dict() for model in models]
        models[0].load_state_dict({name: sum(each[name] for each in states) / len(states) for name in states[0]})
        models[0].half()
    save_checkpoint(replace(loaded, num_inference_steps=num_inference_steps, guidance_scale=guidance_scale), out)
    return sum(file.stat().st_size for file in out.rglob("*") if file.is_file())


if __name__ == "__main__":
    sys.exit(main())
