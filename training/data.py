"""Batches of pairs to train on: rendered ones, or views of real people from a folder."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from tqdm import tqdm

from icportrait.presets import Preset
from training.drawing import VARIETIES
from training.evaluation_pairs import grids
from training.pairs import PairCache, PairSet, training_batch
from training.recipe import Data, RecipeError

EXAMPLES = 8
_SUFFIXES = {".jpg", ".jpeg", ".png", ".webp"}


@dataclass(frozen=True)
class Batch:
    """B pairs. Pictures are ``[B, 3, S, S]`` float32 in -1..1."""

    profile: Tensor
    reference: Tensor
    """Not hidden yet."""
    target: Tensor
    flows: list[Tensor] | None
    """Profile cell for each target cell, ``[B, s_L^2]`` int64, finest level first; None where no truth is known."""
    visibles: list[Tensor] | None
    """True where the profile shows the place that the target's cell shows: ``[B, s_L^2]`` bool."""
    head: Tensor | None = None
    """True where the target shows the head, ``[B, S, S]`` bool; None where that isn't known."""

    def to(self, device: torch.device | str) -> Batch:
        return Batch(
            self.profile.to(device),
            self.reference.to(device),
            self.target.to(device),
            None if self.flows is None else [flow.to(device) for flow in self.flows],
            None if self.visibles is None else [visible.to(device) for visible in self.visibles],
            None if self.head is None else self.head.to(device),
        )


class RenderedPairs:
    """Rendered heads with their true correspondence, in the device's memory: 160 KB a pair at 128 px."""

    def __init__(self, data: Data, preset: Preset, device: torch.device | str = "cpu") -> None:
        """Read the pairs from the cache, and render the pairs that it lacks."""
        self.grids = grids(preset)
        cache = PairCache(Path(data.cache), data.seed, preset.image_size, self.grids, device, data.variety)
        shards = [cache.shard(index) for index in tqdm(range(-(-data.pairs // 64)), "pairs", unit="x64")]
        self.pairs = PairSet.cat(shards)[: data.pairs].to(device)
        self._size, self._variety = preset.image_size, VARIETIES[data.variety]

    def __len__(self) -> int:
        return len(self.pairs)

    def batch(self, index: Tensor, flip: Tensor, same: Tensor) -> Batch:
        """Take pairs.

        Args:
            index: which, ``[B]``.
            flip: which of them to mirror, ``[B]`` bool.
            same: whose reference is the target itself, ``[B]`` bool; of the others it shows another identity.
        """
        return self._batch(self.pairs[index.to(self.pairs.flows.device)], flip, same)

    def examples(self) -> Batch:
        """Return ``EXAMPLES`` pairs to look at, of people that are never trained on, on the CPU."""
        no = torch.zeros(EXAMPLES, dtype=torch.bool)
        return self._batch(self._held_out, no, no)

    @cached_property
    def _held_out(self) -> PairSet:
        device = self.pairs.flows.device
        pairs = training_batch(
            0, EXAMPLES, 1.0, self._size, evaluation=True, grids=self.grids, device=device, variety=self._variety
        )
        return pairs.to("cpu")

    def _batch(self, pairs: PairSet, flip: Tensor, same: Tensor) -> Batch:
        profile, reference, target = pairs.images()
        flip, same = flip.to(profile.device), same.to(profile.device)
        reference = torch.where(_rows(same, 4), target, reference)
        flows, visibles = [], []
        for grid in self.grids:
            flow, visible = pairs.flow(grid, self.grids)
            flows.append(torch.where(_rows(flip, 2), _mirrored(flow, grid), flow))
            visibles.append(torch.where(_rows(flip, 2), visible.view(-1, grid, grid).flip(2).flatten(1), visible))
        profile, reference, target = _flipped((profile, reference, target), flip)
        head = torch.where(_rows(flip, 3), pairs.target_head.flip(2), pairs.target_head)
        return Batch(profile, reference, target, flows, visibles, head)


class PictureFolder:
    """Two views of one identity a pair, from a folder that has a folder of pictures for each identity.

    No correspondence is known, and the reference is always the target, as in the paper's data.
    """

    def __init__(self, data: Data, preset: Preset) -> None:
        folder = Path(data.pictures)
        identities = sorted(path for path in folder.iterdir() if path.is_dir()) if folder.is_dir() else []
        views = [
            sorted(path for path in identity.iterdir() if path.suffix.lower() in _SUFFIXES) for identity in identities
        ]
        self.pairs = [(a, b) for pictures in views for a in pictures for b in pictures if a != b]
        self.size = preset.image_size
        if not self.pairs:
            raise RecipeError(
                f"data.pictures: {folder} has no folder with two pictures, expected <person>/<view>.jpg, .png or .webp"
            )

    def __len__(self) -> int:
        return len(self.pairs)

    def batch(self, index: Tensor, flip: Tensor, same: Tensor) -> Batch:
        """Read a batch as ``RenderedPairs.batch`` does; ``same`` has no effect."""
        chosen = [self.pairs[item] for item in index.tolist()]
        profile, target = (torch.stack([self._read(pair[side]) for pair in chosen]) for side in range(2))
        profile, target = _flipped((profile, target), flip)
        return Batch(profile, target, target, None, None)

    def examples(self) -> Batch:
        """Return the first ``EXAMPLES`` pairs; no pair of a folder is kept from training."""
        index = torch.arange(min(EXAMPLES, len(self)))
        no = torch.zeros(len(index), dtype=torch.bool)
        return self.batch(index, no, no)

    def _read(self, path: Path) -> Tensor:
        with Image.open(path) as picture:
            upright = ImageOps.exif_transpose(picture).convert("RGB")
        square = ImageOps.fit(upright, (self.size, self.size), Image.Resampling.LANCZOS)
        return torch.from_numpy(np.array(square)).permute(2, 0, 1).float() / 127.5 - 1


Source = RenderedPairs | PictureFolder


def open_source(data: Data, preset: Preset, device: torch.device | str = "cpu") -> Source:
    """Open the folder of pictures where the recipe names one, else rendered pairs."""
    return PictureFolder(data, preset) if data.pictures else RenderedPairs(data, preset, device)


def _rows(chosen: Tensor, dimensions: int) -> Tensor:
    return chosen.view(-1, *(1,) * (dimensions - 1))


def _flipped(pictures: Sequence[Tensor], flip: Tensor) -> list[Tensor]:
    return [torch.where(_rows(flip, 4), picture.flip(3), picture) for picture in pictures]


def _mirrored(flow: Tensor, grid: int) -> Tensor:
    """Return the flow between the mirrored pictures. Cells without a head keep the 0 that says so."""
    y, x = torch.div(flow, grid, rounding_mode="floor"), flow % grid
    moved = (y * grid + grid - 1 - x).masked_fill(flow == 0, 0)
    return moved.view(-1, grid, grid).flip(2).flatten(1)
