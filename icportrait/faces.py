"""Which part of a picture is used: the box the caller gives, else the largest face, else the centre.

Every crop is square in pixels, so no face is ever stretched, and lies inside the picture, so nothing is padded.
"""

from __future__ import annotations

import functools
import logging
import math
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from icportrait.errors import InvalidRequest
from icportrait.imaging import MIN_SIDE_PX

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
"""So many of the largest that were found so are sought again, each by itself in a copy where it has this side, by
windows whose sizes differ less. What isn't found again was none."""

HEAD_AND_SHOULDERS = 2.1
"""Side of the crop in faces; the finder's face reaches from the brows' upper side to the chin."""

FACE_CENTRE = 0.47
"""How far down the crop the face's middle is: hair takes less room above than neck and shoulders below."""

logger = logging.getLogger(__name__)
_thread = threading.local()
_importing = threading.Lock()
"""OpenCV takes another module's place while it is imported; a second thread that imports it then finds half of it."""


@dataclass(frozen=True)
class Crop:
    """The square of an upright picture that is used."""

    box: Box
    """x0, y0, x1, y1 in pixels."""
    source: Literal["given", "face", "centre"]
    picture_size: tuple[int, int]
    """Width and height of the picture in pixels."""

    def to_dict(self) -> dict[str, Any]:
        """The source and the box in 0..1 of the picture; given back as a request's box, it chooses the same pixels."""
        width, height = self.picture_size
        x0, y0, x1, y1 = self.box
        fractions = (x0 / width, y0 / height, x1 / width, y1 / height)
        return {"source": self.source, "box": [round(fraction, 6) for fraction in fractions]}


def find_crop(picture: Image.Image, given_box: tuple[float, float, float, float] | None, name: str) -> Crop:
    """Choose the square of a picture that is used.

    A given box that isn't square in pixels is narrowed to the square in its middle. Without a box it is the head and
    shoulders of the largest frontal face; without a face, or without OpenCV, the square in the picture's middle.

    Args:
        picture: the upright picture.
        given_box: x0, y0, x1, y1 in 0..1 of the upright picture.
        name: the input the box came in, for messages.

    Raises:
        InvalidRequest: the box isn't inside the picture or spans under 16 px.
    """
    if given_box is not None:
        return Crop(_middle_square(_to_pixels(given_box, picture.size, name)), "given", picture.size)
    face = find_face(picture)
    if face is not None:
        return Crop(_head_and_shoulders(face, picture.size), "face", picture.size)
    return Crop(_middle_square((0, 0, *picture.size)), "centre", picture.size)


def crop_to_square(picture: Image.Image, crop: Crop, size: int) -> NDArray[np.uint8]:
    """The crop, scaled down or up: ``[size, size, 3]`` uint8."""
    # reducing_gap lets a large crop shrink by a whole factor first: a face in a 12-megapixel picture takes 30 ms, not
    # 77 ms, and the result is the same to 54 dB.
    scaled = picture.resize((size, size), Image.Resampling.LANCZOS, box=crop.box, reducing_gap=2.0)
    return np.array(scaled, dtype=np.uint8)


def find_face(picture: Image.Image) -> Box | None:
    """The largest frontal face, in the picture's pixels; None where there is none or OpenCV isn't installed.

    Viola and Jones, "Rapid object detection using a boosted cascade of simple features", 2001, by OpenCV's cascade
    ``frontalface_alt2``, which is both faster and less often mistaken than ``frontalface_default``.
    """
    finder = _finder()
    return finder.largest_face(picture) if finder else None


class _Finder:
    """OpenCV's cascade, for one thread."""

    def __init__(self, cv2: Any) -> None:
        self._cv2 = cv2
        self._cascade = cv2.CascadeClassifier(str(Path(cv2.data.haarcascades) / "haarcascade_frontalface_alt2.xml"))

    def largest_face(self, picture: Image.Image) -> Box | None:
        """See ``find_face``."""
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
        """The face that was seen there, more exactly; None where a second look doesn't see it."""
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
        """Faces that so many neighbouring windows agree on, their sizes growing by ``step``."""
        found = self._cascade.detectMultiScale(
            grey, step, agreeing, minSize=(smallest_px, smallest_px), maxSize=(largest_px, largest_px)
        )
        return [(float(x), float(y), float(side)) for x, y, side, _ in found]

    def _shrunk(self, grey: Array, scale: float) -> tuple[Array, float]:
        """A smaller copy, and its scale; what would be larger stays as it is."""
        if scale >= 1:
            return grey, 1.0
        height, width = grey.shape
        size = max(1, round(width * scale)), max(1, round(height * scale))
        return self._cv2.resize(grey, size, interpolation=self._cv2.INTER_AREA), scale


def _by_size(face: Face) -> tuple[float, ...]:
    return face[2], *face


def _inside(x: float, y: float, side: float, size: tuple[int, int]) -> Box:
    """A face in whole pixels of a picture."""
    width, height = size
    return max(0, round(x)), max(0, round(y)), min(width, round(x + side)), min(height, round(y + side))


@functools.cache
def _opencv() -> Any | None:
    """OpenCV; imported on first use, since it takes some 60 ms."""
    with _importing:
        try:
            import cv2
            import cv2.data  # distributions other than PyPI's leave the cascades out
        except ImportError as error:
            logger.warning("no face is sought and pictures are cropped to their middle: OpenCV is missing (%s)", error)
            return None
    # Requests already run side by side; threads inside each search would only take turns, in an order that varies.
    cv2.setNumThreads(1)
    return cv2


def _finder() -> _Finder | None:
    """This thread's: one detector must not serve two threads at once."""
    if not hasattr(_thread, "finder"):
        cv2 = _opencv()
        _thread.finder = cv2 and _Finder(cv2)
    finder: _Finder | None = _thread.finder
    return finder


def _to_pixels(box: tuple[float, float, float, float], size: tuple[int, int], name: str) -> Box:
    x0, y0, x1, y1 = box
    if not (0 <= x0 < x1 <= 1 and 0 <= y0 < y1 <= 1):  # not-a-number fails here too
        came = ", ".join(f"{value:g}" for value in box)
        raise InvalidRequest(f"{name}: [{came}], expected x0, y0, x1, y1 with 0 <= x0 < x1 <= 1 and 0 <= y0 < y1 <= 1")
    width, height = size
    left, top, right, bottom = round(x0 * width), round(y0 * height), round(x1 * width), round(y1 * height)
    if min(right - left, bottom - top) < MIN_SIDE_PX:
        raise InvalidRequest(
            f"{name}: spans {right - left}x{bottom - top} px of a {width}x{height} px picture, "
            f"expected at least {MIN_SIDE_PX} px each way; widen the box"
        )
    return left, top, right, bottom


def _middle_square(box: Box) -> Box:
    x0, y0, x1, y1 = box
    side = min(x1 - x0, y1 - y0)
    left, top = (x0 + x1 - side) // 2, (y0 + y1 - side) // 2
    return left, top, left + side, top + side


def _head_and_shoulders(face: Box, size: tuple[int, int]) -> Box:
    """The face grown to head and shoulders, moved into the picture, and no larger than the picture allows."""
    x0, y0, x1, y1 = face
    width, height = size
    side = min(math.ceil(HEAD_AND_SHOULDERS * (y1 - y0)), width, height)
    left = min(max(0, round((x0 + x1) / 2 - side / 2)), width - side)
    top = min(max(0, round((y0 + y1) / 2 - side * FACE_CENTRE)), height - side)
    return left, top, left + side, top + side
