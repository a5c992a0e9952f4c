"""The denoising loop: one thread owns the warping network and the UNet and runs requests in one batch.

A request's way: ``submit`` puts it into the queue; the scheduler says when it joins; the slot table gives each of its
portraits a row (two with guidance), warps its profile into the reference's view once and steps it with all the others,
every row with its own timestep and schedule; it leaves when its own steps are done. What shares a batch changes no bit
of a row's result.

The same loop batches whole requests, as the baseline to compare with: see ``scheduling.BATCHING_MODES``.
"""

from __future__ import annotations

import logging
import math
import queue
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import numpy as np

from icportrait.contract import Array
from icportrait.errors import Cancelled, DeadlineMissed, IcPortraitError, InvalidRequest, Unavailable
from icportrait.loop_times import LoopTimes, Pace
from icportrait.metrics import Metrics
from icportrait.presets import Preset
from icportrait.randomness import canvas_noise
from icportrait.request import PortraitRequest
from icportrait.runtime import Slots
from icportrait.sampling import NoiseSchedule, StepPlan
from icportrait.scheduling import BATCHING_MODES, Scheduler
from icportrait.slot_table import DenoiseJob, RunningJob, SlotTable

logger = logging.getLogger(__name__)
CANCELLED = "the caller cancelled"
SHUTTING_DOWN = "the server is shutting down; try again"
HELD_POLL_S = 0.1
"""How often deadlines are looked at while every job that runs is held."""


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
OnStep = Callable[[int, Callable[[], DenoiseResult]], None]
"""Is told how many steps are done, and may ask for the result that they amount to: the portraits as the last step took
them to be, without noise.
"""


def check_slots(request: PortraitRequest, slots: int) -> None:
    """Raise InvalidRequest where a request needs more rows than a batch ever has."""
    if request.rows > slots:
        raise InvalidRequest(
            f"num_portraits: {request.num_portraits} portraits at guidance_scale {request.guidance_scale:g} need "
            f"{request.rows} slots, this server has {slots}; ask for fewer, or for guidance_scale 1"
        )


@dataclass(eq=False)
class Ticket:
    """A job on its way through the loop."""

    job: DenoiseJob
    plan: StepPlan
    noise: Array
    on_done: OnDone
    on_step: OnStep | None
    priority: int
    deadline_s: float
    arrived_s: float
    wake: Callable[[], None]
    steps_done: int = field(default=0, init=False)
    is_running: bool = field(default=False, init=False)
    is_cancelled: bool = field(default=False, init=False)
    is_held: bool = field(default=False, init=False)
    """Its rows stay as they are, until ``go_on``; the others' are stepped."""
    _is_answered: bool = field(default=False, init=False)

    @property
    def rows(self) -> int:
        return self.job.request.rows

    @property
    def steps(self) -> int:
        return len(self.plan.timesteps)

    def cancel(self) -> None:
        """Drop the job before the next step, from any thread; ``on_done`` is then told ``Cancelled``."""
        self.is_cancelled = True
        self.wake()

    def hold(self) -> None:
        """Step no further for now."""
        self.is_held = True

    def go_on(self) -> None:
        """Undo ``hold``, from any thread."""
        self.is_held = False
        self.wake()

    def answer(self, outcome: DenoiseResult | IcPortraitError) -> None:
        """Call ``on_done``, the first time only; what it raises ends here, for the other jobs' sake."""
        if self._is_answered:
            return
        self._is_answered = True
        try:
            self.on_done(outcome)
        except Exception:
            logger.exception("an answer could not be delivered")

    def report(self, result: Callable[[], DenoiseResult]) -> None:
        """Call ``on_step``; likewise."""
        self.steps_done += 1
        if self.on_step is None:
            return
        try:
            self.on_step(self.steps_done, result)
        except Exception:
            logger.exception("a step could not be reported")


