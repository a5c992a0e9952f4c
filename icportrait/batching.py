"""The denoising loop: one thread owns the warping network and the UNet and runs requests in one batch.

A request's way: ``submit`` puts it into the queue; the scheduler says when it joins; the slot table gives each of its
portraits a row (two with guidance), warps its profile into the reference's view once and steps it with all the others,
every row with its own timestep and schedule; it leaves when its own steps are done. What shares a batch changes no bit
of a row's result.

An engine that waits for the loop does nothing, so the loop decides ahead: while the UNet runs a step, it answers who
ended with the one before and, shortly before the step ends, settles who leaves after it and who takes their rows. What
comes later than that changes the decision where it could: a caller who cancels, a deadline that passes, an arrival for
a slot that is free.

The same loop batches whole requests, as the baseline to compare with: see ``scheduling.BATCHING_MODES``.
"""

from __future__ import annotations

import logging
import math
import queue
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial

import numpy as np

from icportrait.backlog import Backlog, BacklogError
from icportrait.contract import Array
from icportrait.decision import Decider, Decision, Outcomes, stepping_jobs
from icportrait.errors import IcPortraitError, InvalidRequest, Unavailable
from icportrait.loop_times import LoopTimes, Pace
from icportrait.metrics import Metrics
from icportrait.presets import Preset
from icportrait.randomness import canvas_noise
from icportrait.request import PortraitRequest
from icportrait.runtime import Slots
from icportrait.sampling import NoiseSchedule
from icportrait.scheduling import BATCHING_MODES
from icportrait.slot_table import Change, RunningJob, SlotTable
from icportrait.ticket import DenoiseJob, DenoiseResult, OnDone, OnStep, Ticket

logger = logging.getLogger(__name__)
SHUTTING_DOWN = "the server is shutting down; try again"
HELD_POLL_S = 0.1
"""How often deadlines are looked at while every job that runs is held."""


