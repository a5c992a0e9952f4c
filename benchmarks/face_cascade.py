"""The finder that faces were found by before: OpenCV's frontal cascade, kept to be measured beside the one in use.

Viola and Jones, "Rapid object detection using a boosted cascade of simple features", 2001, by OpenCV's cascade
``frontalface_alt2``, which is both faster and less often mistaken than ``frontalface_default``.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

Array = NDArray[np.uint8]
Box = tuple[int, int, int, int]
Face = tuple[float, float, float]
"""Left, top and side: the cascade knows squares only."""

GREY_SIZE_PX = (360, 640)
"""At most the shorter and the longer side of the grey copy in which faces are sought: the time goes up with both."""

WINDOW_PX = 20
"""The smallest face that the cascade knows."""

SEARCHES = ((1 / 3, 1.0, 0.1), (1 / 6, 0.34, 0.0), (1 / 12, 0.17, 0.0))
"""Each by its smallest and largest face, and by what the picture's edges are continued by, in shorter sides of the
picture: a face that fills a picture leaves windows no room to agree in. Each is made in a copy so small that its
smallest face is one window: up to two windows OpenCV skips every second place, which makes it fast. The first to find a
face ends it, so a picture without one takes longest: 18 to 35 ms, against 3 ms for a face over a third."""

CLOSE_UPS, CLOSE_UP_PX = 8, 28
"""The number of largest faces that are sought again, each by itself in a copy where it has this side, by
windows whose sizes differ less. What isn't found again was none."""


class Cascade:
    """OpenCV's frontal cascade; for one thread."""

    def __init__(self) -> None:
        import cv2
        import cv2.data

        cv2.setNumThreads(1)
        self._cv2: Any = cv2
        self._cascade = cv2.CascadeClassifier(str(Path(cv2.data.haarcascades) / "haarcascade_frontalface_alt2.xml"))

    def largest_face(self, picture: Image.Image) -> Box | None:
        """Find the largest frontal face, in the picture's pixels."""
        shorter, longer = GREY_SIZE_PX
        scale = min(shorter / min(picture.size), longer / max(picture.size))
        grey, scale = self._shrunk(np.asarray(picture.convert("L")), scale)
        for smallest, largest, edge in SEARCHES:
            edge_px = round(edge * min(grey.shape))
            wide = self._cv2.copyMakeBorder(grey, *4 * [edge_px], self._cv2.BORDER_REPLICATE)
            small, small_scale = self._shrunk(wide, WINDOW_PX / (smallest * min(grey.shape)))
            found = self._search(small, 1.26, 1, WINDOW_PX, round(largest / smallest * WINDOW_PX))
            found = sorted(found, key=lambda face: -face[2])[:CLOSE_UPS]
            seen = [self._close_up(wide, *(value / small_scale for value in face)) for face in found]
            if faces := [face for face in seen if face]:
                x, y, side = max(faces, key=_by_size)
                return _inside((x - edge_px) / scale, (y - edge_px) / scale, side / scale, picture.size)
        return None

    def _close_up(self, grey: Array, x: float, y: float, side: float) -> Face | None:
        """Find more exactly the face that was seen there. Return None where a second look doesn't see it."""
        height, width = grey.shape
        margin = 0.35 * side
        left, top = max(0, int(x - margin)), max(0, int(y - margin))
        part = grey[top : min(height, int(y + side + margin)), left : min(width, int(x + side + margin))]
        part, scale = self._shrunk(part, CLOSE_UP_PX / side)
        found = self._search(part, 1.1, 3, int(0.7 * side * scale), int(1.45 * side * scale))
        if not found:
            return None
        x, y, side = max(found, key=_by_size)
        return left + x / scale, top + y / scale, side / scale

    def _search(self, grey: Array, step: float, agreeing: int, smallest_px: int, largest_px: int) -> list[Face]:
        """Find faces that so many neighbouring windows agree on, their sizes growing by ``step``."""
        found = self._cascade.detectMultiScale(
            grey, step, agreeing, minSize=(smallest_px, smallest_px), maxSize=(largest_px, largest_px)
        )
        return [(float(x), float(y), float(side)) for x, y, side, _ in found]

    def _shrunk(self, grey: Array, scale: float) -> tuple[Array, float]:
        """Return a smaller copy and its scale. A copy that would be larger is the picture itself."""
        if scale >= 1:
            return grey, 1.0
        height, width = grey.shape
        size = max(1, round(width * scale)), max(1, round(height * scale))
        return self._cv2.resize(grey, size, interpolation=self._cv2.INTER_AREA), scale


def _by_size(face: Face) -> tuple[float, ...]:
    return face[2], *face


def _inside(x: float, y: float, side: float, size: tuple[int, int]) -> Box:
    """Return a face in whole pixels of a picture."""
    width, height = size
    return max(0, round(x)), max(0, round(y)), min(width, round(x + side)), min(height, round(y + side))
