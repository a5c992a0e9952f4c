"""The appearance of heads: the colour of every surface point, and light on it."""

from __future__ import annotations

from enum import IntEnum
from typing import NamedTuple

import torch
from torch import Tensor

from training.parameters import Identity, View
from training.sdf import HeadShape

PIXEL = 0.012
"""Half the width over which colours change, in head units: half a pixel of a picture of 128 px, so nothing flickers."""


class Part(IntEnum):
    """The thing that a pixel shows, where one thing covers at least half of the pixel."""

    BACKGROUND = 0
    SKIN = 1
    HAIR = 2
    EYE_WHITE = 3
    IRIS = 4
    PUPIL = 5
    LIPS = 6
    BROWS = 7
    CLOTHES = 8


class Surface(NamedTuple):
    """Surface points: colour ``[B, P, 3]``, part ``[B, P]`` int64, gloss and its exponent ``[B, P]``."""

    albedo: Tensor
    part: Tensor
    gloss: Tensor
    exponent: Tensor


class _Paint:
    """Layers of paint, each over the ones before."""

    def __init__(self, like: Tensor, colour: Tensor, part: Part) -> None:
        self.albedo = colour.expand(*like.shape, 3).clone()
        self.part = torch.full_like(like, int(part), dtype=torch.int64)

    def over(self, weight: Tensor, colour: Tensor, part: Part | None = None) -> None:
        """Cover with ``colour`` where ``weight`` is 1; the part changes where that is most of it."""
        self.albedo.add_((colour - self.albedo) * weight.unsqueeze(-1))
        if part is not None:
            self.part[weight > 0.5] = int(part)


def _inside(distance: Tensor, softness: float = PIXEL) -> Tensor:
    """Return 1 where ``distance`` is below zero, 0 above, smooth over twice the softness."""
    t = (0.5 - distance / (2 * softness)).clamp_(0, 1)
    return t * t * (3 - 2 * t)


def _blob(dx: Tensor, dy: Tensor, radius: float) -> Tensor:
    return (1 - (dx * dx + dy * dy) / radius**2).clamp_(min=0).square_()


def paint(identity: Identity, view: View, shape: HeadShape, x: Tensor, y: Tensor, z: Tensor) -> Surface:
    """Paint surface points ``[B, P]``. A head's colours depend on the identity alone, never on the view."""

    def column(value: Tensor) -> Tensor:
        return value.unsqueeze(1)

    skin_colour, hair_colour, lip_colour = (
        column(c) for c in (identity.skin_colour, identity.hair_colour, identity.lip_colour)
    )
    ax, front = x.abs(), _inside(0.25 - z, 0.05)
    layers = _Paint(x, skin_colour, Part.SKIN)
    flush = torch.tensor([0.85, 0.42, 0.38], device=x.device, dtype=x.dtype) * (0.35 + 0.65 * skin_colour)
    layers.over(0.30 * front * _blob(ax - 0.36, y - shape.nose_y - 0.02, 0.26), flush)
    layers.over(0.22 * front * _blob(ax, y - shape.nose_y - 0.01, 0.14), flush)
    eye_dx, eye_dy = ax - shape.eye_x, y - shape.eye_y
    layers.over(0.25 * front * _blob(eye_dx, 0.8 * (eye_dy - 0.03), 0.26), 0.6 * skin_colour)
    # Beard: below a line from the ears to the nose, with the lips left free by their own paint.
    below = torch.maximum(y - (shape.mouth_y + 0.13 + 0.8 * (ax - 0.2).clamp(min=0)), shape.chin_y - 0.05 - y)
    beard = column(identity.beard) * _inside(below, 0.07) * _inside(0.12 - z, 0.14)
    layers.over(beard, 0.75 * hair_colour)
    nostril = _blob(ax - 0.55 * shape.nose_width, y - shape.nose_y + 0.105, 0.055)
    layers.over(0.6 * front * nostril, 0.3 * skin_colour)
    _lips(layers, identity, shape, ax, y, front, lip_colour)
    _eyes(layers, identity, shape, eye_dx, eye_dy, front)
    brow_along = (eye_dx + 0.02) / 0.19
    brow_line = column(identity.brow_y) + column(identity.brow_arch) * (1 - brow_along**2)
    brow_line = brow_line + column(identity.brow_tilt) * (eye_dx + 0.05)
    brow_half = column(identity.brow_thickness) * (1 - 0.55 * ((brow_along + 1) / 2).clamp(0, 1))
    brow = torch.maximum((eye_dy - brow_line).abs() - brow_half, (brow_along.abs() - 1) * 0.19)
    layers.over(front * _inside(brow), column(identity.brow_colour), Part.BROWS)

    skin, hair, clothes = shape.distances(x, y, z)
    # Strands: a slow ripple around the head, so that hair has places that can be told apart.
    ripple = torch.sin(9 * torch.atan2(x, z + 0.1) + 2.5 * y) * torch.sin(3.1 * y + 1.0)
    is_hair = _inside(hair - skin)
    layers.over(is_hair, hair_colour * (1 + 0.14 * ripple).unsqueeze(-1), Part.HAIR)
    is_clothes = _inside(clothes - torch.minimum(skin, hair))
    layers.over(is_clothes, _clothes_colour(view, shape, x, y, z), Part.CLOTHES)
    is_eye = (layers.part >= Part.EYE_WHITE) & (layers.part <= Part.PUPIL)
    gloss = torch.where(is_eye, 0.5, 0.10 + 0.05 * is_hair - 0.08 * is_clothes + 0.10 * (layers.part == Part.LIPS))
    return Surface(layers.albedo, layers.part, gloss, torch.where(is_eye, 60.0, 18.0))


