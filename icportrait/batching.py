"""The denoising loop: one thread owns the warping network and the UNet and runs requests in batches.

A request's way: ``submit`` puts it into the queue; the loop gives each of its portraits a row (two with guidance),
warps its profile into the reference's view once and leaves the result in those rows (``runtime.slots``), and steps all
rows together, every row with its own timestep and schedule. A row's result doesn't depend on the rows beside it.

``WholeBatcher`` forms a batch when the previous one has ended and runs it to its end.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import islice

import numpy as np

from icportrait.contract import Array
from icportrait.errors import IcPortraitError, InvalidRequest, Unavailable
from icportrait.presets import Preset
from icportrait.randomness import canvas_noise
from icportrait.request import PortraitRequest
from icportrait.runtime import Slots
from icportrait.runtime.placement import Placed
from icportrait.sampling import NoiseSchedule, StepPlan, advance, guide

logger = logging.getLogger(__name__)


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


@dataclass(frozen=True)
class DenoiseResult:
    """What the loop made of a job.

    ``portrait_latent`` is [num_portraits, 4, s, s] float32; the times are ``time.monotonic_ns`` readings.
    """

    portrait_latent: Array
    match_confidence: float
    conditioned_ns: int
    denoised_ns: int


OnDone = Callable[[DenoiseResult | IcPortraitError], None]
SHUTTING_DOWN = "the server is shutting down; try again"


def check_slots(request: PortraitRequest, slots: int) -> None:
    """Raise InvalidRequest where a request needs more rows than a batch ever has."""
    if request.rows > slots:
        raise InvalidRequest(
            f"num_portraits: {request.num_portraits} portraits at guidance_scale {request.guidance_scale:g} need "
            f"{request.rows} slots, this server has {slots}; ask for fewer, or for guidance_scale 1"
        )


@dataclass
class _Waiting:
    """A job with its schedule and its way back."""

    job: DenoiseJob
    plan: StepPlan
    on_done: OnDone
    answered: bool = False

    def answer(self, outcome: DenoiseResult | IcPortraitError) -> None:
        """Call ``on_done``, the first time only; what it raises ends here, for the other jobs' sake."""
        if self.answered:
            return
        self.answered = True
        try:
            self.on_done(outcome)
        except Exception:
            logger.exception("an answer could not be delivered")


@dataclass
class _Running:
    """A job's rows while they are denoised."""

    entry: _Waiting
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
        self.latent = self.noise * np.float32(self.plan.initial_scale)
        self.history = np.zeros_like(self.noise)

    @property
    def plan(self) -> StepPlan:
        return self.entry.plan

    @property
    def job(self) -> DenoiseJob:
        return self.entry.job

    @property
    def ended(self) -> bool:
        return self.step == len(self.plan.timesteps)

    def hold_profile(self) -> None:
        """Set the canvas's left half to the profile at this step's noise level."""
        side = self.latent.shape[-1] // 2
        signal, noise = self.plan.signal_level[self.step], self.plan.noise_level[self.step]
        self.latent[..., :side] = signal * self.profile_latent + noise * self.noise[..., :side]

    def advance(self, noise_pred: Array) -> None:
        """Take one sampler step; ``noise_pred`` holds the conditional rows, then the unconditional ones."""
        portraits = len(self.latent)
        if len(noise_pred) > portraits:
            noise_pred = guide(noise_pred[:portraits], noise_pred[portraits:], self.job.request.guidance_scale)
        coefficients = np.repeat(self.plan.coefficients[self.step : self.step + 1], portraits, axis=0)
        self.latent, self.history = advance(self.latent, noise_pred, self.history, coefficients)
        self.step += 1

    def result(self) -> DenoiseResult:
        side = self.latent.shape[-1] // 2
        portrait = np.ascontiguousarray(self.latent[..., side:])
        return DenoiseResult(portrait, self.match_confidence, self.conditioned_ns, time.monotonic_ns())


