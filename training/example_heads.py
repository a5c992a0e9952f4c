"""The rendered heads that the demo and the client's sweep send: ``python -m training.example_heads`` writes them.

All are drawn from evaluation seeds, so no training ever sees these people. The files are committed; a test renders them
again and compares.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np
from icportrait_client.sweep import LIGHTS, YAWS, Reference
from numpy.typing import NDArray
from PIL import Image

from training.drawing import FIRST_EVALUATION_SEED, draw_identities, draw_views
from training.heads import render
from training.parameters import View

ROOT = Path(__file__).parents[1]
DEMO_FOLDER = Path("examples/heads")
SWEEP_FOLDER = Path("client/src/icportrait_client/references")
SIZE_PX = 128

# Counted from the first evaluation seed; chosen by eye. The demo's two people differ in skin, hair and shape; they look
# to opposite sides, one in light from the camera's direction, the other in light from the right.
DEMO_PROFILE, DEMO_REFERENCE = 75, 79
# A shorn and fair head shows the light and lends the portraits little hair; the view has muted colours, a strong light
# and little light from all sides.
SWEEP_IDENTITY, SWEEP_VIEW = 12, 118
LIT_ROW_YAW, LIT_ROW_ELEVATION = 0.0, 20.0
TURNED_ROW_LIGHT = (-35.0, 25.0)
"""Azimuth and elevation of the one light of the row whose head turns."""

Pictures = dict[Path, NDArray[np.uint8]]
"""Pixels ``[S, S, 3]`` by the file's path in the repository."""


def demo_pictures() -> Pictures:
    """Render profile, reference and ground truth: the profile's person in the reference's view and light."""
    people = (DEMO_PROFILE, DEMO_REFERENCE, DEMO_PROFILE)
    views = (DEMO_PROFILE, DEMO_REFERENCE, DEMO_REFERENCE)
    names = ("profile.png", "reference.png", "ground_truth.png")
    pixels = _render(people, draw_views([FIRST_EVALUATION_SEED + view for view in views]))
    return {DEMO_FOLDER / name: picture for name, picture in zip(names, pixels, strict=True)}


def sweep_pictures() -> Pictures:
    """Render one head that looks ahead in eight lights, and turned to eight sides in one light."""
    view = draw_views([FIRST_EVALUATION_SEED + SWEEP_VIEW])

    def seen(reference: Reference) -> View:
        if reference.kind == "light":
            return view.turned(LIT_ROW_YAW).lit_from(reference.degrees, LIT_ROW_ELEVATION)
        return view.turned(reference.degrees).lit_from(*TURNED_ROW_LIGHT)

    references = (*LIGHTS, *YAWS)
    pixels = _render((SWEEP_IDENTITY,) * len(references), View.cat([seen(reference) for reference in references]))
    return {SWEEP_FOLDER / reference.file_name: picture for reference, picture in zip(references, pixels, strict=True)}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m training.example_heads", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=ROOT, help="folder to write under (default: the repository)")
    args = parser.parse_args(argv)
    for path, pixels in {**demo_pictures(), **sweep_pictures()}.items():
        target = args.out / path
        target.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(target, optimize=True)
        print(path)
    return 0


def _render(people: tuple[int, ...], views: View) -> NDArray[np.uint8]:
    """Render people, counted from the first evaluation seed, each in its view: ``[N, S, S, 3]``."""
    image = render(draw_identities([FIRST_EVALUATION_SEED + person for person in people]), views, SIZE_PX).image
    return (image * 255).round().byte().permute(0, 2, 3, 1).numpy()


if __name__ == "__main__":
    sys.exit(main())
