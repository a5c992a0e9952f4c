"""Who joins the batch, and when: the order of waiting requests.

Nothing here runs an engine or reads a clock: times come in as seconds of whichever clock the caller lives by, so that
the server and a simulation in virtual time decide alike.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

AGING_S = 10.0
"""A request moves up a priority class each time it has waited so long: none waits for ever."""


class Ranked(Protocol):
    """What the order of waiting requests depends on."""

    @property
    def priority(self) -> int:
        """Its class, 0 first."""
        ...

    @property
    def deadline_s(self) -> float:
        """When its answer is worth nothing any more; infinite without a deadline."""
        ...

    @property
    def arrived_s(self) -> float: ...


class Queued(Ranked, Protocol):
    """What their joining depends on."""

    @property
    def rows(self) -> int:
        """Slots that it needs."""
        ...

    @property
    def steps(self) -> int:
        """UNet calls that it needs."""
        ...


def rank(item: Ranked, now_s: float, aging_s: float = AGING_S) -> tuple[int, float, float]:
    """The order of waiting requests, the smallest first: class, then deadline, then arrival.

    A request that has waited through all classes is before every one that hasn't, and among its like in the order of
    arrival: none of them waits for ever, whatever deadlines come after it.
    """
    aged = math.floor((now_s - item.arrived_s) / aging_s)
    if aged > item.priority:
        return -1, item.arrived_s, item.arrived_s
    return item.priority - aged, item.deadline_s, item.arrived_s


Item = TypeVar("Item", bound=Queued)


@dataclass(frozen=True)
class BatchingMode:
    """When requests join a batch and leave it."""

    joins_running: bool
    """Between any two steps; else only once all of the batch before have ended."""
    leaves_early: bool
    """When its own steps are done; else with the last of its batch."""
    equal_steps: bool = False
    """Only requests with the same number of steps share a batch."""


BATCHING_MODES = {
    "in-flight": BatchingMode(joins_running=True, leaves_early=True),
    "whole": BatchingMode(joins_running=False, leaves_early=False),
    "whole-leave-early": BatchingMode(joins_running=False, leaves_early=True),
    "whole-equal-steps": BatchingMode(joins_running=False, leaves_early=False, equal_steps=True),
}
"""``whole`` is what servers do that batch requests; the two after it are that at its fairest."""


class Scheduler(Generic[Item]):
    """The queue. Not thread-safe: the loop owns it."""

    def __init__(self, mode: BatchingMode, rows: int, max_jobs: int, aging_s: float = AGING_S) -> None:
        """Make an empty queue.

        Args:
            mode: when requests join.
            rows: slots in all.
            max_jobs: requests that are warped at once.
            aging_s: see ``AGING_S``.
        """
        self.mode, self._rows, self._max_jobs, self._aging_s = mode, rows, max_jobs, aging_s
        self._waiting: list[Item] = []

    def __len__(self) -> int:
        return len(self._waiting)

    @property
    def waiting(self) -> Sequence[Item]:
        """In no order."""
        return self._waiting

    def push(self, item: Item) -> None:
        """Let a request wait."""
        self._waiting.append(item)

    def remove(self, unwanted: Callable[[Item], bool]) -> list[Item]:
        """Take requests out that shall not run."""
        kept: list[Item] = []
        removed: list[Item] = []
        for item in self._waiting:
            (removed if unwanted(item) else kept).append(item)
        self._waiting = kept
        return removed

    def next_to_warp(self, now_s: float, used_rows: int) -> list[Item]:
        """The requests to warp before the next step, if any.

        In-flight, warping and stepping take turns: what runs waits for at most one warping of ``max_jobs`` requests
        between two steps, and what has arrived and finds slots free for at most one step and one such warping a
        ``max_jobs`` of those ahead of it.

        Args:
            now_s: the clock.
            used_rows: slots in use by then.
        """
        if not self.is_open(used_rows):
            return []
        return self._take(now_s, self._rows - used_rows)

    def is_open(self, used_rows: int) -> bool:
        """Whether a request could join beside so many slots in use."""
        return used_rows < self._rows if self.mode.joins_running else not used_rows

    def _take(self, now_s: float, free_rows: int) -> list[Item]:
        """The first in order that fit. The first that doesn't fit ends it: none is overtaken for being large."""
        chosen: list[Item] = []
        for item in sorted(self._waiting, key=lambda item: rank(item, now_s, self._aging_s)):
            if self.mode.equal_steps and chosen and item.steps != chosen[0].steps:
                continue
            if item.rows > free_rows or (self.mode.joins_running and len(chosen) == self._max_jobs):
                break
            chosen.append(item)
            free_rows -= item.rows
        taken = set(map(id, chosen))
        self._waiting = [item for item in self._waiting if id(item) not in taken]
        return chosen
