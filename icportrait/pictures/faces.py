"""The part of a picture that is used: the box the caller gives, else the largest face, else the centre.

Every crop is square in pixels, so no face is ever stretched, and lies inside the picture, so nothing is padded.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from icportrait.errors import InvalidRequest
from icportrait.pictures.finder import Face, find_faces
from icportrait.pictures.imaging import MIN_SIDE_PX

Box = tuple[int, int, int, int]

HEAD_AND_SHOULDERS = 2.0
"""Side of the crop in heights of the face, from the forehead to the chin. A face's height hardly changes as it turns or
rolls, its width does."""

FACE_CENTRE = 0.477
"""Share of the crop above the face's middle: hair takes less room above than neck and shoulders below."""


@dataclass(frozen=True)
class Crop:
    """The square of an upright picture that is used."""

    box: Box
    """x0, y0, x1, y1 in pixels."""
    source: Literal["given", "face", "centre"]
    picture_size: tuple[int, int]
    """Width and height of the picture in pixels."""
    face: Face | None = None
    """The one that it is about."""
    faces: int = 0
    """Faces that were found."""

    def to_dict(self) -> dict[str, Any]:
        """Describe the source and the box in 0..1 of the picture. As a request's box, it chooses the same pixels.

        Of a found face also its own box, its score, and how many were found, of which it is the largest.
        """
        described: dict[str, Any] = {"source": self.source, "box": self._fractions(self.box)}
        if self.face:
            described["face"] = {
                "box": self._fractions(self.face.box),
                "score": round(self.face.score, 3),
                "largest_of": self.faces,
            }
        return described

    def _fractions(self, box: tuple[float, float, float, float]) -> list[float]:
        return [round(min(max(edge / side, 0), 1), 6) for edge, side in zip(box, 2 * self.picture_size, strict=True)]


def find_crop(picture: Image.Image, given_box: tuple[float, float, float, float] | None, name: str) -> Crop:
    """Choose the square of a picture that is used.

    A given box that isn't square in pixels is narrowed to the square in its middle. Without a box it is the head and
    shoulders of the largest face, weighed by its score; without a face the square in the picture's middle.

    Args:
        picture: the upright picture.
        given_box: x0, y0, x1, y1 in 0..1 of the upright picture.
        name: the input the box came in, for messages.

    Raises:
        InvalidRequest: the box isn't inside the picture or spans under 16 px.
        RuntimeNotAvailable: a face is to be found, and ONNX Runtime isn't installed.
    """
    if given_box is not None:
        return Crop(_middle_square(_to_pixels(given_box, picture.size, name)), "given", picture.size)
    if faces := find_faces(picture):
        return Crop(_head_and_shoulders(faces[0].box, picture.size), "face", picture.size, faces[0], len(faces))
    return Crop(_middle_square((0, 0, *picture.size)), "centre", picture.size)


def crop_to_square(picture: Image.Image, crop: Crop, size: int) -> NDArray[np.uint8]:
    """Scale the crop down or up: ``[size, size, 3]`` uint8."""
    # reducing_gap lets a large crop shrink by a whole factor first: a face in a 12-megapixel picture takes 30 ms, not
    # 77 ms, and the result is the same to 54 dB.
    scaled = picture.resize((size, size), Image.Resampling.LANCZOS, box=crop.box, reducing_gap=2.0)
    return np.array(scaled, dtype=np.uint8)


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


def _head_and_shoulders(face: tuple[float, float, float, float], size: tuple[int, int]) -> Box:
    """Grow a face to head and shoulders, moved into the picture, and no larger than the picture allows."""
    x0, y0, x1, y1 = face
    width, height = size
    side = min(math.ceil(HEAD_AND_SHOULDERS * (y1 - y0)), width, height)
    left = min(max(0, round((x0 + x1) / 2 - side / 2)), width - side)
    top = min(max(0, round((y0 + y1) / 2 - side * FACE_CENTRE)), height - side)
    return left, top, left + side, top + side
