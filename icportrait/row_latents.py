"""The latents of a batch's rows, and a sampler's step of all of them, each by its own plan.

What a row is made of lies in arrays of all rows, and a step is a few operations on their first n rows. They are
elementwise: a row's bits depend on no other's.

The engine waits for what lies between two of its runs, so a step has three parts. ``prepare`` works out, while the UNet
runs, all that doesn't need its output; ``advance`` makes the next canvas of that output, and nothing else; ``complete``
does the rest while the UNet runs on that canvas. Arrays are there from the start, since fresh memory costs a step as
much as its arithmetic, and flat, since NumPy takes several times as long over half a canvas in its place.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from icportrait.contract import Array
from icportrait.presets import Preset
from icportrait.sampling import StepPlan, guide


@dataclass(frozen=True)
class Start:
    """What rows hold before their first step."""

    settings: Array
    """[8], of ``StepPlan.settings``."""
    canvas: Array
    """[rows, 4, s, 2 s]."""
    latent: Array
    """[rows, 4 s s], as is the next; a profile is [1, 4 s s]."""
    profile_noise: Array
    profile: Array

    @classmethod
    def of(cls, plan: StepPlan, noise: Array, profile_latent: Array, twins: int) -> Start:
        """Begin a request's portraits.

        Args:
            plan: its sampler's.
            noise: [num_portraits, 4, s, 2 s]; the left half is what the held profile is noised with at every step.
            profile_latent: [1, 4, s, s].
            twins: rows of each portrait: all first ones, then all second ones.
        """
        left, right = (np.tile(half, (twins, 1, 1, 1)) for half in _halves(noise))
        right *= np.float32(plan.initial_scale)
        held = plan.signal_level[0] * profile_latent + plan.noise_level[0] * left
        canvas = np.concatenate([held, right], axis=-1)
        rows = len(canvas)
        return cls(
            plan.settings[0], canvas, right.reshape(rows, -1), left.reshape(rows, -1), profile_latent.reshape(1, -1)
        )


@dataclass(frozen=True)
class Advance:
    """What a step does with one request's rows."""

    rows: Sequence[int]
    following: Array
    """[8], the settings of the step after it."""
    unconditional: Sequence[int] = ()
    """The rows that guidance goes away from, each the twin of one of the first ``rows``."""
    guidance_scale: float = 1.0


