"""What is done with pictures in a process of its own, which a bad picture may end."""

from __future__ import annotations

import resource

from icportrait import faces
from icportrait.contract import Array
from icportrait.errors import InvalidRequest
from icportrait.faces import Crop, crop_to_square, find_crop
from icportrait.imaging import decode_base64, decode_picture, encode_picture

Box = tuple[float, float, float, float]


def begin(memory_bytes: int) -> None:
    """Bound this process's address space, and load what the first picture would wait for."""
    _, most = resource.getrlimit(resource.RLIMIT_AS)
    if most != resource.RLIM_INFINITY:
        memory_bytes = min(memory_bytes, most)
    resource.setrlimit(resource.RLIMIT_AS, (memory_bytes, most))
    faces._finder()


def prepare(data: bytes, name: str, box: Box | None, is_base64: bool, size: int) -> tuple[Crop, Array]:
    """Decode a picture and cut out what is used of it.

    Args:
        data: the file, as base64 text where ``is_base64`` says so.
        name: the input that it came in, for messages.
        box: the caller's crop, in 0..1 of the upright picture.
        is_base64: see ``data``.
        size: S.

    Returns:
        The crop, and its pixels [S, S, 3] uint8.

    Raises:
        InvalidRequest: the picture can't be read or is too large, or the box is invalid.
    """
    try:
        picture = decode_picture(decode_base64(data, name) if is_base64 else data, name)
        crop = find_crop(picture, box, f"{name}_box")
        return crop, crop_to_square(picture, crop, size)
    except MemoryError as error:
        raise InvalidRequest(f"{name}: the picture takes too much memory to be decoded; scale it down") from error


def encode(pixels: Array, output_format: str) -> bytes:
    """A portrait's file; see ``imaging.encode_picture``."""
    return encode_picture(pixels, output_format)
