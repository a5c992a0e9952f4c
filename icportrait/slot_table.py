"""The jobs that are being denoised: which rows each has, and a step of all of them."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

import numpy as np

from icportrait.contract import Array
from icportrait.presets import Preset
from icportrait.request import PortraitRequest
from icportrait.runtime.placement import Placed
from icportrait.runtime.slots import Slots
from icportrait.sampling import StepPlan, guide


@dataclass(frozen=True)
class DenoiseJob:
    """One request at the loop's door.

    ``profile_latent`` and ``reference_latent`` are [1, 4, s, s], ``visibility`` is [1, 1, s, s], all float32, each in
    the host's memory or the GPU's.
    """

    request: PortraitRequest
    profile_latent: Placed
    reference_latent: Placed
    visibility: Placed

    @property
    def inputs(self) -> dict[str, Placed]:
        """The warping network's, by name."""
        return {
            "profile_latent": self.profile_latent,
            "reference_latent": self.reference_latent,
            "visibility": self.visibility,
        }


class Planned(Protocol):
    """A job with its schedule and its noise."""

    @property
    def job(self) -> DenoiseJob: ...

    @property
    def plan(self) -> StepPlan: ...

    @property
    def noise(self) -> Array:
        """[num_portraits, 4, s, 2 s] float32; its left half is what the held profile is noised with at every step."""
        ...


Ticket = TypeVar("Ticket", bound=Planned)


@dataclass(eq=False)
class RunningJob(Generic[Ticket]):
    """A job's rows while they are denoised."""

    ticket: Ticket
    rows: list[int]
    """Its slots: one for each portrait, then, with guidance, one more for each with ``F_ref`` = 0."""
    match_confidence: float
    conditioned_ns: int
    step: int = 0
    """How many are done."""

    @property
    def ended(self) -> bool:
        return self.step == len(self.ticket.plan.timesteps)

    @property
    def portrait_rows(self) -> list[int]:
        return self.rows[: self.ticket.job.request.num_portraits]


