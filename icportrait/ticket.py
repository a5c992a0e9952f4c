"""A job, its way through the denoising loop, and what comes out of it."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, field

from icportrait.contract import Array
from icportrait.errors import Cancelled, DeadlineMissed, IcPortraitError
from icportrait.request import PortraitRequest
from icportrait.runtime.placement import Placed
from icportrait.sampling import StepPlan

logger = logging.getLogger(__name__)
CANCELLED = "the caller cancelled"


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
    joined_ns: int
    """When its warping began,"""
    conditioned_ns: int
    """when that had ended,"""
    denoised_ns: int
    """and its last step."""
    warp_ms: float
    """The warping network's run, with all that joined beside it."""
    rows_shared: float
    """Rows in use, on average over its steps."""
    engine_ms: float
    """The engines' time that it is charged with: of each run its rows' part."""


OnDone = Callable[[DenoiseResult | IcPortraitError], None]
OnStep = Callable[[int, Callable[[], DenoiseResult]], None]
"""Is told how many steps are done, and may ask for the result that they amount to: the portraits as the last step took
them to be, without noise.
"""


@dataclass(eq=False)
class Ticket:
    """A job on its way through the loop."""

    job: DenoiseJob
    plan: StepPlan
    noise: Array
    """[num_portraits, 4, s, 2 s] float32; its left half is what the held profile is noised with at every step."""
    on_done: OnDone | None
    """None once it was called: who waits for a job may well hold its ticket, and the two would keep each other."""
    on_step: OnStep | None
    priority: int
    deadline_s: float
    arrived_s: float
    wake: Callable[[], None]
    hold_every: int
    """After so many steps each, ``on_step`` may hold the job; 0 for one that is never held."""
    steps_done: int = field(default=0, init=False)
    is_running: bool = field(default=False, init=False)
    is_cancelled: bool = field(default=False, init=False)
    is_held: bool = field(default=False, init=False)
    """Its rows stay as they are, until ``go_on``; the others' are stepped."""

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

    def refusal(self, now_s: float, needed_s: float = 0.0) -> IcPortraitError | None:
        """Why the job is to go no further, if it isn't.

        Args:
            now_s: the loop's clock.
            needed_s: what it would take to begin and end, for one that waits.
        """
        if self.is_cancelled:
            return Cancelled(CANCELLED)
        if now_s >= self.deadline_s:
            return _too_late(f"passed after {self.steps_done} of {self.steps} steps")
        if now_s + needed_s > self.deadline_s:
            return _too_late(f"too near for {self.steps} steps, which begin only now")
        return None

    def answer(self, outcome: DenoiseResult | IcPortraitError) -> None:
        """Call ``on_done``, the first time only; what it raises ends here, for the other jobs' sake."""
        on_done, self.on_done, self.on_step = self.on_done, None, None
        if on_done is None:
            return
        try:
            on_done(outcome)
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


def _too_late(what: str) -> DeadlineMissed:
    return DeadlineMissed(f"deadline_ms: {what}; allow more time, or ask for fewer steps")
