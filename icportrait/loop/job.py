"""A job: one request on its way through the denoising loop, and its result."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum, auto
from functools import cached_property

from icportrait.contract import Array
from icportrait.diffusion.sampling import Trajectory
from icportrait.errors import Cancelled, DeadlineMissed, IcPortraitError
from icportrait.phases import Phases, remaining
from icportrait.request import PortraitRequest

logger = logging.getLogger(__name__)
CANCELLED = "the caller cancelled"


class State(Enum):
    """The state of a job."""

    WAITING = auto()
    """In the queue, or on its way there."""
    RUNNING = auto()
    """In rows of the batch, which every step advances."""
    HELD = auto()
    """In rows of the batch, which stay as they are."""
    DONE = auto()
    """Answered."""


@dataclass
class Account:
    """A job's share of the engines so far. Times are readings of ``time.monotonic_ns``."""

    match_confidence: float = math.nan
    joined_ns: int = 0
    """Begin of the job's warping."""
    conditioned_ns: int = 0
    """End of the job's warping."""
    denoised_ns: int = 0
    """End of the job's last step."""
    warp_ms: float = 0.0
    """The warping network's run, with all jobs that joined together."""
    engine_ms: float = 0.0
    """The engines' time that the job is charged with: its rows' share of each run."""
    rows_of_steps: int = 0
    """Rows in use, summed over the steps that the job was in the batch for."""
    steps_in_batch: int = 0

    @property
    def rows_shared(self) -> float:
        """Return the rows in use, on average over the job's steps."""
        return self.rows_of_steps / max(1, self.steps_in_batch)


@dataclass(frozen=True)
class DenoiseResult:
    """The result of a job."""

    portrait_latent: Array
    """[num_portraits, 4, s, s] float32."""
    account: Account


OnDone = Callable[[DenoiseResult | IcPortraitError], None]
OnStep = Callable[[int, Callable[[], DenoiseResult]], None]
"""Takes the number of steps done, and a function that returns the result so far.

The result so far is the last step's estimate of the portraits without noise.
"""


@dataclass(eq=False)
class Job:
    """One request on its way through the loop.

    A caller sets the first nine fields. The loop sets the others, and reads and writes them on its own thread only.
    """

    request: PortraitRequest
    profile_latent: Array
    """[1, 4, s, s] float32."""
    reference_latent: Array
    """[1, 4, s, s] float32."""
    visibility: Array
    """[1, 1, s, s]."""
    on_done: OnDone | None = field(repr=False)
    """The loop's thread calls it once, then sets it to None, because the caller may hold the job and be held by it."""
    on_step: OnStep | None = field(default=None, repr=False)
    """The loop's thread calls it after every step, usually while the next step runs."""
    priority: int = 1
    """Class of the job; 0 goes first."""
    deadline_s: float = math.inf
    """A time of the loop's clock. A job that hasn't ended by then is dropped before a step begins."""
    hold_every: int = 0
    """Steps between two reports that may hold the job; 0 for a job that is never held."""

    trajectory: Trajectory = field(init=False, repr=False)
    noise: Array = field(init=False, repr=False)
    """[num_portraits, 4, s, 2 s] float32. The left half noises the held profile at every step."""
    arrived_s: float = field(default=0.0, init=False)
    tell: Callable[[Callable[[], None]], None] = field(init=False, repr=False)
    """Puts a message into the loop's inbox."""
    state: State = field(default=State.WAITING, init=False)
    is_cancelled: bool = field(default=False, init=False)
    failure: IcPortraitError | None = field(default=None, init=False)
    """Set where the job's rows hold nothing of use any more."""
    slots: list[int] = field(default_factory=list, init=False)
    """The job's rows in the batch: one a portrait, then, at guided steps, one more a portrait with ``F_ref`` = 0."""
    steps_begun: int = field(default=0, init=False)
    steps_done: int = field(default=0, init=False)
    """Steps that were reported."""
    account: Account = field(default_factory=Account, init=False, repr=False)

    @cached_property
    def _guided_steps(self) -> range:
        return self.request.guided_steps

    @cached_property
    def _all_phases(self) -> Phases:
        return self.request.phases

    @property
    def rows(self) -> int:
        """Return the slots that the job needs at its next step. A job that has ended needs those of its last step."""
        is_guided = min(self.steps_begun, self.request.num_inference_steps - 1) in self._guided_steps
        return self.request.num_portraits * (2 if is_guided else 1)

    @property
    def phases(self) -> Phases:
        """Return the slots that the job needs at the steps that it still has."""
        return remaining(self._all_phases, self.steps_begun)

    @property
    def steps(self) -> int:
        """Return the UNet runs that the job needs."""
        return len(self.trajectory.timesteps)

    @property
    def has_ended(self) -> bool:
        """Tell whether the job has had all its steps."""
        return self.steps_begun == self.steps

    @property
    def portrait_slots(self) -> list[int]:
        return self.slots[: self.request.num_portraits]

    @property
    def unconditional_slots(self) -> list[int]:
        return self.slots[self.request.num_portraits :]

    @property
    def may_be_held(self) -> bool:
        """Tell whether the report of the step that was begun last may hold the job."""
        return self.hold_every > 0 and self.steps_begun % self.hold_every == 0

    def cancel(self) -> None:
        """Drop the job before the next step, from any thread; ``on_done`` then gets ``Cancelled``."""
        self.is_cancelled = True
        self.tell(lambda: None)

    def hold(self) -> None:
        """Step the job no further for now; from ``on_step`` only."""
        if self.state is State.RUNNING:
            self.state = State.HELD

    def go_on(self) -> None:
        """Undo ``hold``, from any thread."""
        self.tell(self._go_on)

    def _go_on(self) -> None:
        if self.state is State.HELD:
            self.state = State.RUNNING

    def refusal(self, now_s: float, needed_s: float = 0.0) -> IcPortraitError | None:
        """Return the reason to drop the job, or None where there is none.

        Args:
            now_s: the loop's clock.
            needed_s: the time that a waiting job needs from its first step to its answer.
        """
        if self.is_cancelled:
            return Cancelled(CANCELLED)
        if now_s >= self.deadline_s:
            return _too_late(f"passed after {self.steps_begun} of {self.steps} steps")
        if now_s + needed_s > self.deadline_s:
            return _too_late(f"too near for {self.steps} steps, which begin only now")
        return None

    def answer(self, outcome: DenoiseResult | IcPortraitError) -> None:
        """Call ``on_done``, the first time only. An exception of ``on_done`` ends here, for the other jobs' sake."""
        self.state = State.DONE
        on_done, self.on_done, self.on_step = self.on_done, None, None
        if on_done is None:
            return
        try:
            on_done(outcome)
        except Exception:
            logger.exception("an answer could not be delivered")

    def report(self, result: Callable[[], DenoiseResult]) -> None:
        """Call ``on_step``. An exception of ``on_step`` ends here."""
        self.steps_done += 1
        if self.on_step is None:
            return
        try:
            self.on_step(self.steps_done, result)
        except Exception:
            logger.exception("a step could not be reported")


def _too_late(what: str) -> DeadlineMissed:
    return DeadlineMissed(f"deadline_ms: {what}; allow more time, or ask for fewer steps")
