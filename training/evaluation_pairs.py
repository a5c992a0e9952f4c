"""Pairs to evaluate on: identities that no training ever sees, and references that show another person, as in use."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from icportrait.presets import Preset
from training.drawing import NARROW, Variety
from training.pairs import PairSet, pair_set, render_pairs


@dataclass(frozen=True)
class EvaluationPairs(PairSet):
    """N pairs, and what their targets show."""

    target_part: Tensor
    """``Part`` at each pixel's centre: ``[N, S, S]`` uint8."""


def evaluation_pairs(
    preset: Preset,
    seed: int,
    count: int,
    first: int = 0,
    device: torch.device | str = "cpu",
    variety: Variety = NARROW,
) -> EvaluationPairs:
    """Render pairs ``first`` to ``first + count`` of a seed's endless row, on the CPU, with flows for all levels."""
    rendered = render_pairs(seed, count, 1.0, preset.image_size, True, first, device, variety)
    kept = vars(pair_set(rendered, grids(preset)))
    return EvaluationPairs(**kept, target_part=rendered.target.part).to("cpu")


def grids(preset: Preset) -> list[int]:
    """Return the cells across a picture at each level, finest first."""
    return [preset.level_size(level) for level in range(preset.levels)]