class Batcher:
    """Runs jobs in the rows of ``slots``; in-flight, they join and leave between any two steps."""

    def __init__(
        self,
        slots: Slots,
        schedule: NoiseSchedule,
        preset: Preset,
        mode: str = "in-flight",
        clock: Callable[[], float] = time.monotonic,
        metrics: Metrics | None = None,
        on_failure: Callable[[int], None] = lambda _: None,
    ) -> None:
        """Start the loop's thread.

        Args:
            slots: the rows of the batch, with the engines behind them; used from the loop's thread only.
            schedule: the checkpoint's noise schedule.
            preset: the model's geometry.
            mode: one of ``BATCHING_MODES``.
            clock: seconds; deadlines and waiting times are measured by it.
            metrics: where the loop counts.
            on_failure: is told, after all concerned were answered, how often in a row the engines have failed.
        """
        self._rows, self._schedule, self._clock, self._preset = slots.rows, schedule, clock, preset
        self._mode, self._metrics, self._on_failure = BATCHING_MODES[mode], metrics or Metrics(), on_failure
        self.engine_version = slots.version
        self.pace = Pace()
        self._times = LoopTimes(slots, self._metrics, self.pace)
        self._table: SlotTable[Ticket] = SlotTable(self._times, preset)
        self._scheduler: Scheduler[Ticket] = Scheduler(self._mode, slots.rows, slots.max_jobs)
        self._max_jobs = slots.max_jobs
        self._failures = 0
        self._has_joined = False
        # None only wakes the loop.
        self._arrivals: queue.SimpleQueue[Ticket | None] = queue.SimpleQueue()
        self._closed = False
        self._closing = threading.Lock()
        self._thread = threading.Thread(target=self._loop, name="denoise", daemon=True)
        self._thread.start()

    @property
    def slots(self) -> int:
        return self._rows

    @property
    def used_rows(self) -> int:
        return self._table.used_rows

    def submit(
        self,
        job: DenoiseJob,
        on_done: OnDone,
        on_step: OnStep | None = None,
        *,
        priority: int = 1,
        deadline_s: float = math.inf,
    ) -> Ticket:
        """Queue a job.

        Args:
            job: what to denoise.
            on_done: called once, from the loop's thread, with the result or the error.
            on_step: called after every step, from the loop's thread, which waits for it.
            priority: 0 first.
            deadline_s: by the clock; a job that hasn't ended by then is dropped before the next step.

        Raises:
            InvalidRequest: the request needs more slots than there are, or more steps than the schedule has.
            Unavailable: the loop was closed.
        """
        request = job.request
        check_slots(request, self._rows)
        plan = self._schedule.plan(request.scheduler, request.num_inference_steps)
        seeds = range(request.seed, request.seed + request.num_portraits)
        noise = np.stack([canvas_noise(self._preset, seed) for seed in seeds])
        ticket = Ticket(job, plan, noise, on_done, on_step, priority, deadline_s, self._clock(), self._wake)
        with self._closing:
            if self._closed:
                raise Unavailable(SHUTTING_DOWN)
            self._arrivals.put(ticket)
        return ticket

    def close(self) -> None:
        """Refuse what runs and what waits, and end the thread."""
        with self._closing:
            self._closed = True
        self._wake()
        self._thread.join()

    def _wake(self) -> None:
        self._arrivals.put(None)

    def _loop(self) -> None:
        while True:
            self._take_arrivals()
            if self._closed:
                break
            with self._times.turn():
                self._drop_unwanted()
                tickets = self._scheduler.next_to_warp(self._clock(), self._table.used_rows)
                self._has_joined = bool(tickets)
                if tickets:
                    self._join(tickets)
                elif self._stepping():
                    self._step()
                self._answer_ended()
        for ticket in self._scheduler.remove(lambda _: True):
            ticket.answer(Unavailable(SHUTTING_DOWN))
        self._fail(self._table.running, Unavailable(SHUTTING_DOWN))

    def _stepping(self) -> list[RunningJob[Ticket]]:
        return [running for running in self._table.running if not running.ended and not running.ticket.is_held]

    def _take_arrivals(self) -> None:
        """Queue what has come, and wait for it where there is nothing else to do."""
        # What waits while held jobs have the slots waits on.
        nobody_joins = not len(self._scheduler) or (self._table.running and not self._has_joined)
        if not self._stepping() and nobody_joins and self._arrivals.empty():
            self._times.pause()
            try:
                self._push(self._arrivals.get(timeout=HELD_POLL_S if self._table.running else None))
            except queue.Empty:
                return
        while not self._arrivals.empty():
            self._push(self._arrivals.get())

    def _push(self, ticket: Ticket | None) -> None:
        if ticket is not None:
            self._scheduler.push(ticket)

    def _drop_unwanted(self) -> None:
        """Let those go whose caller has gone or whose deadline has passed, or will have before they could end."""
        now = self._clock()
        used = self._table.used_rows

        def reason(ticket: Ticket) -> IcPortraitError | None:
            if ticket.is_cancelled:
                return Cancelled(CANCELLED)
            if now >= ticket.deadline_s:
                return _too_late(f"passed after {ticket.steps_done} of {ticket.steps} steps")
            if not ticket.is_running and ticket.deadline_s < math.inf:
                step_s = self.pace.step_s(min(used + ticket.rows, self._rows))
                if now + ticket.steps * step_s + self.pace.after_s > ticket.deadline_s:
                    return _too_late(f"too near for {ticket.steps} steps, which begin only now")
            return None

        unwanted = {ticket: error for ticket in self._scheduler.waiting if (error := reason(ticket))}
        self._scheduler.remove(unwanted.__contains__)
        for ticket, error in unwanted.items():
            ticket.answer(error)
        for running in list(self._table.running):
            if error := reason(running.ticket):
                self._fail([running], error)

    def _join(self, tickets: list[Ticket]) -> None:
        for start in range(0, len(tickets), self._max_jobs):
            part = tickets[start : start + self._max_jobs]
            try:
                self._table.join(part)
            except Exception as error:
                for ticket in part:
                    ticket.answer(self._failure(error, "warping"))
                self._on_failure(self._failures)
            else:
                for ticket in part:
                    ticket.is_running = True

    def _step(self) -> None:
        stepping = self._stepping()
        try:
            broken = self._table.step(stepping)
        except Exception as error:
            self._fail(stepping, self._failure(error, "denoising"))
            self._on_failure(self._failures)
            return
        self._failures = 0
        self._times.stepped(self._table.used_rows)
        self._fail(broken, IcPortraitError("the UNet gave NaN or Inf for this request; no picture was made"))
        for running in stepping:
            if running not in broken:
                running.ticket.report(lambda: _result(running, self._table.clean_latent(running)))  # noqa: B023

    def _answer_ended(self) -> None:
        ended = [running for running in self._table.running if running.ended]
        if ended and (self._mode.leaves_early or len(ended) == len(self._table.running)):
            results = [_result(running, self._table.portrait_latent(running)) for running in ended]
            self._table.leave(ended)
            for running, result in zip(ended, results, strict=True):
                is_whole = np.isfinite(result.portrait_latent).all()
                running.ticket.answer(
                    result if is_whole else IcPortraitError("the denoised latent has NaN or Inf; no picture was made")
                )

    def _fail(self, failed: Iterable[RunningJob[Ticket]], error: IcPortraitError) -> None:
        leaving = list(failed)
        if leaving:
            self._table.leave(leaving)
        for running in leaving:
            running.ticket.answer(error)

    def _failure(self, error: Exception, what: str) -> IcPortraitError:
        """The caller's mistake as it is; a failure of ours into the log, and answered without its details."""
        if isinstance(error, InvalidRequest):
            return error
        self._failures += 1
        self._metrics.count("engine_failures_total")
        logger.error("%s failed", what, exc_info=error)
        return IcPortraitError(f"{what} failed on this server; its log has the cause")


def _result(running: RunningJob[Ticket], portrait_latent: Array) -> DenoiseResult:
    return DenoiseResult(portrait_latent, running.match_confidence, running.conditioned_ns, time.monotonic_ns())


def _too_late(what: str) -> DeadlineMissed:
    return DeadlineMissed(f"deadline_ms: {what}; allow more time, or ask for fewer steps")
