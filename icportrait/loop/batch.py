"""The jobs that are being denoised: each job's rows, how they change, and a step of all of them.

Jobs have the first rows of the slots, without gaps. At a guided step a portrait's second row is the twin of its first.

A turn calls, in this order:

    complete          the rest of the last step, where jobs leave or change their rows: it is read before rows move
    rearrange         jobs leave, jobs give rows back or get rows, and the last rows fill the gaps
    launch_warping    the warping network begins over jobs that join
    complete          the rest of the last step, while an engine runs
    fill              the joining jobs' latents
    wait_warping      the warping network has ended
    launch            the UNet begins
    complete          as above, where no job joins
    prepare           all of the sampler's step that doesn't need the UNet's output
    wait              the UNet has ended, and every row that is stepped has its next canvas
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from itertools import count

from icportrait.contract import Array
from icportrait.diffusion.latents import RowLatents
from icportrait.loop.job import DenoiseResult, Job, State
from icportrait.loop.times import Times
from icportrait.presets import Preset
from icportrait.runtime import Slots


class Batch:
    """Running jobs in the first rows of the slots. Not thread-safe: the loop owns it."""

    def __init__(
        self, slots: Slots, preset: Preset, times: Times, latents: Callable[[Preset, int], RowLatents] = RowLatents
    ) -> None:
        """Begin without jobs.

        Args:
            slots: where ``F_ref`` is, with the engines behind it.
            preset: the model's geometry.
            times: is told when engines begin and end.
            latents: makes the latents of a number of rows.
        """
        self._slots, self._times = slots, times
        self._latents = latents(preset, slots.rows)
        self.running: list[Job] = []
        self.used_rows = 0
        self._incomplete: tuple[list[Job], int, float, int] | None = None
        """The last step's jobs, rows in use, seconds, and end by ``time.monotonic_ns``, until ``complete``."""

    @property
    def stepping(self) -> list[Job]:
        """Return the jobs that the next step advances. The rows of the others stay as they are."""
        return [job for job in self.running if job.state is State.RUNNING and not job.has_ended]

    @property
    def is_changing(self) -> bool:
        """Tell whether guidance begins or ends for a job with the next step, so that the job's rows change."""
        return any(len(job.slots) != job.rows for job in self.running)

    def rearrange(self, leaving: Collection[Job], joining: Sequence[Job]) -> None:
        """Let jobs leave, give unconditional rows back, and give jobs the lowest free rows; then close the gaps.

        Args:
            leaving: jobs of the batch, of which the last step is complete, or jobs that never were in it.
            joining: jobs whose rows fit. Where running jobs change their rows, the last step is complete.
        """
        if not leaving and not joining and not self.is_changing:
            return
        self.running = [job for job in self.running if job not in leaving]
        for job in self.running:
            del job.slots[job.rows :]
        owners = {row: (job, index) for job in self.running for index, row in enumerate(job.slots)}
        free = (row for row in count() if row not in owners)
        for job in self.running:
            for portrait in job.slots[: job.rows - len(job.slots)]:
                job.slots.append(next(free))
                self._latents.move(portrait, job.slots[-1])
                self._slots.clear(job.slots[-1:])
        for job in joining:
            job.slots, job.state = [next(free) for _ in range(job.rows)], State.RUNNING
        self.running += joining
        self.used_rows = sum(job.rows for job in self.running)
        for row in [row for row in sorted(owners) if row >= self.used_rows]:
            job, index = owners[row]
            job.slots[index] = next(free)
            self._slots.move(row, job.slots[index])
            self._latents.move(row, job.slots[index])

    def launch_warping(self, jobs: Sequence[Job]) -> None:
        """Begin to run the warping network over joining jobs, at most ``Slots.max_jobs``."""
        self._times.begin()
        now_ns = time.monotonic_ns()
        for job in jobs:
            job.account.joined_ns = now_ns
        names = ("profile_latent", "reference_latent", "visibility")
        inputs = [{name: getattr(job, name) for name in names} for job in jobs]
        try:
            self._slots.launch_warping(inputs, [job.portrait_slots for job in jobs])
        except BaseException:
            self._times.end()
            raise

    def fill(self, job: Job) -> None:
        """Put a joining job's first canvas and latents into its rows."""
        self._latents.fill(job.slots, job.trajectory, job.noise, job.profile_latent)

    def wait_warping(self, jobs: Sequence[Job]) -> None:
        """Wait for the warping network over the jobs that ``launch_warping`` was given."""
        engine_s = None
        try:
            confidences = self._slots.wait_warping()
            engine_s = self._slots.engine_s
        finally:
            warp_s = self._times.end(engine_s)
        self._times.warped(warp_s)
        now_ns, portraits = time.monotonic_ns(), sum(job.request.num_portraits for job in jobs)
        for job, confidence in zip(jobs, confidences, strict=True):
            account = job.account
            account.match_confidence, account.conditioned_ns, account.warp_ms = float(confidence), now_ns, 1000 * warp_s
            account.engine_ms = account.warp_ms * job.request.num_portraits / portraits
            if job.unconditional_slots:
                self._slots.clear(job.unconditional_slots)

    def launch(self) -> None:
        """Begin a step: one UNet run over every row in use."""
        self._times.begin(self.used_rows)
        try:
            self._slots.launch(self._latents.canvas(self.used_rows), self._latents.timestep(self.used_rows))
        except BaseException:
            self._times.end()
            raise

    def prepare(self, stepping: Sequence[Job]) -> None:
        """Prepare the sampler's step of jobs while the UNet runs."""
        following: dict[int, Array] = {}
        guided: list[tuple[int, int, float]] = []
        for job in stepping:
            job.steps_begun += 1
            following |= dict.fromkeys(job.slots, job.trajectory.settings[min(job.steps_begun, job.steps - 1)])
            scales = [job.request.guidance_scale] * len(job.unconditional_slots)
            guided += zip(job.portrait_slots, job.unconditional_slots, scales, strict=False)
        self._latents.prepare(self.used_rows, following, guided)

    def wait(self) -> None:
        """Wait for the UNet, and make the next canvas of every row that was prepared."""
        measured_s = None
        try:
            noise_pred = self._slots.wait()
            measured_s = self._slots.engine_s
        finally:
            engine_s = self._times.end(measured_s)
        self._latents.advance(noise_pred)
        self._times.stepped(self.used_rows, engine_s)
        self._incomplete = (self.running, self.used_rows, engine_s, time.monotonic_ns())

    def complete(self) -> None:
        """Finish the last step's arithmetic, and charge the step's time by rows.

        Held jobs are charged too, because their rows are computed with the others.
        """
        if self._incomplete is None:
            return
        self._latents.complete()
        (running, used_rows, engine_s, now_ns), self._incomplete = self._incomplete, None
        for job in running:
            account = job.account
            account.denoised_ns = now_ns
            account.rows_of_steps += used_rows
            account.steps_in_batch += 1
            account.engine_ms += 1000 * engine_s * len(job.slots) / used_rows

    def is_finite(self, job: Job) -> bool:
        """Tell whether the last step gave neither NaN nor Inf for a job."""
        return self._latents.are_finite(job.slots)

    def result(self, job: Job) -> DenoiseResult:
        """Return the result of a job that has had all its steps, with a copy of its portraits."""
        return DenoiseResult(self._latents.latent(job.portrait_slots), replace(job.account))

    def preview(self, job: Job) -> DenoiseResult:
        """Return a job's result so far, with the last step's estimate of its portraits without noise."""
        return DenoiseResult(self._latents.clean_latent(job.portrait_slots), replace(job.account))
