"""The jobs that are being denoised: which rows each has, and a step of all of them."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Generic, Protocol, TypeVar

import numpy as np

from icportrait.contract import Array
from icportrait.presets import Preset
from icportrait.randomness import canvas_noise
from icportrait.request import PortraitRequest
from icportrait.runtime.placement import Placed
from icportrait.runtime.slots import Slots
from icportrait.sampling import StepPlan, advance, guide


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
    """A job with its schedule."""

    @property
    def job(self) -> DenoiseJob: ...

    @property
    def plan(self) -> StepPlan: ...


Ticket = TypeVar("Ticket", bound=Planned)


@dataclass(eq=False)
class RunningJob(Generic[Ticket]):
    """A job's rows while they are denoised."""

    ticket: Ticket
    rows: list[int]
    """Its slots: one for each portrait, then, with guidance, one more for each with ``F_ref`` = 0."""
    profile_latent: Array
    match_confidence: float
    noise: Array
    """[num_portraits, 4, s, 2 s]; its left half is what the held profile is noised with at every step."""
    conditioned_ns: int
    latent: Array = field(init=False)
    history: Array = field(init=False)
    step: int = 0

    def __post_init__(self) -> None:
        self.latent = self.noise * np.float32(self.ticket.plan.initial_scale)
        self.history = np.zeros_like(self.noise)

    @property
    def ended(self) -> bool:
        return self.step == len(self.ticket.plan.timesteps)

    @property
    def portrait_latent(self) -> Array:
        """A copy of the right half as it is now: [num_portraits, 4, s, s]."""
        return np.ascontiguousarray(self.latent[..., self.latent.shape[-1] // 2 :])

    def hold_profile(self) -> None:
        """Set the canvas's left half to the profile at this step's noise level."""
        plan, side = self.ticket.plan, self.latent.shape[-1] // 2
        signal, noise = plan.signal_level[self.step], plan.noise_level[self.step]
        self.latent[..., :side] = signal * self.profile_latent + noise * self.noise[..., :side]

    def advance(self, noise_pred: Array) -> None:
        """Take one sampler step; ``noise_pred`` holds the conditional rows, then the unconditional ones."""
        portraits = len(self.latent)
        if len(noise_pred) > portraits:
            noise_pred = guide(noise_pred[:portraits], noise_pred[portraits:], self.ticket.job.request.guidance_scale)
        coefficients = np.repeat(self.ticket.plan.coefficients[self.step : self.step + 1], portraits, axis=0)
        self.latent, self.history = advance(self.latent, noise_pred, self.history, coefficients)
        self.step += 1


class SlotTable(Generic[Ticket]):
    """Running jobs in the first rows of the slots, without gaps."""

    def __init__(self, slots: Slots, preset: Preset) -> None:
        self._slots, self._preset = slots, preset
        self.running: list[RunningJob[Ticket]] = []

    @property
    def used_rows(self) -> int:
        return sum(len(running.rows) for running in self.running)

    def join(self, tickets: Sequence[Ticket]) -> list[RunningJob[Ticket]]:
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
        now, joined = time.monotonic_ns(), []
        for ticket, own, confidence in zip(tickets, rows, confidences, strict=True):
            request = ticket.job.request
            self._slots.clear(own[request.num_portraits :])
            seeds = range(request.seed, request.seed + request.num_portraits)
            joined.append(
                RunningJob(
                    ticket=ticket,
                    rows=own,
                    profile_latent=self._slots.to_host(ticket.job.profile_latent),
                    match_confidence=float(confidence),
                    noise=np.stack([canvas_noise(self._preset, seed) for seed in seeds]),
                    conditioned_ns=now,
                )
            )
        self.running += joined
        return joined

    def step(self, stepping: Sequence[RunningJob[Ticket]]) -> list[RunningJob[Ticket]]:
        """One UNet forward over every row in use, then one sampler step for each of ``stepping``.

        Args:
            stepping: the running jobs that haven't ended; the others' rows are computed and not used.

        Returns:
            Those whose prediction has NaN or Inf in it; they haven't been advanced.
        """
        canvas_latent = np.zeros((self.used_rows, *stepping[0].latent.shape[1:]), np.float32)
        timestep = np.zeros(self.used_rows, np.float32)
        for running in stepping:
            running.hold_profile()
            copies = len(running.rows) // len(running.latent)
            canvas_latent[running.rows] = np.concatenate([running.latent] * copies)
            timestep[running.rows] = running.ticket.plan.timesteps[running.step]
        noise_pred = self._slots.predict(canvas_latent, timestep)
        broken = []
        for running in stepping:
            prediction = noise_pred[running.rows]
            if np.isfinite(prediction).all():
                running.advance(prediction)
            else:
                broken.append(running)
        return broken

    def leave(self, leaving: Sequence[RunningJob[Ticket]]) -> None:
        """Free jobs' rows, and move the last rows to where they were."""
        self.running = [running for running in self.running if running not in leaving]
        owners = {row: (running, index) for running in self.running for index, row in enumerate(running.rows)}
        count = len(owners)
        free = (row for row in range(count) if row not in owners)
        for source in sorted(row for row in owners if row >= count):
            running, index = owners[source]
            running.rows[index] = next(free)
            self._slots.move(source, running.rows[index])
