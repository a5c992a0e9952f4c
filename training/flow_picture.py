"""A flow as a picture; without torch, for the demo shows one too."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image


def flow_picture(flow: NDArray[np.integer[Any]]) -> Image.Image:
    """Draw a flow as colours: hue for a displacement's direction, strength for its length.

    Args:
        flow: ``[s, s]``, positions y * s + x in the profile's grid.

    Returns:
        s x s pixels: white where nothing moved, full colour from a quarter of the picture's side.
    """
    side = flow.shape[-1]
    rows, columns = np.indices(flow.shape)
    down, right = flow // side - rows, flow % side - columns
    hue = (np.arctan2(down, right) / (2 * np.pi) % 1.0) * 255
    saturation = np.minimum(np.hypot(down, right) / (side / 4), 1.0) * 255
    hsv = np.stack([hue, saturation, np.full_like(hue, 255)], axis=-1).astype(np.uint8)
    return Image.fromarray(hsv, "HSV").convert("RGB")
