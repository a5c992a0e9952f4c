"""The last step before features are compared: what coarse levels know, at the precision of fine levels."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

MAX_CHANNELS = 128


class MatchingHead(nn.Module):
    """A feature pyramid's top-down path (arXiv 1612.03144) over the levels of a control UNet.

    Most of the reference is hidden, and a fine level sees too little of the canvas to know what a hidden place shows.
    Coarse levels do, but not precisely. Each level is therefore matched by its own features plus those of the level
    below it, interpolated between cells.
    """

    def __init__(self, channels: Sequence[int]) -> None:
        """Build the head.

        Args:
            channels: of the matching net's features, one number a level, finest first.
        """
        super().__init__()
        common = min(MAX_CHANNELS, 2 * channels[0])
        self.laterals = nn.ModuleList(nn.Conv2d(number, common, kernel_size=1) for number in channels)
        self.smooths = nn.ModuleList(nn.Conv2d(common, common, kernel_size=3, padding=1) for _ in channels)
        self.reset()

    @torch.no_grad()
    def reset(self) -> None:
        """Start as a projection that keeps cosines nearly, so that a trained base's features match as they are."""
        generator = torch.Generator().manual_seed(0)
        for conv in (*self.laterals, *self.smooths):
            assert isinstance(conv, nn.Conv2d) and conv.bias is not None
            if conv.kernel_size == (1, 1):
                conv.weight.normal_(0, conv.out_channels**-0.5, generator=generator)
            else:
                nn.init.dirac_(conv.weight)
            conv.bias.zero_()

    def forward(self, features: list[tuple[Tensor, Tensor]]) -> list[tuple[Tensor, Tensor]]:
        """Mix the levels.

        Args:
            features: source and target of each level, [batch, C_L, s_L, s_L] each, finest first.

        Returns:
            As many, with the same number of channels each.
        """
        mixed: list[tuple[Tensor, Tensor]] = []
        below: list[Tensor] = []
        for level in reversed(range(len(features))):
            own: list[Tensor] = [self.laterals[level](half) for half in features[level]]
            if below:
                own = [half + _doubled(coarse) for half, coarse in zip(own, below, strict=True)]
            source, target = (self.smooths[level](half) for half in own)
            mixed.insert(0, (source, target))
            below = own
        return mixed


def _doubled(features: Tensor) -> Tensor:
    return functional.interpolate(features, scale_factor=2.0, mode="bilinear", align_corners=False)
