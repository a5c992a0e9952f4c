"""The choice of jobs that leave the batch before its next step, and of jobs that join it.

No function here runs an engine or reads a clock: times come in as seconds of the caller's clock. The server and a
simulation in virtual time thus decide alike.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from icportrait.errors import IcPortraitError
from icportrait.loop.job import Job
from icportrait.pace import Pace
from icportrait.phases import FOR_GOOD, Phases, Timetable, most_rows
from icportrait.policy import AGING_S, BatchingMode, rank

Outcomes = dict[Job, IcPortraitError | None]
"""The reason for which each job leaves: an error, or None where the job has ended."""


class Scheduler:
    """The queue, and the rules by which jobs leave the queue and the batch. Not thread-safe: the loop owns it."""

    def __init__(self, mode: BatchingMode, rows: int, max_jobs: int, pace: Pace, aging_s: float = AGING_S) -> None:
        """Make an empty queue.

        Args:
            mode: when jobs join and leave.
            rows: slots in all.
            max_jobs: jobs that are warped at once.
            pace: the time that a job still needs to keep its deadline.
            aging_s: the value of ``AGING_S`` to use.
        """
        self._mode, self._rows, self._max_jobs, self._pace, self._aging_s = mode, rows, max_jobs, pace, aging_s
        self.waiting: list[Job] = []
        """Queued jobs, in no order."""

    def next_step(self, running: Sequence[Job], now_s: float) -> tuple[Outcomes, list[Job]]:
        """Decide before a step.

        In-flight, warping and stepping take turns. Running jobs wait for at most one warping of ``max_jobs`` jobs
        between two steps. A job that finds slots free waits for at most one step, and one such warping for each
        ``max_jobs`` jobs ahead of it.

        Args:
            running: the batch's jobs, at the step where they are.
            now_s: the clock.

        Returns:
            The jobs that leave the batch or the queue, and why; then the jobs that join.
        """
        leaving = self._leaving(running, now_s)
        staying = [job for job in running if job not in leaving]
        unwanted = self._unwanted(now_s, sum(job.rows for job in staying))
        self.waiting = [job for job in self.waiting if job not in unwanted]
        joining = self._joining(now_s, staying)
        self.waiting = [job for job in self.waiting if job not in joining]
        return leaving | unwanted, joining

    def _leaving(self, running: Sequence[Job], now_s: float) -> Outcomes:
        """Find the jobs that have ended or failed, that were cancelled, or whose deadline has passed."""
        leaving: Outcomes = {job: job.failure for job in running if job.failure}
        leaving |= self._ended(running, leaving)
        refused: Outcomes = {job: error for job in running if job not in leaving and (error := job.refusal(now_s))}
        if not refused:
            return leaving
        leaving |= refused
        return leaving | self._ended(running, leaving)

    def _ended(self, running: Sequence[Job], leaving: Outcomes) -> Outcomes:
        """Find the jobs that have ended, and may leave beside the jobs that leave anyway."""
        staying = [job for job in running if job not in leaving]
        if self._mode.leaves_early or all(job.has_ended for job in staying):
            return {job: None for job in staying if job.has_ended}
        return {}

    def _unwanted(self, now_s: float, used: int) -> Outcomes:
        """Find the waiting jobs that were cancelled, or that can't end by their deadlines any more."""
        unwanted: Outcomes = {}
        for job in self.waiting:
            needed_s = 0.0
            if job.deadline_s < math.inf:
                needed_s = self._pace.after_s
                for steps, rows in job.phases:
                    needed_s += steps * self._pace.step_s(min(used + rows, self._rows))
            if error := job.refusal(now_s, needed_s):
                unwanted[job] = error
        return unwanted

    def _joining(self, now_s: float, running: Sequence[Job]) -> list[Job]:
        """Take the first jobs in order that fit, at this step and at all their later ones.

        A job that doesn't fit ends the choice: no large job is overtaken.
        """
        chosen: list[Job] = []
        order = sorted(self.waiting, key=lambda job: rank(job, now_s, self._aging_s))
        room = self._rows - sum(job.rows for job in running)
        if not order or order[0].rows > room or (running and not self._mode.joins_running):
            return chosen
        free = Timetable(self._rows, max(job.steps for job in [*running, *self.waiting]))
        for job in running:
            free.take(self._phases(job))
        for job in order:
            if self._mode.equal_steps and chosen and job.steps != chosen[0].steps:
                continue
            phases = self._phases(job)
            if free.first_fit(phases) > 0 or (self._mode.joins_running and len(chosen) == self._max_jobs):
                break
            chosen.append(job)
            free.take(phases)
        return chosen

    def _phases(self, job: Job) -> Phases:
        """Return the rows that a job may take at the next steps: its most, where it may stay longer than its steps."""
        if self._mode.leaves_early and not job.hold_every:
            return job.phases
        return ((FOR_GOOD, most_rows(job.phases)),)
