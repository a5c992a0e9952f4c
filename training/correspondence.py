"""The places of one picture in another: ground truth for matching."""

from __future__ import annotations

import torch
from torch import Tensor

from training.appearance import Part
from training.heads import Rendering

_HAIR_APART = 0.5
"""Added distance between hair and everything else, so that hair is only matched with hair."""


@torch.no_grad()
def correspondence(source: Rendering, target: Rendering, grid: int, reach: float = 0.08) -> tuple[Tensor, Tensor]:
    """Find the source cell that shows what each target cell shows.

    A target cell stands for what its middle pixel shows. Its match is the source pixel whose canonical point is
    nearest, which for two pictures of one identity is the same point of its surface, and for different identities the
    place of the same meaning (``training.canonical``). The neck bends between head and body, and with it its points.

    Args:
        source: B pictures of side S.
        target: B pictures of side S.
        grid: cells across a picture, a divisor of S.
        reach: how far the nearest point that the source shows may be for the place to count as visible there, in head
            units; pixels are 0.025 apart at 128 px, more where the surface is seen at a slant.

    Returns:
        flow ``[B, grid * grid]`` int64, source cells y * grid + x, 0 where the target doesn't show the head; visible
        ``[B, grid * grid]`` bool, where the target shows the head and the source shows the same place.

    Raises:
        ValueError: the renderings don't fit each other or the grid.
    """
    size = source.image.shape[-1]
    if source.image.shape != target.image.shape:
        raise ValueError(f"target: {list(target.image.shape)}, expected the source's shape {list(source.image.shape)}")
    if grid <= 0 or size % grid:
        raise ValueError(f"grid: {grid}, expected a divisor of {size}")
    cell = size // grid
    middle = torch.arange(grid, device=source.part.device) * cell + cell // 2
    # Every second pixel is enough where it includes the cells' middles, and four times faster.
    step = 2 if cell % 4 == 0 else 1
    flow = torch.zeros(len(source), grid * grid, dtype=torch.int64, device=source.part.device)
    visible = torch.zeros_like(flow, dtype=torch.bool)
    source_places, target_places = _places(source), _places(target)
    source_mask, target_mask = source.head_mask, target.head_mask
    for item in range(len(source)):
        shown = source_mask[item, ::step, ::step]
        wanted = target_mask[item][middle][:, middle]
        if not (shown.any() and wanted.any()):
            continue
        here = source_places[item, ::step, ::step][shown]
        there = target_places[item][middle][:, middle][wanted]
        distance, nearest = torch.cdist(there, here, compute_mode="donot_use_mm_for_euclid_dist").min(dim=1)
        y, x = (torch.div(axis * step, cell, rounding_mode="floor") for axis in shown.nonzero()[nearest].unbind(1))
        cells = wanted.flatten()
        flow[item, cells] = y * grid + x
        visible[item, cells] = distance < reach
    return flow, visible


def _places(rendering: Rendering) -> Tensor:
    """Return canonical points with hair set apart from skin: ``[B, S, S, 4]``."""
    hair = (rendering.part == Part.HAIR).unsqueeze(-1) * _HAIR_APART
    return torch.cat((rendering.canonical_point, hair), dim=-1)