class SlotTable(Generic[Ticket]):
    """Running jobs in the first rows of the slots, without gaps.

    What a row is made of lies in arrays of all rows, and a step is a few operations on their first n rows. They are
    elementwise: a row's bits depend on no other's. With guidance a portrait's second row is the twin of its first.

    The engine waits for what lies between two of its runs, so little does: ``_prepare`` works out, while it runs, all
    that doesn't need its output. Arrays are there from the start, since fresh memory costs a step as much as its
    arithmetic, and flat, since NumPy takes several times as long over half a canvas in its place.
    """

    def __init__(self, slots: Slots, preset: Preset) -> None:
        self._slots = slots
        self.running: list[RunningJob[Ticket]] = []
        side = preset.latent_size
        self._half = (preset.latent_channels, side, side)
        # What the UNet is given next, and where the step after that is laid out meanwhile.
        self._canvas, self._next_canvas = np.zeros((2, slots.rows, *self._half[:2], 2 * side), np.float32)
        self._latent, self._clean, self._profile, self._profile_noise = self._of_row = [
            self._flat(slots.rows) for _ in range(4)
        ]
        self._output, self._kept, self._clean_part, self._scratch = (self._flat(slots.rows) for _ in range(4))

    def _flat(self, rows: int) -> Array:
        return np.zeros((rows, math.prod(self._half)), np.float32)

    @property
    def used_rows(self) -> int:
        return sum(len(running.rows) for running in self.running)

    def join(self, tickets: Sequence[Ticket]) -> None:
        """Give jobs the next rows and run the warping network over them.

        Args:
            tickets: at most ``Slots.max_jobs``, whose rows fit.
        """
        first, rows = self.used_rows, []
        for ticket in tickets:
            rows.append(list(range(first, first + ticket.job.request.rows)))
            first += ticket.job.request.rows
        shared = [own[: ticket.job.request.num_portraits] for ticket, own in zip(tickets, rows, strict=True)]
        confidences = self._slots.condition([ticket.job.inputs for ticket in tickets], shared)
        now = time.monotonic_ns()
        for ticket, own, confidence in zip(tickets, rows, confidences, strict=True):
            portraits, side = ticket.job.request.num_portraits, self._half[-1]
            if own[portraits:]:
                self._slots.clear(own[portraits:])
            self._profile[own] = self._slots.to_host(ticket.job.profile_latent).reshape(1, -1)
            self._clean[own] = 0
            left, right = ticket.noise[..., :side], ticket.noise[..., side:] * np.float32(ticket.plan.initial_scale)
            for twins in filter(None, (own[:portraits], own[portraits:])):
                self._profile_noise[twins] = left.reshape(portraits, -1)
                self._latent[twins] = right.reshape(portraits, -1)
            held = (
                ticket.plan.signal_level[0] * self._profile[own] + ticket.plan.noise_level[0] * self._profile_noise[own]
            )
            self._canvas[own, ..., :side] = held.reshape(-1, *self._half)
            self._canvas[own, ..., side:] = self._latent[own].reshape(-1, *self._half)
            self.running.append(RunningJob(ticket, own, float(confidence), now))

    def step(self, stepping: Sequence[RunningJob[Ticket]]) -> list[RunningJob[Ticket]]:
        """One UNet forward over every row in use, then one sampler step for each of ``stepping``.

        Args:
            stepping: the running jobs that haven't ended; the others' rows are computed and not used.

        Returns:
            Those whose prediction has NaN or Inf in it; they haven't been advanced.
        """
        used, side = self.used_rows, self._half[-1]
        now, following = np.zeros((2, used, 8), np.float32)
        goes_on = set(map(id, stepping))
        for running in self.running:
            settings, step = running.ticket.plan.settings, running.step
            last = len(settings) - 1
            this, next_one = settings[min(step, last)], settings[min(step + (id(running) in goes_on), last)]
            for row in running.rows:
                now[row], following[row] = this, next_one
        noise_pred = self._slots.predict(
            self._canvas[:used], now[:, 0].copy(), lambda: self._prepare(used, now, following)
        )
        output = self._output[:used]
        output.reshape(used, *self._half)[...] = noise_pred[..., side:]
        is_finite, broken = np.isfinite(output).all(axis=1), []
        if not is_finite.all():
            broken = [running for running in stepping if not is_finite[running.rows].all()]
        advancing = [running for running in stepping if running not in broken] if broken else stepping
        self._guide(advancing, output)
        self._advance(advancing, output, now)
        return broken

    def _prepare(self, used: int, now: Array, following: Array) -> None:
        """What a step can be told before its prediction is there; see ``sampling.advance`` for the formula."""
        (_, _, _, c0, _, c2, c3, _), (_, signal, noise, *_) = (np.split(each, 8, axis=1) for each in (now, following))
        scratch, latent = self._scratch[:used], self._latent[:used]
        np.multiply(c0, latent, out=self._kept[:used])
        np.multiply(c2, self._clean[:used], out=scratch)
        self._kept[:used] += scratch
        np.multiply(c3, latent, out=self._clean_part[:used])
        np.multiply(noise, self._profile_noise[:used], out=scratch)
        held = self._output[:used]  # which isn't there yet
        np.multiply(signal, self._profile[:used], out=held)
        held += scratch
        self._next_canvas[:used, ..., : self._half[-1]] = held.reshape(used, *self._half)

    def _guide(self, jobs: Sequence[RunningJob[Ticket]], output: Array) -> None:
        """Put the guided prediction into both of a portrait's rows."""
        for running in jobs:
            request = running.ticket.job.request
            if len(running.rows) > request.num_portraits:
                conditional, unconditional = running.portrait_rows, running.rows[request.num_portraits :]
                guided = guide(output[conditional], output[unconditional], request.guidance_scale)
                output[conditional] = output[unconditional] = guided

    def _advance(self, jobs: Sequence[RunningJob[Ticket]], output: Array, now: Array) -> None:
        """``sampling.advance``, to the bit, from where ``_prepare`` has left it; the other rows stay as they are."""
        used, latent, clean = len(output), self._latent[: len(output)], self._clean[: len(output)]
        advancing = {row for running in jobs for row in running.rows}
        idle = [row for row in range(used) if row not in advancing]
        stays = (latent[idle], clean[idle]) if idle else None
        np.multiply(now[:, 4:5], output, out=latent)
        latent += self._kept[:used]
        output *= now[:, 7:8]
        np.add(self._clean_part[:used], output, out=clean)
        if stays:
            latent[idle], clean[idle] = stays
        self._next_canvas[:used, ..., self._half[-1] :] = latent.reshape(used, *self._half)
        self._canvas, self._next_canvas = self._next_canvas, self._canvas
        for running in jobs:
            running.step += 1

    def portrait_latent(self, running: RunningJob[Ticket]) -> Array:
        """A copy of a job's portraits as they are now, noisy until it has ended: [num_portraits, 4, s, s]."""
        return self._latent[running.portrait_rows].reshape(-1, *self._half)

    def clean_latent(self, running: RunningJob[Ticket]) -> Array:
        """A copy of what the last step took the job's portraits for, without noise: [num_portraits, 4, s, s]."""
        return self._clean[running.portrait_rows].reshape(-1, *self._half)

    def leave(self, leaving: Sequence[RunningJob[Ticket]]) -> None:
        """Free jobs' rows, and move the last rows to where they were."""
        self.running = [running for running in self.running if running not in leaving]
        owners = {row: (running, index) for running in self.running for index, row in enumerate(running.rows)}
        count = len(owners)
        free = (row for row in range(count) if row not in owners)
        for source in sorted(row for row in owners if row >= count):
            running, index = owners[source]
            target = running.rows[index] = next(free)
            self._slots.move(source, target)
            for array in (self._canvas, *self._of_row):
                array[target] = array[source]
