"""Who is let in: leases that the gateway takes before it decodes a picture, so that a refusal costs no engine anything.

A request is refused where the queue is full, in slots or in bytes of pictures, or where it has a deadline and that, or
one that was promised before, couldn't be kept. When it would end is forecast from measured step times (``forecast``).
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from heapq import heapreplace, nsmallest

from icportrait.errors import Unavailable
from icportrait.loop_times import Pace
from icportrait.metrics import Metrics
from icportrait.scheduling import rank
from icportrait.ticket import Ticket

MARGIN = 1.15
"""What a forecast is multiplied by before a deadline is promised: few that were let in shall be dropped."""
UNKNOWN_RETRY_MS = 1000
"""What a refusal advises before any step was measured."""


@dataclass(frozen=True)
class Demand:
    """What a request will take, as the gateway knows it."""

    rows: int
    steps: int
    priority: int
    deadline_ms: int | None
    arrived_s: float
    """When the gateway got it, by ``time.monotonic``."""
    nbytes: int
    """Of its pictures."""

    @property
    def deadline_s(self) -> float:
        return math.inf if self.deadline_ms is None else self.arrived_s + self.deadline_ms / 1000

    def to_message(self) -> dict[str, float | None]:
        """``control.LeaseAsked``'s fields."""
        return asdict(self)


@dataclass(eq=False)
class Lease:
    """A request that was let in, until it is answered."""

    demand: Demand
    ticket: Ticket | None = None
    """None while it is on its way to the loop."""
    is_denoised: bool = False

    @property
    def is_queued(self) -> bool:
        return not self.is_denoised and (self.ticket is None or not self.ticket.is_running)

    @property
    def steps_left(self) -> int:
        return self.demand.steps - (self.ticket.steps_done if self.ticket else 0)


@dataclass(frozen=True)
class Limits:
    """Of the queue."""

    slots: int
    nbytes: int


def forecast(running: Iterable[tuple[int, int]], queued: Sequence[tuple[int, int]], slots: int) -> list[int]:
    """After how many steps from now each queued request joins the batch, in their order and overtaken by none.

    Args:
        running: for each its slots and the steps that it still has.
        queued: for each its slots and steps, in the order in which they join.
        slots: how many there are.
    """
    free_after = sorted(steps for rows, steps in running for _ in range(rows))
    free_after = ([0] * slots + free_after)[-slots:]
    starts, before = [], 0
    for rows, steps in queued:
        before = max(before, nsmallest(rows, free_after)[-1])
        starts.append(before)
        for _ in range(rows):
            heapreplace(free_after, before + steps)
    return starts


