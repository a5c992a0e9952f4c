"""Make the reference pipeline's portrait: ``python -m tests.full.reference CHECKPOINT PICTURE``."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
from PIL import Image
from torch import nn

from icportrait.contract import Array
from icportrait.nn import ReferencePipeline, load_checkpoint
from icportrait.presets import SD15_512
from tests.conftest import EXAMPLES

STEPS, SEED = 2, 7


def pixels_of(name: str) -> Array:
    """Read an example's photograph in the preset's size, so that nothing is cropped on the way."""
    with Image.open(EXAMPLES / name) as picture:
        return np.asarray(picture.convert("RGB").resize((SD15_512.image_size,) * 2))


PROFILE, REFERENCE = pixels_of("hopper.jpg"), pixels_of("astronaut.jpg")


def reference_portrait(directory: Path) -> Array:
    """Compute a checkpoint's portrait in float32 from the weights as they are exported, in half precision."""
    checkpoint = load_checkpoint(directory)
    pipeline = ReferencePipeline.of(checkpoint)
    for module in pipeline.modules.values():
        # Only the module that computes is in float32, because TensorRT's builder takes much memory beside this.
        module.half()
        module.register_forward_pre_hook(_widen)
        module.register_forward_hook(_narrow)
    made = pipeline(PROFILE, REFERENCE, seed=SEED, num_inference_steps=STEPS, guidance_scale=1.0)
    return made.portraits[0]


def _widen(module: nn.Module, _: object) -> None:
    module.float()


def _narrow(module: nn.Module, *_: object) -> None:
    module.half()


if __name__ == "__main__":
    Image.fromarray(reference_portrait(Path(sys.argv[1]))).save(sys.argv[2])
