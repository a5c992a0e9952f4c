"""Lighting-aware stitching: hiding most of the reference, so that it gives light and layout but no identity."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from icportrait.diffusion.randomness import Stream, raw_bits
from icportrait.errors import InvalidRequest
from icportrait.presets import Preset

HIDDEN_LEVEL = 128
"""Value that hidden pixels are filled with: mid-grey, close to zero once pixels are scaled to -1..1."""


def reference_visibility(preset: Preset, mask_ratio: float, seed: int) -> NDArray[np.float32]:
    """Choose the latent cells of the reference that may be seen: ``[1, 1, s, s]`` float32, 1 visible and 0 hidden.

    Whole patches of ``preset.mask_patch_px`` are hidden, exactly ``round(mask_ratio * patches)`` of them. The seed
    puts the patches into an order and the first ones are hidden, so a higher ratio hides the same patches and more.

    Raises:
        InvalidRequest: ``mask_ratio`` isn't within 0..1, or the seed is out of range.
    """
    if not 0 <= mask_ratio <= 1:
        raise InvalidRequest(f"mask_ratio: {mask_ratio}, expected 0..1")
    patches_across = preset.image_size // preset.mask_patch_px
    cells_per_patch = preset.mask_patch_px // preset.vae_factor
    patches = patches_across**2
    order = np.argsort(raw_bits(seed, Stream.MASK, patches), kind="stable")
    visible = np.ones(patches, dtype=np.float32)
    visible[order[: round(mask_ratio * patches)]] = 0.0
    grid = visible.reshape(patches_across, patches_across)
    return grid.repeat(cells_per_patch, axis=0).repeat(cells_per_patch, axis=1)[np.newaxis, np.newaxis]


def hide(pixels: NDArray[np.uint8], visibility: NDArray[np.float32]) -> NDArray[np.uint8]:
    """Copy a picture, and fill the copy's hidden cells with ``HIDDEN_LEVEL``.

    Args:
        pixels: ``[S, S, 3]`` uint8.
        visibility: ``[1, 1, s, s]`` float32 as ``reference_visibility`` gives it; S is a multiple of s.
    """
    hidden = visibility[0, 0] < 0.5
    cells, cell_px = hidden.shape[0], pixels.shape[0] // hidden.shape[0]
    masked = pixels.copy(order="C")
    rows, columns = np.nonzero(hidden)
    # A view with the axes row, y within the cell, column, x within the cell, rgb.
    masked.reshape(cells, cell_px, cells, cell_px, 3)[rows, :, columns] = HIDDEN_LEVEL
    return masked
