"""Picture files: what callers send becomes upright RGB, and what they get back says that it was generated.

``decode_picture`` trusts nothing: the format is read from the first bytes and only that format's decoder runs, the size
is checked in the header before a pixel is decoded, and whatever a damaged file makes the decoder raise becomes one
sentence for the caller.
"""

from __future__ import annotations

import binascii
import io
import re
import zlib
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray
from pi_heif import HeifImageFile, options
from PIL import AvifImagePlugin, ExifTags, Image, ImageCms, PngImagePlugin
from PIL.AvifImagePlugin import AvifImageFile
from PIL.ImageFile import ImageFile
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile, PngInfo
from PIL.WebPImagePlugin import WebPImageFile

from icportrait.errors import InvalidRequest
from icportrait.pictures.damage import completed, plain_png

MAX_FILE_BYTES = 20_000_000
MAX_PIXELS = 40_000_000
"""The most pixels that are decoded."""
MAX_JPEG_PIXELS = 400_000_000
"""A JPEG of more than ``MAX_PIXELS`` is decoded at a half, a quarter or an eighth of its size, which is as quick."""
MIN_SIDE_PX = 16
FORMATS = "JPEG, PNG, WebP, AVIF or HEIC"
_TOO_MANY_PIXELS = "the picture has too many pixels, expected at most {:.0f} megapixels; scale it down"
# Of what else a PNG may have, plain_png leaves nothing; a profile may be as large as the file.
PngImagePlugin.MAX_TEXT_CHUNK = MAX_FILE_BYTES
# Pictures are decoded side by side.
AvifImagePlugin.DEFAULT_MAX_THREADS = options.DECODE_THREADS = 1
options.THUMBNAILS = False

DIGITAL_SOURCE_TYPE = "http://cv.iptc.org/newscodes/digitalsourcetype/trainedAlgorithmicMedia"
"""IPTC's term for media made by a trained model. The term for composites isn't meant: no pixel is an input's, because
the decoder makes all of them."""
XMP = (
    '<?xpacket begin="\ufeff" id="W5M0MpCehiHzreSzNTczkc9d"?>'
    '<x:xmpmeta xmlns:x="adobe:ns:meta/">'
    '<rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">'
    '<rdf:Description rdf:about="" xmlns:Iptc4xmpExt="http://iptc.org/std/Iptc4xmpExt/2008-02-29/">'
    "<Iptc4xmpExt:DigitalSourceType>"
    f"{DIGITAL_SOURCE_TYPE}"
    "</Iptc4xmpExt:DigitalSourceType>"
    '</rdf:Description></rdf:RDF></x:xmpmeta><?xpacket end="r"?>'
)
"""IPTC's mark for media made by a trained model, which every encoded picture carries. It has no dates: equal pixels
give equal bytes."""

# The decoders' own classes instead of Image.open, which checks the size against a global limit of Pillow's and warns
# through the warnings module, whose filters can't be set for one thread. Of a multi-picture JPEG this takes the first.
_DECODERS: dict[str, type[ImageFile]] = {
    "JPEG": JpegImageFile,
    "PNG": PngImageFile,
    "WebP": WebPImageFile,
    "AVIF": AvifImageFile,
    "HEIC": HeifImageFile,
}
_OTHER_FORMATS = (
    (rb"GIF8", "a GIF"),
    (rb"BM", "a BMP"),
    (rb"II\*\0|MM\0\*", "a TIFF or camera raw file"),
    (rb"....ftyp", "a video"),
    (rb"\0\0\0\x0cjP  |\xff\x4f\xff\x51", "a JPEG 2000"),
    (rb"\0\0\0\x0cJXL |\xff\x0a", "a JPEG XL"),
    (rb"\0\0\x01\0", "an icon"),
    (rb"8BPS", "a Photoshop file"),
    (rb"%PDF", "a PDF"),
    (rb"PK\x03\x04", "a ZIP archive"),
    (rb"\s*<(!doctype html|html)", "a web page"),
    (rb"\s*<(svg|\?xml)", "an SVG"),
)
_TURN_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
# 4 x 4 x 4 colours that tell whether a profile is sRGB by another name, in a few bytes instead of the whole picture.
_COLOURS = Image.frombytes("RGB", (64, 1), bytes(85 * (n >> shift & 3) for n in range(64) for shift in (0, 2, 4)))


