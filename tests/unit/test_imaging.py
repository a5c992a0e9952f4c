import base64
import contextlib
import io
import struct
import xml.etree.ElementTree as ET
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageCms
from PIL.JpegImagePlugin import get_sampling

from icportrait.errors import InvalidRequest
from icportrait.pictures import imaging
from icportrait.pictures.__main__ import main
from icportrait.pictures.faces import Crop, crop_to_square, find_crop
from icportrait.pictures.imaging import decode_base64, decode_picture, encode_picture

EXAMPLES = Path(__file__).parents[2] / "examples"
PICTURES = Path(__file__).parents[1] / "pictures"
RED, GREEN, BLUE, WHITE = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)
FORMATS = pytest.mark.parametrize("file_format", ["JPEG", "PNG", "WEBP", "AVIF"])


def encoded(picture, file_format="PNG", **options):
    buffer = io.BytesIO()
    picture.save(buffer, file_format, **options)
    return buffer.getvalue()


def quadrants(width=64, height=48):
    """Draw red, green / blue, white: a picture that shows every way of turning it."""
    pixels = np.zeros((height, width, 3), dtype=np.uint8)
    pixels[: height // 2, : width // 2], pixels[: height // 2, width // 2 :] = RED, GREEN
    pixels[height // 2 :, : width // 2], pixels[height // 2 :, width // 2 :] = BLUE, WHITE
    return Image.fromarray(pixels)


def plain(colour=(200, 100, 50), mode="RGB", size=(32, 32)):
    return Image.new(mode, size, colour)


def photograph(size=None):
    picture = decode_picture((EXAMPLES / "astronaut.jpg").read_bytes(), "profile")
    return picture.resize(size) if size else picture


def middle(picture):
    return picture.getpixel((picture.width // 2, picture.height // 2))


def png_chunk(kind, content):
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png(width, height, depth, colour_type, rows, *extra):
    header = struct.pack(">IIBBBBB", width, height, depth, colour_type, 0, 0, 0)
    chunks = [png_chunk(b"IHDR", header), *extra, png_chunk(b"IDAT", zlib.compress(rows)), png_chunk(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def grey_16_bit(levels, *extra):
    height, width = levels.shape
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in levels)
    return png(width, height, 16, 0, rows, *extra)


def refusal(data, name="profile"):
    with pytest.raises(InvalidRequest) as raised:
        decode_picture(data, name)
    message = str(raised.value)
    assert message.startswith(f"{name}: ")
    assert "\n" not in message
    return message


class TestDecoding:
    @FORMATS
    @pytest.mark.parametrize("orientation", range(1, 9))
    def test_exif_orientation_is_applied(self, file_format, orientation):
        upright = np.asarray(quadrants())
        # EXIF 2.32, 4.6.4 A: which side of the upright picture row 0 and column 0 of the stored one are.
        row_0, column_0 = [
            ("top", "left"),
            ("top", "right"),
            ("bottom", "right"),
            ("bottom", "left"),
            ("left", "top"),
            ("right", "top"),
            ("right", "bottom"),
            ("left", "bottom"),
        ][orientation - 1]
        stored = upright if row_0 in ("top", "bottom") else upright.swapaxes(0, 1)
        stored = stored[::-1] if row_0 in ("bottom", "right") else stored
        stored = stored[:, ::-1] if column_0 in ("bottom", "right") else stored
        exif = Image.Exif()
        exif[0x0112] = orientation
        data = encoded(Image.fromarray(np.ascontiguousarray(stored)), file_format, exif=exif, quality=95)
        picture = decode_picture(data, "profile")
        assert picture.size == (64, 48)
        # Lossy formats blur the quadrants' borders.
        difference = np.abs(np.asarray(picture).astype(int) - upright)[4::8, 4::8]
        assert difference.max() <= (0 if file_format == "PNG" else 25)

    def test_the_orientation_does_not_stay_behind(self):
        exif = Image.Exif()
        exif[0x0112] = 6
        assert decode_picture(encoded(quadrants(), exif=exif), "profile").info == {}

    @pytest.mark.parametrize("exif", [b"Exif\0\0", b"Exif\0\0no TIFF header", b"Exif\0\0II*\0\x08\0\0\0\x01\0"])
    @pytest.mark.filterwarnings("ignore:Corrupt EXIF data:UserWarning")
    def test_damaged_exif_is_ignored(self, exif):
        picture = decode_picture(encoded(quadrants(), exif=exif), "profile")
        np.testing.assert_array_equal(np.asarray(picture), np.asarray(quadrants()))

    @pytest.mark.parametrize(
        ("picture", "file_format"),
        [
            (plain(200, "L"), "PNG"),
            (plain(200, "L"), "JPEG"),
            (plain((200, 255), "LA"), "PNG"),
            (plain((200, 200, 200, 255), "RGBA"), "WEBP"),
            (plain((200, 200, 200)).quantize(2), "PNG"),
            (plain((200, 200, 200)).convert("CMYK"), "JPEG"),
        ],
        ids=lambda value: getattr(value, "mode", value),
    )
    def test_every_mode_becomes_rgb(self, picture, file_format):
        decoded = decode_picture(encoded(picture, file_format), "profile")
        assert decoded.mode == "RGB"
        np.testing.assert_allclose(middle(decoded), (200, 200, 200), atol=2)

    def test_one_bit_pictures_become_black_and_white(self):
        half = Image.new("1", (32, 32))
        half.paste(1, (16, 0, 32, 32))
        decoded = decode_picture(encoded(half), "profile")
        assert (decoded.getpixel((4, 4)), decoded.getpixel((28, 4))) == ((0, 0, 0), WHITE)

    def test_cmyk_inks_come_out_as_their_colours(self):
        cyan = decode_picture(encoded(plain((255, 0, 0, 0), "CMYK"), "JPEG", quality=95), "profile")
        np.testing.assert_allclose(middle(cyan), (0, 255, 255), atol=3)

    def test_16_bit_grey_is_scaled_and_not_clipped(self):
        ramp = np.tile(np.linspace(0, 65535, 64).astype(np.uint16), (32, 1))
        decoded = np.asarray(decode_picture(grey_16_bit(ramp), "profile"))
        np.testing.assert_array_equal(decoded[5, :, 0], ramp[5] >> 8)
        assert (decoded[..., 0] == decoded[..., 2]).all()

    def test_32_bit_grey_is_scaled_and_not_clipped(self):
        levels = Image.fromarray(np.full((16, 16), 0x8000, dtype=np.int32))
        assert levels.mode == "I"
        assert middle(imaging._flatten(levels)) == (128, 128, 128)

    def test_16_bit_colour_keeps_its_high_byte(self):
        row = b"\0" + struct.pack(">HHH", 0x8000, 0x4000, 0xFFFF) * 16
        assert middle(decode_picture(png(16, 16, 16, 2, row * 16), "profile")) == (128, 64, 255)

    def test_transparent_16_bit_grey_shows_white(self):
        levels = np.full((16, 16), 0x3000, dtype=np.uint16)
        levels[:, 8:] = 0x3001
        decoded = decode_picture(grey_16_bit(levels, png_chunk(b"tRNS", struct.pack(">H", 0x3000))), "profile")
        assert (decoded.getpixel((2, 2)), decoded.getpixel((12, 2))) == (WHITE, (0x30, 0x30, 0x30))

    @pytest.mark.parametrize("file_format", ["PNG", "WEBP"])
    @pytest.mark.parametrize(("alpha", "expected"), [(0, 255), (128, 127), (255, 0)])
    def test_alpha_is_composited_over_white(self, file_format, alpha, expected):
        data = encoded(plain((0, 0, 0, alpha), "RGBA"), file_format, lossless=True)
        assert middle(decode_picture(data, "profile")) == (expected,) * 3

    def test_grey_alpha_is_composited_over_white(self):
        assert middle(decode_picture(encoded(plain((0, 128), "LA")), "profile")) == (127, 127, 127)

    @pytest.mark.parametrize(
        ("picture", "transparency"),
        [
            (quadrants().quantize(4), "index of red"),
            (quadrants().quantize(4), "alphas"),
            (quadrants(), RED),
            (quadrants().getchannel("B"), 0),
            (quadrants().getchannel("B").convert("1"), 0),
        ],
        ids=["P-index", "P-alphas", "RGB", "L", "1"],
    )
    def test_a_transparent_colour_shows_white(self, picture, transparency):
        index = picture.getpixel((2, 2))
        alphas = bytes(0 if entry == index else 255 for entry in range(4))
        transparency = {"index of red": index, "alphas": alphas}.get(transparency, transparency)
        decoded = decode_picture(encoded(picture, transparency=transparency), "profile")
        assert decoded.getpixel((2, 2)) == WHITE
        if picture.mode in ("P", "RGB"):
            assert decoded.getpixel((2, 44)) == BLUE

    def test_a_palette_with_alpha_is_composited_over_white(self):
        palette = plain(0, "PA")
        palette.putpalette([0, 0, 0] * 256)
        palette.putalpha(128)
        assert palette.mode == "PA"
        assert middle(imaging._flatten(palette)) == (127, 127, 127)

    @pytest.mark.parametrize("file_format", ["PNG", "WEBP", "MPO"])
    def test_of_several_frames_the_first_is_taken(self, file_format):
        data = encoded(plain(BLUE), file_format, save_all=True, append_images=[plain(RED), plain(GREEN)])
        np.testing.assert_allclose(middle(decode_picture(data, "profile")), BLUE, atol=6)

    def test_a_very_long_picture_is_decoded_and_cropped(self):
        picture = decode_picture(encoded(plain(size=(16, 40_000))), "profile")
        crop = find_crop(picture, None, "profile_box")
        assert crop == Crop((0, 19_992, 16, 20_008), "centre", (16, 40_000))
        assert (crop_to_square(picture, crop, 64) == (200, 100, 50)).all()


def swapped_profile():
    """Make an RGB profile whose red is sRGB's green and the other way round."""
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    return profile.replace(b"rXYZ", b"????").replace(b"gXYZ", b"rXYZ").replace(b"????", b"gXYZ")


def linear_grey_profile():
    """Make the least ICC version 2 profile for grey, with a tone curve that is the identity."""
    white = b"XYZ \0\0\0\0" + struct.pack(">iii", 63190, 65536, 54061)
    curve = b"curv\0\0\0\0" + struct.pack(">I", 0)
    offset = 128 + 4 + 2 * 12
    table = struct.pack(">I4sII4sII", 2, b"wtpt", offset, len(white), b"kTRC", offset + len(white), len(curve))
    size = offset + len(white) + len(curve)
    header = struct.pack(">I4sI4s4s4s12s4s", size, b"", 0x02100000, b"mntr", b"GRAY", b"XYZ ", b"", b"acsp")
    header += bytes(28) + struct.pack(">iii", 63190, 65536, 54061)
    return header.ljust(128, b"\0") + table + white + curve


def white_cyan_profile():
    """Make a CMYK profile (ICC version 2, lut8Type) under which the first ink is white and everything else is black."""
    identity = bytes(range(256))
    lut = b"mft1\0\0\0\0" + bytes([4, 3, 2, 0]) + struct.pack(">9i", *[65536, 0, 0, 0] * 2, 65536)
    lut += identity * 4 + bytes([0, 128, 128]) * 8 + bytes([255, 128, 128]) * 8 + identity * 3
    table = struct.pack(">I4sII", 1, b"A2B0", 128 + 16, len(lut))
    header = struct.pack(
        ">I4sI4s4s4s12s4s", 128 + 16 + len(lut), b"", 0x02100000, b"prtr", b"CMYK", b"Lab ", b"", b"acsp"
    )
    header += bytes(28) + struct.pack(">iii", 63190, 65536, 54061)
    return header.ljust(128, b"\0") + table + lut


class TestColourProfiles:
    @FORMATS
    def test_a_foreign_profile_is_converted_to_srgb(self, file_format):
        data = encoded(plain(RED), file_format, icc_profile=swapped_profile(), quality=95)
        np.testing.assert_allclose(middle(decode_picture(data, "profile")), GREEN, atol=4)

    def test_under_alpha_the_colour_is_converted_too(self):
        data = encoded(plain((*RED, 128), "RGBA"), icc_profile=swapped_profile())
        np.testing.assert_allclose(middle(decode_picture(data, "profile")), (127, 255, 127), atol=2)

    @pytest.mark.parametrize("mode", ["L", "LA"])
    def test_a_grey_profile_is_converted_to_srgb(self, mode):
        data = encoded(plain(128, "L").convert(mode), icc_profile=linear_grey_profile())
        np.testing.assert_allclose(middle(decode_picture(data, "profile")), (188, 188, 188), atol=1)

    def test_an_ink_profile_is_converted_to_srgb(self):
        data = encoded(plain((255, 0, 0, 0), "CMYK"), "JPEG", icc_profile=white_cyan_profile())
        np.testing.assert_allclose(middle(decode_picture(data, "profile")), WHITE, atol=3)

    # With names, because a profile holds the second of its making and workers must collect equal tests.
    @pytest.mark.parametrize(
        "profile",
        [b"no profile", swapped_profile()[:200], linear_grey_profile()],
        ids=["no profile", "cut off", "of another mode"],
    )
    def test_a_broken_or_mismatched_profile_is_ignored(self, profile):
        assert middle(decode_picture(encoded(plain(RED), icc_profile=profile), "profile")) == RED

    def test_an_srgb_profile_changes_nothing_and_costs_nothing(self, monkeypatch):
        sizes, apply = [], ImageCms.applyTransform
        monkeypatch.setattr(
            ImageCms, "applyTransform", lambda im, transform: sizes.append(im.size) or apply(im, transform)
        )
        profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
        data = encoded(photograph((64, 64)), icc_profile=profile)
        assert (np.asarray(decode_picture(data, "profile")) == np.asarray(photograph((64, 64)))).all()
        assert sizes == [(64, 1)]


def psnr(picture, other):
    error = np.asarray(picture, float) - np.asarray(other, float)
    return 10 * np.log10(255**2 / max((error**2).mean(), 1e-9))


def chunks(data):
    """Split a PNG into kinds and whole chunks."""
    at, found = 8, []
    while at < len(data):
        length = int.from_bytes(data[at : at + 4], "big")
        found.append((data[at + 4 : at + 8], data[at : at + 12 + length]))
        at += 12 + length
    return found


def joined(*pieces):
    return b"\x89PNG\r\n\x1a\n" + b"".join(pieces)


def spoilt(chunk):
    """Return a chunk with a checksum that is wrong."""
    return chunk[:-4] + bytes(byte ^ 0xFF for byte in chunk[-4:])


class TestDamage:
    """Files that browsers show are taken, if little is missing."""

    @pytest.mark.parametrize("kind", [b"tEXt", b"zTXt", b"iTXt", b"zzZz", b"tIME", b"iCCP", b"eXIf"])
    @pytest.mark.parametrize("where", [1, -1])
    def test_a_png_may_have_anything_beside_its_pixels(self, kind, where):
        original = encoded(photograph((64, 64)))
        head, *rest = [chunk for _, chunk in chunks(original)]
        text = b"workflow\0\0" + zlib.compress(bytes(3_000_000)) + np.random.default_rng(0).bytes(2_000_000)
        for extra in (png_chunk(kind, text), spoilt(png_chunk(kind, text)), spoilt(png_chunk(kind, b""))):
            data = joined(head, extra, *rest) if where == 1 else joined(head, *rest[:-1], extra, rest[-1])
            assert (np.asarray(decode_picture(data, "profile")) == np.asarray(photograph((64, 64)))).all()

    def test_a_large_profile_is_applied(self):
        profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
        large = profile + np.random.default_rng(0).bytes(2_000_000)
        large = len(large).to_bytes(4, "big") + large[4:]
        notes = []
        picture = decode_picture(encoded(photograph((64, 64)), icc_profile=large), "profile", notes.append)
        assert notes == ["its colour profile is applied"] and picture.size == (64, 64)

    def test_an_orientation_after_the_pixels_is_applied(self):
        exif = Image.Exif()
        exif[0x0112] = 6
        parts = dict(chunks(encoded(quadrants(), exif=exif)))
        late = joined(parts[b"IHDR"], parts[b"IDAT"], parts[b"eXIf"], parts[b"IEND"])
        notes = []
        assert decode_picture(late, "profile", notes.append).size == (48, 64)
        assert notes == ["its orientation is applied (rotate 270)"]

    def test_pixels_in_many_pieces_and_without_an_end(self):
        head, pixels, _ = (chunk for _, chunk in chunks(encoded(photograph((64, 64)))))
        content = pixels[8:-4]
        pieces = [png_chunk(b"IDAT", content[at : at + 7]) for at in range(0, len(content), 7)]
        picture = decode_picture(joined(head, *pieces, png_chunk(b"IDAT", b"")), "profile")
        assert (np.asarray(picture) == np.asarray(photograph((64, 64)))).all()

    @pytest.mark.parametrize("kind", [b"IHDR", b"PLTE"])
    def test_a_wrong_checksum_of_what_the_picture_is_made_of_is_refused(self, kind):
        parts = chunks(encoded(photograph((64, 64)).quantize(16)))
        assert "cut off or damaged" in refusal(joined(*(spoilt(c) if k == kind else c for k, c in parts)))

    def test_very_many_chunks_are_refused_soon(self):
        head, *rest = [chunk for _, chunk in chunks(encoded(plain()))]
        assert "more than 100000 chunks" in refusal(joined(head, 100_001 * png_chunk(b"teSt", b""), *rest))

    @pytest.mark.parametrize(("missing", "is_served"), [(1, True), (4, True), (5, False), (100, False)])
    @pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "P", "1"])
    def test_a_png_that_lacks_rows_is_taken_up_to_a_fiftieth(self, mode, missing, is_served):
        whole = photograph((200, 200)).convert(mode)
        parts = dict(chunks(encoded(whole)))
        rows = zlib.decompress(b"".join(chunk[8:-4] for kind, chunk in chunks(encoded(whole)) if kind == b"IDAT"))
        row_bytes = len(rows) // 200
        for more in (0, row_bytes // 2):  # of the first row that is missing
            cut = zlib.compressobj()
            content = cut.compress(rows[: (200 - missing) * row_bytes + more]) + cut.flush(zlib.Z_SYNC_FLUSH)
            palette = [parts[b"PLTE"]] if b"PLTE" in parts else []
            data = joined(parts[b"IHDR"], *palette, png_chunk(b"IDAT", content)[:-4])
            if not is_served:
                assert "cut off or damaged" in refusal(data)
                continue
            notes = []
            picture = np.asarray(decode_picture(data, "profile", notes.append))
            expected = np.asarray(whole.convert("RGB"))
            assert notes == ["a little is missing at its end, which is made up"]
            assert (picture[:-missing] == expected[:-missing]).all()
            assert (picture[-missing:] == expected[-missing - 1]).all()

    def test_an_interlaced_png_that_lacks_rows_is_refused(self):
        # Pillow writes none: one row of a pass each, and the last pass is every second row of the picture.
        header = struct.pack(">IIBBBBB", 16, 16, 8, 0, 0, 0, 1)
        rows = b"".join(
            (b"\0" + bytes(len(range(x0, 16, dx)))) * len(range(y0, 16, dy))
            for x0, y0, dx, dy in
            ((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2))
        )  # fmt: skip
        head, end = png_chunk(b"IHDR", header), png_chunk(b"IEND", b"")
        assert decode_picture(joined(head, png_chunk(b"IDAT", zlib.compress(rows)), end), "profile").size == (16, 16)
        cut = zlib.compressobj()
        content = cut.compress(rows[:-3]) + cut.flush(zlib.Z_SYNC_FLUSH)
        assert "cut off or damaged" in refusal(joined(head, png_chunk(b"IDAT", content), end))

    @pytest.mark.parametrize("subsampling", ["4:4:4", "4:2:0", "4:2:2"])
    @pytest.mark.parametrize("mode", ["RGB", "L"])
    @pytest.mark.parametrize("progressive", [False, True])
    @pytest.mark.parametrize("lacks", [1, 2, 30])
    def test_a_jpeg_that_lacks_its_last_bytes_is_taken(self, mode, subsampling, progressive, lacks):
        whole = photograph((300, 400)).convert(mode)
        data = encoded(whole, "JPEG", quality=90, subsampling=subsampling, progressive=progressive)
        notes = []
        picture = decode_picture(data[:-lacks], "profile", notes.append)
        assert notes == ["a little is missing at its end, which is made up"]
        expected = decode_picture(data, "profile")
        assert psnr(picture, expected) > 28
        assert (np.asarray(picture)[:380] == np.asarray(expected)[:380]).all() or progressive

    @pytest.mark.parametrize("subsampling", ["4:4:4", "4:2:0"])
    @pytest.mark.parametrize("kept", [0.1, 0.5, 0.9, 0.96])
    def test_a_jpeg_that_lacks_more_is_refused(self, subsampling, kept):
        data = encoded(photograph((300, 400)), "JPEG", quality=90, subsampling=subsampling)
        assert "cut off or damaged" in refusal(data[: int(kept * len(data))])

    def test_a_progressive_jpeg_must_have_begun_its_last_scan(self):
        data = encoded(photograph((300, 400)), "JPEG", quality=90, progressive=True)
        last = data.rindex(b"\xff\xda")
        expected = decode_picture(data, "profile")
        assert psnr(decode_picture(data[: (last + len(data)) // 2], "profile"), expected) > 35
        for end in (last - 2, last // 2, last // 10):
            assert "cut off or damaged" in refusal(data[:end])

    def test_a_cmyk_jpeg_that_is_cut_off_is_refused(self):
        data = encoded(photograph((300, 400)).convert("CMYK"), "JPEG")
        assert decode_picture(data, "profile").size == (300, 400)
        assert "cut off or damaged" in refusal(data[:-30])


class TestHeic:
    """On examples/astronaut.jpg, encoded by libheif in 256 x 256, and in 256 x 192 with EXIF's orientation 6."""

    def test_a_phones_picture_is_decoded(self):
        data = (PICTURES / "astronaut.heic").read_bytes()
        assert psnr(decode_picture(data, "profile"), photograph((256, 256))) > 30

    def test_its_own_transformations_hold_and_not_exifs(self):
        """Decode a file with both, because phones write both; ISO/IEC 23008-12 lets its own transformations hold."""
        data = (PICTURES / "astronaut-turned.heic").read_bytes()
        assert psnr(decode_picture(data, "profile"), photograph((256, 192))) > 30

    @pytest.mark.parametrize("lacks", [1, 30, 10_000, 14_000])
    def test_one_that_is_cut_off_is_refused(self, lacks):
        data = (PICTURES / "astronaut.heic").read_bytes()
        assert "the HEIC is cut off or damaged" in refusal(data[:-lacks])

    def test_damaged_bytes_give_a_picture_or_one_sentence(self):
        data, generator = (PICTURES / "astronaut.heic").read_bytes(), np.random.default_rng(0)
        for _ in range(100):
            damaged = bytearray(data)
            for position in generator.integers(12, 1000, 4):
                damaged[position] = generator.integers(256)
            with contextlib.suppress(InvalidRequest):
                assert decode_picture(bytes(damaged), "profile").mode == "RGB"


class TestLargePictures:
    def test_a_phones_48_megapixels_are_decoded_at_half_their_size(self):
        whole = photograph((504, 378)).resize((8064, 6048), Image.Resampling.BILINEAR)
        notes = []
        picture = decode_picture(encoded(whole, "JPEG", quality=80), "profile", notes.append)
        assert picture.size == (4032, 3024)
        assert notes == ["it has 8064x6048 pixels, and is decoded at 4032x3024"]
        small = (252, 189)
        assert psnr(picture.resize(small), whole.resize(small)) > 40

    @pytest.mark.parametrize(("most", "size"), [(120_000, (400, 300)), (119_999, (200, 150)), (20_000, (100, 75))])
    def test_it_is_the_largest_size_that_is_allowed(self, most, size, monkeypatch):
        monkeypatch.setattr(imaging, "MAX_PIXELS", most)
        assert decode_picture(encoded(photograph((400, 300)), "JPEG"), "profile").size == size


class TestCommand:
    def test_it_says_what_would_be_done_and_why(self, tmp_path, capsys):
        exif = Image.Exif()
        exif[0x0112] = 6
        (tmp_path / "a.jpg").write_bytes(encoded(photograph((512, 512)), "JPEG", exif=exif)[:-2])
        assert main([str(tmp_path / "a.jpg"), "--out", str(tmp_path / "crop.png"), "--size", "64"]) == 0
        lines = capsys.readouterr().out.splitlines()
        assert lines[:2] == [
            "  a little is missing at its end, which is made up",
            "  its orientation is applied (rotate 270)",
        ]
        assert lines[2] == "  512x512 pixels, upright, in sRGB" and "scaled from" in lines[-1]
        with Image.open(tmp_path / "crop.png") as crop:
            assert crop.size == (64, 64)
        assert main([str(EXAMPLES / "astronaut.jpg"), "--box", "0", "0", "1", "0.5"]) == 0
        assert "(the box that was given, narrowed to a square)" in capsys.readouterr().out

    def test_what_is_refused_has_its_reason(self, tmp_path, capsys):
        (tmp_path / "a.gif").write_bytes(encoded(plain(), "GIF"))
        assert main([str(tmp_path / "a.gif")]) == 1
        assert capsys.readouterr().err.startswith("refused: a.gif: the file is a GIF, expected a JPEG")
        assert main([str(tmp_path / "gone.png")]) == 1


class TestRefusals:
    def test_empty(self):
        assert "empty, expected the bytes of a JPEG, PNG, WebP, AVIF or HEIC" in refusal(b"")

    def test_too_many_bytes(self):
        message = refusal(encoded(plain()) + bytes(20_000_001), "reference")
        assert "at most 20,000,000" in message
        padding = 20_000_000 - len(encoded(plain()))
        assert decode_picture(encoded(plain()) + bytes(padding), "profile").size == (32, 32)

    @pytest.mark.parametrize("side", [6_400, 10_000, 50_000])
    def test_too_many_pixels_are_seen_in_a_png_header(self, side, monkeypatch):
        monkeypatch.setattr("PIL.PngImagePlugin.PngImageFile.load", lambda self: pytest.fail("pixels were decoded"))
        message = refusal(png(side, side, 8, 2, b""))
        assert "at most 40 megapixels" in message
        assert f"{side}x{side}" in message

    def test_too_many_pixels_are_seen_in_a_jpeg_header(self, monkeypatch):
        monkeypatch.setattr("PIL.JpegImagePlugin.JpegImageFile.load", lambda self: pytest.fail("pixels were decoded"))
        data = encoded(plain(), "JPEG")
        frame = data.index(b"\xff\xc0") + 5
        assert "(it has 65000x65000)" in refusal(data[:frame] + struct.pack(">HH", 65000, 65000) + data[frame + 4 :])

    @pytest.mark.parametrize("side", [6_400, 10_000, 60_000])
    def test_too_many_pixels_are_seen_in_a_webp_header(self, side, monkeypatch):
        monkeypatch.setattr("PIL.WebPImagePlugin.WebPImageFile.load", lambda self: pytest.fail("pixels were decoded"))
        # An animation, since only its canvas may be larger than its frames.
        data = encoded(plain(), "WEBP", save_all=True, append_images=[plain(RED)])
        canvas = data.index(b"VP8X") + 12
        assert "at most 40 megapixels" in refusal(
            data[:canvas] + (side - 1).to_bytes(3, "little") * 2 + data[canvas + 6 :]
        )

    def test_too_small(self):
        assert "15x100 px, expected at least 16" in refusal(encoded(plain(size=(15, 100))))
        assert decode_picture(encoded(plain(size=(16, 100))), "profile").size == (16, 100)

    @pytest.mark.parametrize(
        ("data", "kind"),
        [
            (encoded(plain(), "GIF"), "a GIF"),
            (encoded(plain(), "BMP"), "a BMP"),
            (encoded(plain(), "TIFF"), "a TIFF"),
            (encoded(plain(), "ICO"), "an icon"),
            (encoded(plain(), "PDF"), "a PDF"),
            (b"\0\0\0\x18ftypisom\0\0\0\0", "a video"),
            (b"\0\0\0\x0cjP  \r\n\x87\n", "a JPEG 2000"),
            (b"\xff\x0a\0\0", "a JPEG XL"),
            (b"8BPS\0\x01", "a Photoshop file"),
            (b"PK\x03\x04", "a ZIP archive"),
            (b"\n<!DOCTYPE html><html>", "a web page"),
            (b"<svg xmlns=''>", "an SVG"),
        ],
        ids=lambda value: value if isinstance(value, str) else "",
    )
    def test_another_format_is_named(self, data, kind):
        message = refusal(data)
        assert f"the file is {kind}" in message
        assert message.endswith("expected a JPEG, PNG, WebP, AVIF or HEIC; convert it first")

    def test_text_is_quoted(self):
        assert "16 bytes that begin with b'/tmp/me.' are no picture" in refusal(b"/tmp/me.jpg, yes")

    @FORMATS
    def test_base64_in_place_of_bytes_is_recognised(self, file_format):
        assert 'set encoding to "base64"' in refusal(base64.b64encode(encoded(plain(), file_format)))

    @FORMATS
    @pytest.mark.parametrize("kept", [0.02, 0.3, 0.6, 0.98])
    def test_a_file_that_is_cut_off(self, file_format, kept):
        data = encoded(photograph((256, 256)), file_format)
        assert "cut off or damaged" in refusal(data[: int(kept * len(data))])

    @FORMATS
    def test_damaged_bytes_give_a_picture_or_one_sentence(self, file_format):
        data, generator, refused = encoded(photograph((48, 48)), file_format), np.random.default_rng(0), 0
        for _ in range(300):
            damaged = bytearray(data)
            for position in generator.integers(0, min(len(data), 400), 4):
                damaged[position] = generator.integers(256)
            try:
                assert decode_picture(bytes(damaged), "profile").mode == "RGB"
            except InvalidRequest as error:
                assert str(error).startswith("profile: ")
                refused += 1
        assert refused > 20

    def test_running_out_of_memory_is_not_the_callers_mistake(self, monkeypatch):
        def load(self):
            raise MemoryError

        monkeypatch.setattr("PIL.PngImagePlugin.PngImageFile.load", load)
        with pytest.raises(MemoryError):
            decode_picture(encoded(plain()), "profile")


class TestBase64:
    def test_round_trip(self):
        for length in range(1, 6):
            assert decode_base64(base64.b64encode(bytes(length)), "profile") == bytes(length)

    @pytest.mark.parametrize(
        "text",
        [
            b"aGVsbG8=\n",
            b"  aGVs\r\n bG8=",
            b"data:image/png;base64,aGVsbG8=",
            b"DATA:image/svg+xml;q=1;base64,\naGVsbG8=",
        ],
    )
    def test_white_space_and_data_urls_are_allowed(self, text):
        assert decode_base64(text, "profile") == b"hello"

    @pytest.mark.parametrize(
        ("text", "reason"),
        [
            (b"", "empty"),
            (b" \n", "empty"),
            (b"data:image/png;base64,", "empty"),
            (b"aGVsb-8=", "b'-' is in the base64 text"),
            (b"aGVsb_8=", "b'_' is in the base64 text"),
            (b"aGVsbG8\xff", "b'\\xff' is in the base64 text"),
            (b"data:text/plain;base64,aGVsbG8=", "b':' is in the base64 text"),
            (b"data:image/png,aGVsbG8=", "b':' is in the base64 text"),
            (b"aGVsbG8", "7 characters of broken base64"),
            (b"aGVsbG8=aGVs", "12 characters of broken base64"),
            (b"=aGVsbG8", "8 characters of broken base64"),
        ],
    )
    def test_anything_else_is_refused(self, text, reason):
        with pytest.raises(InvalidRequest) as raised:
            decode_base64(text, "reference")
        assert str(raised.value).startswith("reference: ")
        assert reason in str(raised.value)

    def test_the_limit_holds_before_decoding(self, monkeypatch):
        limit = 20_000_000
        assert len(decode_base64(base64.b64encode(bytes(limit)), "profile")) == limit
        monkeypatch.setattr("binascii.a2b_base64", lambda *args, **options: pytest.fail("it was decoded"))
        with pytest.raises(InvalidRequest, match=r"^profile: the file has 20,000,001 bytes"):
            decode_base64(base64.b64encode(bytes(limit + 1)), "profile")


def digital_source_type(data):
    with Image.open(io.BytesIO(data)) as picture:
        packet = picture.info["XML:com.adobe.xmp"] if picture.format == "PNG" else picture.info["xmp"]
    names = {
        "x": "adobe:ns:meta/",
        "rdf": "http://www.w3.org/1999/02/22-rdf-syntax-ns#",
        "Iptc4xmpExt": "http://iptc.org/std/Iptc4xmpExt/2008-02-29/",
    }
    root = ET.fromstring(packet)
    assert root.tag == "{adobe:ns:meta/}xmpmeta"
    return root.findtext("rdf:RDF/rdf:Description/Iptc4xmpExt:DigitalSourceType", namespaces=names)


class TestEncoding:
    OUTPUT_FORMATS = pytest.mark.parametrize("output_format", ["png", "jpeg", "webp"])

    @OUTPUT_FORMATS
    def test_every_file_says_that_it_was_generated(self, output_format):
        data = encode_picture(np.asarray(photograph((128, 128))), output_format)
        assert digital_source_type(data) == "http://cv.iptc.org/newscodes/digitalsourcetype/trainedAlgorithmicMedia"

    @OUTPUT_FORMATS
    def test_equal_pixels_give_equal_bytes(self, output_format):
        pixels = np.asarray(photograph((128, 128)))
        assert encode_picture(pixels, output_format) == encode_picture(pixels.copy(), output_format)

    @OUTPUT_FORMATS
    def test_what_is_encoded_can_be_sent_again(self, output_format):
        pixels = np.asarray(photograph((128, 128)))
        data = encode_picture(pixels, output_format)
        decoded = np.asarray(decode_picture(data, "profile")).astype(int)
        error = np.abs(decoded - pixels)
        assert error.mean() < 2 if output_format == "jpeg" else error.max() == 0
        with Image.open(io.BytesIO(data)) as picture:
            assert picture.format == output_format.upper()

    def test_png_has_no_other_chunks(self):
        data, kinds, offset = encode_picture(np.asarray(photograph((128, 128))), "png"), [], 8
        while offset < len(data):
            length, kind = struct.unpack(">I4s", data[offset : offset + 8])
            kinds.append(kind)
            offset += 12 + length
        assert sorted(set(kinds)) == [b"IDAT", b"IEND", b"IHDR", b"iTXt"]

    def test_jpeg_keeps_the_full_colour_resolution(self):
        with Image.open(io.BytesIO(encode_picture(np.asarray(photograph((128, 128))), "jpeg"))) as picture:
            assert get_sampling(picture) == 0

    def test_another_format_is_refused(self):
        with pytest.raises(InvalidRequest, match=r"^output_format: 'gif', expected png, jpeg or webp"):
            encode_picture(np.asarray(plain()), "gif")


class TestGivenBoxes:
    def test_a_square_box_is_taken_as_it_is(self):
        crop = find_crop(plain(size=(200, 100)), (0.25, 0.0, 0.75, 1.0), "profile_box")
        assert crop == Crop((50, 0, 150, 100), "given", (200, 100))
        assert crop.to_dict() == {"source": "given", "box": [0.25, 0.0, 0.75, 1.0]}

    @pytest.mark.parametrize(
        ("box", "expected"), [((0.0, 0.0, 1.0, 0.5), (75, 0, 125, 50)), ((0.2, 0.0, 0.4, 1.0), (40, 30, 80, 70))]
    )
    def test_another_box_is_narrowed_to_the_square_in_its_middle(self, box, expected):
        assert find_crop(plain(size=(200, 100)), box, "profile_box").box == expected

    @pytest.mark.parametrize(
        "box",
        [
            (float("nan"), 0, 1, 1),
            (0, 0, float("inf"), 1),
            (-0.1, 0, 1, 1),
            (0, 0, 1, 1.01),
            (0.5, 0, 0.5, 1),
            (0, 0.9, 1, 0.1),
        ],
    )
    def test_a_box_outside_the_picture_is_refused(self, box):
        with pytest.raises(InvalidRequest, match=r"^reference_box: \[.*\], expected x0, y0, x1, y1 with 0 <= x0 < x1"):
            find_crop(plain(size=(200, 100)), box, "reference_box")

    def test_a_box_of_few_pixels_is_refused(self):
        picture = plain(size=(200, 100))
        with pytest.raises(InvalidRequest, match=r"^profile_box: spans 15x100 px of a 200x100 px picture, .* 16 px"):
            find_crop(picture, (0.0, 0.0, 0.075, 1.0), "profile_box")
        assert find_crop(picture, (0.0, 0.0, 0.08, 1.0), "profile_box").box == (0, 42, 16, 58)

    @pytest.mark.parametrize("size", [(997, 1511), (5003, 3001)])
    def test_the_reported_box_chooses_the_same_pixels_again(self, size):
        picture, generator = Image.new("L", size), np.random.default_rng(0)
        for _ in range(50):
            x0, y0 = generator.uniform(0, 0.5, 2)
            first = find_crop(picture, (x0, y0, x0 + 0.4, y0 + 0.3), "profile_box")
            assert find_crop(picture, tuple(first.to_dict()["box"]), "profile_box").box == first.box


class TestScaling:
    @pytest.mark.parametrize("size", [16, 128, 512, 700])
    def test_a_crop_becomes_a_square_of_the_asked_size(self, size):
        picture = quadrants(640, 480)
        pixels = crop_to_square(picture, Crop((320, 0, 640, 240), "given", (640, 480)), size)
        assert pixels.shape == (size, size, 3)
        assert pixels.dtype == np.uint8
        assert pixels.flags.writeable
        assert pixels.flags.c_contiguous
        border = 3 + size // 50  # where the filter reaches over the crop's edge into the neighbours
        assert (pixels[border:-border, border:-border] == GREEN).all()

    def test_fine_patterns_are_averaged_and_not_sampled(self):
        checks = (np.indices((2048, 2048)).sum(axis=0) % 2 * 255).astype(np.uint8)
        picture = Image.fromarray(checks).convert("RGB")
        pixels = crop_to_square(picture, Crop((0, 0, 2048, 2048), "centre", (2048, 2048)), 128)
        assert np.abs(pixels.astype(int) - 127).max() <= 2

    def test_a_crop_of_the_right_size_is_kept(self):
        picture = photograph()
        pixels = crop_to_square(picture, Crop((100, 50, 356, 306), "given", picture.size), 256)
        assert (pixels == np.asarray(picture)[50:306, 100:356]).all()
