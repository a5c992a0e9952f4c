"""The ways a caller may hand over a picture, and the encoded bytes that are sent for each.

A picture that is larger than the server makes use of is sent smaller: a phone's 200 megapixels become 12. A JPEG is
then decoded at a half, a quarter or an eighth of its size, which is as quick as it is small.
"""

from __future__ import annotations

import io
import math
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, TypeAlias, TypeGuard

from icportrait_client.errors import InvalidRequest

if TYPE_CHECKING:
    import numpy as np
    from PIL import Image
    from PIL.ImageFile import ImageFile

PictureSource: TypeAlias = (
    "str | os.PathLike[str] | bytes | bytearray | memoryview | IO[bytes] | Image.Image | np.ndarray[Any, Any]"
)
"""A file's path, a picture's encoded bytes, a file opened for reading bytes, a Pillow image, or a uint8 array [H, W],
[H, W, 3] or [H, W, 4] (RGB)."""

FORMATS = "JPEG, PNG, WebP, AVIF or HEIC"
MAX_FILE_BYTES = 20_000_000
"""The most that the server takes of one picture."""
MAX_SENT_PIXELS = 40_000_000
"""The most that the server decodes whole."""
MAX_READ_PIXELS = 400_000_000
SHORTER_SIDE_PX = 3000
"""Length to which the shorter side is shrunk. A face of a twelfth of it, about the smallest that the server finds,
still has 500 pixels in its crop, which is two faces high; the largest preset takes 512. The 48, 50 and 200 megapixels
of phones decode to little more at a half and a quarter."""
LONGER_SIDE_PX = 65_000
"""Length to which the longer side is shrunk: a JPEG has no more than 65,500."""
SLACK = 1.5
"""A picture that is larger by no more than this stays as it is, because shrinking it would gain little."""

_PNG_MODES = ("1", "L", "LA", "P", "RGB", "RGBA")
_DEEP_MODES = ("I", "F")
_QUALITIES = (95, 90, 80)
_COLOUR_SPACES = {"L": b"GRAY", "RGB": b"RGB ", "CMYK": b"CMYK"}
_ORIENTATION = 0x0112
_TURN_UPRIGHT = {
    2: "FLIP_LEFT_RIGHT",
    3: "ROTATE_180",
    4: "FLIP_TOP_BOTTOM",
    5: "TRANSPOSE",
    6: "ROTATE_270",
    7: "TRANSVERSE",
    8: "ROTATE_90",
}
_TYPES = "a path, encoded bytes, a file opened with 'rb', a PIL image or a uint8 array"
_OTHER_FORMATS = (
    (rb"GIF8", "a GIF"),
    (rb"BM", "a BMP"),
    (rb"II\*\0|MM\0\*", "a TIFF or camera raw file"),
    (rb"....ftyp", "a video"),
    (rb"%PDF", "a PDF"),
    (rb"\s*<(svg|\?xml)", "an SVG"),
    (rb"\s*<(!doctype html|html)", "a web page"),
    (rb"/9j/|iVBORw0KGgo|UklGR|data:", "base64 text; decode it first"),
)


def picture_bytes(source: PictureSource, name: str, *, shrink: bool = True) -> bytes:
    """Return the encoded picture to send.

    A file and encoded bytes go as they are where the server takes them: it decodes them and applies their EXIF
    orientation. Pixels are encoded without loss, unless the file would be larger than the server takes. A picture that
    is larger than the server makes use of is shrunk, upright and with its colour profile, and sent as JPEG.

    Args:
        source: the picture.
        name: the input's name, for messages.
        shrink: send large pictures smaller.

    Raises:
        InvalidRequest: the source is of another type, can't be read, is no picture or has no pixels.
    """
    if isinstance(source, (str, os.PathLike)):
        data = _file_bytes(source, name)
    elif isinstance(source, (bytes, bytearray, memoryview)):
        data = bytes(source)
    elif _is_array(source):
        return _of_image(_array_image(source, name), name, shrink)
    elif _is_image(source):
        return _of_image(source, name, shrink)
    elif callable(getattr(source, "read", None)):
        data = _stream_bytes(source, name)
    else:
        raise InvalidRequest(f"{name}: type is {type(source).__name__}, expected {_TYPES}")
    if not data:
        raise InvalidRequest(f"{name}: empty, expected the bytes of a {FORMATS} picture")
    return _of_file(data, name, shrink)


def _is_array(source: object) -> bool:
    # An array can't come from a program that hasn't loaded NumPy.
    numpy = sys.modules.get("numpy")
    return numpy is not None and isinstance(source, numpy.ndarray)


