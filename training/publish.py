"""Write a checkpoint as it is given away, in fp16 and with its defaults: ``python -m training.publish``."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from icportrait.errors import IcPortraitError
from training.evaluate import positive_int


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m training.publish", description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", type=Path, required=True, help="a run's checkpoint")
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


def publish(checkpoint: Path, out: Path, num_inference_steps: int, guidance_scale: float) -> int:
    """Write ``checkpoint`` to ``out`` in half precision with its defaults; returns its size in bytes."""
    from dataclasses import replace

    from icportrait.nn import load_checkpoint, save_checkpoint

    loaded = load_checkpoint(checkpoint)
    for model in loaded.models:
        model.half()
    save_checkpoint(replace(loaded, num_inference_steps=num_inference_steps, guidance_scale=guidance_scale), out)
    return sum(file.stat().st_size for file in out.rglob("*") if file.is_file())


if __name__ == "__main__":
    sys.exit(main())