def decode_picture(data: bytes, name: str, note: Callable[[str], object] = lambda _: None) -> Image.Image:
    """Decode a caller's JPEG, PNG, WebP, AVIF or HEIC file.

    The EXIF orientation is applied, an embedded colour profile is converted to sRGB (a broken one is ignored), what is
    transparent shows white, and of an animation the first frame is taken. A large JPEG is decoded smaller, and what is
    missing at a file's end is made up where it is little (docs/pictures.md).

    Args:
        data: the file.
        name: the input it came in, for messages.
        note: takes what is done with the picture, a line each.

    Returns:
        The upright picture, mode RGB.

    Raises:
        InvalidRequest: empty, over 20 MB or too many megapixels, a side under 16 px, another format, or damaged.
    """
    check_file_bytes(len(data), name)
    file_format = sniff(data, name)
    try:
        picture = _loaded(file_format, plain_png(data) if file_format == "PNG" else data, name, note)
        turn, flat = _to_upright(picture), _flatten(picture)
    except (InvalidRequest, MemoryError):
        raise
    except Image.DecompressionBombError as error:
        raise InvalidRequest(f"{name}: {_TOO_MANY_PIXELS.format(MAX_PIXELS / 1e6)}") from error
    except Exception as error:  # decoders raise what a damaged file makes them stumble over, not one kind of error
        reason = " ".join(str(error).split())
        raise InvalidRequest(
            f"{name}: the {file_format} is cut off or damaged ({reason}); send the whole file"
        ) from error
    if picture.info.get("icc_profile"):
        note("its colour profile is applied")
    flat.info.clear()  # the file's metadata, its orientation among them, no longer hold
    if turn is None:
        return flat
    note(f"its orientation is applied ({turn.name.lower().replace('_', ' ')})")
    return flat.transpose(turn)