def _lips(
    layers: _Paint, identity: Identity, shape: HeadShape, ax: Tensor, y: Tensor, front: Tensor, colour: Tensor
) -> None:
    along = ax / shape.mouth_width
    line = shape.mouth_y + identity.mouth_curve.unsqueeze(1) * along**2
    bow = 1 - 0.25 * (1 - (along / 0.25).square()).clamp(min=0)
    upper = line + shape.lip_fullness * 1.05 * (1 - along**2) * bow
    lower = line - shape.lip_fullness * 1.45 * (1 - along**2)
    layers.over(front * _inside(torch.maximum(y - upper, lower - y)), colour, Part.LIPS)
    parting = torch.maximum((y - line).abs() - 0.006, ax - 1.04 * shape.mouth_width)
    layers.over(0.75 * front * _inside(parting), 0.35 * colour)


def _eyes(layers: _Paint, identity: Identity, shape: HeadShape, dx: Tensor, dy: Tensor, front: Tensor) -> None:
    """Paint eyes on the bulge of the lids: an almond with white, iris and pupil, and a line of lashes above."""
    half_width = 0.95 * shape.eye_size
    along = dx / half_width
    lid = 0.72 * shape.eye_size * identity.eye_open.unsqueeze(1) * (1 - along**2)
    axis = identity.eye_tilt.unsqueeze(1) * dx
    almond = torch.maximum(dy - axis - lid, axis - 0.8 * lid - dy)
    opening = front * _inside(almond)
    white = torch.tensor([0.95, 0.94, 0.93], device=dx.device, dtype=dx.dtype)
    layers.over(opening, white, Part.EYE_WHITE)
    around = (dx * dx + (dy - 0.01) ** 2).sqrt()
    layers.over(opening * _inside(around - 0.60 * shape.eye_size), identity.iris_colour.unsqueeze(1), Part.IRIS)
    layers.over(opening * _inside(around - 0.24 * shape.eye_size), white * 0.04, Part.PUPIL)
    lashes = torch.maximum((dy - axis - lid).abs() - 0.012, (along.abs() - 1.05) * half_width)
    layers.over(0.85 * front * _inside(lashes), 0.25 * identity.brow_colour.unsqueeze(1))


def _clothes_colour(view: View, shape: HeadShape, x: Tensor, y: Tensor, z: Tensor) -> Tensor:
    x, y, z = shape.on_body(x, y, z)
    stripes = view.clothes_stripes.unsqueeze(1)
    striped = 0.5 + 0.5 * torch.sin(6.2832 * stripes * y).mul(4).clamp(-1, 1)
    collar = _inside((x * x + (z + 0.25) ** 2).sqrt() - 0.55 - 0.3 * (y + 1.5), 0.03)
    second = torch.where(stripes > 0, striped, collar).unsqueeze(-1)
    return view.clothes.unsqueeze(1) * (1 - second) + view.clothes_second.unsqueeze(1) * second


def backdrop(view: View, u: Tensor, v: Tensor) -> Tensor:
    """Return the background at picture positions u (right) and v (up), ``[B, P]`` in -1..1: ``[B, P, 3]``."""
    angle, sharpness, glow_u, glow_v = view.background_shape.unsqueeze(-1).unbind(1)
    across = torch.sigmoid(sharpness * (u * angle.cos() + v * angle.sin())).unsqueeze(-1)
    colour = view.background.unsqueeze(1) * across + view.background_second.unsqueeze(1) * (1 - across)
    glow = torch.exp(-2.5 * ((u - glow_u) ** 2 + (v - glow_v) ** 2)).unsqueeze(-1)
    return colour * (0.75 + 0.35 * glow)


def illuminate(
    surface: Surface, view: View, normal: Tensor, to_eye: Tensor, to_light: Tensor, shadow: Tensor, hollow: Tensor
) -> Tensor:
    """Illuminate surfaces with ambient light, Lambert's diffuse and Blinn's highlight (SIGGRAPH 1977).

    Colours are squared before they are lit and the result's root is taken, close to what displays do, so light falls
    off as in a photograph while ambient light of 1 shows every surface's own colour.

    Args:
        surface: what is lit, P points of each picture.
        view: the light.
        normal: unit vectors ``[B, P, 3]``.
        to_eye: unit vectors ``[B, P, 3]``.
        to_light: unit vectors ``[B, 1, 3]``.
        shadow: share of the light that arrives, ``[B, P]``.
        hollow: share of the ambient light that arrives, ``[B, P]``.

    Returns:
        ``[B, P, 3]`` in 0..1.
    """
    facing = (normal * to_light).sum(-1)
    diffuse = ((facing + 0.12) / 1.12).clamp(min=0) * shadow
    half = torch.nn.functional.normalize(to_eye + to_light, dim=-1)
    highlight = surface.gloss * (normal * half).sum(-1).clamp(min=0) ** surface.exponent * shadow * (facing > 0)
    light, ambient = view.light_colour.unsqueeze(1), view.ambient.unsqueeze(1)
    lit = surface.albedo.square() * (ambient * hollow.unsqueeze(-1) + light * diffuse.unsqueeze(-1))
    return (lit + light * highlight.unsqueeze(-1)).clamp(0, 1).sqrt()
