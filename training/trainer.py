"""The loop that every stage is trained in: optimizer, running mean of the weights, records, and resuming."""

from __future__ import annotations

import csv
import dataclasses
import json
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.optim.swa_utils import AveragedModel
from tqdm import tqdm

from icportrait.disk import room_for
from icportrait.errors import IcPortraitError
from icportrait.nn import save_checkpoint
from training.optimizer import RecipeOptimizer
from training.stage import Stage

STATE = "state.pt"
LOSSES = "losses.csv"


class TrainingError(IcPortraitError):
    """A run can't go on."""


class Trainer:
    """One run of one stage, in a directory of its own.

    checkpoint/          the running mean of the weights, as an IC-Portrait checkpoint
    state.pt             all that a resumed run needs to end as if it had never stopped
    losses.csv .png      every step's losses
    samples-NNNNNN.png   what the checkpoint made of evaluation heads
    run.json             the recipe, and how long it took
    """

    def __init__(self, stage: Stage, directory: Path) -> None:
        self.stage, self.recipe, self.directory = stage, stage.recipe, Path(directory)
        self.step, self.seconds = 0, 0.0
        recipe = self.recipe
        modules = stage.trained.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.mean = AveragedModel(modules, multi_avg_fn=_running_mean(recipe.ema_decay))
        self.optimizer = RecipeOptimizer(modules.parameters(), recipe)
        self.generator = torch.Generator().manual_seed(recipe.seed)
        self.losses: list[dict[str, float]] = []

    def run(self, until: int | None = None) -> None:
        """Train up to step ``until``, by default the recipe's last; saves at the end and every so often.

        Raises:
            TrainingError: the loss isn't finite.
            NotEnoughDisk: there is no room for what the run saves; the last save is whole.
        """
        last = self.recipe.steps if until is None else until
        bar = tqdm(total=self.recipe.steps, initial=self.step, desc=self.recipe.stage, unit="step")
        with bar, room_for("the run", self.directory, self._saved_bytes(), [f"{STATE}.part"]):
            self.directory.mkdir(parents=True, exist_ok=True)
            while self.step < last:
                started = time.perf_counter()
                losses = self._advance()
                self.seconds += time.perf_counter() - started
                self.losses.append(losses)
                bar.update()
                bar.set_postfix({name: f"{value:.4f}" for name, value in self._recent().items()}, refresh=False)
                if self.step % self.recipe.sample_every == 0 or self.step == last:
                    self._sample()
                if self.step % self.recipe.save_every == 0 or self.step == last:
                    self.save()

    def _advance(self) -> dict[str, float]:
        progress = self.step / self.recipe.steps
        device = self.stage.device.type
        with torch.autocast(device, torch.bfloat16, enabled=self.recipe.bf16):
            losses = self.stage.loss(progress, self.generator)
        losses["loss"].backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(self.stage.trained.parameters(), self.recipe.gradient_norm)
        self.optimizer.step()
        self.mean.update_parameters(self.stage.trained)
        values = {name: float(value.detach()) for name, value in losses.items()}  # last, since it waits for a GPU
        if not math.isfinite(values["loss"]):
            raise TrainingError(
                f"{self.directory}: the loss is {values['loss']} at step {self.step}; start again with a lower "
                "learning_rate"
            )
        self.step += 1
        return values

    def _saved_bytes(self) -> int:
        """Return about how much one save writes: the checkpoint, and the trained weights, their mean and moments."""
        trained = sum(tensor.nbytes for tensor in self.stage.trained.state_dict().values())
        moments = 1 if self.recipe.optimizer == "muon" else 2
        saved: int = self.stage.checkpoint.size_bytes + (2 + moments) * trained
        return saved

    def _recent(self) -> dict[str, float]:
        recent = self.losses[-100:]
        return {name: sum(row[name] for row in recent) / len(recent) for name in recent[0]}

    def save(self) -> None:
        """Write the checkpoint, the state and the records."""
        with self._mean_weights():
            save_checkpoint(self.stage.finished(), self.directory / "checkpoint")
        state = {
            "step": self.step,
            "seconds": self.seconds,
            "recipe": dataclasses.asdict(self.recipe),
            "modules": self.stage.trained.state_dict(),
            "mean": self.mean.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "generator": self.generator.get_state(),
            "losses": self.losses,
        }
        part = self.directory / (STATE + ".part")
        with part.open("wb") as stream:  # of a full disk, torch's own way of opening it says nothing
            torch.save(state, stream)
        part.replace(self.directory / STATE)
        with (self.directory / LOSSES).open("w", newline="") as file:
            writer = csv.DictWriter(file, ["step", *self.losses[0]])
            writer.writeheader()
            writer.writerows({"step": step, **row} for step, row in enumerate(self.losses, 1))
        _plot(self.losses, self.directory / "losses.png")
        record = {
            "stage": self.recipe.stage,
            "recipe": dataclasses.asdict(self.recipe),
            "step": self.step,
            "seconds": round(self.seconds, 1),
            "device": str(self.stage.device),
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
            "losses": {name: round(value, 5) for name, value in self._recent().items()},
        }
        (self.directory / "run.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")

    def resume(self) -> None:
        """Take up a run from its directory.

        Raises:
            TrainingError: there is no state, or it is another recipe's.
        """
        path = self.directory / STATE
        if not path.is_file():
            raise TrainingError(f"{path}: is missing; start the run without --resume")
        state = torch.load(path, map_location="cpu", weights_only=True)
        recipe = dataclasses.asdict(self.recipe)
        if changed := [key for key, value in recipe.items() if state["recipe"].get(key) != value]:
            key = changed[0]
            raise TrainingError(
                f"{path}: was saved with {key} {state['recipe'].get(key)!r}, and the recipe has {recipe[key]!r}"
            )
        self.stage.trained.load_state_dict(state["modules"])
        self.mean.load_state_dict(state["mean"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.generator.set_state(state["generator"])
        self.step, self.seconds, self.losses = state["step"], state["seconds"], state["losses"]

    @contextmanager
    def _mean_weights(self) -> Iterator[None]:
        """Give the stage's modules the running mean of their weights, in evaluation mode, until the block ends."""
        modules = self.stage.trained
        trained = {name: value.clone() for name, value in modules.state_dict().items()}
        modules.load_state_dict(self.mean.module.state_dict())
        modules.eval()
        with torch.no_grad():
            yield
        modules.load_state_dict(trained)
        modules.train()

    def _sample(self) -> None:
        with self._mean_weights():
            picture = self.stage.samples()
        picture.save(self.directory / f"samples-{self.step:06d}.png")


def _running_mean(decay: float) -> Any:
    """Make an exponential mean that follows closely at first, while the weights still move far."""

    @torch.no_grad()
    def update(means: list[Tensor], values: list[Tensor], count: Tensor | int) -> None:
        now = min(decay, (1 + int(count)) / (10 + int(count)))
        torch._foreach_lerp_(means, values, 1 - now)

    return update


def _plot(losses: list[dict[str, float]], path: Path) -> None:
    import matplotlib as mpl

    mpl.use("agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(len(losses[0]), 1, figsize=(8, 2.5 * len(losses[0])), squeeze=False, sharex=True)
    window = max(1, len(losses) // 100)
    starts = range(0, len(losses), window)
    for axis, name in zip(axes[:, 0], losses[0], strict=True):
        means = [sum(row[name] for row in losses[s : s + window]) / len(losses[s : s + window]) for s in starts]
        axis.plot([start + 1 for start in starts], means)
        axis.set_ylabel(name)
        axis.grid(alpha=0.3)
    axes[-1, 0].set_xlabel(f"step (means of {window})")
    figure.tight_layout()
    figure.savefig(path, dpi=80)
    pyplot.close(figure)