def decode_base64(data: bytes, name: str) -> bytes:
    """Decode strict base64; white space and a ``data:image/...;base64,`` prefix are allowed.

    Raises:
        InvalidRequest: empty, not base64, or a file over 20 MB (told from the text's length).
    """
    text = data.translate(None, b" \t\r\n\v\f")
    if prefix := re.match(rb"data:image/[\w.+-]+(;[\w=.-]+)*;base64,", text, re.IGNORECASE):
        text = text[prefix.end() :]
    check_file_bytes(len(text) // 4 * 3 - text[-2:].count(b"="), name)
    if stray := re.search(rb"[^A-Za-z0-9+/=]", text):
        raise InvalidRequest(
            f"{name}: {stray[0]!r} is in the base64 text, expected A-Z a-z 0-9 + / and = at the end only"
        )
    try:
        return binascii.a2b_base64(text, strict_mode=True)
    except binascii.Error as error:
        raise InvalidRequest(
            f"{name}: {len(text)} characters of broken base64 ({error}), expected a multiple of 4, padded with ="
        ) from error


def encode_picture(pixels: NDArray[np.uint8], output_format: str) -> bytes:
    """Encode a portrait and mark it as generated. Equal pixels give equal bytes.

    Args:
        pixels: ``[height, width, 3]`` uint8.
        output_format: png (lossless, read by everything), webp (lossless, a fifth smaller) or jpeg (smallest).
    """
    picture, buffer = Image.fromarray(pixels), io.BytesIO()
    if output_format == "png":
        # At 512 px, run-length matching takes 16 ms for 396 kB; the default level 6 takes 83 ms for 400 kB.
        mark = PngInfo()
        mark.add_itxt("XML:com.adobe.xmp", XMP)
        picture.save(buffer, "PNG", pnginfo=mark, compress_level=1, compress_type=zlib.Z_RLE)
    elif output_format == "jpeg":
        picture.save(buffer, "JPEG", quality=95, subsampling="4:4:4", xmp=XMP.encode())
    elif output_format == "webp":
        # Lossless, since lossy WebP halves the colour resolution, which JPEG at 4:4:4 does not. The least effort takes
        # 8 ms for 321 kB at 512 px, method 4 takes 89 ms for 279 kB.
        picture.save(buffer, "WEBP", lossless=True, quality=0, method=0, xmp=XMP.encode())
    else:
        raise InvalidRequest(f"output_format: {output_format!r}, expected png, jpeg or webp")
    return buffer.getvalue()


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
    if data.startswith((b"/9j/", b"iVBORw0KGgo", b"UklGR", b"data:")) or re.match(rb"AAAA..Z0eXBhdml", data):
        raise InvalidRequest(f'{name}: base64 text, expected the file itself; decode it, or set encoding to "base64"')
    for pattern, kind in _OTHER_FORMATS:
        if re.match(pattern, data, re.IGNORECASE | re.DOTALL):
            raise InvalidRequest(f"{name}: the file is {kind}, expected a {FORMATS}; convert it first")
    raise InvalidRequest(f"{name}: {len(data)} bytes that begin with {data[:8]!r} are no picture, expected a {FORMATS}")


def check_file_bytes(count: int, name: str) -> None:
    """Raise InvalidRequest where a file of ``count`` bytes is empty or over 20 MB."""
    if count == 0:
        raise InvalidRequest(f"{name}: empty, expected the bytes of a {FORMATS}")
    if count > MAX_FILE_BYTES:
        raise InvalidRequest(
            f"{name}: the file has {count:,} bytes, expected at most {MAX_FILE_BYTES:,}; "
            "scale the picture down or compress it more"
        )


def _loaded(file_format: str, data: bytes, name: str, note: Callable[[str], object]) -> ImageFile:
    """Load and decode the file."""
    picture = _opened(file_format, data, name, note)
    try:
        picture.load()
    except (OSError, SyntaxError):
        whole = completed(file_format, data)
        if whole is None:
            raise
        note("a little is missing at its end, which is made up")
        picture = _opened(file_format, whole, name, note)
        picture.load()
    return picture


def _opened(file_format: str, data: bytes, name: str, note: Callable[[str], object]) -> ImageFile:
    picture = _DECODERS[file_format](io.BytesIO(data))
    width, height = picture.size
    _check_size(width, height, MAX_JPEG_PIXELS if file_format == "JPEG" else MAX_PIXELS, name)
    if width * height > MAX_PIXELS:
        # Once only: a second call does nothing.
        scale = next(scale for scale in (2, 4, 8) if width * height <= MAX_PIXELS * scale**2 or scale == 8)
        picture.draft(None, (width // scale, height // scale))
    if picture.size != (width, height):
        note(f"it has {width}x{height} pixels, and is decoded at {picture.width}x{picture.height}")
    return picture


def _check_size(width: int, height: int, most: int, name: str) -> None:
    if width * height > most:
        raise InvalidRequest(f"{name}: {_TOO_MANY_PIXELS.format(most / 1e6)} (it has {width}x{height})")
    if min(width, height) < MIN_SIDE_PX:
        raise InvalidRequest(
            f"{name}: the picture is {width}x{height} px, expected at least {MIN_SIDE_PX} on each side"
        )


def _to_upright(picture: ImageFile) -> Image.Transpose | None:
    """Return the turn that the EXIF orientation asks for."""
    try:
        return _TURN_UPRIGHT.get(picture.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:  # damaged EXIF is no reason to refuse a picture that can be seen
        return None


def _flatten(picture: Image.Image) -> Image.Image:
    """Convert a picture of any mode to sRGB on white."""
    profile = picture.info.get("icc_profile")
    if picture.mode.startswith("I"):
        picture = _eight_bit_grey(picture)
    if not picture.has_transparency_data:
        return _to_srgb(picture, profile)
    layers = picture.convert("LA" if picture.mode in ("1", "L", "LA", "La") else "RGBA")
    white = Image.new("RGB", picture.size, "white")
    white.paste(_to_srgb(layers.convert(layers.mode.rstrip("A")), profile), mask=layers.getchannel("A"))
    return white


def _eight_bit_grey(picture: Image.Image) -> Image.Image:
    """Scale 16-bit grey to 8 bits, because Pillow's own conversion would clip at 255."""
    levels = np.asarray(picture).astype(np.int32)
    grey = Image.fromarray((levels.clip(0, 65535) >> 8).astype(np.uint8))
    if "transparency" in picture.info:
        grey.putalpha(Image.fromarray(np.where(levels == picture.info["transparency"], 0, 255).astype(np.uint8)))
    return grey


def _to_srgb(picture: Image.Image, profile: bytes | None) -> Image.Image:
    """Convert from an embedded ICC profile; without one, or where it is broken or of another kind, by Pillow's rule."""
    colours = picture if picture.mode in ("L", "CMYK", "RGB") else picture.convert("RGB")
    if profile:
        try:
            source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
            transform = ImageCms.buildTransform(source, ImageCms.createProfile("sRGB"), colours.mode, "RGB")
            if colours.mode != "RGB" or _changes_colours(transform):
                colours = ImageCms.applyTransform(colours, transform) or colours
        except (ImageCms.PyCMSError, OSError):
            pass
    return colours if colours.mode == "RGB" else colours.convert("RGB")


def _changes_colours(transform: ImageCms.ImageCmsTransform) -> bool:
    changed = np.asarray(ImageCms.applyTransform(_COLOURS, transform), dtype=np.int16)
    return bool(np.abs(changed - np.asarray(_COLOURS)).max() > 1)