class WholeBatcher:
    """Runs jobs in batches that are formed once and run to their end; an answer leaves when its own steps are done."""

    def __init__(self, slots: Slots, schedule: NoiseSchedule, preset: Preset) -> None:
        """Start the loop's thread.

        Args:
            slots: the rows of one batch, with the engines behind them; used from the loop's thread only.
            schedule: the checkpoint's noise schedule.
            preset: the model's geometry.
        """
        self._slots, self._schedule, self._preset = slots, schedule, preset
        self.engine_version = slots.version
        self._queue: queue.SimpleQueue[_Waiting | None] = queue.SimpleQueue()
        self._held: _Waiting | None = None
        self._closed = False
        self._closing = threading.Lock()
        self._thread = threading.Thread(target=self._loop, name="denoise", daemon=True)
        self._thread.start()

    def submit(self, job: DenoiseJob, on_done: OnDone) -> None:
        """Queue a job; ``on_done`` is called once, from the loop's thread, with its result or its error.

        Raises:
            InvalidRequest: the request needs more slots than there are, or more steps than the schedule has.
            Unavailable: the loop was closed.
        """
        request = job.request
        check_slots(request, self._slots.rows)
        entry = _Waiting(job, self._schedule.plan(request.scheduler, request.num_inference_steps), on_done)
        with self._closing:
            if self._closed:
                raise Unavailable(SHUTTING_DOWN)
            self._queue.put(entry)

    def close(self) -> None:
        """Refuse what runs and what waits, and end the thread."""
        with self._closing:
            if not self._closed:
                self._closed = True
                self._queue.put(None)
        self._thread.join()

    def _loop(self) -> None:
        while (entries := self._next_batch()) is not None:
            try:
                self._run(entries)
            except Exception:
                logger.exception("the denoising loop failed on a batch of %d requests", len(entries))
                for entry in entries:
                    entry.answer(IcPortraitError("denoising failed on this server; its log has the cause"))

    def _next_batch(self) -> list[_Waiting] | None:
        """Wait for a job, then take all that wait as long as their rows fit the slots; None after the last."""
        entries: list[_Waiting] = []
        rows = 0
        while True:
            entry = self._held or self._queue.get()
            self._held = None
            if entry is None:
                for refused in entries:
                    refused.answer(Unavailable(SHUTTING_DOWN))
                return None
            rows += entry.job.request.rows
            if rows > self._slots.rows and not self._closed:
                self._held = entry
                return entries
            entries.append(entry)
            # A closed loop gathers all that is left, up to the None behind it, and runs none of it.
            if self._queue.empty() and not self._closed:
                return entries

    def _run(self, entries: list[_Waiting]) -> None:
        running = self._condition(entries)
        while running and not self._closed:
            self._step(running)
            for ended in [entry for entry in running if entry.ended]:
                running.remove(ended)
                ended.entry.answer(_checked(ended.result()))
            self._close_gaps(running)
        for left in running:
            left.entry.answer(Unavailable(SHUTTING_DOWN))

    def _condition(self, entries: list[_Waiting]) -> list[_Running]:
        """Give the jobs their rows and run the warping network over them, as many at a time as its engine takes."""
        running: list[_Running] = []
        free = iter(range(self._slots.rows))
        for start in range(0, len(entries), self._slots.max_jobs):
            part = entries[start : start + self._slots.max_jobs]
            rows = [list(islice(free, entry.job.request.rows)) for entry in part]
            shared = [each[: entry.job.request.num_portraits] for entry, each in zip(part, rows, strict=True)]
            confidences = self._slots.condition([entry.job.inputs for entry in part], shared)
            now = time.monotonic_ns()
            for entry, own, confidence in zip(part, rows, confidences, strict=True):
                request = entry.job.request
                self._slots.clear(own[request.num_portraits :])
                seeds = range(request.seed, request.seed + request.num_portraits)
                running.append(
                    _Running(
                        entry=entry,
                        rows=own,
                        profile_latent=self._slots.to_host(entry.job.profile_latent),
                        match_confidence=float(confidence),
                        noise=np.stack([canvas_noise(self._preset, seed) for seed in seeds]),
                        conditioned_ns=now,
                    )
                )
        return running

    def _step(self, running: list[_Running]) -> None:
        """One UNet forward over every row that still runs, then one sampler step for each job."""
        rows = sum(len(entry.rows) for entry in running)
        canvas_latent = np.empty((rows, *running[0].latent.shape[1:]), np.float32)
        timestep = np.empty(rows, np.float32)
        for entry in running:
            entry.hold_profile()
            canvas_latent[entry.rows] = np.concatenate([entry.latent] * (len(entry.rows) // len(entry.latent)))
            timestep[entry.rows] = entry.plan.timesteps[entry.step]
        noise_pred = self._slots.predict(canvas_latent, timestep)
        for entry in running:
            entry.advance(noise_pred[entry.rows])

    def _close_gaps(self, running: list[_Running]) -> None:
        """Move the last rows to where rows ended, so that those in use are the first ones again."""
        owners = {row: (entry, index) for entry in running for index, row in enumerate(entry.rows)}
        count = len(owners)
        free = (row for row in range(count) if row not in owners)
        for source in sorted(row for row in owners if row >= count):
            entry, index = owners[source]
            entry.rows[index] = next(free)
            self._slots.move(source, entry.rows[index])


def _checked(result: DenoiseResult) -> DenoiseResult | IcPortraitError:
    if np.isfinite(result.portrait_latent).all():
        return result
    return IcPortraitError("the denoised latent has NaN or Inf in it; no picture was made")
