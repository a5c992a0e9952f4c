"""Large pictures, which the client shrinks to what the server makes use of."""

from __future__ import annotations

import io
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from icportrait_client import pictures
from icportrait_client.errors import InvalidRequest
from icportrait_client.pictures import MAX_FILE_BYTES, MAX_SENT_PIXELS, SHORTER_SIDE_PX, SLACK, picture_bytes
from PIL import Image, ImageCms

from icportrait.pictures.imaging import MAX_FILE_BYTES as SERVER_FILE_BYTES
from icportrait.pictures.imaging import MAX_PIXELS as SERVER_PIXELS
from icportrait.pictures.imaging import decode_picture

PHONE = (8064, 6048)
"""48 megapixels."""


def quadrants(width: int, height: int, mode: str = "RGB") -> Image.Image:
    """Paint a picture whose four quarters have colours of their own."""
    picture = Image.new("RGB", (width, height), (200, 30, 30))
    picture.paste((30, 200, 30), (width // 2, 0, width, height // 2))
    picture.paste((30, 30, 200), (0, height // 2, width // 2, height))
    picture.paste((220, 220, 40), (width // 2, height // 2, width, height))
    return picture.convert(mode)


def encoded(picture: Image.Image, file_format: str = "JPEG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, file_format, **options)
    return buffer.getvalue()


@pytest.fixture(scope="module")
def phone() -> bytes:
    return encoded(quadrants(*PHONE), quality=90)


@pytest.fixture
def tenth(monkeypatch: pytest.MonkeyPatch) -> None:
    """Set limits of a tenth of the side, so that small pictures are large ones."""
    monkeypatch.setattr(pictures, "SHORTER_SIDE_PX", SHORTER_SIDE_PX // 10)
    monkeypatch.setattr(pictures, "MAX_SENT_PIXELS", MAX_SENT_PIXELS // 100)


def corners(picture: Image.Image) -> list[tuple[int, ...]]:
    """Return the colours of the quarters' middles, as the server decodes them."""
    width, height = picture.size
    places = [(x * width // 4, y * height // 4) for y in (1, 3) for x in (1, 3)]
    return [picture.convert("RGB").getpixel(place) for place in places]


def near(found: list[tuple[int, ...]], expected: list[tuple[int, ...]]) -> bool:
    return bool(np.abs(np.array(found) - np.array(expected)).max() <= 4)


def test_limits_are_the_servers() -> None:
    assert (MAX_FILE_BYTES, MAX_SENT_PIXELS) == (SERVER_FILE_BYTES, SERVER_PIXELS)


def test_a_phones_picture_is_sent_at_half_its_size_and_looks_the_same(phone: bytes) -> None:
    sent = picture_bytes(phone, "profile")
    assert len(sent) < len(phone)
    with Image.open(io.BytesIO(sent)) as opened:
        assert (opened.format, opened.size) == ("JPEG", (4032, 3024))
    assert near(corners(decode_picture(sent, "p")), corners(quadrants(64, 64)))
    assert picture_bytes(phone, "profile", shrink=False) == phone


def test_it_is_decoded_at_reduced_scale(phone: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = []
    load = Image.Image.load

    def noted(self: Image.Image) -> Any:
        loaded.append(self.size)
        return load(self)

    monkeypatch.setattr(Image.Image, "load", noted)
    picture_bytes(phone, "profile")
    assert loaded
    assert max(width for width, _ in loaded) <= PHONE[0] // 2, "no pixel of the full size is made"


@pytest.mark.usefixtures("tenth")
@pytest.mark.parametrize("orientation", range(1, 9))
def test_it_is_sent_upright(orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(quadrants(640, 624), exif=exif)
    sent = picture_bytes(data, "profile")
    with Image.open(io.BytesIO(sent)) as opened:
        assert opened.getexif().get(0x0112, 1) == 1
        assert min(opened.size) == 312
    small = encoded(quadrants(200, 195), exif=exif)
    assert near(corners(decode_picture(sent, "p")), corners(decode_picture(small, "p")))


def wide_profile() -> bytes:
    """Make a colour profile that isn't sRGB: its red and blue are swapped."""
    profile = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    for at in range(128 + 4, 128 + 4 + 12 * int.from_bytes(profile[128:132], "big"), 12):
        if profile[at : at + 4] in (b"rXYZ", b"bXYZ"):
            profile[at : at + 4] = b"bXYZ" if profile[at : at + 4] == b"rXYZ" else b"rXYZ"
    return bytes(profile)


@pytest.mark.usefixtures("tenth")
def test_its_colours_stay_right() -> None:
    profile = wide_profile()
    sent = picture_bytes(encoded(quadrants(800, 600), icc_profile=profile), "profile")
    expected = corners(decode_picture(encoded(quadrants(400, 300), icc_profile=profile), "p"))
    assert near(corners(decode_picture(sent, "p")), expected)
    assert not near(expected, corners(quadrants(64, 64))), "the profile changes them"


@pytest.mark.usefixtures("tenth")
@pytest.mark.parametrize("mode", ["L", "CMYK"])
def test_other_channels_stay_what_they_are(mode: str) -> None:
    sent = picture_bytes(encoded(quadrants(640, 624, mode)), "profile")
    with Image.open(io.BytesIO(sent)) as opened:
        assert (opened.mode, opened.size) == (mode, (320, 312))
    expected = corners(decode_picture(encoded(quadrants(200, 195, mode)), "p"))
    assert near(corners(decode_picture(sent, "p")), expected)


@pytest.mark.usefixtures("tenth")
def test_what_is_transparent_is_white_as_on_the_server() -> None:
    layers = quadrants(500, 490, "RGBA")
    layers.paste((0, 0, 0, 0), (0, 0, 250, 245))
    for picture in (layers, layers.quantize(16)):
        sent = picture_bytes(encoded(picture, "PNG", compress_level=1), "profile")
        shown = decode_picture(sent, "p")
        assert near(corners(shown), [(255, 255, 255), *corners(quadrants(64, 64))[1:]])
        assert min(shown.size) == SHORTER_SIDE_PX // 10


@pytest.mark.usefixtures("tenth")
def test_sixteen_bits_become_eight() -> None:
    levels = np.full((480, 480), 30_000, np.uint16)
    sent = picture_bytes(encoded(Image.fromarray(levels), "PNG", compress_level=1), "profile")
    assert near(corners(decode_picture(sent, "p")), [(117, 117, 117)] * 4)


@pytest.mark.usefixtures("tenth")
def test_images_and_arrays_are_shrunk_too() -> None:
    image = quadrants(800, 600)
    for source in (image, np.asarray(image)):
        sent = picture_bytes(source, "profile")
        with Image.open(io.BytesIO(sent)) as opened:
            assert (opened.format, opened.size) == ("JPEG", (400, 300))
        assert near(corners(decode_picture(sent, "p")), corners(image))
    assert image.size == (800, 600), "the caller's image is left alone"


def test_what_is_not_large_is_sent_as_it_is() -> None:
    side = int(SHORTER_SIDE_PX * SLACK)
    data = encoded(quadrants(side, side))
    assert picture_bytes(data, "profile") == data


@pytest.mark.usefixtures("tenth")
def test_a_strip_is_fitted_into_the_servers_pixels() -> None:
    sent = picture_bytes(encoded(quadrants(2400, 200)), "profile")
    with Image.open(io.BytesIO(sent)) as opened:
        assert 0.9 * MAX_SENT_PIXELS / 100 < opened.width * opened.height <= MAX_SENT_PIXELS / 100 + 2000
    assert decode_picture(sent, "p")


def test_a_file_that_is_too_large_is_sent_smaller() -> None:
    noise = np.random.default_rng(0).integers(0, 256, (2700, 2700, 3), dtype=np.uint8)
    data = encoded(Image.fromarray(noise), "PNG", compress_level=0)
    assert len(data) > MAX_FILE_BYTES
    sent = picture_bytes(data, "profile")
    assert len(sent) <= MAX_FILE_BYTES
    assert decode_picture(sent, "p").size == (2700, 2700)
    with pytest.raises(InvalidRequest, match=r"^profile: 2\d,\d{3},\d{3} bytes, expected at most 20,000,000"):
        picture_bytes(data, "profile", shrink=False)


@pytest.mark.usefixtures("tenth")
def test_a_damaged_large_file_is_named() -> None:
    data = encoded(quadrants(640, 624))
    with pytest.raises(InvalidRequest, match=r"^profile: it can't be read, and is too large to be sent whole"):
        picture_bytes(data[: len(data) // 3], "profile")


def test_far_too_many_pixels_are_refused_without_being_decoded() -> None:
    header = bytearray(encoded(Image.new("RGB", (64, 64))))
    at = header.index(b"\xff\xc0") + 5
    header[at : at + 4] = (30_000).to_bytes(2, "big") * 2
    tracemalloc.start()
    try:
        with pytest.raises(InvalidRequest, match=r"^profile: 30000x30000 pixels, expected 400 megapixels or fewer$"):
            picture_bytes(bytes(header), "profile")
        assert tracemalloc.get_traced_memory()[1] < 10**7
    finally:
        tracemalloc.stop()


def test_a_file_that_only_the_server_can_read_is_left_to_it(tmp_path: Path) -> None:
    damaged = b"\xff\xd8\xff no JPEG"
    assert picture_bytes(damaged, "profile") == damaged
    heic = b"\0\0\0\x18ftypheic" + bytes(100)
    assert picture_bytes(heic, "profile") == heic


def test_a_heic_of_a_phone_is_shrunk_where_it_can_be_read() -> None:
    pi_heif = pytest.importorskip("pi_heif")
    assert pi_heif
    data = Path("tests/pictures/astronaut.heic").read_bytes()
    assert picture_bytes(data, "profile") == data
