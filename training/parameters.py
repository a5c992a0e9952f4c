"""The parameters of synthetic heads and of the views that heads are rendered in.

Lengths are in head units: a head is about 2 high. A head's own coordinates have x to the image's right where the face
looks at the camera, y up, z out of the face, and their origin in the middle of the head.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Self

import torch
from torch import Tensor


@dataclass(frozen=True)
class Batched:
    """Tensors that share their leading axis, the batch."""

    def __len__(self) -> int:
        return int(getattr(self, fields(self)[0].name).shape[0])

    def __getitem__(self, items: slice | Sequence[int] | Tensor) -> Self:
        index = items if isinstance(items, (slice, Tensor)) else list(items)
        return type(self)(**{field.name: getattr(self, field.name)[index] for field in fields(self)})

    def to(self, device: torch.device | str) -> Self:
        return type(self)(**{field.name: getattr(self, field.name).to(device) for field in fields(self)})

    @classmethod
    def cat(cls, parts: Sequence[Self]) -> Self:
        """Join several batches to one, in their order."""
        return cls(**{field.name: torch.cat([getattr(part, field.name) for part in parts]) for field in fields(cls)})


@dataclass(frozen=True)
class Identity(Batched):
    """Heads: lengths and strengths ``[B]``, colours ``[B, 3]`` in 0..1, all float32."""

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
    eye_open: Tensor
    eye_tilt: Tensor
    nose_y: Tensor
    nose_out: Tensor
    nose_width: Tensor
    mouth_y: Tensor
    mouth_width: Tensor
    mouth_curve: Tensor
    lip_fullness: Tensor
    ear_size: Tensor
    ear_out: Tensor
    brow_y: Tensor
    """Height of the brows above the eyes."""
    brow_thickness: Tensor
    brow_arch: Tensor
    brow_tilt: Tensor
    hair_top: Tensor
    """Thickness above the crown."""
    hair_side: Tensor
    hair_bottom: Tensor
    """Height at which the hair ends."""
    hairline_y: Tensor
    hair_frame: Tensor
    """Half width of the face that hair leaves free."""
    hair_parting: Tensor
    bun_size: Tensor
    """Radius; negative where there is none."""
    beard: Tensor
    """Strength, 0..1."""
    skin_colour: Tensor
    hair_colour: Tensor
    brow_colour: Tensor
    iris_colour: Tensor
    lip_colour: Tensor


@dataclass(frozen=True)
class View(Batched):
    """Everything that isn't identity: pose, light, surroundings. Scalars ``[B]``, colours and vectors ``[B, n]``."""

    yaw: Tensor
    """Radians; positive turns the face to the image's right."""
    pitch: Tensor
    """Radians; positive looks up."""
    roll: Tensor
    zoom: Tensor
    offset: Tensor
    """Offset of the picture's centre, ``[B, 2]``, in head units."""
    light_direction: Tensor
    """Unit vector to the light ``[B, 3]``: x to the image's right, y up, z to the camera. Not turned with the head."""
    light_colour: Tensor
    ambient: Tensor
    occlusion: Tensor
    """Strength of cast shadows and of the darkening of hollows, 0..1."""
    background: Tensor
    background_second: Tensor
    background_shape: Tensor
    """``[B, 4]``: angle of the gradient, its sharpness, and where the glow behind the head is, x and y."""
    clothes: Tensor
    clothes_second: Tensor
    clothes_stripes: Tensor
    """Stripes per head unit; 0 for plain clothes with a collar."""

    def in_flat_light(self) -> View:
        """Return the view with nothing but white ambient light: the picture shows the surfaces' own colours."""
        return replace(
            self,
            light_colour=torch.zeros_like(self.light_colour),
            ambient=torch.ones_like(self.ambient),
            occlusion=torch.zeros_like(self.occlusion),
        )

    def turned(self, yaw_degrees: float) -> View:
        """Return the view of a head that looks ``yaw_degrees`` to the image's right, upright and level."""
        still = torch.zeros_like(self.yaw)
        return replace(self, yaw=torch.full_like(self.yaw, math.radians(yaw_degrees)), pitch=still, roll=still)

    def lit_from(self, azimuth_degrees: float, elevation_degrees: float) -> View:
        """Return the view with light from another side; azimuth 0 is the camera's, positive the right."""
        direction = torch.tensor(direction_to(azimuth_degrees, elevation_degrees)).to(self.light_direction)
        return replace(self, light_direction=direction.expand_as(self.light_direction))


def direction_to(azimuth_degrees: float, elevation_degrees: float) -> list[float]:
    """Return the unit vector ``[x, y, z]`` to a light; azimuth 0 is the camera's side, positive the right."""
    azimuth, elevation = math.radians(azimuth_degrees), math.radians(elevation_degrees)
    return [
        math.sin(azimuth) * math.cos(elevation),
        math.sin(elevation),
        math.cos(azimuth) * math.cos(elevation),
    ]
