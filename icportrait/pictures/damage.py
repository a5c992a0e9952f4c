"""Picture files that are damaged where nobody sees it: made whole, or not.

What is accepted and what isn't stands in docs/pictures.md. Nothing here is told what a file looks like once it is
decoded, but for the part of a JPEG that is missing.
"""

from __future__ import annotations

import io
import re
import struct
import zlib
from collections.abc import Iterator

import numpy as np
from PIL.JpegImagePlugin import JpegImageFile

MISSING_SHARE = 0.02
"""Share of a picture's rows, or of a JPEG's blocks, that may be missing at its end."""
PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
PNG_CHUNKS = 100_000
"""A 20 MB file of pieces of 8 KB, which is what encoders write, has 2,500."""
PNG_ORDER = (b"IHDR", b"iCCP", b"PLTE", b"tRNS", b"eXIf")
"""Chunks that the picture is made of, before its data and in this order."""
PNG_CRITICAL = (b"IHDR", b"PLTE")
CHANNELS = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}
"""Channels by a PNG's colour type."""
UP = b"\x02"
"""The PNG filter that adds the row above."""
SOF2, SOS, EOI = 0xC2, 0xDA, b"\xff\xd9"
ALONE = frozenset({0x01, *range(0xD0, 0xD9)})
"""JPEG markers that no length follows."""
GREY = 128
"""The level that libjpeg gives to a block it has no data for."""
COEFFICIENTS = 64


def plain_png(data: bytes) -> bytes:
    """Copy a PNG's picture in the fewest chunks: one of data, and no texts, times, animations and the like.

    Pillow refuses the whole file for a text of more than a megabyte or a bad checksum in a chunk that Pillow has
    no use for. Pillow checks the other chunks itself. An ancillary chunk with a wrong checksum is left out.

    Raises:
        ValueError: the file has very many chunks.
    """
    found: dict[bytes, bytes] = {}
    pixels: list[memoryview] = []
    at, view = len(PNG_SIGNATURE), memoryview(data)
    for _ in range(PNG_CHUNKS):
        if at + 8 > len(data):
            break
        length, kind = struct.unpack_from(">I4s", data, at)
        end = at + 12 + length
        if kind == b"IDAT":
            pixels.append(view[at + 8 : end - 4])
        elif kind == b"IEND" or end > len(data):
            break
        elif kind in PNG_ORDER and kind not in found:
            (checksum,) = struct.unpack_from(">I", data, end - 4)
            if kind in PNG_CRITICAL or zlib.crc32(view[at + 4 : end - 4]) == checksum:
                found[kind] = data[at:end]
        at = end
    else:
        raise ValueError(f"it has more than {PNG_CHUNKS} chunks")
    before = [found[kind] for kind in PNG_ORDER if kind in found]
    return b"".join([PNG_SIGNATURE, *before, _chunk(b"IDAT", b"".join(pixels)), _chunk(b"IEND", b"")])


def completed(file_format: str, data: bytes) -> bytes | None:
    """Make up what is missing at a file's end. Return None where too much is missing, or the share can't be told.

    Args:
        file_format: JPEG, PNG or another, which is never completed.
        data: a JPEG, or a PNG as ``plain_png`` leaves it.
    """
    if file_format == "PNG":
        return _completed_png(data)
    return _completed_jpeg(data) if file_format == "JPEG" else None


def _completed_png(data: bytes) -> bytes | None:
    """Fill the missing rows with copies of the last row that is there."""
    chunks = dict(_chunks(data))
    width, height, depth, colour, *_, interlace = struct.unpack(">IIBBBBB", chunks[b"IHDR"])
    if interlace or colour not in CHANNELS:
        return None
    row_bytes = 1 + (width * CHANNELS[colour] * depth + 7) // 8
    try:
        rows = zlib.decompressobj().decompress(chunks[b"IDAT"], row_bytes * height)
    except zlib.error:
        return None
    missing = height - len(rows) // row_bytes
    if not 0 < missing <= MISSING_SHARE * height:
        return None
    rows = rows[: (height - missing) * row_bytes] + missing * (UP + bytes(row_bytes - 1))
    chunks[b"IDAT"] = zlib.compress(rows, 0)
    return PNG_SIGNATURE + b"".join(_chunk(kind, content) for kind, content in chunks.items())


def _chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(content, zlib.crc32(kind)))


def _chunks(data: bytes) -> Iterator[tuple[bytes, bytes]]:
    at = len(PNG_SIGNATURE)
    while at < len(data):
        length, kind = struct.unpack_from(">I4s", data, at)
        yield kind, data[at + 8 : at + 8 + length]
        at += 12 + length


def _completed_jpeg(data: bytes) -> bytes | None:
    """Let libjpeg fill the rest of a scan that ends early: grey blocks, or less detail where it is progressive."""
    whole = data + EOI
    segments = list(_jpeg_segments(data))
    if any(marker == SOF2 for marker, _ in segments):
        return whole if _has_all_scans(segments) else None
    return whole if _missing_share(whole) <= MISSING_SHARE else None


def _jpeg_segments(data: bytes) -> Iterator[tuple[int, bytes]]:
    """Yield markers and the content behind each, up to the first scan's data; of scans their headers."""
    at = 2
    while (found := _MARKER.search(data, at)) and found.end() + 2 <= len(data):
        marker, at = data[found.end() - 1], found.end()
        if marker not in ALONE:
            length = int.from_bytes(data[at : at + 2], "big")
            yield marker, data[at + 2 : at + length]
            at += length


_MARKER = re.compile(rb"\xff+[^\x00\xff\xd0-\xd7]", re.DOTALL)


def _has_all_scans(segments: list[tuple[int, bytes]]) -> bool:
    """Tell whether the last scan of every coefficient of every component has begun: all that may lack is detail."""
    frame = next(content for marker, content in segments if marker == SOF2)
    left = {component: set(range(COEFFICIENTS)) for component in frame[6::3]}
    for content in (content for marker, content in segments if marker == SOS):
        count = content[0] if content else 0
        if len(content) < 4 + 2 * count:
            return False
        first, last, precision = content[1 + 2 * count : 4 + 2 * count]
        if precision & 0xF == 0:
            for component in content[1 : 1 + 2 * count : 2]:
                left.get(component, set()).difference_update(range(first, last + 1))
    return not any(left.values())


def _missing_share(whole: bytes) -> float:
    """Return the share of a JPEG's blocks of 8 x 8 pixels, counted from its end, that have no data."""
    picture = JpegImageFile(io.BytesIO(whole))
    picture.draft("L", (max(1, picture.width // 8), max(1, picture.height // 8)))  # a pixel a block
    levels = np.asarray(picture)
    if levels.ndim != 2:
        return 1.0
    missing = 0
    for row in levels[::-1]:
        there = np.flatnonzero(row != GREY)
        grey = len(row) - (int(there[-1]) + 1 if len(there) else 0)
        if not grey:
            break
        missing += grey
    return missing / levels.size
