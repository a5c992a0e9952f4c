"""The admission of requests. The gateway takes a lease before it decodes a picture, so a refusal costs no engine time.

A request is refused where the queue is full, in slots or in bytes of pictures. It is also refused where its deadline,
or a deadline that was promised before, couldn't be kept. A request's end is forecast from measured step times
(``forecast``).
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from icportrait.errors import Unavailable
from icportrait.loop.job import Job, State
from icportrait.metrics import Metrics
from icportrait.pace import Pace
from icportrait.phases import Phases, Timetable, remaining
from icportrait.policy import rank
from icportrait.serving.control import Demand, Peer

MARGIN = 1.15
"""Factor on a forecast before a deadline is promised, so that few admitted requests are dropped."""
UNKNOWN_RETRY_MS = 1000
"""Advice of a refusal before any step was measured."""


@dataclass(eq=False)
class Lease:
    """A request that was let in, until it is answered."""

    key: str
    demand: Demand
    peer: Peer | None = None
    """The gateway's; a standalone request has none."""
    job: Job | None = None
    """None while the request is on its way to the loop."""
    denoised_s: float | None = None
    """Time of the loop's answer, by ``time.monotonic``."""
    is_cancelled: bool = False
    has_missed_deadline: bool = False
    """The miss was counted."""
    has_unseen_preview: bool = False
    waiting_preview: Callable[[], None] | None = None
    lock: threading.Lock = field(default_factory=threading.Lock, repr=False)
    """Guards the fields from ``job`` on where two threads may change them."""

    @property
    def is_denoised(self) -> bool:
        return self.denoised_s is not None

    @property
    def is_queued(self) -> bool:
        return not self.is_denoised and (self.job is None or self.job.state is State.WAITING)

    @property
    def phases_left(self) -> Phases:
        return remaining(self.demand.phases, self.job.steps_done if self.job else 0)

    @property
    def steps_left(self) -> int:
        return sum(steps for steps, _ in self.phases_left)

    def cancel(self) -> None:
        """End the request's job, now or as soon as it comes."""
        with self.lock:
            self.is_cancelled = True
            if self.job:
                self.job.cancel()


@dataclass(frozen=True)
class Limits:
    """The limits of the queue."""

    slots: int
    nbytes: int


def forecast(running: Sequence[Phases], queued: Sequence[Phases], slots: int) -> list[int]:
    """Return the steps from now until each queued request joins the batch, in their order; none overtakes another.

    Args:
        running: for each the phases that it still has.
        queued: for each its phases, in the order in which they join.
        slots: how many there are.
    """
    free = Timetable(slots, sum(steps for phases in (*running, *queued) for steps, _ in phases))
    for phases in running:
        free.take(phases)
    starts, before = [], 0
    for phases in queued:
        before = free.first_fit(phases, before)
        starts.append(before)
        free.take(phases, before)
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

    def lease(self, key: str, demand: Demand, peer: Peer | None = None) -> Lease:
        """Let a request in.

        Raises:
            Unavailable: not now; the text ends with ``retry_after_ms``.
        """
        with self._lock:
            self._check(demand)
            return self._grant(key, demand, peer)

    def grant(self, key: str, demand: Demand, peer: Peer | None = None) -> Lease:
        """Let a request in that was let in before, by a loop that has ended."""
        with self._lock:
            return self._grant(key, demand, peer)

    def _grant(self, key: str, demand: Demand, peer: Peer | None) -> Lease:
        lease = self._leases[key] = Lease(key, demand, peer)
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
        """Return how many slots are asked for beyond the existing ones. A request that slots wait for isn't queued."""
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
        before, new = self._ends(now), Lease("", demand)
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
        """Forecast the time of each queued request's answer."""
        queued = self._in_order(now_s, new)
        active = [lease for lease in [*self._leases.values(), *([new] if new else [])] if not lease.is_denoised]
        step_s = self._pace.step_s(min(round(sum(lease.demand.mean_rows for lease in active)), self._slots))
        ends = {}
        for lease, start in zip(queued, self._starts(queued), strict=True):
            arrives_s = now_s if lease.job else lease.demand.arrived_s + self._pace.before_s
            begins_s = max(now_s + start * step_s, arrives_s)
            # A step more: it waits for one that runs, and is warped.
            left_s = begins_s - now_s + (lease.demand.steps + 1) * step_s + self._pace.after_s
            ends[lease] = now_s + MARGIN * left_s
        return ends

    def _in_order(self, now_s: float, new: Lease | None = None) -> list[Lease]:
        return sorted([*self._queued(), *([new] if new else [])], key=lambda lease: rank(lease.demand, now_s))

    def _starts(self, queued: Sequence[Lease]) -> list[int]:
        running = [
            lease.phases_left for lease in self._leases.values() if not lease.is_queued and not lease.is_denoised
        ]
        return forecast(running, [lease.demand.phases for lease in queued], self._slots)

    def _room_after_ms(self, missing: int, size: Callable[[Lease], int]) -> float:
        """Estimate the milliseconds until requests that hold ``missing`` between them have ended."""
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
