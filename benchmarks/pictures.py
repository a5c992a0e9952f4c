"""Pictures that a server hasn't seen: a given one with a pattern of its own laid over it."""

from __future__ import annotations

import io

import numpy as np
from icportrait_client.errors import InvalidRequest
from PIL import Image

_TILES = 8
_STRENGTH = 3
"""Levels of 255 by which a tile may be lighter or darker: not seen by a face finder, and not lost in a JPEG."""


def new_pictures(data: bytes, count: int, seed: int) -> list[bytes]:
    """Make ``count`` pictures of one, as JPEGs.

    The tiles of each are a little lighter or darker over the whole picture, so that no crop of two is the same.

    Raises:
        InvalidRequest: the given one is none.
    """
    if count == 0:
        return []
    rng = np.random.default_rng(seed)
    try:
        with Image.open(io.BytesIO(data)) as image:
            pixels = np.asarray(image.convert("RGB"), dtype=np.int16)
    except OSError as error:
        raise InvalidRequest(f"profile: can't be read ({error}), expected a picture to make new ones of") from None
    rows, columns = (np.arange(size) * _TILES // size for size in pixels.shape[:2])
    made = []
    for _ in range(count):
        tiles = rng.integers(-_STRENGTH, _STRENGTH, (_TILES, _TILES, 3), endpoint=True, dtype=np.int16)
        changed = np.clip(pixels + tiles[rows][:, columns], 0, 255).astype(np.uint8)
        file = io.BytesIO()
        Image.fromarray(changed).save(file, "JPEG", quality=90)
        made.append(file.getvalue())
    return made
