"""The latents of a batch's rows, and a sampler's step of all rows, each by its own trajectory.

Each quantity of a row lies in an array of all rows. A step is a few operations on the first n rows of these arrays.
The operations are elementwise: a row's bits depend on no other row's.

The engine waits for the work between two of its runs, so a step has three parts. While the UNet runs, ``prepare``
computes everything that doesn't need the UNet's output. ``advance`` makes the next canvas from that output, and nothing
else. ``complete`` does the rest while the UNet runs on that canvas.

The arrays are there from the start, because fresh memory costs a step as much as its arithmetic. They are flat, because
NumPy takes several times as long over half a canvas in its place.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np

from icportrait.contract import Array
from icportrait.diffusion.randomness import canvas_noise
from icportrait.diffusion.sampling import Trajectory, guide
from icportrait.presets import Preset


class RowLatents:
    """The latents of all rows of a batch. Not thread-safe."""

    def __init__(self, preset: Preset, rows: int) -> None:
        """Make room for a number of rows."""
        side = preset.latent_size
        self._half = (preset.latent_channels, side, side)
        # The UNet's next input, and room to lay out the input of the step after that.
        self._canvas, self._next_canvas = np.zeros((2, rows, *self._half[:2], 2 * side), np.float32)
        # ``Trajectory.settings`` of each row's step, and of the one after it.
        self._settings, self._next_settings = np.zeros((2, rows, 8), np.float32)
        arrays = np.zeros((7, rows, math.prod(self._half)), np.float32)
        self._latent, self._next_latent, self._clean, self._profile, self._profile_noise = arrays[:5]
        self._kept, self._clean_part = arrays[5:]
        self._noise_pred = self._canvas[:0]
        self._idle: list[int] = []
        self._guided: Sequence[tuple[int, int, float]] = ()
        self._is_finite = np.ones(rows, bool)

    @staticmethod
    def noise(preset: Preset, seeds: Sequence[int]) -> Array:
        """Draw a request's noise, a seed a portrait: [seeds, 4, s, 2 s]. Any thread may call it."""
        return np.stack([canvas_noise(preset, seed) for seed in seeds])

    def canvas(self, used: int) -> Array:
        """Return the UNet's canvas for the first rows: [used, 4, s, 2 s]."""
        canvas: Array = self._canvas[:used]
        return canvas

    def timestep(self, used: int) -> Array:
        """Copy the UNet's timesteps for the first rows: [used]."""
        timestep: Array = self._settings[:used, 0]
        return timestep.copy()

    def fill(self, rows: Sequence[int], trajectory: Trajectory, noise: Array, profile_latent: Array) -> None:
        """Put a request's portraits into rows, before their first step.

        Args:
            rows: first a row of each portrait, then, with guidance, the second rows of all.
            trajectory: the request's.
            noise: [num_portraits, 4, s, 2 s]; the left half noises the held profile at every step.
            profile_latent: [1, 4, s, s].
        """
        left, right = (np.tile(half, (len(rows) // len(noise), 1, 1, 1)) for half in _halves(noise))
        right *= np.float32(trajectory.initial_scale)
        held = trajectory.signal_level[0] * profile_latent + trajectory.noise_level[0] * left
        self._settings[rows], self._canvas[rows] = trajectory.settings[0], np.concatenate([held, right], axis=-1)
        self._latent[rows], self._clean[rows] = right.reshape(len(rows), -1), 0
        self._profile[rows], self._profile_noise[rows] = profile_latent.ravel(), left.reshape(len(rows), -1)

    def move(self, source: int, target: int) -> None:
        """Copy a row, of which the last step is complete."""
        for array in (self._canvas, self._settings, self._latent, self._clean, self._profile, self._profile_noise):
            array[target] = array[source]

    def prepare(self, used: int, following: Mapping[int, Array], guided: Sequence[tuple[int, int, float]] = ()) -> None:
        """Compute the part of a step that doesn't need the UNet's output; ``sampling.advance`` has the formula.

        Args:
            used: number of rows in use.
            following: for each row that the step advances, [8], the settings of the step after it. The other rows stay
                as they are.
            guided: a row, the twin that guidance goes away from, and the guidance scale.
        """
        self._next_settings[:used] = self._settings[:used]
        for row, settings in following.items():
            self._next_settings[row] = settings
        self._idle, self._guided = [row for row in range(used) if row not in following], guided

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
        """Take the prepared step, as far as the next step's canvas.

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
        """Copy the UNet's output for the denoised half. With guidance, copy the guided output into both rows."""
        target.reshape(-1, *self._half)[...] = self._noise_pred[..., self._half[-1] :]
        if self._guided:
            conditional, unconditional, scales = (list(column) for column in zip(*self._guided, strict=True))
            guided = guide(target[conditional], target[unconditional], np.array(scales, np.float32))
            target[conditional] = target[unconditional] = guided

    def complete(self) -> None:
        """Finish the step: compute the rows' latents and the estimates without noise, and find the finite rows."""
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
        """Tell whether the last step gave neither NaN nor Inf for rows."""
        return bool(self._is_finite[rows].all())

    def latent(self, rows: Sequence[int]) -> Array:
        """Copy rows as they are now, noisy until they have had all their steps: [rows, 4, s, s]."""
        latent: Array = self._latent[rows]
        return latent.reshape(-1, *self._half)

    def clean_latent(self, rows: Sequence[int]) -> Array:
        """Copy the last step's estimate of rows without noise: [rows, 4, s, s]."""
        latent: Array = self._clean[rows]
        return latent.reshape(-1, *self._half)


def _halves(canvas: Array) -> tuple[Array, Array]:
    """Return views of a canvas's held half and of its denoised half."""
    side = canvas.shape[-1] // 2
    return canvas[..., :side], canvas[..., side:]
