"""One profile under many lights and views: sixteen requests, and one picture of the sixteen portraits.

The references are rendered heads of one person, sent whole; ``training.example_heads`` renders
them. Profile, seed and options are the same in every request, so a row shows what its light or its view alone does.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont, ImageOps, PngImagePlugin

from icportrait_client.errors import InvalidRequest
from icportrait_client.pictures import PictureSource, picture_bytes
from icportrait_client.portraits import Crop, Metadata, Portrait

CALLS_AT_ONCE = 8
"""Half of the portraits that a server denoises together by default: the other half is for its other callers."""
WHOLE = (0.0, 0.0, 1.0, 1.0)


@dataclass(frozen=True)
class Reference:
    """One packaged picture; its degrees are counted from the camera, positive to the picture's right."""

    kind: str
    """Kind of the degrees: ``light`` or ``yaw``."""
    degrees: int

    @property
    def file_name(self) -> str:
        return f"{self.kind}_{self.degrees:+03d}.png"

    @property
    def label(self) -> str:
        return f"{self.kind} {self.degrees:+d}°"

    def read(self) -> bytes:
        """Read the encoded picture."""
        return (resources.files("icportrait_client") / "references" / self.file_name).read_bytes()


LIGHTS = tuple(Reference("light", azimuth) for azimuth in (-70, -50, -30, -10, 10, 30, 50, 70))
YAWS = tuple(Reference("yaw", yaw) for yaw in (-35, -25, -15, -5, 5, 15, 25, 35))
ROWS = (LIGHTS, YAWS)


def sweep(
    generate: Callable[..., Portrait],
    profile: PictureSource,
    options: Mapping[str, Any],
    answered: Callable[[int], None] = lambda _: None,
) -> dict[Reference, Portrait]:
    """Ask for the profile's portrait under every reference, several at once.

    After an error nothing more is sent; what is under way ends when the caller closes the client.

    Args:
        generate: ``PortraitClient.generate``.
        profile: who it is.
        options: further arguments of ``PortraitClient.generate``, the same for all; a seed belongs among them, else
            every portrait has its own.
        answered: called after each answer with how many there are by now.

    Returns:
        The answers, each with one portrait in PNG, in the references' order.

    Raises:
        PortraitError: a request failed; which errors there are, ``PortraitClient.generate`` says.
    """
    request = {**options, "profile": picture_bytes(profile, "profile"), "output_format": "png"}
    pool = ThreadPoolExecutor(CALLS_AT_ONCE)
    try:
        calls = {
            pool.submit(generate, reference=reference.read(), reference_box=WHOLE, **request): reference
            for row in ROWS
            for reference in row
        }
        for count, call in enumerate(as_completed(calls), start=1):
            call.result()
            answered(count)
        return {reference: call.result() for call, reference in calls.items()}
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def strip(profile: PictureSource, portraits: Mapping[Reference, Portrait]) -> Image.Image:
    """Draw the profile, as the server cropped it, beside two rows of labelled portraits.

    Returns:
        An RGB picture; for portraits of side S, labels are L = S // 6 high, it is 2 (S + L) high and 10 S + L + S // 8
        wide. Its ``info`` has the portraits' XMP, which marks them as generated media.

    Raises:
        InvalidRequest: the profile can't be read here.
    """
    pictures = {reference: answer.image.convert("RGB") for reference, answer in portraits.items()}
    first = next(iter(portraits.values()))
    side = next(iter(pictures.values())).width
    label, gap = side // 6, side // 8
    large = 2 * side + label
    sheet = Image.new("RGB", (large + gap + len(LIGHTS) * side, 2 * (side + label)), "white")
    draw = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(size=0.7 * label)

    def place(picture: Image.Image, text: str, x: int, y: int) -> None:
        draw.text((x + picture.width // 2, y + label // 2), text, fill="black", font=font, anchor="mm")
        sheet.paste(picture, (x, y + label))

    place(_cropped(profile, first.metadata).resize((large, large), Image.Resampling.LANCZOS), "profile", 0, 0)
    for y, row in enumerate(ROWS):
        for x, reference in enumerate(row):
            place(pictures[reference], reference.label, large + gap + x * side, y * (side + label))
    if xmp := first.image.info.get("xmp"):
        sheet.info["xmp"] = xmp
    return sheet


def save_strip(picture: Image.Image, path: Path, output_format: str) -> None:
    """Write a strip in one of the contract's formats, with its mark as generated media.

    Raises:
        OSError: the file can't be written.
    """
    xmp: bytes = picture.info.get("xmp", b"")
    options: dict[str, Any] = {"xmp": xmp}
    if output_format == "png":
        mark = PngImagePlugin.PngInfo()
        if xmp:
            mark.add_itxt("XML:com.adobe.xmp", xmp.decode())
        options = {"pnginfo": mark}
    elif output_format == "jpeg":
        options |= {"quality": 95, "subsampling": "4:4:4"}
    # Encoded before the file is opened, so that no half of one is left.
    buffer = io.BytesIO()
    picture.save(buffer, output_format.upper(), **options)
    path.write_bytes(buffer.getvalue())


def _cropped(profile: PictureSource, metadata: Metadata) -> Image.Image:
    """Cut out the square of the profile that the server used."""
    try:
        with Image.open(io.BytesIO(picture_bytes(profile, "profile"))) as file:
            picture = ImageOps.exif_transpose(file).convert("RGB")
    except Exception as error:  # Pillow's decoders raise SyntaxError, zlib.error and others on damaged files
        raise InvalidRequest(f"profile: the server could read it, this computer can't ({error})") from None
    box: Sequence[float] = metadata.crops.get("profile", Crop()).box
    x0, y0, x1, y1 = (round(share * side) for share, side in zip(box, picture.size * 2, strict=True))
    square = picture.crop((x0, y0, x1, y1))
    return ImageOps.fit(square, (min(square.size),) * 2)
