"""The denoising loop: one thread runs the warping network and the UNet, and all requests share one batch.

Each portrait of a job has a row of the batch, or two at steps with guidance. A joining job's profile is warped into its
reference's view once. Every step then advances all rows, each by its own timestep and schedule. A job leaves when its
own steps are done. The other jobs of the batch change no bit of a row's result.

An engine that waits for the loop does nothing, so answers, reports and counting come while an engine runs. Three rules
follow. Before a job leaves or its rows change, the last step is reported, and a leaving job's result copied. A step
whose report may hold a job is reported before the next launch. A row with NaN is found after the next launch.
"""

from __future__ import annotations

import logging
import queue
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial

import numpy as np

from icportrait.diffusion.latents import RowLatents
from icportrait.diffusion.sampling import NoiseSchedule
from icportrait.errors import IcPortraitError, Unavailable
from icportrait.loop.batch import Batch
from icportrait.loop.job import DenoiseResult, Job
from icportrait.loop.scheduler import Outcomes, Scheduler
from icportrait.loop.thread import Inbox, in_thread
from icportrait.loop.times import Times
from icportrait.metrics import Metrics
from icportrait.pace import Pace
from icportrait.policy import BATCHING_MODES
from icportrait.presets import Preset
from icportrait.request import check_slots
from icportrait.runtime import Slots

logger = logging.getLogger(__name__)
SHUTTING_DOWN = "the server is shutting down; try again"
HELD_POLL_S = 0.1
"""Time between two checks of deadlines while every running job is held."""


