"""The face finder and the frontal cascade that it took the place of: what each finds, what it takes for a face, and ms.

Heads are rendered, so that their true faces are known: the smallest box about the pixels seen of the face, in front of
the ears and from the hair to the chin. Two photographs are turned and scaled, their faces known from looking. A finder
is right where its first face has an IoU of 0.5 or more with the true one. Of pictures without faces there are noise,
patterns, heads seen from behind, the photographs beside their heads, and a folder's if one is given, each whole and in
nine parts that overlap.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from importlib.metadata import version
from statistics import median
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from benchmarks.face_cascade import Cascade
from benchmarks.report import conditions_here
from benchmarks.settings import ROOT, FacesSettings
from icportrait.pictures import finder
from training.drawing import FIRST_EVALUATION_SEED, draw_identities, draw_views
from training.heads import Part, render

YAWS = (-90, -75, -60, -45, -30, -15, 0, 15, 30, 45, 60, 75, 90)
ROLLS = (-45, -30, -20, -10, 10, 20, 30, 45)
BOTH = ((-60, -30), (-60, 30), (60, -30), (60, 30))
THRESHOLDS = (0.3, 0.4, 0.5, 0.6, 0.65, 0.7, 0.75, 0.8, 0.85)
HEAD_PX = 256
FACE_PARTS = (Part.SKIN, Part.EYE_WHITE, Part.IRIS, Part.PUPIL, Part.LIPS, Part.BROWS)
CHIN_Y = -1.08
"""On the average head (``training.canonical``); what is below is neck. The ears are at z 0."""
PHOTOGRAPHS = {
    "astronaut.jpg": ((178, 62, 270, 176), (110, 0, 330, 230)),
    "hopper.jpg": ((177, 112, 357, 340), (130, 0, 400, 400)),
}
"""The face, an ellipse in this box, and what is left out for pictures without it."""
SMALL = (6, 12, 20, 28)
"""Shorter sides of a scene in heights of the face."""
SCENE_PX = (800, 600)
REPEATS = 15

Box = tuple[float, float, float, float]
Scored = list[tuple[float, Box]]
"""Faces with their scores, the one that would be taken first."""
Finder = Callable[[Image.Image], Scored]
Case = tuple[Image.Image, Box | None]


def run_faces(settings: FacesSettings) -> dict[str, Any]:
    """Search all pictures with both finders."""
    finders = {"yunet": _yunet, "cascade": _cascade(Cascade())}
    groups: dict[str, list[Case]] = {}
    for number, (yaw, roll) in enumerate(_poses()):
        print(f"\rheads: pose {number + 1} of {len(_poses())}", end="", file=sys.stderr, flush=True)
        groups[f"yaw {yaw:+d}, roll {roll:+d}"] = list(_heads(settings, yaw, roll))
    print(file=sys.stderr)
    upright = [case for yaw in (-30, 0, 30) for case in groups[f"yaw {yaw:+d}, roll +0"]]
    for heights in SMALL:
        groups[f"small: 1/{heights} of the shorter side"] = [_in_a_scene(*case, heights) for case in upright]
    groups["partial: a third is cut off"] = [_cut(*case, side, 1 / 3) for case in upright for side in range(4)]
    groups["partial: a half is cut off"] = [_cut(*case, side, 1 / 2) for case in upright for side in range(4)]
    for roll in (-45, -30, -15, 0, 15, 30, 45):
        groups[f"photographs, roll {roll:+d}"] = list(_photographs(roll))
    backs = list(_heads(settings, 180, 0))
    groups["no face"] = [(image, None) for image in _without_faces(settings, backs)]
    found = {name: {group: [find(image) for image, _ in cases] for group, cases in groups.items()}
             for name, find in finders.items()}  # fmt: skip
    least = {"yunet": finder.LEAST_SCORE, "cascade": 0.0}
    return {
        "groups": {
            group: {"pictures": len(cases)}
            | {name: _figures(cases, found[name][group], least[name]) for name in finders}
            for group, cases in groups.items()
        },
        "thresholds": {
            str(threshold): _over_all(groups, found["yunet"], threshold) for threshold in THRESHOLDS
        } | {"cascade": _over_all(groups, found["cascade"], 0.0)},
        "ms": _times(finders),
        "conditions": {
            **conditions_here(settings),
            **{name: version(name) for name in ("onnxruntime", "opencv-python-headless", "Pillow", "numpy")},
            "least_score": finder.LEAST_SCORE,
        },
    }  # fmt: skip


def _yunet(image: Image.Image) -> Scored:
    return [(face.score, face.box) for face in finder.find_faces(image, THRESHOLDS[0])]


def _cascade(cascade: Cascade) -> Finder:
    def find(image: Image.Image) -> Scored:
        box = cascade.largest_face(image)
        return [(1.0, box)] if box else []

    return find


def _poses() -> list[tuple[int, int]]:
    return [*((yaw, 0) for yaw in YAWS), *((0, roll) for roll in ROLLS), *BOTH]


def _heads(settings: FacesSettings, yaw: int, roll: int) -> Iterator[Case]:
    """Yield each of the people in a view, with the true face. Positive roll leans to the picture's right."""
    seeds = [FIRST_EVALUATION_SEED + settings.seed + person for person in range(settings.heads)]
    views = draw_views(seeds).turned(yaw)
    views = replace(views, roll=torch.full_like(views.roll, -math.radians(roll)))
    rendering = render(draw_identities(seeds), views, HEAD_PX)
    is_face = torch.isin(rendering.part, torch.tensor(FACE_PARTS, dtype=rendering.part.dtype))
    is_face &= (rendering.canonical_point[..., 2] > 0) & (rendering.canonical_point[..., 1] > CHIN_Y)
    pixels = (rendering.image * 255).round().byte().permute(0, 2, 3, 1).numpy()
    for image, seen in zip(pixels, is_face.numpy(), strict=True):
        yield Image.fromarray(image), _box_of(seen)


