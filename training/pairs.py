"""Training data from rendered heads: profile, reference and target, with the true correspondence.

    profile     an identity in a view of its own
    reference   the view and light to appear in: the same identity there, or another one
    target      the profile's identity in the reference's view, light, background and clothes

With the same identity the target is the reference, unmasked. With another one nothing of the person must pass from
reference to target, which is how the model is used.

Evaluation pairs share nothing with each other. Training pairs are cheaper: two people in the same two views are four
pictures and four pairs, since each picture is a profile once, a reference once and a target once (``crossed_set``).
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from training.correspondence import correspondence
from training.drawing import (
    FIRST_EVALUATION_SEED,
    NARROW,
    VARIETIES,
    Draw,
    Variety,
    draw_identities,
    draw_views,
    uniforms,
)
from training.heads import Rendering, render
from training.parameters import Batched

GRIDS = (32, 16, 8, 4)
"""Latent grids of the demo-128 preset, finest first."""
VERSION = 2
"""Goes up whenever the same seeds give other pictures, so that no cached set outlives the renderer that made it."""
_SHARD = 64
_NUMBERS_PER_PAIR = 8


@dataclass(frozen=True)
class PairRenderings:
    """N rendered pairs with everything that is known about their pixels."""

    profile: Rendering
    reference: Rendering
    target: Rendering
    same_identity: Tensor
    """``[N]`` bool: the reference shows the profile's identity."""