class RowLatents:
    """All rows of a batch. Not thread-safe."""

    def __init__(self, preset: Preset, rows: int) -> None:
        """Make room for so many rows."""
        side = preset.latent_size
        self._half = (preset.latent_channels, side, side)
        # What the UNet is given next, and where the step after that is laid out meanwhile.
        self._canvas, self._next_canvas = np.zeros((2, rows, *self._half[:2], 2 * side), np.float32)
        # ``StepPlan.settings`` of each row's step, and of the one after it.
        self._settings, self._next_settings = np.zeros((2, rows, 8), np.float32)
        arrays = np.zeros((7, rows, math.prod(self._half)), np.float32)
        self._latent, self._next_latent, self._clean, self._profile, self._profile_noise = arrays[:5]
        self._kept, self._clean_part = arrays[5:]
        self._noise_pred = self._canvas[:0]
        self._idle: list[int] = []
        self._guided: tuple[list[int], list[int], Array] | None = None
        self._is_finite = np.ones(rows, bool)

    def canvas(self, used: int) -> Array:
        """What the UNet is given for the first rows: [used, 4, s, 2 s]."""
        canvas: Array = self._canvas[:used]
        return canvas

    def timestep(self, used: int) -> Array:
        """Likewise: [used]."""
        timestep: Array = self._settings[:used, 0]
        return timestep.copy()

    def fill(self, rows: Sequence[int], start: Start) -> None:
        """Begin rows anew."""
        self._settings[rows], self._canvas[rows] = start.settings, start.canvas
        self._latent[rows], self._clean[rows] = start.latent, 0
        self._profile[rows], self._profile_noise[rows] = start.profile, start.profile_noise

    def move(self, source: int, target: int) -> None:
        """Copy of a row what the next step is given. ``move_rest`` must follow, once the step before is complete."""
        for array in (self._canvas, self._settings):
            array[target] = array[source]

    def move_rest(self, source: int, target: int) -> None:
        """Copy the rest of it."""
        for array in (self._latent, self._clean, self._profile, self._profile_noise):
            array[target] = array[source]

    def prepare(self, used: int, advances: Sequence[Advance]) -> None:
        """Work out what a step can be told before its prediction is there; see ``sampling.advance`` for the formula.

        Args:
            used: so many rows are in use.
            advances: whose rows are advanced; the others stay as they are.
        """
        self._next_settings[:used] = self._settings[:used]
        idle = set(range(used))
        for advance in advances:
            self._next_settings[advance.rows] = advance.following
            idle -= set(advance.rows)
        self._idle, self._guided = sorted(idle), _guided([advance for advance in advances if advance.unconditional])

        _, _, _, c0, _, c2, c3, _ = np.split(self._settings[:used], 8, axis=1)
        _, signal, noise, *_ = np.split(self._next_settings[:used], 8, axis=1)
        latent, kept, clean_part, scratch = (
            array[:used] for array in (self._latent, self._kept, self._clean_part, self._next_latent)
        )
        held = clean_part  # which comes after it
        np.multiply(signal, self._profile[:used], out=held)
        np.multiply(noise, self._profile_noise[:used], out=scratch)
        held += scratch
        _halves(self._next_canvas[:used])[0][...] = held.reshape(used, *self._half)
        np.multiply(c3, latent, out=clean_part)
        np.multiply(c0, latent, out=kept)
        np.multiply(c2, self._clean[:used], out=scratch)
        kept += scratch

    def advance(self, noise_pred: Array) -> None:
        """Take the step that was prepared, as far as the next one's canvas.

        Args:
            noise_pred: [used, 4, s, 2 s] float32; it is read once more by ``complete``.
        """
        used, self._noise_pred = len(noise_pred), noise_pred
        latent, following = self._next_latent[:used], _halves(self._next_canvas[:used])[1]
        self._put_prediction(latent)
        latent *= self._settings[:used, 4:5]
        np.add(latent.reshape(following.shape), self._kept[:used].reshape(following.shape), out=following)
        if self._idle:
            following[self._idle] = self._latent[self._idle].reshape(-1, *self._half)
        self._canvas, self._next_canvas = self._next_canvas, self._canvas
        self._settings, self._next_settings = self._next_settings, self._settings

    def _put_prediction(self, target: Array) -> None:
        """Copy the UNet's output for the denoised half; the guided one into both of a portrait's rows."""
        target.reshape(-1, *self._half)[...] = self._noise_pred[..., self._half[-1] :]
        if self._guided:
            conditional, unconditional, scales = self._guided
            target[conditional] = target[unconditional] = guide(target[conditional], target[unconditional], scales)

    def complete(self) -> None:
        """The rest of the step: the rows' latents, which are finite, and what the step took the portraits for."""
        used, idle = len(self._noise_pred), self._idle
        latent = self._next_latent[:used]
        latent += self._kept[:used]
        latent[idle] = self._latent[idle]
        self._latent, self._next_latent = self._next_latent, self._latent
        self._is_finite[:used] = np.isfinite(latent).all(axis=1)
        clean, from_output = self._clean[:used], self._kept[:used]
        stays = clean[idle]
        self._put_prediction(from_output)
        from_output *= self._next_settings[:used, 7:8]  # the step's own until the next is prepared
        np.add(self._clean_part[:used], from_output, out=clean)
        clean[idle] = stays

    def are_finite(self, rows: Sequence[int]) -> bool:
        """Whether the last step gave neither NaN nor Inf for rows."""
        return bool(self._is_finite[rows].all())

    def latent(self, rows: Sequence[int]) -> Array:
        """A copy of rows as they are now, noisy until they have had all their steps: [rows, 4, s, s]."""
        latent: Array = self._latent[rows]
        return latent.reshape(-1, *self._half)

    def clean_latent(self, rows: Sequence[int]) -> Array:
        """A copy of what the last step took rows for, without noise: [rows, 4, s, s]."""
        latent: Array = self._clean[rows]
        return latent.reshape(-1, *self._half)


def _guided(advances: Sequence[Advance]) -> tuple[list[int], list[int], Array] | None:
    """Rows of portraits, their twins, and for each its scale."""
    if not advances:
        return None
    unconditional = [row for advance in advances for row in advance.unconditional]
    conditional = [row for advance in advances for row in advance.rows[: len(advance.unconditional)]]
    scales = [advance.guidance_scale for advance in advances for _ in advance.unconditional]
    return conditional, unconditional, np.array(scales, np.float32)


def _halves(canvas: Array) -> tuple[Array, Array]:
    """Views of what is held and of what is denoised."""
    side = canvas.shape[-1] // 2
    return canvas[..., :side], canvas[..., side:]
