"""Synthetic heads: the same identity rendered in any view and light, with the surface point that every pixel shows.

    identities, views = draw_identities(range(8)), draw_views(range(8))
    rendering = render(identities, views)                     # image [8, 3, 128, 128]
    flow, visible = correspondence(rendering, other, grid=32)  # see training.correspondence

A picture is made by sphere tracing (Hart, "Sphere tracing", 1996), first tiles, then the pixels of tiles that may see
anything. Pixels at outlines are traced four times more and averaged. No ray's result depends on other rays or on the
rest of the batch, but for the rounding of vectorised arithmetic.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from training.appearance import Part, Surface, backdrop, illuminate, paint
from training.canonical import canonical
from training.drawing import draw_identities, draw_views
from training.parameters import Batched, Identity, View
from training.sdf import PIVOT, HeadShape

__all__ = ["Identity", "Part", "Rendering", "View", "draw_identities", "draw_views", "render"]

HEAD_PARTS = (Part.SKIN, Part.HAIR, Part.EYE_WHITE, Part.IRIS, Part.PUPIL, Part.LIPS, Part.BROWS)
_CAMERA_DISTANCE = 7.0
_CAMERA_Y = -0.22
_HALF_HEIGHT = 1.55
"""Half of what the picture shows at the head's distance, in head units, at zoom 1."""
_NEAR, _FAR = _CAMERA_DISTANCE - 1.5, _CAMERA_DISTANCE + 1.6
_TILE = 4
_HIT = 0.002
_STAGES = ((4, 0.0), (3, 0.0), (4, 0.0), (6, 0.0), (12, 0.012), (20, 0.012))
"""Steps between which finished rays are dropped, and the shortest step: half a pixel for the last rays, which creep
along an outline or under a chin and would not arrive otherwise."""
_OUTLINE = 0.10
"""Neighbouring pixels whose depths differ by more are at an outline, in head units."""
_CHUNK = {"cpu": 8, "cuda": 64}
"""Pictures at a time: on a CPU so few that a tensor over all rays stays in the cache."""


@dataclass(frozen=True)
class Rendering(Batched):
    """Pictures and what they show."""

    image: Tensor
    """``[B, 3, S, S]`` float32 in 0..1."""
    albedo: Tensor
    """The surfaces' own colours, unlit, at the pixels' centres: ``[B, 3, S, S]`` float32."""
    surface_point: Tensor
    """Point that each pixel's centre sees, in the head's own coordinates: ``[B, S, S, 3]`` float32; 0 off the head."""
    canonical_point: Tensor
    """The same place on the average head (``training.canonical``): ``[B, S, S, 3]`` float32."""
    part: Tensor
    """``Part`` at each pixel's centre: ``[B, S, S]`` uint8."""

    @property
    def head_mask(self) -> Tensor:
        """Return the pixels that show the head, with hair and neck and without clothes: ``[B, S, S]`` bool."""
        return (self.part != Part.BACKGROUND) & (self.part != Part.CLOTHES)


@torch.no_grad()
def render(identity: Identity, view: View, size: int = 128) -> Rendering:
    """Render each identity in its view.

    Args:
        identity: B heads.
        view: B views, on the same device.
        size: side of the pictures in pixels, a multiple of 4.

    Raises:
        ValueError: the batches differ, or the size isn't a multiple of 4.
    """
    if len(identity) != len(view):
        raise ValueError(f"view: {len(view)} views for {len(identity)} identities, expected as many")
    if size % _TILE or size <= 0:
        raise ValueError(f"size: {size}, expected a multiple of {_TILE}")
    chunk = _CHUNK.get(identity.skull_width.device.type, 16)
    starts = range(0, len(identity), chunk)
    return Rendering.cat([_Camera(identity[s : s + chunk], view[s : s + chunk], size).picture() for s in starts])


