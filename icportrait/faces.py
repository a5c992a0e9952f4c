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

Box = tuple[int, int, int, int]

SEARCH_SIDE_PX = 320
"""The longer side of the grey copy in which faces are sought; the time goes up with its square. In a 4:3 picture a face
of a seventh of the shorter side is found reliably, of an eleventh now and then (at 480 px: a tenth)."""

SEARCHED_SIZES = ((1 / 3, 1.0), (1 / 6, 0.4), (1 / 12, 0.2))
"""The searches, as (smallest, largest) face in shorter sides of the picture; the first to find one ends it. Small
windows are what costs time, and a portrait's face is large: 4 ms for a face over a third, 11 ms over a sixth, about 30
ms where there is none. The ranges overlap because a face counts only when neighbouring window sizes agree."""

HEAD_AND_SHOULDERS = 2.1
"""Side of the crop in faces; the finder's face reaches from the brows' upper side to the chin."""

FACE_CENTRE = 0.47
"""How far down the crop the face's middle is: hair takes less room above than neck and shoulders below."""

logger = logging.getLogger(__name__)
_thread = threading.local()


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
    cascade = _cascade()
    if cascade is None:
        return None
    scale = min(1.0, SEARCH_SIDE_PX / max(picture.size))
    search_size = (max(1, round(picture.width * scale)), max(1, round(picture.height * scale)))
    grey = np.asarray(picture.resize(search_size, Image.Resampling.BILINEAR, reducing_gap=2.0).convert("L"))
    for smallest, largest in SEARCHED_SIZES:
        faces = cascade.detectMultiScale(
            grey,
            scaleFactor=1.2,
            minNeighbors=3,
            minSize=(max(20, int(smallest * min(search_size))),) * 2,
            maxSize=(int(largest * min(search_size)),) * 2,
        )
        if len(faces):
            break
    else:
        return None
    x, y, width, height = (int(value) for value in max(faces, key=lambda face: (face[2] * face[3], *face)))
    return round(x / scale), round(y / scale), round((x + width) / scale), round((y + height) / scale)


@functools.cache
def _opencv() -> tuple[Any, str] | None:
    """OpenCV and the path of the cascade; imported on first use, since it takes some 60 ms."""
    try:
        import cv2
        import cv2.data  # distributions other than PyPI's leave the cascades out
    except ImportError as error:
        logger.warning("no face is sought and pictures are cropped to their middle: OpenCV is missing (%s)", error)
        return None
    # Requests already run side by side; threads inside each search would only take turns, in an order that varies.
    cv2.setNumThreads(1)
    return cv2, str(Path(cv2.data.haarcascades) / "haarcascade_frontalface_alt2.xml")


def _cascade() -> Any | None:
    """This thread's cascade: one detector must not serve two threads at once."""
    if not hasattr(_thread, "cascade"):
        opencv = _opencv()
        _thread.cascade = opencv and opencv[0].CascadeClassifier(opencv[1])
    return _thread.cascade


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
