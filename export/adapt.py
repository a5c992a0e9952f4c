"""Adapt a Stable Diffusion 1.5 directory to an IC-Portrait checkpoint: ``python -m export.adapt``."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from icportrait.errors import IcPortraitError


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m export.adapt", description=__doc__.splitlines()[0])
    parser.add_argument("--stable-diffusion", type=Path, required=True, help="a directory in diffusers layout")
    parser.add_argument("--prompt", default="", help="every portrait is denoised under it (default: the empty one)")
    parser.add_argument("--prompt-embedding", type=Path, help="a safetensors file, in place of the text encoder")
    parser.add_argument("--out", type=Path, required=True, help="the checkpoint to write")
    args = parser.parse_args(argv)
    print("loading torch and the model", file=sys.stderr, flush=True)
    from icportrait.nn import from_stable_diffusion, save_checkpoint
    from icportrait.nn.component_files import WEIGHTS_STEM, weights_variant

    try:
        checkpoint = from_stable_diffusion(
            args.stable_diffusion, prompt=args.prompt, prompt_embedding=args.prompt_embedding
        )
        copies = {"unet": (checkpoint.unet, checkpoint.warping_network), "vae": (checkpoint.vae,)}
        for component, models in copies.items():
            if weights_variant(args.stable_diffusion / component, WEIGHTS_STEM) == "fp16":
                for model in models:  # half the disk, and no weight loses a bit
                    model.half()
        save_checkpoint(checkpoint, args.out)
    except (IcPortraitError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"{args.out}: {checkpoint.preset.name}; F_ref is zero until the checkpoint is trained")
    return 0


if __name__ == "__main__":
    sys.exit(main())