class _Camera:
    """A pinhole camera per head, in the head's coordinates."""

    def __init__(self, identity: Identity, view: View, size: int) -> None:
        self.identity, self.view, self.size = identity, view, size
        self.shape = HeadShape(identity, view)
        world_to_head = self.shape.head_to_world.transpose(1, 2)
        self.world_to_head = world_to_head
        self.scale = _HALF_HEIGHT / _CAMERA_DISTANCE / view.zoom
        pivot = view.yaw.new_tensor(PIVOT)
        place = view.yaw.new_tensor([0.0, _CAMERA_Y, _CAMERA_DISTANCE]).repeat(len(view), 1)
        place[:, :2] += view.offset
        self.origin = ((place - pivot).unsqueeze(1) @ self.shape.head_to_world).squeeze(1) + pivot
        self.to_light = view.light_direction.unsqueeze(1) @ self.shape.head_to_world

    def rays(self, u: Tensor, v: Tensor) -> Tensor:
        """Return unit directions ``[B, P, 3]`` through picture positions -1..1, u to the right and v up."""
        scale = self.scale.unsqueeze(1)
        ahead = torch.stack((u * scale, v * scale, -torch.ones_like(u)), dim=-1)
        return torch.nn.functional.normalize(ahead, dim=-1) @ self.shape.head_to_world

    def position(
        self, pixel: Tensor, shift_x: float | Tensor = 0.0, shift_y: float | Tensor = 0.0
    ) -> tuple[Tensor, Tensor]:
        """Return picture positions of pixels y * size + x, ``[B, P]``, shifted by parts of a pixel."""
        x, y = pixel % self.size, torch.div(pixel, self.size, rounding_mode="floor")
        u = (x + 0.5 + shift_x) * (2 / self.size) - 1
        return u, 1 - (y + 0.5 + shift_y) * (2 / self.size)

    def points(self, rays: Tensor, depth: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x, y, z = (self.origin[:, None, axis] + depth * rays[..., axis] for axis in range(3))
        return x, y, z

    def tiles(self) -> Tensor:
        """Return the depth that all rays of each tile reach untouched, ``[B, tiles]``; from ``_FAR``: all the way."""
        across = self.size // _TILE
        index = torch.arange(across * across, device=self.origin.device).expand(len(self.view), -1)
        x, y = index % across, torch.div(index, across, rounding_mode="floor")
        rays = self.rays((x + 0.5) * (2 / across) - 1, 1 - (y + 0.5) * (2 / across))
        # A sphere of this radius per unit of depth about the tile's ray holds all rays of the tile.
        spread = (self.scale * (1.05 * math.sqrt(2) / across)).unsqueeze(1)
        depth = torch.full_like(rays[..., 0], _NEAR)
        for _ in range(12):
            free = self.shape.distance(*self.points(rays, depth)) - spread * depth
            depth = depth + 0.95 * free.clamp(min=0) * (depth < _FAR)
        return depth

    def trace(self, rays: Tensor, start: Tensor) -> Tensor:
        """Find the depths ``[B, P]`` at which rays meet a surface; infinite where they don't."""
        depth = start.clone()
        free = torch.zeros_like(depth)
        left: Tensor | None = None
        for steps, least in _STAGES:
            near = rays if left is None else _take(rays, left)
            t = depth if left is None else depth.gather(1, left)
            d = torch.zeros_like(t)
            for _ in range(steps):
                d = self.shape.distance(*self.points(near, t))
                t = t + (0.92 * d).clamp_(min=least) * ((d > _HIT) & (t < _FAR))
            if left is None:
                depth, free = t, d
            else:
                depth, free = depth.scatter(1, left, t), free.scatter(1, left, d)
            left = _indices((free > _HIT) & (depth < _FAR))
        return torch.where((depth < _FAR) & (free < 6 * _HIT), depth, math.inf)

    def shade(self, rays: Tensor, depth: Tensor) -> tuple[Tensor, Surface, tuple[Tensor, Tensor, Tensor]]:
        """Return the lit colours ``[B, P, 3]``, surfaces and points of rays that end at ``depth``."""
        x, y, z = self.points(rays, depth)
        surface = paint(self.identity, self.view, self.shape, x, y, z)
        # The gradient from four corners of a tetrahedron, wide enough to smooth what is smaller than a pixel.
        normal = torch.zeros_like(rays)
        for corner in ((1, -1, -1), (-1, -1, 1), (-1, 1, -1), (1, 1, 1)):
            dx, dy, dz = (0.008 * c for c in corner)
            normal += self.shape.distance(x + dx, y + dy, z + dz).unsqueeze(-1) * rays.new_tensor(corner)
        normal = torch.nn.functional.normalize(normal, dim=-1)
        nx, ny, nz = normal.unbind(-1)
        hollow = torch.zeros_like(depth)
        for reach in (0.10, 0.30):
            hollow += 0.5 * (self.shape.distance(x + reach * nx, y + reach * ny, z + reach * nz) / reach).clamp(0, 1)
        lx, ly, lz = self.to_light.unbind(-1)
        shadow = torch.ones_like(depth)
        for reach in (0.12, 0.28, 0.50, 0.85):
            ahead = self.shape.distance(
                x + 0.03 * nx + reach * lx, y + 0.03 * ny + reach * ly, z + 0.03 * nz + reach * lz
            )
            shadow = torch.minimum(shadow, (0.5 + 3.0 * ahead / reach).clamp(0, 1))
        strength = self.view.occlusion.unsqueeze(1)
        shadow, hollow = 1 - strength * (1 - shadow), 1 - strength * 0.75 * (1 - hollow)
        return illuminate(surface, self.view, normal, -rays, self.to_light, shadow, hollow), surface, (x, y, z)

    def picture(self) -> Rendering:
        """Render the pictures of the whole batch."""
        batch, size = len(self.view), self.size
        whole = torch.arange(size * size, device=self.origin.device).expand(batch, -1)
        background = backdrop(self.view, *self.position(whole)).clamp(0, 1)
        start = self.tiles().view(batch, size // _TILE, size // _TILE)
        start = start.repeat_interleave(_TILE, 1).repeat_interleave(_TILE, 2).flatten(1)
        depth = torch.full_like(start, math.inf)
        pixel = _indices(start < _FAR)
        depth.scatter_(1, pixel, self.trace(self.rays(*self.position(pixel)), start.gather(1, pixel)))

        seen = depth < math.inf
        pixel = _indices(seen)
        valid = seen.gather(1, pixel)
        colour, surface, points = self.shade(self.rays(*self.position(pixel)), _finite(depth.gather(1, pixel)))
        image, albedo = _put(background, pixel, valid, colour), _put(background, pixel, valid, surface.albedo)
        part = _put(torch.zeros_like(whole).unsqueeze(-1), pixel, valid, surface.part.unsqueeze(-1))
        on_head = valid & (surface.part != Part.CLOTHES)
        zero = torch.zeros_like(background)
        is_hair = surface.part == Part.HAIR
        point = _put(zero, pixel, on_head, torch.stack(points, dim=-1))
        same = _put(zero, pixel, on_head, canonical(self.shape, *points, is_hair))
        image = self.smooth_outlines(image, background, depth, start)
        square = (batch, size, size)
        return Rendering(
            image.transpose(1, 2).reshape(batch, 3, size, size),
            albedo.transpose(1, 2).reshape(batch, 3, size, size),
            point.view(*square, 3),
            same.view(*square, 3),
            part.view(square).to(torch.uint8),
        )

    def smooth_outlines(self, image: Tensor, background: Tensor, depth: Tensor, start: Tensor) -> Tensor:
        """Replace the pixels at outlines by the mean of four rays each."""
        grid = _finite(depth).view(-1, self.size, self.size)
        edge = torch.zeros_like(grid, dtype=torch.bool)
        jump = (grid[:, 1:] - grid[:, :-1]).abs() > _OUTLINE
        edge[:, 1:] |= jump
        edge[:, :-1] |= jump
        jump = (grid[:, :, 1:] - grid[:, :, :-1]).abs() > _OUTLINE
        edge[:, :, 1:] |= jump
        edge[:, :, :-1] |= jump
        edge = edge.flatten(1)
        pixel = _indices(edge)
        four = pixel.repeat(1, 4)
        shift = image.new_tensor([[0.125, 0.375], [-0.375, 0.125], [-0.125, -0.375], [0.375, -0.125]])
        shift_x, shift_y = shift.repeat_interleave(pixel.shape[1], dim=0).unbind(1)
        rays = self.rays(*self.position(four, shift_x, shift_y))
        # What lies near an outline begins about as near as in the pixels around it.
        nearest = -torch.nn.functional.max_pool2d(-grid.unsqueeze(1), 3, stride=1, padding=1).flatten(1) - 0.2
        ends = self.trace(rays, torch.maximum(start, nearest).gather(1, four))
        seen = _indices(ends < math.inf)
        colour, _, _ = self.shade(_take(rays, seen), _finite(ends.gather(1, seen)))
        samples = _put(_take(background, four), seen, (ends < math.inf).gather(1, seen), colour)
        mean = samples.view(len(image), 4, -1, 3).mean(1)
        return _put(image, pixel, edge.gather(1, pixel), mean)


def _indices(wanted: Tensor) -> Tensor:
    """Return the indices at which each row of ``wanted`` [B, P] is true: ``[B, most true in a row]``.

    Rows with fewer are filled with other indices.
    """
    count = wanted.sum(1, keepdim=True)
    most = max(1, int(count.max()))
    # Each entry's place: the wanted ones in order, then the others in order. Much cheaper than to sort.
    before = wanted.cumsum(1)
    order = torch.arange(wanted.shape[1], device=wanted.device).expand_as(before)
    place = torch.where(wanted, before - 1, count + order - before)
    return torch.empty_like(place).scatter_(1, place, order)[:, :most]


def _take(values: Tensor, index: Tensor) -> Tensor:
    """Take ``values`` [B, P, C] at ``index`` [B, Q]."""
    return values.gather(1, index.unsqueeze(-1).expand(-1, -1, values.shape[-1]))


def _put(values: Tensor, index: Tensor, valid: Tensor, new: Tensor) -> Tensor:
    """Copy ``values`` [B, P, C], and put ``new`` [B, Q, C] at ``index`` [B, Q] where ``valid`` [B, Q]."""
    old = _take(values, index)
    spread = index.unsqueeze(-1).expand_as(old)
    return values.scatter(1, spread, torch.where(valid.unsqueeze(-1), new, old))


def _finite(depth: Tensor) -> Tensor:
    return depth.clamp(max=_FAR)
