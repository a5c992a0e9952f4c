"""The shape of a head as a signed distance field: about twenty rounded primitives, blended into each other.

Points are three tensors x, y, z of ``[B, P]`` in the head's own coordinates; every parameter is ``[B, 1]``, so that one
call serves any number of points of every head in the batch.
"""

from __future__ import annotations

from dataclasses import fields
from typing import NamedTuple

import torch
from torch import Tensor

from training.parameters import Identity, View

PIVOT = (0.0, -0.5, -0.15)
"""The point at which the head turns on the body: the same in the head's, the body's and the world's coordinates."""
BODY_SHARE = 0.35
"""Share of the head's yaw that the body follows."""
_COLLAR = (0.0, -1.6, -0.22)
SKULL_Y, SKULL_Z = 0.25, -0.10


def smooth_min(a: Tensor, b: Tensor, blend: float) -> Tensor:
    """Return the smaller one, rounded where the two differ by less than ``blend``, and never above it."""
    overlap = (a - b).abs_().neg_().add_(blend).relu_()
    return torch.minimum(a, b).addcmul_(overlap, overlap, value=-0.25 / blend)


def smooth_max(a: Tensor, b: Tensor, blend: float) -> Tensor:
    """Return the larger one, rounded where the two differ by less than ``blend``."""
    overlap = (a - b).abs_().neg_().add_(blend).relu_()
    return torch.maximum(a, b).addcmul_(overlap, overlap, value=0.25 / blend)


Size = tuple[Tensor | float, Tensor | float, Tensor | float]


def ellipsoid(x: Tensor, y: Tensor, z: Tensor, radii: Size) -> Tensor:
    """Return the distance to an ellipsoid about the origin, to first order: f (f - 1) / |grad f|, f = |p / radii|."""
    u, v, w = x / radii[0], y / radii[1], z / radii[2]
    f = (u * u).addcmul_(v, v).addcmul_(w, w).sqrt_()
    u, v, w = u.div_(radii[0]), v.div_(radii[1]), w.div_(radii[2])
    slope = (u * u).addcmul_(v, v).addcmul_(w, w).sqrt_().add_(1e-6)
    return (f - 1).mul_(f).div_(slope)


def sphere(x: Tensor, y: Tensor, z: Tensor, radius: Tensor | float) -> Tensor:
    """Return the distance to a sphere about the origin."""
    return (x * x).addcmul_(y, y).addcmul_(z, z).sqrt_().sub_(radius)


def cone(x: Tensor, y: Tensor, z: Tensor, end: Size, radius: Tensor | float, end_radius: Tensor | float) -> Tensor:
    """Return the distance to a rod from the origin to ``end`` whose radius changes linearly."""
    length_squared = end[0] * end[0] + end[1] * end[1] + end[2] * end[2]
    along = ((x * end[0] + y * end[1] + z * end[2]) / length_squared).clamp_(0, 1)
    axis = sphere(x - along * end[0], y - along * end[1], z - along * end[2], 0.0)
    return axis - (radius + along * (end_radius - radius))


def rotation(yaw: Tensor, pitch: Tensor, roll: Tensor) -> Tensor:
    """Return the rotation from head to world, ``[B, 3, 3]``: rolled, then pitched, then turned."""
    zero, one = torch.zeros_like(yaw), torch.ones_like(yaw)

    def matrix(*entries: Tensor) -> Tensor:
        return torch.stack(entries, dim=-1).view(-1, 3, 3)

    turn = matrix(yaw.cos(), zero, yaw.sin(), zero, one, zero, -yaw.sin(), zero, yaw.cos())
    nod = matrix(one, zero, zero, zero, pitch.cos(), pitch.sin(), zero, -pitch.sin(), pitch.cos())
    tilt = matrix(roll.cos(), -roll.sin(), zero, roll.sin(), roll.cos(), zero, zero, zero, one)
    return turn @ nod @ tilt


class Distances(NamedTuple):
    """Signed distances ``[B, P]`` to what a picture shows; the nearest one is what a point belongs to."""

    skin: Tensor
    hair: Tensor
    clothes: Tensor


