"""The UNet's real inputs, recorded while the reference pipeline makes portraits."""

from __future__ import annotations

from collections.abc import Callable
from itertools import count
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from icportrait.contract import Array, engine_specs
from icportrait.errors import CheckpointError, InvalidRequest
from icportrait.nn import Checkpoint
from icportrait.nn.pipeline import ReferencePipeline
from icportrait.pictures.faces import crop_to_square, find_crop
from icportrait.pictures.imaging import decode_picture
from icportrait.presets import Preset

Pixels = NDArray[np.uint8]
ROWS = 64
"""Recorded inputs that are kept, spread evenly over all."""
MANY_STEPS = 20
"""Steps of every other pair, so that the record has timesteps that the checkpoint's own number skips."""
_SUFFIXES = {".jpg", ".jpeg", ".png", ".webp"}


def rendered_pairs(preset: Preset, number: int) -> list[tuple[Pixels, Pixels]]:
    """Render profiles and references [S, S, 3] uint8 of heads whose persons no evaluation ever shows."""
    from training.pairs import render_pairs

    pairs = render_pairs(seed=1, count=number, cross_identity_share=1.0, size=preset.image_size)
    profiles, references = (
        (rendering.image * 255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
        for rendering in (pairs.profile, pairs.reference)
    )
    return list(zip(profiles, references, strict=True))


def folder_pairs(preset: Preset, folder: Path, number: int) -> list[tuple[Pixels, Pixels]]:
    """Join a folder's first ``number`` pictures to pairs like ``rendered_pairs``. Each one's reference is the next one.

    Raises:
        CheckpointError: the folder has fewer than two pictures, or one can't be read.
    """
    paths = sorted(path for path in folder.glob("*") if path.suffix.lower() in _SUFFIXES and path.is_file())[:number]
    if len(paths) < 2:
        raise CheckpointError(f"{folder}: has {len(paths)} pictures (jpg, png, webp), expected 2 or more")
    pixels = []
    for path in paths:
        try:
            picture = decode_picture(path.read_bytes(), path.name)
        except InvalidRequest as error:
            raise CheckpointError(f"{path}: {error}") from error
        pixels.append(crop_to_square(picture, find_crop(picture, None, path.name), preset.image_size))
    return list(zip(pixels, [*pixels[1:], pixels[0]], strict=True))


def record_inputs(
    checkpoint: Checkpoint,
    pairs: list[tuple[Pixels, Pixels]],
    progress: Callable[[str], None] = lambda _: None,
) -> dict[str, Array]:
    """Make the pairs' portraits in fp32 and keep what the UNet got.

    Args:
        checkpoint: whose portraits; its modules are brought to fp32.
        pairs: profiles and references [S, S, 3] uint8.
        progress: called with what is being done now.

    Returns:
        Latents, timesteps and ``F_ref`` by the UNet's input names, float32, up to ``ROWS`` rows along axis 0.
    """
    pipeline = ReferencePipeline.of(checkpoint, "cuda" if torch.cuda.is_available() else "cpu")
    for module in pipeline.modules.values():
        module.float()
    steps = [MANY_STEPS if index % 2 else checkpoint.num_inference_steps for index in range(len(pairs))]
    calls = sum(steps) * (1 if checkpoint.guidance_scale == 1 else 2)
    # Odd, because guided rows with and without F_ref come in turns.
    every = -(-calls // ROWS) | 1
    seen, kept = count(), []

    def keep(_: torch.nn.Module, arguments: tuple[torch.Tensor, ...]) -> None:
        if next(seen) % every == 0:
            kept.append([argument.cpu().numpy() for argument in arguments])

    hook = pipeline.modules["unet"].register_forward_pre_hook(keep)
    for index, (profile, reference) in enumerate(pairs):
        progress(f"calibration: portrait {index + 1} of {len(pairs)}")
        pipeline(profile, reference, seed=index, num_inference_steps=steps[index])
    hook.remove()
    inputs = engine_specs(checkpoint.preset)["unet"].inputs
    return {spec.name: np.concatenate(rows) for spec, rows in zip(inputs, zip(*kept, strict=True), strict=True)}