class DenoisingLoop:
    """The thread that runs jobs in the rows of ``slots``. In-flight, jobs join and leave between any two steps."""

    def __init__(
        self,
        slots: Slots,
        schedule: NoiseSchedule,
        preset: Preset,
        mode: str = "in-flight",
        clock: Callable[[], float] = time.monotonic,
        metrics: Metrics | None = None,
        on_failure: Callable[[int], None] = lambda _: None,
        inbox: Inbox | None = None,
        start: Callable[[Callable[[], None]], Callable[[], None]] = in_thread,
        latents: type[RowLatents] = RowLatents,
    ) -> None:
        """Start the loop's thread.

        Args:
            slots: the rows of the batch, with the engines behind them; used from the loop's thread only.
            schedule: the checkpoint's noise schedule.
            preset: the model's geometry.
            mode: one of ``BATCHING_MODES``.
            clock: seconds; measures deadlines, waiting times and engines.
            metrics: where the loop counts.
            on_failure: called after the failed jobs were answered, with the number of engine failures in a row;
                ``sys.maxsize`` where the loop itself has failed.
            inbox: where messages wait; None for a queue between threads.
            start: starts to run the loop, and returns a function that waits for its end.
            latents: the rows' latents.
        """
        self.rows, self._max_jobs, self.engine_version, self.pace = slots.rows, slots.max_jobs, slots.version, Pace()
        self._schedule, self._preset, self._clock, self._latents = schedule, preset, clock, latents
        self._metrics, self._on_failure = metrics or Metrics(), on_failure
        self._times = Times(clock, self._metrics, self.pace)
        self._batch = Batch(slots, preset, self._times, latents)
        self._scheduler = Scheduler(BATCHING_MODES[mode], slots.rows, slots.max_jobs, self.pace)
        self._inbox: Inbox = queue.SimpleQueue() if inbox is None else inbox
        # The jobs of the last step, until it is reported, and the jobs that have left, until they are answered.
        self._stepped: list[Job] = []
        self._answers: dict[Job, DenoiseResult | IcPortraitError] = {}
        # The jobs that leave and join in this turn, for which the queue and the batch may not answer any more or yet.
        self._changing: list[Job] = []
        self._failures, self._closed = 0, False
        self._closing = threading.Lock()
        self._join = start(self._run)

    @property
    def used_rows(self) -> int:
        return self._batch.used_rows

    def standstill(self) -> tuple[float, float]:
        """Return ``Times.standstill``; zeros where there is nothing to do."""
        has_work = self._batch.running or self._scheduler.waiting or not self._inbox.empty()
        return self._times.standstill() if has_work else (0.0, 0.0)

    def submit(self, job: Job) -> None:
        """Queue a job.

        Raises:
            InvalidRequest: the request needs more slots than there are, or more steps than the schedule has.
            Unavailable: the loop was closed.
        """
        request = job.request
        check_slots(request, self.rows)
        job.trajectory = self._schedule.trajectory(request.scheduler, request.num_inference_steps)
        seeds = range(request.seed, request.seed + request.num_portraits)
        job.noise = self._latents.noise(self._preset, seeds)
        job.arrived_s, job.tell = self._clock(), self._inbox.put
        with self._closing:
            if self._closed:
                raise Unavailable(SHUTTING_DOWN)
            self._inbox.put(lambda: self._scheduler.waiting.append(job))

    def close(self) -> None:
        """Refuse running and waiting jobs, and end the thread."""
        with self._closing:
            self._closed = True
        self._inbox.put(lambda: None)
        self._join()

    def _run(self) -> None:
        is_idle = True
        try:
            with np.errstate(over="ignore", invalid="ignore"):  # NaN and Inf are looked for
                while not self._closed:
                    self._receive(is_idle)
                    is_idle = not self._turn()
            self._part({job: None for job in self._batch.running if job.has_ended})
        except Exception:
            logger.exception("the denoising loop can't go on")
            self._end()
            self._on_failure(sys.maxsize)
        else:
            self._end()

    def _receive(self, is_idle: bool) -> None:
        """Take all messages; block for one while the loop is idle. While jobs are held, wake to check deadlines."""
        if is_idle:
            with suppress(queue.Empty):
                self._inbox.get(timeout=HELD_POLL_S if self._batch.running else None)()
            self._times.resume()
        while not self._inbox.empty():
            self._inbox.get(timeout=None)()

    def _turn(self) -> bool:
        """Let jobs leave and join, and step the batch. Tell whether there was anything to do."""
        if self._closed:
            return False
        leaving, joining = self._scheduler.next_step(self._batch.running, self._clock())
        self._changing = [*leaving, *joining]
        self._part(leaving)
        self._batch.rearrange(leaving, joining)
        for start in range(0, len(joining), self._max_jobs):
            self._warp(joining[start : start + self._max_jobs])
        stepping = [] if self._closed else self._batch.stepping
        if stepping:
            self._step(stepping)
        else:
            self._finish()
        return bool(leaving or joining or stepping)

    def _warp(self, jobs: Sequence[Job]) -> None:
        """Warp joining jobs, and fill their rows."""
        if not self._runs(partial(self._batch.launch_warping, jobs), jobs, "warping"):
            return
        self._finish()
        bad: dict[Job, Exception] = {}
        for job in jobs:
            try:
                self._batch.fill(job)
            except Exception as error:
                bad[job] = error
        if self._runs(partial(self._batch.wait_warping, jobs), jobs, "warping"):
            for job, cause in bad.items():
                self._drop([job], cause, "a job's start")

    def _step(self, stepping: Sequence[Job]) -> None:
        """Run the UNet, and finish the last step meanwhile."""
        if not self._runs(self._batch.launch, stepping, "denoising"):
            return
        self._finish()
        self._batch.prepare(stepping)
        if not self._runs(self._batch.wait, stepping, "denoising"):
            return
        self._failures, self._stepped = 0, list(stepping)
        if any(job.may_be_held for job in stepping):
            self._finish()

    def _runs(self, engine: Callable[[], None], jobs: Sequence[Job], what: str) -> bool:
        """Launch an engine, or wait for it. Where it fails, drop its jobs, count the failure, and return False."""
        try:
            engine()
        except Exception as error:
            self._failures += 1
            self._metrics.count("engine_failures_total")
            self._drop(jobs, error, what)
            self._on_failure(self._failures)
            return False
        return True

    def _part(self, leaving: Outcomes) -> None:
        """Finish the last step where rows are about to move, and keep the results of leaving jobs."""
        if leaving or self._batch.is_changing:
            self._finish()
        for job, error in leaving.items():
            try:
                self._answers[job] = job.failure or error or self._batch.result(job)
            except Exception:
                logger.exception("a result can't be had")
                self._answers[job] = IcPortraitError("a result was lost on this server; its log has the cause")

    def _finish(self) -> None:
        """Report the last step, and answer the jobs that have left."""
        self._batch.complete()
        while self._stepped:
            job = self._stepped.pop(0)
            if self._batch.is_finite(job):
                job.report(partial(self._batch.preview, job))
            else:
                job.failure = IcPortraitError("the UNet gave NaN or Inf for this request; no picture was made")
        for job, answer in self._answers.items():
            job.answer(answer)
        self._answers.clear()
        self._times.publish()

    def _drop(self, jobs: Sequence[Job], error: Exception, what: str) -> None:
        """Answer jobs at once, without the cause: no caller made this mistake, and the log has it."""
        logger.error("%s failed", what, exc_info=error)
        answer = IcPortraitError(f"{what} failed on this server; its log has the cause")
        self._part(dict.fromkeys(jobs, answer))
        self._batch.rearrange(jobs, [])
        self._finish()

    def _end(self) -> None:
        """Answer the jobs that have left, and refuse all others."""
        with self._closing:
            self._closed = True
        try:
            self._finish()
        except Exception:
            logger.exception("results are lost")
        self._receive(is_idle=False)
        for job in [*self._answers, *self._changing, *self._batch.running, *self._scheduler.waiting]:
            job.answer(Unavailable(SHUTTING_DOWN))
