"""The denoising loop: one thread owns the warping network and the UNet and runs requests in batches.

A request's way: ``submit`` puts it into the queue; the loop warps its profile into the reference's view once, gives
each of its portraits a row (two with guidance) and steps all rows together, every row with its own timestep and
schedule. A row's result doesn't depend on the rows beside it.

``WholeBatcher`` forms a batch when the previous one has ended and runs it to its end.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from icportrait.contract import Array
from icportrait.errors import IcPortraitError, InvalidRequest, Unavailable
from icportrait.presets import Preset
from icportrait.randomness import canvas_noise
from icportrait.request import PortraitRequest
from icportrait.runtime import Engine
from icportrait.sampling import NoiseSchedule, StepPlan, advance, guide

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class DenoiseJob:
    """One request at the loop's door.

    ``profile_latent`` and ``reference_latent`` are [1, 4, s, s], ``visibility`` is [1, 1, s, s], all float32.
    """

    request: PortraitRequest
    profile_latent: Array
    reference_latent: Array
    visibility: Array


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
    residuals: dict[str, Array]
    """``F_ref`` by name, [1, C_k, s_k, 2 s_k]: one for all portraits of the request."""
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
        self.latent[..., :side] = signal * self.job.profile_latent + noise * self.noise[..., :side]

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

    def __init__(self, warping: Engine, unet: Engine, schedule: NoiseSchedule, preset: Preset, slots: int) -> None:
        """Start the loop's thread.

        Args:
            warping: the warping network's engine; used from the loop's thread only.
            unet: the UNet's engine; likewise.
            schedule: the checkpoint's noise schedule.
            preset: the model's geometry.
            slots: UNet rows of one batch, at most the engine's largest batch.
        """
        self._warping, self._unet, self._schedule, self._preset = warping, unet, schedule, preset
        self._slots = min(slots, unet.spec.batch.max)
        self.engine_version = unet.version
        self._residual_names = [spec.name for spec in warping.spec.outputs if spec.name.startswith("f_ref_")]
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
        check_slots(request, self._slots)
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
            if rows > self._slots and not self._closed:
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
            for ended in [row for row in running if row.ended]:
                running.remove(ended)
                ended.entry.answer(_checked(ended.result()))
        for row in running:
            row.entry.answer(Unavailable(SHUTTING_DOWN))

    def _condition(self, entries: list[_Waiting]) -> list[_Running]:
        """Run the warping network over the jobs, as many at a time as its engine takes."""
        running = []
        size = self._warping.spec.batch.max
        for start in range(0, len(entries), size):
            part = entries[start : start + size]
            outputs = self._warping.run(
                {
                    spec.name: np.concatenate([getattr(entry.job, spec.name) for entry in part])
                    for spec in self._warping.spec.inputs
                }
            )
            now = time.monotonic_ns()
            for row, entry in enumerate(part):
                request = entry.job.request
                seeds = range(request.seed, request.seed + request.num_portraits)
                running.append(
                    _Running(
                        entry=entry,
                        residuals={name: outputs[name][row : row + 1] for name in self._residual_names},
                        match_confidence=float(outputs["match_confidence"][row]),
                        noise=np.stack([canvas_noise(self._preset, seed) for seed in seeds]),
                        conditioned_ns=now,
                    )
                )
        return running

    def _step(self, running: list[_Running]) -> None:
        """One UNet forward over every row that still runs, then one sampler step for each job."""
        for entry in running:
            entry.hold_profile()
        noise_pred = self._unet.run(self._unet_inputs(running))["noise_pred"]
        first = 0
        for entry in running:
            entry.advance(noise_pred[first : first + entry.job.request.rows])
            first += entry.job.request.rows

    def _unet_inputs(self, running: list[_Running]) -> dict[str, Array]:
        """Rows in the order of the jobs: a job's conditional rows, then its unconditional ones with ``F_ref`` = 0."""
        inputs: dict[str, list[Array]] = {spec.name: [] for spec in self._unet.spec.inputs}
        for entry in running:
            portraits, rows = len(entry.latent), entry.job.request.rows
            inputs["canvas_latent"] += [entry.latent] * (rows // portraits)
            inputs["timestep"].append(np.full(rows, entry.plan.timesteps[entry.step], np.float32))
            for name, residual in entry.residuals.items():
                inputs[name] += [residual] * portraits + [np.zeros_like(residual)] * (rows - portraits)
        return {name: np.concatenate(parts) for name, parts in inputs.items()}


def _checked(result: DenoiseResult) -> DenoiseResult | IcPortraitError:
    if np.isfinite(result.portrait_latent).all():
        return result
    return IcPortraitError("the denoised latent has NaN or Inf in it; no picture was made")