class Admission:
    """The leases of one server. Thread-safe."""

    def __init__(
        self, slots: int, limits: Limits, pace: Pace, clock: Callable[[], float], metrics: Metrics | None = None
    ) -> None:
        """Begin without any.

        Args:
            slots: of the denoising batch.
            limits: of the queue.
            pace: what the loop has measured.
            clock: seconds.
            metrics: where refusals are counted.
        """
        self._slots, self._limits, self._pace, self._clock = slots, limits, pace, clock
        self._metrics = metrics or Metrics()
        self._leases: dict[str, Lease] = {}
        self._lock = threading.Lock()

    def lease(self, key: str, demand: Demand) -> Lease:
        """Let a request in.

        Raises:
            Unavailable: not now; the text ends with ``retry_after_ms``.
        """
        with self._lock:
            self._check(demand)
            return self._grant(key, demand)

    def grant(self, key: str, demand: Demand) -> Lease:
        """Let a request in that was let in before, by a loop that has ended."""
        with self._lock:
            return self._grant(key, demand)

    def _grant(self, key: str, demand: Demand) -> Lease:
        lease = self._leases[key] = Lease(demand)
        return lease

    def get(self, key: str) -> Lease | None:
        with self._lock:
            return self._leases.get(key)

    def release(self, key: str) -> Lease | None:
        """Forget a request, and give what there was of it."""
        with self._lock:
            return self._leases.pop(key, None)

    @property
    def queued_requests(self) -> int:
        return len(self._queued())

    @property
    def queued_slots(self) -> int:
        """Slots that are asked for and aren't there: what has slots waiting for it isn't queued."""
        return max(0, self._asked_slots - self._slots)

    @property
    def _asked_slots(self) -> int:
        return sum(lease.demand.rows for lease in list(self._leases.values()) if not lease.is_denoised)

    @property
    def admitted_bytes(self) -> int:
        return sum(lease.demand.nbytes for lease in list(self._leases.values()))

    def _queued(self) -> list[Lease]:
        return [lease for lease in list(self._leases.values()) if lease.is_queued]

    def _check(self, demand: Demand) -> None:
        queued, used = self.queued_slots, self.admitted_bytes
        too_many = self._asked_slots + demand.rows - self._slots - self._limits.slots
        if too_many > 0:
            raise self._refusal(
                "queue_slots",
                f"the queue is full ({queued} of {self._limits.slots} slots, and {demand.rows} more are asked for)",
                self._room_after_ms(too_many, lambda lease: 0 if lease.is_denoised else lease.demand.rows),
            )
        if used and used + demand.nbytes > self._limits.nbytes:
            raise self._refusal(
                "queue_bytes",
                f"the queue is full ({used:,} of {self._limits.nbytes:,} bytes of pictures, and {demand.nbytes:,} more "
                "came)",
                self._room_after_ms(used + demand.nbytes - self._limits.nbytes, lambda lease: lease.demand.nbytes),
            )
        if demand.deadline_s < math.inf:
            self._check_deadlines(demand)

    def _check_deadlines(self, demand: Demand) -> None:
        now = self._clock()
        before, new = self._ends(now), Lease(demand)
        after = self._ends(now, new)
        late_s = after[new] - demand.deadline_s
        if late_s > 0:
            needed_ms = 1000 * (after[new] - demand.arrived_s)
            raise self._refusal(
                "deadline",
                f"deadline_ms: {demand.deadline_ms}, and it would take about {needed_ms:.0f} ms now; allow more time, "
                "ask for fewer steps, or try again",
                1000 * late_s,
            )
        for lease, end_s in after.items():
            if lease is not new and end_s > lease.demand.deadline_s >= before[lease]:
                raise self._refusal(
                    "deadline",
                    "deadline_ms: keeping it would break a deadline that was promised to another; allow more time, or "
                    "try again",
                    1000 * (end_s - lease.demand.deadline_s),
                )

    def _ends(self, now_s: float, new: Lease | None = None) -> dict[Lease, float]:
        """When each queued request is forecast to be answered."""
        queued = self._in_order(now_s, new)
        asked = self._asked_slots + (new.demand.rows if new else 0)
        step_s = self._pace.step_s(min(asked, self._slots))
        ends = {}
        for lease, start in zip(queued, self._starts(queued), strict=True):
            arrives_s = now_s if lease.ticket else lease.demand.arrived_s + self._pace.before_s
            begins_s = max(now_s + start * step_s, arrives_s)
            # A step more: it waits for one that runs, and is warped.
            left_s = begins_s - now_s + (lease.demand.steps + 1) * step_s + self._pace.after_s
            ends[lease] = now_s + MARGIN * left_s
        return ends

    def _in_order(self, now_s: float, new: Lease | None = None) -> list[Lease]:
        return sorted([*self._queued(), *([new] if new else [])], key=lambda lease: rank(lease.demand, now_s))

    def _starts(self, queued: Sequence[Lease]) -> list[int]:
        running = [
            (lease.demand.rows, lease.steps_left)
            for lease in self._leases.values()
            if not lease.is_queued and not lease.is_denoised
        ]
        return forecast(running, [(lease.demand.rows, lease.demand.steps) for lease in queued], self._slots)

    def _room_after_ms(self, missing: int, size: Callable[[Lease], int]) -> float:
        """Until requests that have so much between them have ended."""
        queued = self._in_order(self._clock())
        ends = [(lease.steps_left, lease) for lease in self._leases.values() if not lease.is_queued]
        for lease, start in zip(queued, self._starts(queued), strict=True):
            ends.append((start + lease.demand.steps, lease))
        for steps, lease in sorted(ends, key=lambda end: end[0]):
            missing -= size(lease)
            if missing <= 0:
                return 1000 * (steps + 1) * self._pace.step_s(self._slots)
        return 0.0

    def _refusal(self, reason: str, text: str, after_ms: float) -> Unavailable:
        self._metrics.count("refusals_total", reason=reason)
        return Unavailable(f"{text}; retry_after_ms: {math.ceil(after_ms) or UNKNOWN_RETRY_MS}")
