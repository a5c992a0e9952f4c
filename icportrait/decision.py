"""Who leaves the batch and who joins it before its next step.

Nothing here runs an engine, owns a thread or reads a clock: the same decisions can be made in virtual time.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from icportrait.errors import IcPortraitError
from icportrait.loop_times import Pace
from icportrait.scheduling import BatchingMode, Scheduler
from icportrait.slot_table import Change, RunningJob, SlotTable
from icportrait.ticket import Ticket

Outcomes = dict[RunningJob, IcPortraitError | None]
"""Why jobs leave: an error, or that they have ended."""


@dataclass(frozen=True)
class Decision:
    """What happens before the next step."""

    leaving: Outcomes
    change: Change
    is_open: bool
    """Whether somebody who arrives until then could join too."""
    until_s: float
    """When the first deadline of those who run on passes."""
    steps: bool
    """Whether anybody is to be stepped."""


def stepping_jobs(running: Sequence[RunningJob]) -> list[RunningJob]:
    """Those whose rows the next step advances."""
    return [job for job in running if not job.ended and not job.ticket.is_held]


class Decider:
    """The queue, and the rules by which jobs get out of it and out of the batch."""

    def __init__(self, mode: BatchingMode, rows: int, max_jobs: int, pace: Pace) -> None:
        """Begin with an empty queue.

        Args:
            mode: when jobs join and leave.
            rows: slots in all.
            max_jobs: jobs that are warped at once.
            pace: says whether a deadline can still be kept.
        """
        self._mode, self._rows, self._pace = mode, rows, pace
        self._scheduler: Scheduler[Ticket] = Scheduler(mode, rows, max_jobs)

    @property
    def waiting(self) -> Sequence[Ticket]:
        """In no order."""
        return self._scheduler.waiting

    def push(self, ticket: Ticket) -> None:
        """Let a job wait."""
        self._scheduler.push(ticket)

    def decide(
        self,
        table: SlotTable,
        broken: Mapping[RunningJob, IcPortraitError],
        now_s: float,
        ahead_s: float = 0.0,
    ) -> Decision:
        """Decide, and answer those who wait in vain.

        Args:
            table: the jobs that run, at the step where they are or, ahead of its end, will be.
            broken: those of them that can't go on.
            now_s: the clock.
            ahead_s: how long a step still takes that runs.
        """
        leaving = self._leaving(table.running, broken, now_s)
        staying = table.used_rows - sum(len(job.rows) for job in leaving)
        self._drop_waiting(now_s, ahead_s, staying)
        change = table.plan(leaving, self._scheduler.next_to_warp(now_s, staying))
        is_open = self._scheduler.is_open(staying) and change.used_rows < self._rows
        until_s = min((job.ticket.deadline_s for job in change.running), default=math.inf)
        return Decision(leaving, change, is_open, until_s, bool(stepping_jobs(change.running)))

    def revoke(self, decision: Decision) -> None:
        """Let those wait on who should have joined."""
        for job in decision.change.joining:
            self._scheduler.push(job.ticket)

    def _leaving(
        self,
        running: Sequence[RunningJob],
        broken: Mapping[RunningJob, IcPortraitError],
        now_s: float,
    ) -> Outcomes:
        """Those that have ended or broken, whose caller has gone or whose deadline has passed."""
        leaving: Outcomes = {**broken}
        leaving |= self._ended(running, leaving)
        for job in running:
            if job not in leaving and (error := job.ticket.refusal(now_s)):
                leaving[job] = error
        return leaving | self._ended(running, leaving)

    def _ended(self, running: Sequence[RunningJob], leaving: Outcomes) -> Outcomes:
        """Those that have, and may leave beside the ones that leave anyway."""
        staying = [job for job in running if job not in leaving]
        if self._mode.leaves_early or all(job.ended for job in staying):
            return {job: None for job in staying if job.ended}
        return {}

    def _drop_waiting(self, now_s: float, ahead_s: float, staying: int) -> None:
        """Let those go whose caller has gone or whose deadline has passed, or will have before they could end."""
        unwanted = {}
        for ticket in self._scheduler.waiting:
            needed_s = 0.0
            if ticket.deadline_s < math.inf:
                step_s = self._pace.step_s(min(staying + ticket.rows, self._rows))
                needed_s = ahead_s + ticket.steps * step_s + self._pace.after_s
            if error := ticket.refusal(now_s, needed_s):
                unwanted[ticket] = error
        self._scheduler.remove(unwanted.__contains__)
        for ticket, error in unwanted.items():
            ticket.answer(error)
