"""Pictures to send: good ones of every accepted format, the same with damage, and hostile files."""

from __future__ import annotations

import io
import random
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image, ImageCms

from tests.exports import ROOT

EXAMPLES = (
    ROOT / "examples/hopper.jpg",
    ROOT / "examples/astronaut.jpg",
    ROOT / "examples/heads/profile.png",
    ROOT / "tests/pictures/astronaut.heic",
    ROOT / "tests/pictures/astronaut-turned.heic",
)
SIDES = (16, 17, 31, 64, 100, 128, 200, 333)
LARGE_SIDES = (1200, 2500)
PNG = b"\x89PNG\r\n\x1a\n"
EXTREMES = (b"\0\0\0\0", b"\xff\xff\xff\xff", b"\x7f\xff\xff\xff", b"\0\0\0\1", b"\x80\0\0\0", b"\0\0\xff\xff")
FOREIGN = (
    b"GIF89a", b"BM", b"II*\0", b"MM\0*", b"\0\0\0\x18ftypmp42", b"\0\0\0\x0cjP  ", b"\xff\x0a", b"8BPS", b"%PDF-1.7",
    b"PK\x03\x04", b"<!DOCTYPE html>", b"<svg xmlns='http://www.w3.org/2000/svg'/>", b"\0\0\1\0", b"\x7fELF",
)  # fmt: skip
FORMATS = ("JPEG", "PNG", "WEBP", "AVIF")


class Corpus:
    """Good pictures by name, and the damage that is done to them."""

    def __init__(self, seed: int, folder: Path | None = None, count: int = 40) -> None:
        """Draw the good pictures.

        Args:
            seed: chooses them.
            folder: with more files, which are taken as they are.
            count: of drawn pictures.
        """
        rng = random.Random(f"{seed} corpus")
        self.good = {path.name: path.read_bytes() for path in EXAMPLES}
        for number in range(count):
            name, data = drawn(rng, large=number % 20 == 19)
            self.good[f"{number:03}-{name}"] = data
        self._names = list(self.good)
        self.given = [path.read_bytes() for path in pictures_in(folder)] if folder else []

    def write(self, folder: Path) -> None:
        """Write the good pictures, and ten damaged ones of each, so that they can be looked at or added to."""
        folder.mkdir(parents=True, exist_ok=True)
        for name, data in self.good.items():
            (folder / name).write_bytes(data)
            for number in range(10):
                (folder / f"damaged-{number}-{name}").write_bytes(self.damaged(random.Random(f"{name} {number}"), data))

    def pick(self, rng: random.Random) -> bytes:
        """Return a good picture."""
        return self.good[rng.choice(self._names)]

    def small(self, rng: random.Random, limit_bytes: int = 60_000) -> bytes:
        """Return a good picture that is quick to decode."""
        while len(data := self.pick(rng)) > limit_bytes:
            pass
        return data

    def damaged(self, rng: random.Random, data: bytes | None = None) -> bytes:
        """Return a good or a given picture after one to four kinds of damage; it may be good still."""
        if data is None:
            data = rng.choice(self.given) if self.given and rng.random() < 0.5 else self.small(rng)
        if data.startswith(PNG) and rng.random() < 0.6:
            return damaged_png(rng, data)
        return mutated(rng, data, self.small(rng))

    def hostile(self, rng: random.Random) -> bytes:
        """Return a file that can be no portrait's picture."""
        return rng.choice(HOSTILE)(rng, self.small(rng))


def pictures_in(folder: Path) -> list[Path]:
    """List the files of a corpus that aren't cases."""
    return sorted(path for path in folder.rglob("*") if path.is_file() and path.suffix != ".json")


def drawn(rng: random.Random, large: bool = False) -> tuple[str, bytes]:
    """Draw a picture that every server must take, and return its name and its file."""
    width, height = (rng.choice(LARGE_SIDES if large else SIDES) for _ in range(2))
    file_format = rng.choice(FORMATS)
    mode = rng.choice({"JPEG": ("RGB", "L", "CMYK"), "PNG": ("RGB", "L", "LA", "RGBA", "P", "1", "I;16")}.get(
        file_format, ("RGB", "RGBA")
    ))  # fmt: skip
    generator = np.random.default_rng(rng.getrandbits(32))
    coarse = generator.integers(0, 256, (8, 8, 3), np.uint8)
    picture = Image.fromarray(coarse).resize((width, height))
    if mode == "I;16":
        picture = Image.fromarray((np.asarray(picture.convert("L")).astype(np.uint16)) * 257)
    else:
        picture = picture.convert(mode)
    options: dict[str, object] = {}
    if file_format == "JPEG":
        options = {"quality": rng.randint(20, 95), "progressive": rng.random() < 0.4}
    if file_format == "WEBP":
        options = {"lossless": rng.random() < 0.3}
    if file_format == "AVIF":
        options = {"speed": 10, "quality": 60}
    if rng.random() < 0.3 and mode in ("RGB", "L") and file_format != "AVIF":
        exif = Image.Exif()
        exif[0x0112] = rng.randint(1, 8)
        options["exif"] = exif.tobytes()
    if rng.random() < 0.2 and mode == "RGB":
        options["icc_profile"] = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    file = io.BytesIO()
    picture.save(file, file_format, **options)
    return f"{mode.replace(';', '')}-{width}x{height}.{file_format.lower()}", file.getvalue()


