"""The common part of all stages of training."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from PIL import Image
from torch import Tensor, nn

from icportrait.nn.checkpoint import Checkpoint
from training.data import Batch, Source
from training.recipe import Recipe


class Stage(ABC):
    """A stage of training: the modules that it trains, and their loss."""

    def __init__(self, checkpoint: Checkpoint, source: Source, recipe: Recipe) -> None:
        self.checkpoint, self.source, self.recipe = checkpoint, source, recipe
        self.preset = checkpoint.preset
        for model in checkpoint.models:
            model.requires_grad_(False).eval()
        self.trained = self.modules()
        self.trained.requires_grad_(True).train()
        self.device = next(self.trained.parameters()).device

    @abstractmethod
    def modules(self) -> nn.ModuleDict:
        """Return the modules that are trained, by name."""

    @abstractmethod
    def loss(self, progress: float, generator: torch.Generator) -> dict[str, Tensor]:
        """Compute one batch's losses; ``loss``, the first, is the one that is minimised.

        Args:
            progress: how much of the run is done, 0..1.
            generator: on the CPU; everything that is random is drawn from it.
        """

    @abstractmethod
    def samples(self) -> Image.Image:
        """Render the source's examples as the checkpoint makes them now."""

    def finished(self) -> Checkpoint:
        """Return the checkpoint as it is saved."""
        return self.checkpoint

    def draw(self, generator: torch.Generator) -> tuple[Batch, Tensor]:
        """Draw a batch on the stage's device, and its pairs' numbers ``[B]``, in which mirrored pairs differ."""
        size = self.recipe.batch
        index = torch.randint(len(self.source), (size,), generator=generator)
        flip = torch.rand(size, generator=generator) < (0.5 if self.recipe.flip else 0.0)
        same = torch.rand(size, generator=generator) < self.recipe.same_identity_share
        batch = self.source.batch(index, flip, same)
        return batch.to(self.device), index * 2 + flip
