"""The jobs that are being denoised: which rows each has, how that changes, and a step of all of them."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Collection, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from itertools import count

import numpy as np

from icportrait.backlog import Backlog
from icportrait.contract import Array
from icportrait.loop_times import LoopTimes
from icportrait.presets import Preset
from icportrait.row_latents import Advance, RowLatents, Start
from icportrait.ticket import Ticket


@dataclass(eq=False)
class RunningJob:
    """A job's rows while they are denoised."""

    ticket: Ticket
    rows: list[int]
    """Its slots: one for each portrait, then, with guidance, one more for each with ``F_ref`` = 0."""
    match_confidence: float = math.nan
    joined_ns: int = 0
    conditioned_ns: int = 0
    warp_s: float = 0.0
    engine_s: float = 0.0
    """Of the engines' time so far, its rows' part."""
    steps_shared: list[int] = field(default_factory=list)
    """Rows in use at each step so far."""
    step: int = 0
    """How many are done, or are being done."""
    start: Start | None = field(default=None, repr=False)
    """Made ahead of its joining, where it could be."""

    @property
    def ended(self) -> bool:
        return self.step == len(self.ticket.plan.timesteps)

    @property
    def portrait_rows(self) -> list[int]:
        return self.rows[: self.ticket.job.request.num_portraits]

    @property
    def unconditional_rows(self) -> list[int]:
        return self.rows[self.ticket.job.request.num_portraits :]


@dataclass(frozen=True)
class Change:
    """Who is there from the next step on."""

    running: list[RunningJob]
    joining: list[RunningJob]
    """Those of ``running`` that weren't there before."""
    moves: list[tuple[RunningJob, int, int]]
    """Which of a job's rows goes where: its index in ``rows``, and the row that it shall be in."""
    used_rows: int