def mutated(rng: random.Random, data: bytes, other: bytes = b"") -> bytes:
    """Return bytes with one to four changes, whatever they are."""
    changed = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        at = rng.randrange(len(changed) + 1)
        # Sizes and types lie at a file's beginning.
        if rng.random() < 0.4:
            at = min(at, rng.randrange(64))
        length = min(rng.choice((1, 1, 4, 16, 200)), len(changed) - at)
        kind = rng.randrange(8)
        if kind == 0 and length:
            changed[at] ^= 1 << rng.randrange(8)
        elif kind == 1:
            changed[at : at + length] = rng.randbytes(length)
        elif kind == 2:
            del changed[at:]
        elif kind == 3:
            del changed[at : at + length]
        elif kind == 4:
            changed[at:at] = rng.randbytes(rng.choice((1, 4, 64)))
        elif kind == 5:
            changed[at : at + 4] = rng.choice(EXTREMES)
        elif kind == 6:
            changed[at:at] = bytes(changed[at : at + 400]) * rng.choice((1, 2, 8))
        elif kind == 7 and other:
            start = rng.randrange(len(other))
            changed[at : at + length] = other[start : start + length]
    return bytes(changed)


def damaged_png(rng: random.Random, data: bytes) -> bytes:
    """Change a PNG inside its parts, whose checksums hold, so that the damage comes through to the decoder."""
    parts = list(chunks(data))
    index = rng.randrange(len(parts))
    kind, content = parts[index]
    change = rng.randrange(6)
    if change == 0:
        parts[index] = kind, mutated(rng, content or b"\0")
    elif change == 1:
        parts.insert(index, (kind, content))
    elif change == 2 and len(parts) > 1:
        del parts[index]
    elif change == 3:
        parts.insert(
            index, (rng.choice((b"tEXt", b"iCCP", b"eXIf", b"zzZz", b"acTL", b"PLTE", b"tRNS")), rng.randbytes(30))
        )
    elif change == 4 and kind == b"IDAT":
        parts[index] = kind, zlib.compress(rng.randbytes(rng.choice((0, 10, 5000))))
    else:
        rng.shuffle(parts)
    return PNG + b"".join(chunk(kind, content) for kind, content in parts)


def chunks(data: bytes) -> list[tuple[bytes, bytes]]:
    """List a PNG's parts, the type and the content of each."""
    found, at = [], len(PNG)
    while at + 8 <= len(data):
        (length,) = struct.unpack_from(">I", data, at)
        found.append((data[at + 4 : at + 8], data[at + 8 : at + 8 + length]))
        at += 12 + length
    return found


def chunk(kind: bytes, content: bytes) -> bytes:
    """Write a PNG's part with its checksum."""
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def _bomb(rng: random.Random, _: bytes) -> bytes:
    """Make a PNG that has more pixels than a server may decode."""
    side = rng.choice((7000, 30_000, 2**31 - 1))
    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, rng.choice((0, 1)))
    return PNG + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(10_000))) + chunk(b"IEND", b"")


def _many_chunks(rng: random.Random, _: bytes) -> bytes:
    data = chunk(b"IHDR", struct.pack(">IIBBBBB", 64, 64, 8, 2, 0, 0, 0))
    return PNG + data + chunk(b"tEXt", b"a\0") * rng.choice((100_001, 120_000)) + chunk(b"IEND", b"")


def _tiny(rng: random.Random, _: bytes) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", rng.choice(((1, 1), (15, 200), (15, 15)))).save(file, rng.choice(("JPEG", "PNG", "WEBP")))
    return file.getvalue()


HOSTILE: tuple[Callable[[random.Random, bytes], bytes], ...] = (
    lambda rng, good: b"",
    lambda rng, good: rng.randbytes(rng.choice((1, 3, 100, 5000))),
    lambda rng, good: rng.choice(FOREIGN) + rng.randbytes(200),
    lambda rng, good: good[: rng.randrange(min(12, len(good)))],
    lambda rng, good: bytes(rng.choice((10, 10_000, 1_000_000))),
    _bomb,
    _tiny,
)
HEAVY: tuple[Callable[[random.Random, bytes], bytes], ...] = (
    _many_chunks,
    lambda rng, good: good + bytes(20_000_001 - len(good)),
)
"""Hostile files of megabytes, of which a run has a few."""
