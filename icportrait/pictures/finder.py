"""Places of faces in a picture: YuNet in ONNX Runtime, on one core.

Wu, Peng and Yu, "YuNet: A Tiny Millisecond-level Face Detector", Machine Intelligence Research 20, 2023. Every cell of
three grids, 8, 16 and 32 pixels wide, says how likely a face is, where its box is, and where eyes, nose and mouth are.
What was measured, and why this network: ADR 0013.
"""

from __future__ import annotations

import functools
import math
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from icportrait.errors import RuntimeNotAvailable

Array = NDArray[np.float32]

WEIGHTS = Path(__file__).parent / "weights" / "yunet_n.onnx"
"""github.com/ShiqiYu/libfacedetection.train, commit 0047ac2, onnx/yunet_n_dynamic.onnx; its licence is beside it."""
LOOKS_PX = (384, 128)
"""A picture is searched in two copies of so many pixels squared: the first shows small faces and rolled ones, and in
the second those that are turned to the side and fill the picture are best known."""
LONGEST_PX = 1024
"""The longest side of a copy: a strip's copies have fewer pixels."""
STRIDES = (8, 16, 32)
LEAST_SCORE = 0.65
OVERLAP = 0.3
"""Two boxes whose intersection over union is this or more are one face: the one with the higher score stays."""

_loading = threading.Lock()


@dataclass(frozen=True)
class Face:
    """A face that was found."""

    box: tuple[float, float, float, float]
    """x0, y0, x1, y1 in the picture's pixels, from the forehead to the chin; what the picture cuts off included."""
    score: float
    """The network's certainty: ``LEAST_SCORE`` to 1."""
    roll_degrees: float
    """Roughly: positive where the head leans to the picture's right. Half of a large roll goes unseen (ADR 0013)."""

    @property
    def area(self) -> float:
        x0, y0, x1, y1 = self.box
        return (x1 - x0) * (y1 - y0)


def load() -> None:
    """Load the network, and look once, which readies ONNX Runtime's memory.

    Raises:
        RuntimeNotAvailable: ONNX Runtime isn't installed.
    """
    find_faces(Image.new("RGB", (LOOKS_PX[0],) * 2))


def find_faces(picture: Image.Image, least_score: float = LEAST_SCORE) -> list[Face]:
    """Find the faces of an RGB picture, the one with the highest score times area first. For any thread.

    Equal pictures give equal faces on one kind of CPU.

    Raises:
        RuntimeNotAvailable: ONNX Runtime isn't installed.
    """
    copy, looks = picture, []
    for side_px in LOOKS_PX:
        copy = _of_pixels(copy, side_px)
        looks.append(_look(copy, picture.size, least_score))
    boxes, scores, landmarks = (np.concatenate(parts) for parts in zip(*looks, strict=True))
    faces = [
        Face(tuple(boxes[index].tolist()), float(scores[index]), _roll_degrees(landmarks[index]))
        for index in _best_of_overlapping(boxes, scores)
    ]
    return sorted(faces, key=lambda face: (-face.score * face.area, face.box))


def _of_pixels(picture: Image.Image, side_px: int) -> Image.Image:
    """Scale the picture to so many pixels squared, or to fewer where it is very long."""
    width, height = picture.size
    scale = min(side_px / math.sqrt(width * height), LONGEST_PX / max(width, height))
    size = max(1, round(width * scale)), max(1, round(height * scale))
    # reducing_gap lets a large picture shrink by a whole factor first, which is quicker.
    return picture.resize(size, Image.Resampling.BILINEAR, reducing_gap=2.0)


def _look(copy: Image.Image, size: tuple[int, int], least_score: float) -> tuple[Array, Array, Array]:
    """Find boxes [N, 4], scores [N] and landmarks [N, 5, 2] in a picture of a size, from a copy of it."""
    rows, columns = (-(-side // STRIDES[-1]) * STRIDES[-1] for side in (copy.height, copy.width))
    pixels = np.zeros((1, 3, rows, columns), np.float32)
    # The network takes blue first.
    pixels[0, :, : copy.height, : copy.width] = np.asarray(copy)[..., ::-1].transpose(2, 0, 1)
    boxes, scores, landmarks = _decoded(_network()(pixels), columns, least_score)
    scale = np.array(size, np.float32) / copy.size
    return boxes * np.tile(scale, 2), scores, landmarks * scale


def _decoded(outputs: dict[str, Array], columns: int, least_score: float) -> tuple[Array, Array, Array]:
    """Decode ``_look``'s faces, in pixels of the copy that the network saw.

    For a cell in column c and row r of the grid of stride s the network gives ``cls`` and ``obj``, whose geometric mean
    is the score; ``bbox`` x, y, w, h: the centre is s (c + x, r + y), the size s (exp w, exp h); and ``kps``, five
    points s (c + x, r + y): the eyes, the nose, the corners of the mouth, each time the picture's left one first.
    """
    found = []
    for stride in STRIDES:
        cls, obj, bbox, kps = (outputs[f"{name}_{stride}"][0] for name in ("cls", "obj", "bbox", "kps"))
        scores = np.sqrt((cls * obj).clip(0, 1))[:, 0]
        cells = np.flatnonzero(scores >= least_score)
        corner = np.stack((cells % (columns // stride), cells // (columns // stride)), axis=1).astype(np.float32)
        centre, half = corner + bbox[cells, :2], np.exp(bbox[cells, 2:]) / 2
        boxes = np.concatenate((centre - half, centre + half), axis=1) * stride
        landmarks = (corner[:, None] + kps[cells].reshape(-1, 5, 2)) * stride
        found.append((boxes, scores[cells], landmarks))
    boxes, scores, landmarks = (np.concatenate(parts) for parts in zip(*found, strict=True))
    return boxes, scores, landmarks


def _best_of_overlapping(boxes: Array, scores: Array) -> list[int]:
    """Return the indices of the boxes that overlap none with a higher score (non-maximum suppression)."""
    area = (boxes[:, 2:] - boxes[:, :2]).prod(axis=1)
    left, kept = np.argsort(-scores, kind="stable"), []
    while len(left):
        best, others = left[0], left[1:]
        kept.append(int(best))
        corner = np.maximum(boxes[best, :2], boxes[others, :2])
        shared = (np.minimum(boxes[best, 2:], boxes[others, 2:]) - corner).clip(0).prod(axis=1)
        left = others[shared < OVERLAP * (area[best] + area[others] - shared)]
    return kept


def _roll_degrees(landmarks: Array) -> float:
    """Return the angle of the line from between the eyes to the mouth's middle, which holds for turned heads too."""
    x, y = landmarks[3:].mean(axis=0) - landmarks[:2].mean(axis=0)
    return math.degrees(math.atan2(-x, y))


def _network() -> Any:
    """Return this process's one session, a function of the pixels [1, 3, rows, columns] to outputs by name."""
    with _loading:
        return _session()


@functools.cache
def _session() -> Any:
    try:
        import onnxruntime
    except ImportError as error:
        raise RuntimeNotAvailable(
            f"faces are found by ONNX Runtime, which isn't there ({error}); pip install 'icportrait[serve]'"
        ) from error
    options = onnxruntime.SessionOptions()
    # Requests already run side by side; threads inside each search would only take turns, in an order that varies.
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    session = onnxruntime.InferenceSession(WEIGHTS, options, providers=["CPUExecutionProvider"])
    (pixels,), names = session.get_inputs(), [output.name for output in session.get_outputs()]
    return lambda values: dict(zip(names, session.run(names, {pixels.name: values}), strict=True))
