"""Dense correspondence between the two halves of a canvas, as three small functions.

The canvas holds the profile on its left (source) and the reference on its right (target). Where a position of one half
is meant as a number, it is y * w + x in that half's own grid of h rows and w columns.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional


def split_canvas(features: Tensor) -> tuple[Tensor, Tensor]:
    """Cut canvas features in their two halves.

    Args:
        features: [batch, channels, h, 2 w].

    Returns:
        The source (left) and the target (right), each [batch, channels, h, w].
    """
    source, target = features.chunk(2, dim=-1)
    return source, target


def join_canvas(source: Tensor, target: Tensor) -> Tensor:
    """Put two halves [batch, channels, h, w] side by side: [batch, channels, h, 2 w]."""
    return torch.cat((source, target), dim=-1)


def cost_volume(source: Tensor, target: Tensor) -> Tensor:
    """Compute the cosine similarity of every target with every source position (arXiv 2501.17159, figure 3).

    C[b, i, j] = <M_t[b, :, i] / |M_t[b, :, i]|, M_s[b, :, j] / |M_s[b, :, j]|>

    Args:
        source: matching features of the profile, [batch, channels, h, w].
        target: matching features of the reference, [batch, channels, h, w].

    Returns:
        [batch, h w (target), h w (source)] float32 in -1..1. Always float32: half precision can't tell neighbouring
        positions apart, and its squared norms overflow.
    """
    source = functional.normalize(source.float().flatten(2), dim=1)
    target = functional.normalize(target.float().flatten(2), dim=1)
    return target.transpose(1, 2) @ source


def best_match(costs: Tensor) -> tuple[Tensor, Tensor]:
    """Find the source position that fits each target position best, and how well the position fits.

    flow[b, i] = argmax_j C[b, i, j],  confidence[b, i] = max_j C[b, i, j]

    Args:
        costs: [batch, h w (target), h w (source)].

    Returns:
        flow [batch, h w (target)] int64 and confidence [batch, h w (target)] of the costs' type.
    """
    confidence, flow = costs.max(dim=-1)
    return flow, confidence


def gather_features(source: Tensor, flow: Tensor) -> Tensor:
    """Move source features to the target positions they fit: warped[b, :, i] = source[b, :, flow[b, i]].

    A gather, because sampling on a grid of fractional coordinates is rounded in half precision and runtimes disagree
    on it.

    Args:
        source: [batch, channels, h, w].
        flow: source position for each target position, [batch, h w] int64.

    Returns:
        [batch, channels, h, w], in the target's layout.
    """
    index = flow.unsqueeze(1).expand(-1, source.shape[1], -1)
    return source.flatten(2).gather(2, index).view_as(source)