def check_slots(request: PortraitRequest, slots: int) -> None:
    """Raise InvalidRequest where a request needs more rows than a batch ever has."""
    if request.rows > slots:
        raise InvalidRequest(
            f"num_portraits: {request.num_portraits} portraits at guidance_scale {request.guidance_scale:g} need "
            f"{request.rows} slots, this server has {slots}; ask for fewer, or for guidance_scale 1"
        )


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
            on_failure: is told, after all concerned were answered, how often in a row the engines have failed;
                ``sys.maxsize`` where the loop itself has.
        """
        self._rows, self._schedule, self._clock, self._preset = slots.rows, schedule, clock, preset
        self._metrics, self._on_failure = metrics or Metrics(), on_failure
        self.engine_version = slots.version
        self.pace = Pace()
        self._times = LoopTimes(slots, self._metrics, self.pace)
        self._backlog = Backlog()
        self._table = SlotTable(self._times, preset, self._backlog)
        self._decider = Decider(BATCHING_MODES[mode], slots.rows, slots.max_jobs, self.pace)
        self._max_jobs = slots.max_jobs
        self._failures = 0
        self._unanswered: Outcomes = {}
        """Those that have left, and why, until the backlog is worked off."""
        self._decision: Decision | None = None
        self._broken: dict[RunningJob, IcPortraitError] = {}
        self._reports_first = not slots.overlaps
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

    def standstill(self) -> tuple[float, float]:
        """How long the loop has been where it is, and how long it may be expected to be there at least, in seconds.

        The first is 0 where there is nothing to do.
        """
        since_s, expected_s = self._times.standstill()
        has_work = self._table.running or self._decider.waiting or not self._arrivals.empty()
        return (since_s, expected_s) if has_work else (0.0, 0.0)

    def submit(
        self,
        job: DenoiseJob,
        on_done: OnDone,
        on_step: OnStep | None = None,
        *,
        priority: int = 1,
        deadline_s: float = math.inf,
        hold_every: int = 0,
    ) -> Ticket:
        """Queue a job.

        Args:
            job: what to denoise.
            on_done: called once, from the loop's thread, with the result or the error.
            on_step: called after every step, from the loop's thread: while the next one runs, where the thread is free
                then, else before it.
            priority: 0 first.
            deadline_s: by the clock; a job that hasn't ended by then is dropped before a step begins.
            hold_every: after so many steps each ``on_step`` may hold the job: the next step waits for it then.

        Raises:
            InvalidRequest: the request needs more slots than there are, or more steps than the schedule has.
            Unavailable: the loop was closed.
        """
        request = job.request
        check_slots(request, self._rows)
        plan = self._schedule.plan(request.scheduler, request.num_inference_steps)
        seeds = range(request.seed, request.seed + request.num_portraits)
        noise = np.stack([canvas_noise(self._preset, seed) for seed in seeds])
        ticket = Ticket(job, plan, noise, on_done, on_step, priority, deadline_s, self._clock(), self._wake, hold_every)
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
        can_go_on = True
        try:
            with np.errstate(over="ignore", invalid="ignore"):  # NaN and Inf are looked for
                while not self._closed:
                    if not self._turn():
                        self._wait()
                self._backlog.work_off()
        except Exception:
            logger.exception("the denoising loop can't go on")
            can_go_on = False
            with self._closing:
                self._closed = True
        self._take_arrivals()
        self._revoke()
        if not can_go_on:
            self._answer_owed()
        for job in self._table.running:
            if can_go_on and job.ended:
                self._answer(job, None)
            job.ticket.answer(Unavailable(SHUTTING_DOWN))
        for ticket in self._decider.waiting:
            ticket.answer(Unavailable(SHUTTING_DOWN))
        if not can_go_on:
            self._on_failure(sys.maxsize)

    def _answer_owed(self) -> None:
        """Answer those that have left, and were to be answered in the turn in which the loop has failed."""
        try:
            self._backlog.work_off()
        except Exception:
            logger.exception("results are lost")
        for job in self._unanswered:
            job.ticket.answer(Unavailable(SHUTTING_DOWN))

    def _wait(self) -> None:
        """For what comes; deadlines are looked at now and then, since what waits for a held job's slots has one too."""
        with suppress(queue.Empty):
            self._push(self._arrivals.get(timeout=HELD_POLL_S if self._table.running else None))
        self._times.resume()

    def _turn(self) -> bool:
        """Who has ended leaves, who waits joins, and all of them step. Says whether there was anything to do."""
        decision = self._due()
        if self._closed:
            self._decision = decision
            return True
        all_joined = self._make(decision)
        steps = decision.steps if all_joined else bool(stepping_jobs(self._table.running))
        if steps and not self._closed:
            self._step()
        else:
            self._backlog.work_off()
        return bool(steps or decision.leaving or decision.change.joining)

    def _due(self) -> Decision:
        """The decision that was made ahead, unless something has come between."""
        decision = self._decision
        has_arrivals, is_woken = self._take_arrivals()
        if decision and not is_woken and not self._reports_first and self._clock() < decision.until_s:
            if not (has_arrivals and decision.is_open):
                self._decision = None
                return decision
        else:
            self._backlog.work_off()  # whoever is told how far it came is told of the last step too
        self._revoke()
        return self._decide()

    def _revoke(self) -> None:
        if self._decision:
            self._decider.revoke(self._decision)
            self._decision = None

    def _take_arrivals(self) -> tuple[bool, bool]:
        """Queue what has come. Says whether jobs have, and whether something else has changed."""
        has_arrivals = is_woken = False
        while not self._arrivals.empty():
            ticket = self._arrivals.get()
            self._push(ticket)
            has_arrivals, is_woken = has_arrivals or ticket is not None, is_woken or ticket is None
        return has_arrivals, is_woken

    def _push(self, ticket: Ticket | None) -> None:
        if ticket is not None:
            self._decider.push(ticket)

    def _decide(self, ahead_s: float = 0.0) -> Decision:
        return self._decider.decide(self._table, self._broken, self._clock(), ahead_s)

    def _make(self, decision: Decision) -> bool:
        """Let jobs leave and join. Says whether all have that should."""
        self._change(decision.change, decision.leaving)
        joining, all_joined = decision.change.joining, True
        for start in range(0, len(joining), self._max_jobs):
            part = joining[start : start + self._max_jobs]
            try:
                failed = self._table.join(part, self._backlog.work_off)
            except BacklogError:
                raise
            except Exception as error:
                self._fail(part, error, "warping")
                all_joined = False
                continue
            for job in part:
                job.ticket.is_running = job not in failed
            for job, cause in failed.items():
                self._drop([job], cause, "a job's start")
                all_joined = False
        return all_joined

    def _change(self, change: Change, leaving: Outcomes) -> None:
        for job, error in leaving.items():
            self._unanswered[job] = error
            self._backlog.add(partial(self._answer, job, error))
        self._table.change(change)

    def _answer(self, job: RunningJob, error: IcPortraitError | None) -> None:
        error = self._broken.pop(job, error)
        try:
            outcome = error or self._result(job, self._table.portrait_latent(job))
        except Exception:
            logger.exception("a result can't be had")
            outcome = IcPortraitError("a result was lost on this server; its log has the cause")
        job.ticket.answer(outcome)
        self._unanswered.pop(job, None)

    def _step(self) -> None:
        stepping: list[RunningJob] = []

        def meanwhile() -> None:
            self._backlog.work_off()
            left_s = self._times.sleep_before_end(self._table.used_rows)
            stepping.extend(stepping_jobs(self._table.running))
            self._table.prepare(stepping)
            if self._times.overlaps:
                self._reports_first = any(_may_be_held(job) for job in stepping)
                self._take_arrivals()
                self._decision = self._decide(left_s)
                self._table.stage(self._decision.change.joining)

        try:
            self._table.step(meanwhile)
        except BacklogError:
            raise
        except Exception as error:
            self._revoke()
            self._fail(stepping or stepping_jobs(self._table.running), error, "denoising")
            return
        if stepping:
            self._failures = 0
        self._backlog.add(lambda: self._report(stepping))

    def _report(self, stepped: list[RunningJob]) -> None:
        for job in stepped:
            if self._table.is_broken(job):
                self._broken[job] = IcPortraitError("the UNet gave NaN or Inf for this request; no picture was made")
            else:
                job.ticket.report(lambda: self._result(job, self._table.clean_latent(job)))  # noqa: B023
        self._times.publish()

    def _result(self, job: RunningJob, portrait_latent: Array) -> DenoiseResult:
        return DenoiseResult(
            portrait_latent,
            job.match_confidence,
            job.joined_ns,
            job.conditioned_ns,
            self._table.stepped_ns,
            1000 * job.warp_s,
            sum(job.steps_shared) / max(1, len(job.steps_shared)),
            1000 * job.engine_s,
        )

    def _fail(self, failed: list[RunningJob], error: Exception, what: str) -> None:
        """Answer jobs at once whose engine failed."""
        self._failures += 1
        self._metrics.count("engine_failures_total")
        self._drop(failed, error, what)
        self._on_failure(self._failures)

    def _drop(self, failed: list[RunningJob], error: Exception, what: str) -> None:
        """Answer jobs at once, without what the log has: what goes wrong here is no caller's mistake."""
        logger.error("%s failed", what, exc_info=error)
        answer = IcPortraitError(f"{what} failed on this server; its log has the cause")
        self._backlog.work_off()
        self._change(self._table.plan(failed, []), dict.fromkeys(failed, answer))
        self._backlog.work_off()


def _may_be_held(job: RunningJob) -> bool:
    """When the step that it is at is reported."""
    return job.ticket.hold_every > 0 and job.step % job.ticket.hold_every == 0