def _box_of(seen: NDArray[np.bool_]) -> Box | None:
    rows, columns = seen.any(axis=1).nonzero()[0], seen.any(axis=0).nonzero()[0]
    if not len(rows):
        return None
    return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1


def _in_a_scene(image: Image.Image, face: Box | None, heights: int) -> Case:
    """Place the picture in a scene, so small that the face has such a part of the scene's shorter side."""
    assert face
    scale = min(SCENE_PX) / heights / (face[3] - face[1])
    small = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.LANCZOS)
    scene, (x, y) = Image.new("RGB", SCENE_PX, (90, 110, 90)), (SCENE_PX[0] // 5, SCENE_PX[1] // 5)
    scene.paste(small, (x, y))
    x0, y0, x1, y1 = (edge * scale for edge in face)
    return scene, (x + x0, y + y0, x + x1, y + y1)


def _cut(image: Image.Image, face: Box | None, side: int, share: float) -> Case:
    """Cut such a part of the face off, at the picture's left, upper, right or lower side."""
    assert face
    x0, y0, x1, y1 = face
    edges = [0, 0, image.width, image.height]
    inward = (x1 - x0, y1 - y0, x0 - x1, y0 - y1)[side]
    edges[side] = round(face[side] + share * inward)
    left, top, right, bottom = edges
    seen = max(x0, left) - left, max(y0, top) - top, min(x1, right) - left, min(y1, bottom) - top
    return image.crop((left, top, right, bottom)), seen


def _photographs(roll: int) -> Iterator[Case]:
    """Yield the photographs, turned clockwise, at three scales."""
    for name, (face, _) in PHOTOGRAPHS.items():
        image = Image.open(ROOT / "examples" / name).convert("RGB")
        seen = Image.new("L", image.size)
        ImageDraw.Draw(seen).ellipse(face, fill=255)
        turned, seen = (each.rotate(-roll, Image.Resampling.BICUBIC, expand=True) for each in (image, seen))
        box = _box_of(np.asarray(seen) > 127)
        assert box
        for scale in (0.4, 1.0, 2.5):
            size = round(turned.width * scale), round(turned.height * scale)
            x0, y0, x1, y1 = (edge * scale for edge in box)
            yield turned.resize(size, Image.Resampling.LANCZOS), (x0, y0, x1, y1)


def _without_faces(settings: FacesSettings, backs: list[Case]) -> Iterator[Image.Image]:
    yield from (image for image, _ in backs)
    rng = np.random.default_rng(settings.seed)
    for size in (2, 8, 32, 128, 512):
        noise = Image.fromarray(rng.integers(0, 256, (size, size, 3), dtype=np.uint8))
        yield noise.resize((512, 512), Image.Resampling.BICUBIC)
    rows, columns = np.indices((512, 512))
    for pattern in (rows // 32 % 2, (rows // 32 + columns // 32) % 2, np.hypot(rows - 256, columns - 256) // 40 % 2):
        yield Image.fromarray((255 * pattern).astype(np.uint8)).convert("RGB")
    wholes = []
    for name, (_, (x0, _, x1, y1)) in PHOTOGRAPHS.items():
        image = Image.open(ROOT / "examples" / name).convert("RGB")
        wholes += [
            image.crop((x1, 0, *image.size)),
            image.crop((0, y1, *image.size)),
            image.crop((0, 0, x0, image.height)),
        ]
    if settings.without_faces:
        wholes += [Image.open(path).convert("RGB") for path in sorted(settings.without_faces.iterdir())
                   if path.suffix.lower() in (".jpg", ".jpeg", ".png")]  # fmt: skip
    for image in wholes:
        yield image
        width, height = image.width // 2, image.height // 2
        for x in (0, width // 2, width):
            yield from (image.crop((x, y, x + width, y + height)) for y in (0, height // 2, height))


def _figures(cases: list[Case], found: list[Scored], least: float) -> dict[str, int]:
    """Count the right boxes, and the wrong ones, which are worse than none."""
    first = [next((box for score, box in faces if score >= least), None) for faces in found]
    right = sum(_iou(box, face) >= 0.5 for box, (_, face) in zip(first, cases, strict=True) if box and face)
    return {"right": right, "wrong": sum(box is not None for box in first) - right}


def _over_all(groups: dict[str, list[Case]], found: dict[str, list[Scored]], least: float) -> dict[str, int]:
    with_faces = [_figures(cases, found[group], least) for group, cases in groups.items() if group != "no face"]
    return {
        "pictures": sum(len(cases) for group, cases in groups.items() if group != "no face"),
        "right": sum(each["right"] for each in with_faces),
        "wrong": sum(each["wrong"] for each in with_faces),
        "pictures_without": len(groups["no face"]),
        "found_without": _figures(groups["no face"], found["no face"], least)["wrong"],
    }


def _iou(a: Box, b: Box) -> float:
    across, down = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    shared = max(0, across) * max(0, down)
    return shared / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - shared)


def _times(finders: dict[str, Finder]) -> dict[str, dict[str, float]]:
    """Return medians of this thread's own time, the finders taking turns."""
    face = Image.open(ROOT / "examples" / "astronaut.jpg").convert("RGB")
    pictures = {
        "512 px, a face": face,
        "512 px, none": face.crop((272, 0, 512, 240)).resize((512, 512)),
        "12 megapixels, a face": face.resize((4000, 3000)),
        "12 megapixels, none": face.crop((272, 0, 512, 240)).resize((4000, 3000)),
    }
    taken: dict[str, dict[str, list[float]]] = {title: {name: [] for name in finders} for title in pictures}
    for title, picture in pictures.items():
        for _ in range(REPEATS):
            for name, find in finders.items():
                began_ns = time.thread_time_ns()
                find(picture)
                taken[title][name].append((time.thread_time_ns() - began_ns) / 1e6)
    return {title: {name: round(median(each), 1) for name, each in times.items()} for title, times in taken.items()}


def table(report: dict[str, Any]) -> str:
    """Write the figures of ``run_faces`` as lines for a reader."""
    lines = [f"{'right, wrong of':<44}{'pictures':>9}{'YuNet':>16}{'cascade':>16}"]
    for group, figures in report["groups"].items():
        cells = ("{right:>11d}{wrong:>5d}".format(**figures[name]) for name in ("yunet", "cascade"))
        lines.append(f"{group:<44}{figures['pictures']:>9d}" + "".join(cells))
    lines += ["", f"{'least score':<14}{'right':>14}{'wrong':>8}{'faces where there are none':>30}"]
    for threshold, all_of in report["thresholds"].items():
        lines.append(
            f"{threshold:<14}{all_of['right']:>6} of {all_of['pictures']:>4}{all_of['wrong']:>8}"
            f"{all_of['found_without']:>22} of {all_of['pictures_without']}"
        )
    lines += ["", f"{'ms on one core':<44}{'YuNet':>25}{'cascade':>16}"]
    lines += [f"{title:<44}{ms['yunet']:>25.1f}{ms['cascade']:>16.1f}" for title, ms in report["ms"].items()]
    return "\n".join(lines)
