"""Say how a picture would be prepared, and why: ``python -m icportrait.pictures FILE``."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from PIL import Image

from icportrait.errors import IcPortraitError
from icportrait.pictures.faces import crop_to_square, find_crop
from icportrait.pictures.finder import Face
from icportrait.pictures.imaging import decode_picture


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m icportrait.pictures", description="What would be done with it.")
    parser.add_argument("file", type=Path)
    parser.add_argument("--box", type=float, nargs=4, metavar=("X0", "Y0", "X1", "Y1"), help="in 0..1 of the picture")
    parser.add_argument("--size", type=int, default=512, help="the preset's (default: %(default)s)")
    parser.add_argument("--out", type=Path, help="write the crop, as the pipeline gets it, to a PNG")
    args = parser.parse_args(argv)
    try:
        data = args.file.read_bytes()
        picture = decode_picture(data, args.file.name, note=lambda line: print(f"  {line}"))
        crop = find_crop(picture, tuple(args.box) if args.box else None, "box")
    except (IcPortraitError, OSError) as error:
        print(f"refused: {error}", file=sys.stderr)
        return 1
    x0, y0, x1, y1 = crop.box
    print(f"  {picture.width}x{picture.height} pixels, upright, in sRGB")
    if crop.face:
        print(f"  {_described(crop.face, crop.faces)}")
    print(f"  crop {x0},{y0} to {x1},{y1} ({_REASONS[crop.source]}), scaled from {x1 - x0} to {args.size} pixels")
    if args.out:
        Image.fromarray(crop_to_square(picture, crop, args.size)).save(args.out)
    return 0


def _described(face: Face, faces: int) -> str:
    x0, y0, x1, y1 = (round(edge) for edge in face.box)
    which = "face" if faces == 1 else f"largest of {faces} faces (score times area)"
    return f"{which} {x0},{y0} to {x1},{y1}, score {face.score:.2f}, rolled by about {face.roll_degrees:.0f} degrees"


_REASONS = {
    "given": "the box that was given, narrowed to a square",
    "face": "head and shoulders of that face",
    "centre": "the middle: no face was found",
}

if __name__ == "__main__":
    sys.exit(main())
