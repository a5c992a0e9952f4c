"""The ways a caller may hand over a picture, and the encoded bytes that are sent for each."""

from __future__ import annotations

import io
import os
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from PIL import Image, ImageOps

from icportrait_client.errors import InvalidRequest

PictureSource: TypeAlias = (
    "str | os.PathLike[str] | bytes | bytearray | memoryview | Image.Image | np.ndarray[Any, Any]"
)
"""A file's path, a picture's encoded bytes, a Pillow image, or a uint8 array [H, W], [H, W, 3] or [H, W, 4] (RGB)."""

_PNG_MODES = ("1", "L", "LA", "P", "RGB", "RGBA")
_DEEP_MODES = ("I", "F")


def picture_bytes(source: PictureSource, name: str) -> bytes:
    """The encoded picture to send.

    A file's bytes and encoded bytes go as they are: the server decodes them and applies their EXIF orientation. Pixels
    are encoded without loss.

    Args:
        source: the picture.
        name: the input's name, for messages.

    Raises:
        InvalidRequest: the source is of another type, can't be read or has no pixels.
    """
    if isinstance(source, (str, os.PathLike)):
        data = _file_bytes(source, name)
    elif isinstance(source, (bytes, bytearray, memoryview)):
        data = bytes(source)
    elif isinstance(source, Image.Image):
        data = _image_bytes(source, name)
    elif isinstance(source, np.ndarray):
        data = _array_bytes(source, name)
    else:
        raise InvalidRequest(
            f"{name}: type is {type(source).__name__}, expected a path, encoded bytes, a PIL image or a uint8 array"
        )
    if not data:
        raise InvalidRequest(f"{name}: empty, expected the bytes of a JPEG, PNG, WebP, AVIF or HEIC picture")
    return data


def _file_bytes(path: str | os.PathLike[str], name: str) -> bytes:
    try:
        return Path(path).read_bytes()
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        reason = getattr(error, "strerror", None) or error
        raise InvalidRequest(f"{name}: {str(path)!r} can't be read ({reason}), expected a picture's path") from None


def _image_bytes(image: Image.Image, name: str) -> bytes:
    if image.mode.split(";")[0] in _DEEP_MODES:
        raise InvalidRequest(
            f"{name}: mode is {image.mode}, expected 8 bits a channel; scale the values to 0..255 and convert to RGB"
        )
    _check_size(image.size, name)
    # Pillow reads a file's pixels only now, so a damaged file shows here.
    try:
        upright = ImageOps.exif_transpose(image)
        if upright.mode in _PNG_MODES:
            return _png(upright)
        converted = upright.convert("RGBA" if upright.mode in ("PA", "RGBa") else "RGB")
    except Exception as error:  # Pillow's decoders raise SyntaxError, zlib.error and others on damaged files
        raise InvalidRequest(f"{name}: the PIL image of mode {image.mode} can't be read ({error})") from None
    # The colour profile describes the channels that were, and would be wrong beside the new ones.
    converted.info.pop("icc_profile", None)
    return _png(converted)


def _array_bytes(array: np.ndarray[Any, Any], name: str) -> bytes:
    if array.dtype != np.uint8:
        raise InvalidRequest(
            f"{name}: type is {array.dtype}, expected uint8; scale the values to 0..255, round and convert them"
        )
    if array.ndim != 2 and (array.ndim != 3 or array.shape[2] not in (3, 4)):
        raise InvalidRequest(f"{name}: shape is {list(array.shape)}, expected [H, W], [H, W, 3] or [H, W, 4]")
    _check_size((array.shape[1], array.shape[0]), name)
    return _png(Image.fromarray(array))


def _check_size(size: tuple[int, int], name: str) -> None:
    if 0 in size:
        raise InvalidRequest(f"{name}: size is {size[0]}x{size[1]}, expected at least one pixel")


def _png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    # A photo hardly gets smaller at higher levels, but takes several times as long.
    image.save(buffer, format="PNG", compress_level=1)
    return buffer.getvalue()