class HeadShape:
    """The distance field of each identity of a batch, on a body that follows the view's yaw in part."""

    def __init__(self, identity: Identity, view: View) -> None:
        for field in fields(identity):
            value = getattr(identity, field.name)
            if value.dim() == 1:
                setattr(self, field.name, value.unsqueeze(1))
        self.head_to_world = rotation(view.yaw, view.pitch, view.roll)
        still = torch.zeros_like(view.yaw)
        body_to_world = rotation(view.yaw * BODY_SHARE, still, still)
        self.head_to_body = (body_to_world.transpose(1, 2) @ self.head_to_world).unsqueeze(-1)
        thickness = self.hair_side + self.hair_top
        self.hair_radii = (
            self.skull_width + self.hair_side,
            self.skull_height + self.hair_top,
            self.skull_depth + 0.5 * thickness,
        )
        # Set back, so that hair is thin at the forehead and thick behind.
        self.hair_z = SKULL_Z - 0.35 * thickness
        # The neck bends: it starts in the head and ends where the body has its collar.
        pivot, collar = view.yaw.new_tensor(PIVOT), view.yaw.new_tensor(_COLLAR)
        base = (collar - pivot) @ self.head_to_body.squeeze(-1) + pivot
        end_x, end_y, end_z = base.unsqueeze(1).unbind(-1)
        self.neck_end = (end_x, end_y + 0.6, end_z + 0.12)
        # Features sit on the face whatever its shape: find the face's depth where each of them belongs.
        zero = torch.zeros_like(self.eye_x)
        across = torch.cat((self.eye_x, zero, zero, zero), dim=1)
        up = torch.cat((self.eye_y, self.eye_y, self.nose_y, self.mouth_y), dim=1)
        depth = torch.full_like(across, 1.5)
        for _ in range(24):
            depth = depth - self._face(across, up, depth)
        self.eye_z, self.bridge_z, self.nose_z, self.mouth_z = depth.unsqueeze(1).unbind(-1)
        self.nose_tip_z = self.nose_z + self.nose_out

    skull_width: Tensor
    skull_height: Tensor
    skull_depth: Tensor
    jaw_width: Tensor
    chin_y: Tensor
    chin_size: Tensor
    cheek_size: Tensor
    brow_ridge: Tensor
    neck_size: Tensor
    eye_x: Tensor
    eye_y: Tensor
    eye_size: Tensor
    nose_y: Tensor
    brow_y: Tensor
    nose_out: Tensor
    nose_width: Tensor
    mouth_y: Tensor
    mouth_width: Tensor
    lip_fullness: Tensor
    ear_size: Tensor
    ear_out: Tensor
    hair_top: Tensor
    hair_side: Tensor
    hair_bottom: Tensor
    hairline_y: Tensor
    hair_frame: Tensor
    hair_parting: Tensor
    bun_size: Tensor

    def distances(self, x: Tensor, y: Tensor, z: Tensor) -> Distances:
        """Return signed distances of points to skin (with eyes and lips), hair and clothes."""
        return Distances(self._skin(x, y, z), self._hair(x, y, z), self._clothes(x, y, z))

    def distance(self, x: Tensor, y: Tensor, z: Tensor) -> Tensor:
        """Return the signed distance of points to the nearest surface, ``[B, P]``."""
        skin, hair, clothes = self.distances(x, y, z)
        return torch.minimum(smooth_min(skin, hair, 0.03), clothes)

    def _face(self, ax: Tensor, y: Tensor, z: Tensor) -> Tensor:
        """Return the distance to skull, jaw, chin and cheeks, without features; ``ax`` is |x|."""
        skull = ellipsoid(ax, y - SKULL_Y, z - SKULL_Z, (self.skull_width, self.skull_height, self.skull_depth))
        jaw = ellipsoid(ax, y - (self.chin_y + 0.70), z - 0.12, (self.jaw_width, 0.68, 0.60))
        chin = sphere(ax, y - (self.chin_y + self.chin_size), z - 0.46, self.chin_size)
        cheek = sphere(ax - 0.34, y + 0.16, z - 0.40, self.cheek_size)
        return smooth_min(smooth_min(smooth_min(skull, jaw, 0.25), chin, 0.22), cheek, 0.25)

    def _skin(self, x: Tensor, y: Tensor, z: Tensor) -> Tensor:
        ax = x.abs()
        skin = self._face(ax, y, z)
        eye_dx, eye_dy = ax - self.eye_x, y - self.eye_y
        ridge = ellipsoid(eye_dx + 0.04, eye_dy - 0.24, z - (self.eye_z - 0.08), (0.22, self.brow_ridge, 0.12))
        skin = smooth_min(skin, ridge, 0.12)
        socket = ellipsoid(eye_dx, eye_dy, z - (self.eye_z + 0.10), (0.24, 0.17, 0.20))
        skin = smooth_max(skin, -socket, 0.14)
        eye = sphere(eye_dx, eye_dy, z - (self.eye_z - self.eye_size), self.eye_size)
        skin = smooth_min(skin, eye, 0.04)
        bridge_y, bridge_z = self.eye_y + 0.10, self.bridge_z - 0.05
        nose_end = (0.0, self.nose_y - bridge_y, self.nose_tip_z - 0.09 - bridge_z)
        nose = cone(ax, y - bridge_y, z - bridge_z, nose_end, 0.06, 0.095)
        wing = sphere(ax - self.nose_width, y - (self.nose_y - 0.03), z - (self.nose_z + 0.05), 0.075)
        skin = smooth_min(skin, smooth_min(nose, wing, 0.09), 0.10)
        lip_dy, lip_z = y - self.mouth_y, z - (self.mouth_z - 0.02) + ax * ax
        upper = ellipsoid(ax, lip_dy - 0.5 * self.lip_fullness, lip_z, (self.mouth_width, 0.06, 0.07))
        lower = ellipsoid(ax, lip_dy + 0.7 * self.lip_fullness, lip_z, (0.75 * self.mouth_width, 0.07, 0.09))
        skin = smooth_min(skin, torch.minimum(upper, lower), 0.05)
        ear_x = self.skull_width - 0.02 + self.ear_out
        ear = ellipsoid(ax - ear_x + 0.25 * (z + 0.1), y + 0.02, z + 0.12, (0.07, self.ear_size, 0.6 * self.ear_size))
        skin = smooth_min(skin, ear, 0.07)
        neck = cone(x, y + 0.6, z + 0.12, self.neck_end, self.neck_size, self.neck_size)
        return smooth_min(skin, neck, 0.14)

    def _hair(self, x: Tensor, y: Tensor, z: Tensor) -> Tensor:
        cap = ellipsoid(x, y - SKULL_Y, z - self.hair_z, self.hair_radii)
        half = 0.5 * (SKULL_Y - self.hair_bottom).clamp(min=0.3)
        fall = ellipsoid(x, y - (SKULL_Y - half), z + 0.25, (0.98 * self.hair_radii[0], half + 0.25, 0.56))
        hair = smooth_min(cap, fall, 0.2)
        # Hair leaves an arch over the face free, in front of the ears, and ends at a plane that falls to the nape.
        v = ((y - self.hairline_y + 0.75) / 0.75).clamp_(min=0)
        u = (x - self.hair_parting * v.clamp(max=1)) / self.hair_frame
        u, v = u * u, v * v
        oval = ((u * u).addcmul_(v, v).sqrt_().sqrt_() - 1) * 0.55
        behind = 0.12 + 0.5 * (y + 0.4).clamp(max=0) - z
        hair = smooth_max(hair, -smooth_max(oval, behind, 0.15), 0.08)
        hair = smooth_max(hair, (self.hair_bottom - y) * 0.94 - 0.33 * z, 0.10)
        bun = sphere(x, y - (SKULL_Y + self.skull_height + 0.05), z + 0.42, self.bun_size)
        return smooth_min(hair, bun, 0.05)

    def _clothes(self, x: Tensor, y: Tensor, z: Tensor) -> Tensor:
        x, y, z = self.on_body(x, y, z)
        x = x.abs()
        shoulder = cone(x - 0.22, y + 1.56, z + 0.25, (0.95, -0.36, -0.02), 0.30, 0.40)
        chest = ellipsoid(x, y + 2.6, z + 0.22, (1.15, 1.05, 0.62))
        return smooth_min(shoulder, chest, 0.25)

    def on_body(self, x: Tensor, y: Tensor, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the same points in the coordinates of the body, which turns less than the head."""
        m, (px, py, pz) = self.head_to_body, PIVOT
        x, y, z = x - px, y - py, z - pz
        moved = [m[:, row, 0] * x + m[:, row, 1] * y + m[:, row, 2] * z for row in range(3)]
        return moved[0] + px, moved[1] + py, moved[2] + pz