class SlotTable:
    """Running jobs in the first rows of the slots, without gaps.

    With guidance a portrait's second row is the twin of its first. What the engine needn't wait for goes into the
    backlog, and a job's start is staged before it joins.
    """

    def __init__(self, slots: LoopTimes, preset: Preset, backlog: Backlog) -> None:
        """Begin without jobs.

        Args:
            slots: where ``F_ref`` is, with the engines behind it.
            preset: the model's geometry.
            backlog: is worked off while an engine runs, and between a ``change`` and the next ``prepare`` or ``plan``.
        """
        self._slots, self._backlog = slots, backlog
        self._latents = RowLatents(preset, slots.rows)
        self.running: list[RunningJob] = []
        self.used_rows = 0
        self.stepped_ns = 0
        """When the last step ended, by ``time.monotonic_ns``."""

    def plan(self, leaving: Collection[RunningJob], joining: Sequence[Ticket]) -> Change:
        """Find rows for those who join, the lowest that are free, and fill the gaps that are left with the last rows.

        Args:
            leaving: running jobs.
            joining: jobs whose rows fit.
        """
        running = [job for job in self.running if job not in leaving]
        owners = {row: (job, index) for job in running for index, row in enumerate(job.rows)}
        free = (row for row in count() if row not in owners)
        joined = [RunningJob(ticket, [next(free) for _ in range(ticket.job.request.rows)]) for ticket in joining]
        used = len(owners) + sum(len(job.rows) for job in joined)
        moves = [(*owners[row], next(free)) for row in sorted(owners) if row >= used]
        return Change(running + joined, joined, moves, used)

    def stage(self, jobs: Sequence[RunningJob]) -> None:
        """Make the starts of planned jobs while the UNet runs, unless a profile's latent can be had only after it.

        What can't be made fails in ``join``, without those that run now.
        """
        for job in jobs:
            if isinstance(job.ticket.job.profile_latent, np.ndarray):
                with suppress(Exception):
                    job.start = self._start(job.ticket)

    def change(self, change: Change) -> None:
        """Let jobs leave, and move rows into the gaps. Those who join have their rows, and ``join`` fills them."""
        self.running, self.used_rows = change.running, change.used_rows
        for job, index, target in change.moves:
            self._slots.move(job.rows[index], target)
            self._latents.move(job.rows[index], target)
        if change.moves:
            self._backlog.add(lambda: self._move(change))

    def _move(self, change: Change) -> None:
        for job, index, target in change.moves:
            self._latents.move_rest(job.rows[index], target)
            job.rows[index] = target

    def join(self, jobs: Sequence[RunningJob], meanwhile: Callable[[], None]) -> dict[RunningJob, Exception]:
        """Run the warping network over jobs and fill their rows.

        Args:
            jobs: at most ``Slots.max_jobs`` of a change's ``joining``.
            meanwhile: see ``Slots.condition``.

        Returns:
            Those whose start couldn't be made, and why; their rows hold nothing of use.
        """
        inputs, rows = [job.ticket.job.inputs for job in jobs], [job.portrait_rows for job in jobs]
        failed: dict[RunningJob, Exception] = {}
        began_ns = time.monotonic_ns()

        def fill() -> None:
            meanwhile()
            for job in jobs:
                try:
                    self._latents.fill(job.rows, job.start or self._start(job.ticket))
                except Exception as error:
                    failed[job] = error
                job.start = None

        confidences = self._slots.condition(inputs, rows, fill)
        now = time.monotonic_ns()
        portraits = sum(map(len, rows))
        for job, confidence in zip(jobs, confidences, strict=True):
            job.match_confidence, job.joined_ns, job.conditioned_ns = float(confidence), began_ns, now
            job.warp_s = self._slots.engine_s
            job.engine_s = job.warp_s * len(job.portrait_rows) / portraits
            if unconditional := job.unconditional_rows:
                self._slots.clear(unconditional)
        return failed

    def _start(self, ticket: Ticket) -> Start:
        request, profile_latent = ticket.job.request, self._slots.to_host(ticket.job.profile_latent)
        return Start.of(ticket.plan, ticket.noise, profile_latent, request.rows // request.num_portraits)

    def prepare(self, stepping: Sequence[RunningJob]) -> None:
        """Say whom the step advances that is about to end, and prepare it; the others' rows stay as they are."""
        advances = []
        for job in stepping:
            settings, job.step = job.ticket.plan.settings, job.step + 1
            following = settings[min(job.step, len(settings) - 1)]
            scale = job.ticket.job.request.guidance_scale
            advances.append(Advance(job.rows, following, job.unconditional_rows, scale))
        self._latents.prepare(self.used_rows, advances)

    def step(self, meanwhile: Callable[[], None]) -> None:
        """One UNet forward over every row in use, then one sampler step for those that ``prepare`` was told.

        Args:
            meanwhile: calls ``prepare``; see ``Slots.predict``.
        """
        canvas, timestep = self._latents.canvas(self.used_rows), self._latents.timestep(self.used_rows)
        self._latents.advance(self._slots.predict(canvas, timestep, meanwhile))
        self.stepped_ns = time.monotonic_ns()
        self._backlog.add(self._latents.complete)
        self._backlog.add(partial(self._charge, self.running, self.used_rows, self._slots.engine_s))

    def _charge(self, running: Sequence[RunningJob], rows: int, engine_s: float) -> None:
        """Add a step's time to all that have rows, held ones too: those are computed with the others."""
        for job in running:
            job.steps_shared.append(rows)
            job.engine_s += engine_s * len(job.rows) / rows

    def is_broken(self, job: RunningJob) -> bool:
        """Whether the last step gave NaN or Inf for a job."""
        return not self._latents.are_finite(job.rows)

    def portrait_latent(self, job: RunningJob) -> Array:
        """A copy of a job's portraits as they are now, noisy until it has ended: [num_portraits, 4, s, s]."""
        return self._latents.latent(job.portrait_rows)

    def clean_latent(self, job: RunningJob) -> Array:
        """A copy of what the last step took the job's portraits for, without noise: [num_portraits, 4, s, s]."""
        return self._latents.clean_latent(job.portrait_rows)
