"""A step in its three parts against the sampler's formula, to the bit."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from icportrait.contract import Array
from icportrait.diffusion.latents import RowLatents
from icportrait.diffusion.sampling import Trajectory, advance, guide
from icportrait.presets import DEMO_128
from tests.label_slots import SCHEDULE

SIDE = DEMO_128.latent_size
HALF = (DEMO_128.latent_channels, SIDE, SIDE)
SCALE = 3.7


def normal(seed: int, *shape: int) -> Array:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


@dataclass
class Alone:
    """Values that a row should hold, computed apart from the others."""

    trajectory: Trajectory
    profile: Array
    noise: Array
    latent: Array
    clean: Array
    step: int = 0

    @classmethod
    def begin(cls, trajectory: Trajectory, profile: Array, noise: Array) -> Alone:
        latent = noise[..., SIDE:] * np.float32(trajectory.initial_scale)
        return cls(trajectory, profile, noise[..., :SIDE], latent, np.zeros(HALF, np.float32))

    def advance(self, noise_pred: Array) -> None:
        coefficients = self.trajectory.coefficients[self.step : self.step + 1]
        latent, clean = advance(self.latent[None], noise_pred[None], self.clean[None], coefficients)
        self.latent, self.clean, self.step = latent[0], clean[0], self.step + 1

    @property
    def canvas(self) -> Array:
        level = min(self.step, len(self.trajectory.timesteps) - 1)
        held = self.trajectory.signal_level[level] * self.profile + self.trajectory.noise_level[level] * self.noise
        return np.concatenate([held, self.latent], axis=-1)


def check(rows: RowLatents, expected: dict[int, Alone], used: int) -> None:
    """Check the canvases and timesteps at once, the latents once the step is complete."""
    for row, alone in expected.items():
        assert np.array_equal(rows.canvas(used)[row], alone.canvas)
        level = min(alone.step, len(alone.trajectory.timesteps) - 1)
        assert rows.timestep(used)[row] == alone.trajectory.timesteps[level]
    rows.complete()
    for row, alone in expected.items():
        assert rows.are_finite([row])
        assert np.array_equal(rows.latent([row])[0], alone.latent)
        assert np.array_equal(rows.clean_latent([row])[0], alone.clean)


def test_steps_are_the_samplers_own_whatever_else_is_stepped_held_or_moved() -> None:
    """Step row 0 by itself, row 1 guided by its twin in row 3, row 2 held at every other step; row 4 becomes row 2."""
    trajectories = [
        SCHEDULE.trajectory(*kind) for kind in (("dpmpp_2m", 6), ("ddim", 4), ("euler", 5), ("dpmpp_2m", 7))
    ]
    rows, alone = RowLatents(DEMO_128, 5), {}
    for index, (trajectory, own) in enumerate(zip(trajectories, ([0], [1, 3], [2], [4]), strict=True)):
        profile, noise = normal(index, 1, *HALF), normal(10 + index, 1, HALF[0], SIDE, 2 * SIDE)
        rows.fill(own, trajectory, noise, profile)
        for row in own:
            alone[row] = Alone.begin(trajectory, profile[0], noise[0])
    for step in range(4):
        stepping = [0, 1, 4] if step % 2 else [0, 1, 2, 4]
        following = {}
        for row in (*stepping, 3):
            settings = alone[row].trajectory.settings
            following[row] = settings[min(alone[row].step + 1, len(settings) - 1)]
        rows.prepare(5, following, [(1, 3, SCALE)])
        noise_pred = normal(100 + step, 5, HALF[0], SIDE, 2 * SIDE)
        rows.advance(noise_pred)
        right = noise_pred[..., SIDE:]
        both = guide(right[1], right[3], np.float32(SCALE))
        for row in (*stepping, 3):
            alone[row].advance(both if row in (1, 3) else right[row])
        check(rows, alone, 5)
    rows.prepare(5, {4: trajectories[3].settings[5]})
    noise_pred = normal(200, 5, HALF[0], SIDE, 2 * SIDE)
    rows.advance(noise_pred)
    alone[4].advance(noise_pred[4, ..., SIDE:])
    rows.complete()
    rows.move(4, 2)
    assert np.array_equal(rows.canvas(3)[2], alone[4].canvas)
    assert np.array_equal(rows.latent([2])[0], alone[4].latent)
    rows.prepare(3, {2: trajectories[3].settings[6]})
    rows.advance(noise_pred[:3])
    alone[4].advance(noise_pred[2, ..., SIDE:])
    check(rows, {2: alone[4], 0: alone[0], 1: alone[1]}, 3)


def test_a_row_that_is_not_finite_is_the_only_one() -> None:
    rows, trajectory = RowLatents(DEMO_128, 3), SCHEDULE.trajectory("ddim", 4)
    noise = normal(1, 3, HALF[0], SIDE, 2 * SIDE)
    rows.fill([0, 1, 2], trajectory, noise, normal(0, 1, *HALF))
    rows.prepare(3, dict.fromkeys(range(3), trajectory.settings[1]))
    noise_pred = normal(2, 3, HALF[0], SIDE, 2 * SIDE)
    noise_pred[1, 0, 0, SIDE] = np.inf
    rows.advance(noise_pred)
    rows.complete()
    assert [rows.are_finite([row]) for row in range(3)] == [True, False, True]
    assert not rows.are_finite([0, 1])
