"""Stages of the tiny geometry, and short runs of them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from icportrait.nn import Checkpoint, random_checkpoint
from tests.tiny import TINY
from training.data import Source
from training.pairs import PairSet
from training.recipe import STAGES
from training.stages import STAGE_CLASSES
from training.trainer import Trainer


def stage(kind: str, source: Source, checkpoint: Checkpoint | None = None, **settings: Any) -> Any:
    """Make a stage in float32, with batches of 4 where the settings don't say otherwise."""
    recipe = STAGES[kind](**({"bf16": False, "batch": 4} | settings))
    return STAGE_CLASSES[kind](checkpoint or random_checkpoint(TINY), source, recipe)


def train(trained: Any, directory: Path) -> list[dict[str, float]]:
    """Run to the recipe's last step, and return the losses."""
    trainer = Trainer(trained, directory)
    trainer.run()
    return trainer.losses


def mean(losses: Sequence[dict[str, float]], name: str = "loss") -> float:
    return sum(row[name] for row in losses) / len(losses)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def write_views(directory: Path, pairs: PairSet) -> None:
    """Write two views of each pair's identity, its profile and its target, as ``PictureFolder`` reads them."""
    for number, views in enumerate(zip(pairs.profile, pairs.target, strict=True)):
        person = directory / f"{number:02}"
        person.mkdir(parents=True)
        for name, picture in zip(("a.PNG", "b.png"), views, strict=True):
            Image.fromarray(picture.permute(1, 2, 0).numpy()).save(person / name)