@dataclass(frozen=True)
class PairSet(Batched):
    """N pairs as they are kept: pictures in whole levels, correspondence from target to profile."""

    profile: Tensor
    """``[N, 3, S, S]`` uint8."""
    reference: Tensor
    target: Tensor
    target_head: Tensor
    """True where the target shows the head, ``[N, S, S]`` bool."""
    same_identity: Tensor
    """``[N]`` bool."""
    flows: Tensor
    """Profile cells for the target cells of every grid, one grid behind the other: ``[N, sum(grid**2)]`` int16."""
    visibles: Tensor
    """True where the profile shows the place that the target's cell shows: as ``flows``, bool."""

    def images(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return profile, reference and target as float32 in -1..1, ``[N, 3, S, S]``."""
        profile, reference, target = (
            picture.float() / 127.5 - 1 for picture in (self.profile, self.reference, self.target)
        )
        return profile, reference, target

    def flow(self, grid: int, grids: Sequence[int] = GRIDS) -> tuple[Tensor, Tensor]:
        """Return flow ``[N, grid * grid]`` int64 and visibility, bool: ``correspondence(profile, target, grid)``."""
        start = sum(other**2 for other in grids[: list(grids).index(grid)])
        cells = slice(start, start + grid**2)
        return self.flows[:, cells].long(), self.visibles[:, cells]


def render_pairs(
    seed: int,
    count: int,
    cross_identity_share: float = 0.5,
    size: int = 128,
    evaluation: bool = False,
    first: int = 0,
    device: torch.device | str = "cpu",
    variety: Variety = NARROW,
) -> PairRenderings:
    """Render pairs ``first`` to ``first + count`` of a seed's endless row.

    Args:
        seed: which row; pair i of it is the same however many are rendered.
        count: number of pairs.
        cross_identity_share: part of the pairs, 0..1, whose reference shows another identity.
        size: side of the pictures in pixels.
        evaluation: draw from the seeds that training never uses.
        first: where in the row to begin.
        device: where to render.
        variety: how much people and views differ.
    """
    numbers = uniforms(seed, Draw.PAIR, (first + count) * _NUMBERS_PER_PAIR).reshape(-1, _NUMBERS_PER_PAIR)[first:]
    seeds = (numbers[:, :4] * 2**32).astype(np.int64) + (FIRST_EVALUATION_SEED if evaluation else 0)
    person, other, own_view, shared_view = (seeds[:, column].tolist() for column in range(4))
    cross = torch.from_numpy(numbers[:, 4] < cross_identity_share)
    identities, views = draw_identities(person, variety).to(device), draw_views(shared_view, variety).to(device)
    profile = render(identities, draw_views(own_view, variety).to(device), size)
    target = render(identities, views, size)
    reference = target
    if cross.any():
        chosen = cross.nonzero().flatten()
        others = draw_identities([other[index] for index in chosen.tolist()], variety).to(device)
        rendered = render(others, views[chosen.to(device)], size)
        place = torch.arange(count, device=device)
        place[chosen.to(device)] = count + torch.arange(len(chosen), device=device)
        reference = Rendering.cat((target, rendered))[place]
    return PairRenderings(profile, reference, target, (~cross).to(device))


def training_batch(
    seed: int,
    count: int,
    cross_identity_share: float = 0.5,
    size: int = 128,
    evaluation: bool = False,
    first: int = 0,
    grids: Sequence[int] = GRIDS,
    device: torch.device | str = "cpu",
    variety: Variety = NARROW,
) -> PairSet:
    """Return ``pair_set`` of ``render_pairs``."""
    return pair_set(render_pairs(seed, count, cross_identity_share, size, evaluation, first, device, variety), grids)


def crossed_set(
    seed: int,
    count: int,
    size: int = 128,
    first: int = 0,
    grids: Sequence[int] = GRIDS,
    device: torch.device | str = "cpu",
    variety: Variety = NARROW,
) -> PairSet:
    """Render training pairs ``first`` to ``first + count`` of a seed's endless row, four from every four pictures.

    Pairs 4 k to 4 k + 3 show two people in two views. Each person is the profile in each view, the target in the
    other one, and the reference shows the other person there.

    Raises:
        ValueError: ``first`` or ``count`` isn't a multiple of 4.
    """
    if first % 4 or count % 4:
        raise ValueError(f"pairs {first} to {first + count}: expected multiples of 4")
    numbers = uniforms(seed, Draw.PAIR, (first + count) * _NUMBERS_PER_PAIR).reshape(-1, 4 * _NUMBERS_PER_PAIR)
    seeds = (numbers[first // 4 :, :4] * 2**32).astype(np.int64)
    # Of each four: a person here, the other one here, the person there, the other one there.
    people, views = seeds[:, [0, 1, 0, 1]].flatten().tolist(), seeds[:, [2, 2, 3, 3]].flatten().tolist()
    drawn = draw_identities(people, variety).to(device), draw_views(views, variety).to(device)
    profile = render(*drawn, size)
    index = torch.arange(count, device=device)
    target = index ^ 2
    no = torch.zeros(count, dtype=torch.bool, device=device)
    return pair_set(PairRenderings(profile, profile[target ^ 1], profile[target], no), grids)


def pair_set(pairs: PairRenderings, grids: Sequence[int]) -> PairSet:
    """Convert rendered pairs to the form that is kept, with the correspondence from target to profile on every grid."""
    found = [correspondence(pairs.profile, pairs.target, grid) for grid in grids]
    profile, reference, target = (
        (rendering.image * 255).round().to(torch.uint8) for rendering in (pairs.profile, pairs.reference, pairs.target)
    )
    return PairSet(
        profile,
        reference,
        target,
        pairs.target.head_mask,
        pairs.same_identity,
        torch.cat([flow for flow, _ in found], dim=1).to(torch.int16),
        torch.cat([visible for _, visible in found], dim=1),
    )


class PairCache:
    """A folder with the training pairs of one seed (``crossed_set``), rendered when they are first wanted.

    Files hold 64 pairs each, about 10 MB at 128 px. A file appears under its name only when it is whole, so several
    processes may fill one folder at once.
    """

    def __init__(
        self,
        folder: Path,
        seed: int,
        size: int = 128,
        grids: Sequence[int] = GRIDS,
        device: torch.device | str = "cpu",
        variety: str = "narrow",
    ) -> None:
        """Name the pairs: their seed, side, grids and variety, one of ``drawing.VARIETIES``."""
        self.folder, self.seed, self.size = folder, seed, size
        self.grids, self.device, self.variety = tuple(grids), device, variety

    def path(self, shard: int) -> Path:
        """Return the file of pairs 64 * shard to 64 * shard + 63."""
        grids = "-".join(map(str, self.grids))
        name = f"v{VERSION}-{self.variety}-seed{self.seed}-{self.size}px-grids{grids}-{shard:05d}.npz"
        return self.folder / name

    def shard(self, shard: int) -> PairSet:
        """Load or render 64 pairs, on the CPU."""
        path = self.path(shard)
        if path.exists():
            with np.load(path) as kept:
                return PairSet(**{field.name: torch.from_numpy(kept[field.name]) for field in fields(PairSet)})
        first = shard * _SHARD
        variety = VARIETIES[self.variety]
        rendered = crossed_set(self.seed, _SHARD, self.size, first, self.grids, self.device, variety).to("cpu")
        self.folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=self.folder, suffix=".part", delete=False) as file:
            np.savez(file, **{field.name: getattr(rendered, field.name).numpy() for field in fields(PairSet)})
        Path(file.name).replace(path)
        return rendered

    def pairs(self, count: int) -> PairSet:
        """Return the first ``count`` pairs."""
        shards = [self.shard(index) for index in range(-(-count // _SHARD))]
        return PairSet.cat(shards)[:count]