def _is_image(source: object) -> TypeGuard[Image.Image]:
    image = sys.modules.get("PIL.Image")
    return image is not None and isinstance(source, image.Image)


# Files.


def _file_bytes(path: str | os.PathLike[str], name: str) -> bytes:
    try:
        return Path(os.fsdecode(path)).read_bytes()
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        reason = getattr(error, "strerror", None) or error
        raise InvalidRequest(f"{name}: {str(path)!r} can't be read ({reason}), expected a picture's path") from None


def _stream_bytes(source: Any, name: str) -> bytes:
    try:
        data = source.read()
    except (OSError, ValueError) as error:
        raise InvalidRequest(f"{name}: the file can't be read ({error})") from None
    if not isinstance(data, (bytes, bytearray, memoryview)):
        raise InvalidRequest(f"{name}: the file gives {type(data).__name__}, expected bytes; open it with 'rb'")
    return bytes(data)


def sniff(data: bytes, name: str) -> str:
    """Tell a file's format by its first bytes: JPEG, PNG, WebP, AVIF or HEIC.

    Raises:
        InvalidRequest: it is something else.
    """
    if data.startswith(b"\xff\xd8\xff"):
        return "JPEG"
    if data.startswith(b"\x89PNG\r\n\x1a\n"):
        return "PNG"
    if data.startswith(b"RIFF") and data[8:12] == b"WEBP":
        return "WebP"
    if re.match(rb"....ftypavi[fs]", data, re.DOTALL):
        return "AVIF"
    if re.match(rb"....ftyp(hei[cxms]|hev[cxms]|mif1|msf1)", data, re.DOTALL):
        return "HEIC"
    for pattern, kind in _OTHER_FORMATS:
        if re.match(pattern, data, re.IGNORECASE | re.DOTALL):
            raise InvalidRequest(f"{name}: it is {kind}, expected a {FORMATS} picture")
    raise InvalidRequest(f"{name}: {len(data)} bytes that begin with {data[:8]!r}, expected a {FORMATS} picture")


def _of_file(data: bytes, name: str, shrink: bool) -> bytes:
    kind = sniff(data, name)
    if shrink and (picture := _opened(kind, data)) is not None:
        width, height = picture.size
        if _is_large(width, height) or len(data) > MAX_FILE_BYTES:
            if width * height > MAX_READ_PIXELS:
                raise InvalidRequest(
                    f"{name}: {width}x{height} pixels, expected {MAX_READ_PIXELS / 1e6:.0f} megapixels or fewer"
                )
            return _shrunk(picture, name, lambda wanted: picture.draft(None, wanted))
    if len(data) > MAX_FILE_BYTES:
        raise _too_many_bytes(data, name)
    return data


def _too_many_bytes(data: bytes, name: str) -> InvalidRequest:
    return InvalidRequest(
        f"{name}: {len(data):,} bytes, expected at most {MAX_FILE_BYTES:,}; scale the picture down or compress it more"
    )


def _opened(kind: str, data: bytes) -> ImageFile | None:
    """Open the file without decoding it; None where that can't be done here, and is left to the server."""
    try:
        return _plugin(kind)(io.BytesIO(data))
    except Exception:  # a damaged file makes decoders raise errors of many kinds; the server says what it lacks
        return None


def _plugin(kind: str) -> Callable[[IO[bytes]], ImageFile]:
    """Return the format's own class, because ``Image.open`` refuses many pixels by a limit of the whole process."""
    if kind == "JPEG":
        from PIL.JpegImagePlugin import JpegImageFile

        return JpegImageFile
    if kind == "PNG":
        from PIL.PngImagePlugin import PngImageFile

        return PngImageFile
    if kind == "WebP":
        from PIL.WebPImagePlugin import WebPImageFile

        return WebPImageFile
    if kind == "AVIF":
        from PIL.AvifImagePlugin import AvifImageFile

        return AvifImageFile
    from pi_heif import HeifImageFile

    return HeifImageFile  # type: ignore[no-any-return]


# Pixels.


