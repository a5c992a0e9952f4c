"""The same place on every head: where a surface point would lie on the average one.

For one identity the map is one-to-one, so equal canonical points are equal surface points. Between identities it says
what belongs together: the tip of one nose and the tip of the other, whatever their sizes.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from training.sdf import SKULL_Y, SKULL_Z, HeadShape

_CHIN, _MOUTH, _NOSE, _EYES, _BROWS, _CROWN = -1.02, -0.575, -0.265, 0.065, 0.32, 0.99
"""Heights on the average head; depths and half widths below are its too."""
_NAPE_Z, _FACE_Z, _NOSE_TIP_Z = -0.94, 0.66, 0.89
_HAIR_RADII = (0.83, 0.87, 0.95)


def canonical(shape: HeadShape, x: Tensor, y: Tensor, z: Tensor, is_hair: Tensor) -> Tensor:
    """Compute canonical coordinates of the head's points.

    On skin, each coordinate is stretched piecewise linearly so that an identity's own landmarks come to lie where the
    average head has them: heights by chin, mouth, nose, eyes, brows and crown; half widths by the corners of the mouth
    and the jaw or by the eyes and the skull, mixed by height; depths by nape, face and tip of the nose. Hair is
    measured by the radii of its own cap instead, about the skull's middle.

    Args:
        shape: the heads, B of them.
        x: ``[B, P]`` in the head's own coordinates, as y and z.
        y: see x.
        z: see x.
        is_hair: ``[B, P]`` bool.

    Returns:
        ``[B, P, 3]`` in head units.
    """
    brows, crown = shape.eye_y + shape.brow_y, SKULL_Y + shape.skull_height
    height = _stretched(
        y,
        (shape.chin_y, shape.mouth_y, shape.nose_y, shape.eye_y, brows, crown),
        (_CHIN, _MOUTH, _NOSE, _EYES, _BROWS, _CROWN),
    )
    upper = ((height - _MOUTH) / (_EYES - _MOUTH)).clamp(0, 1)
    inner = torch.lerp(shape.mouth_width.expand_as(x), shape.eye_x.expand_as(x), upper)
    outer = torch.lerp(shape.jaw_width.expand_as(x), shape.skull_width.expand_as(x), upper)
    canonical_inner, canonical_outer = 0.26 + 0.05 * upper, 0.59 + 0.14 * upper
    ax = x.abs()
    beyond = (ax - inner) * (canonical_outer - canonical_inner) / (outer - inner)
    across = torch.where(ax < inner, ax / inner * canonical_inner, canonical_inner + beyond) * x.sign()
    nape = SKULL_Z - shape.skull_depth
    depth = _stretched(
        z, (nape, torch.zeros_like(nape), shape.nose_z, shape.nose_tip_z), (_NAPE_Z, 0.0, _FACE_Z, _NOSE_TIP_Z)
    )
    radii = zip((x, y - SKULL_Y, z - shape.hair_z), shape.hair_radii, _HAIR_RADII, strict=True)
    hair = torch.stack([offset / radius * average for offset, radius, average in radii], dim=-1)
    return torch.where(is_hair.unsqueeze(-1), hair, torch.stack((across, height, depth), dim=-1))


def _stretched(value: Tensor, landmarks: Sequence[Tensor], places: Sequence[float]) -> Tensor:
    """Move each landmark (ascending) to its place: a piecewise linear map, extended straight at both ends."""
    slopes = [(places[i + 1] - places[i]) / (landmarks[i + 1] - landmarks[i]) for i in range(len(places) - 1)]
    result = places[0] + (value - landmarks[0]) * slopes[0]
    for landmark, before, after in zip(landmarks[1:-1], slopes[:-1], slopes[1:], strict=True):
        result = result + (value - landmark).clamp(min=0) * (after - before)
    return result
