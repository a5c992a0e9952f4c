"""Attention in a plan: fused, or with its scores in scratch memory. The builder says which, without a GPU.

At 512 px the scores of the UNet's largest attention are 1 GB a row. A fused kernel never writes them.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass

from engines.inspection import Inspection

_SCRATCH = re.compile(r"Max Scratch Memory: (\d+) bytes")
_KERNEL = re.compile(r"Name: \S*mha\S*_myl(\d+)_\d+, LayerType")
"""A fused attention, as TensorRT-RTX 1.7 names it, and the number of its profile."""
LEAST_BYTES = 2**28
"""Smaller scores cost a GPU too little to refuse a plan for."""
_BYTES = {"fp32": 4}
"""Bytes of a score; 2 in all other precisions."""


@dataclass(frozen=True)
class Fusion:
    """Scratch memory and attentions of one plan."""

    attentions: int
    fused: int
    """Attentions with a kernel of their own, in the profile that has the fewest."""
    scratch_bytes: tuple[int, ...]
    """Scratch memory by optimization profile; empty where the builder didn't say."""
    score_bytes: int
    """The scores of the largest attention, in the profile with the largest batch."""
    scores_stand_out: bool
    """The scores are larger than any tensor of the graph, so that scratch memory shows whether they are there."""

    @property
    def is_unfused(self) -> bool:
        """Tell whether the plan's scratch memory holds an attention's scores, and these are large."""
        has_room = max(self.scratch_bytes, default=0) >= self.score_bytes >= LEAST_BYTES
        return self.fused < self.attentions and self.scores_stand_out and has_room

    def __str__(self) -> str:
        """Write the report's line."""
        scratch = f"{max(self.scratch_bytes) / 1e9:.2f} GB" if self.scratch_bytes else "of unknown size"
        text = f"scratch memory {scratch}"
        if self.attentions:
            text += (
                f"; {self.fused} of {self.attentions} attentions fused, the largest one's scores unfused "
                f"{self.score_bytes / 1e9:.2f} GB"
            )
        return text


def fusion(planned: list[str], found: Inspection, precision: str, profiles: int, largest_batch: int) -> Fusion:
    """Read what the builder has said while it built a plan.

    Args:
        planned: its messages about memory and kernels.
        found: the graph's inspection.
        precision: of the engine.
        profiles: number of optimization profiles.
        largest_batch: of them.
    """
    scratch = tuple(int(size) for text in planned for size in _SCRATCH.findall(text))
    kernels = Counter(number for text in planned for number in _KERNEL.findall(text))
    return Fusion(
        attentions=found.attentions,
        fused=min(kernels.values()) if len(kernels) == profiles else 0,
        scratch_bytes=scratch,
        score_bytes=found.scores * largest_batch * _BYTES.get(precision, 2),
        scores_stand_out=found.scores > found.largest,
    )
