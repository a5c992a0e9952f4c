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
from icportrait.errors import Cancelled, IcPortraitError, InvalidRequest, Unavailable
from icportrait.presets import Preset
from icportrait.request import PortraitRequest
from icportrait.runtime import Slots
from icportrait.sampling import NoiseSchedule, StepPlan
from icportrait.scheduling import BATCHING_MODES, Scheduler
from icportrait.slot_table import DenoiseJob, RunningJob, SlotTable

logger = logging.getLogger(__name__)
CANCELLED = "the caller cancelled"
SHUTTING_DOWN = "the server is shutting down; try again"


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
OnStep = Callable[[int, Callable[[], Array]], None]
"""Is told how many steps are done, and may ask for the portraits' latent as it is now, [num_portraits, 4, s, s]."""


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
    on_done: OnDone
    on_step: OnStep | None
    priority: int
    deadline_s: float
    arrived_s: float
    is_cancelled: bool = field(default=False, init=False)
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

    def answer(self, outcome: DenoiseResult | IcPortraitError) -> None:
        """Call ``on_done``, the first time only; what it raises ends here, for the other jobs' sake."""
        if self._is_answered:
            return
        self._is_answered = True
        try:
            self.on_done(outcome)
        except Exception:
            logger.exception("an answer could not be delivered")

    def report(self, running: RunningJob[Ticket]) -> None:
        """Call ``on_step``; likewise."""
        if self.on_step is None:
            return
        try:
            self.on_step(running.step, lambda: running.portrait_latent)
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
    ) -> None:
        """Start the loop's thread.

        Args:
            slots: the rows of the batch, with the engines behind them; used from the loop's thread only.
            schedule: the checkpoint's noise schedule.
            preset: the model's geometry.
            mode: one of ``BATCHING_MODES``.
            clock: seconds; deadlines and waiting times are measured by it.
        """
        self._rows, self._schedule, self._clock = slots.rows, schedule, clock
        self._mode = BATCHING_MODES[mode]
        self.engine_version = slots.version
        self._table: SlotTable[Ticket] = SlotTable(slots, preset)
        self._scheduler: Scheduler[Ticket] = Scheduler(self._mode, slots.rows, slots.max_jobs)
        self._max_jobs = slots.max_jobs
        self._arrivals: queue.SimpleQueue[Ticket | None] = queue.SimpleQueue()
        self._closed = False
        self._closing = threading.Lock()
        self._thread = threading.Thread(target=self._loop, name="denoise", daemon=True)
        self._thread.start()

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
        check_slots(job.request, self._rows)
        plan = self._schedule.plan(job.request.scheduler, job.request.num_inference_steps)
        ticket = Ticket(job, plan, on_done, on_step, priority, deadline_s, self._clock())
        with self._closing:
            if self._closed:
                raise Unavailable(SHUTTING_DOWN)
            self._arrivals.put(ticket)
        return ticket

    def close(self) -> None:
        """Refuse what runs and what waits, and end the thread."""
        with self._closing:
            if not self._closed:
                self._closed = True
                self._arrivals.put(None)
        self._thread.join()

    def _loop(self) -> None:
        while self._take_arrivals():
            self._drop_unwanted()
            if tickets := self._scheduler.next_to_warp(self._clock(), self._table.used_rows):
                self._join(tickets)
            elif self._table.running:
                self._step()
        for ticket in self._scheduler.remove(lambda _: True):
            ticket.answer(Unavailable(SHUTTING_DOWN))
        self._fail(self._table.running, Unavailable(SHUTTING_DOWN))

    def _take_arrivals(self) -> bool:
        """Queue what has come, and wait for it where there is nothing else to do; False once the loop is closed."""
        is_open = True
        while not self._arrivals.empty() or (is_open and not self._table.running and not len(self._scheduler)):
            ticket = self._arrivals.get()
            if ticket is None:
                is_open = False
            else:
                self._scheduler.push(ticket)
        return is_open and not self._closed

    def _drop_unwanted(self) -> None:
        """Let those go whose caller has gone or whose deadline has passed."""
        now = self._clock()

        def reason(ticket: Ticket) -> IcPortraitError | None:
            if ticket.is_cancelled:
                return Cancelled(CANCELLED)
            if now >= ticket.deadline_s:
                done = next((running.step for running in self._table.running if running.ticket is ticket), 0)
                return Unavailable(
                    f"deadline_ms: passed after {done} of {ticket.steps} steps; allow more time, or ask for fewer steps"
                )
            return None

        for ticket in self._scheduler.remove(lambda ticket: reason(ticket) is not None):
            ticket.answer(reason(ticket) or Cancelled(CANCELLED))
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
                    ticket.answer(_failure(error, "warping"))

    def _step(self) -> None:
        stepping = [running for running in self._table.running if not running.ended]
        try:
            broken = self._table.step(stepping)
        except Exception as error:
            self._fail(stepping, _failure(error, "denoising"))
            return
        self._fail(broken, IcPortraitError("the UNet gave NaN or Inf for this request; no picture was made"))
        for running in stepping:
            if running not in broken:
                running.ticket.report(running)
        ended = [running for running in self._table.running if running.ended]
        if ended and (self._mode.leaves_early or len(ended) == len(self._table.running)):
            self._table.leave(ended)
            for running in ended:
                running.ticket.answer(_result(running))

    def _fail(self, failed: Iterable[RunningJob[Ticket]], error: IcPortraitError) -> None:
        leaving = list(failed)
        if leaving:
            self._table.leave(leaving)
        for running in leaving:
            running.ticket.answer(error)


def _result(running: RunningJob[Ticket]) -> DenoiseResult | IcPortraitError:
    latent = running.portrait_latent
    if not np.isfinite(latent).all():
        return IcPortraitError("the denoised latent has NaN or Inf in it; no picture was made")
    return DenoiseResult(latent, running.match_confidence, running.conditioned_ns, time.monotonic_ns())


def _failure(error: Exception, what: str) -> IcPortraitError:
    """The caller's mistake as it is; a failure of ours into the log, and answered without its details."""
    if isinstance(error, InvalidRequest):
        return error
    logger.error("%s failed", what, exc_info=error)
    return IcPortraitError(f"{what} failed on this server; its log has the cause")