def _of_image(image: Image.Image, name: str, shrink: bool) -> bytes:
    if image.mode.split(";")[0] in _DEEP_MODES:
        raise InvalidRequest(
            f"{name}: mode is {image.mode}, expected 8 bits a channel; scale the values to 0..255 and convert to RGB"
        )
    _check_size(image.size, name)
    if shrink and _is_large(*image.size):
        return _shrunk(image, name, lambda wanted: None)
    from PIL import ImageOps

    # Pillow reads a file's pixels only now, so a damaged file shows here.
    try:
        upright = ImageOps.exif_transpose(image)
        if upright.mode not in _PNG_MODES:
            upright = upright.convert("RGBA" if upright.mode in ("PA", "RGBa") else "RGB")
            # The colour profile describes the channels that were, and would be wrong beside the new ones.
            upright.info.pop("icc_profile", None)
        data = _png(upright)
    except Exception as error:  # Pillow's decoders raise SyntaxError, zlib.error and others on damaged files
        raise InvalidRequest(f"{name}: the PIL image of mode {image.mode} can't be read ({error})") from None
    if len(data) <= MAX_FILE_BYTES:
        return data
    if not shrink:
        raise _too_many_bytes(data, name)
    # A photo of a camera's 12 megapixels without loss is often more than the server takes.
    return _shrunk(image, name, lambda wanted: None)


def _array_image(array: Any, name: str) -> Image.Image:
    if array.dtype.name != "uint8":
        raise InvalidRequest(
            f"{name}: type is {array.dtype}, expected uint8; scale the values to 0..255, round and convert them"
        )
    if array.ndim != 2 and (array.ndim != 3 or array.shape[2] not in (3, 4)):
        raise InvalidRequest(f"{name}: shape is {list(array.shape)}, expected [H, W], [H, W, 3] or [H, W, 4]")
    _check_size((array.shape[1], array.shape[0]), name)
    from PIL import Image

    return Image.fromarray(array)


def _check_size(size: tuple[int, int], name: str) -> None:
    if 0 in size:
        raise InvalidRequest(f"{name}: size is {size[0]}x{size[1]}, expected at least one pixel")


def _png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    # A photo hardly gets smaller at higher levels, but takes several times as long.
    image.save(buffer, format="PNG", compress_level=1)
    return buffer.getvalue()


# Large pictures.


def _scale(width: int, height: int) -> float:
    """Return the share of its size at which a picture is sent, 1 at most."""
    most_pixels = math.sqrt(MAX_SENT_PIXELS / (width * height))
    return min(1.0, SHORTER_SIDE_PX / min(width, height), most_pixels, LONGER_SIDE_PX / max(width, height))


def _is_large(width: int, height: int) -> bool:
    return width * height > MAX_SENT_PIXELS or _scale(width, height) * SLACK < 1.0


def _shrunk(picture: Image.Image, name: str, draft: Callable[[tuple[int, int]], object]) -> bytes:
    """Scale a picture down, turn it upright, and encode it as JPEG with its colour profile."""
    from PIL import Image

    width, height = picture.size
    scale = _scale(width, height)
    wanted = math.ceil(width * scale), math.ceil(height * scale)
    try:
        draft(wanted)
        picture.load()
        flat = _flat(picture)
        if _is_large(*flat.size) or max(flat.size) > LONGER_SIDE_PX:
            flat = flat.resize(wanted, Image.Resampling.LANCZOS, reducing_gap=2.0)
        if turn := _TURN_UPRIGHT.get(picture.getexif().get(_ORIENTATION, 1)):
            flat = flat.transpose(Image.Transpose[turn])
    except Exception as error:  # Pillow's decoders raise SyntaxError, zlib.error and others on damaged files
        raise InvalidRequest(f"{name}: it can't be read, and is too large to be sent whole ({error})") from None
    profile = picture.info.get("icc_profile") or b""
    if profile[16:20] != _COLOUR_SPACES[flat.mode]:
        profile = b""
    for quality in _QUALITIES:
        buffer = io.BytesIO()
        flat.save(buffer, "JPEG", quality=quality, subsampling="4:4:4", icc_profile=profile, exif=b"")
        if buffer.tell() <= MAX_FILE_BYTES:
            break
    return buffer.getvalue()


def _flat(picture: Image.Image) -> Image.Image:
    """Return the picture in a mode that JPEG has, on white where it is transparent."""
    from PIL import Image

    if picture.mode in ("L", "RGB", "CMYK") and "transparency" not in picture.info:
        return picture
    if picture.mode.startswith("I"):
        # Of 16 bits the upper 8, as the server takes them: Pillow's own conversion would clip.
        return picture.point(lambda level: level * (1 / 256)).convert("L")
    if not picture.has_transparency_data:
        return picture.convert("L" if picture.mode == "1" else "RGB")
    layers = picture.convert("RGBA")
    white = Image.new("RGB", picture.size, "white")
    white.paste(layers, mask=layers.getchannel("A"))
    return white
