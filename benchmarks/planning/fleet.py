"""A fleet in virtual time, whose replicas come and go by the autoscaler's rule while requests come.

Each replica is a ``SimulatedServer`` with a clock of its own that a coordinator lets go on, moment by moment. A
balancer gives a request to the ready replica with the fewest under way, as HAProxy's ``leastconn`` does. Of Prometheus
there is the sampling: each replica's series are read every ``scrape_s``, the rules evaluated every ``evaluate_s``, and
the autoscaler reads what was evaluated last.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from benchmarks.planning.evaluation import quantile
from benchmarks.planning.profile import ServiceProfile
from benchmarks.planning.scaling_rule import QUEUE, SLOTS, Autoscaler, Rule, rate
from benchmarks.planning.simulation import OK, Passage, ServerSettings, SimulatedServer
from benchmarks.planning.virtual import VirtualTime
from benchmarks.planning.workload import Call

NOBODY = "nobody"
"""Code of a request that found no replica ready."""
LEAST_RATE_PER_S = 0.1
"""Least pace in ``icportrait:queue_s``: a replica that answers nothing counts as one that answers so much."""


@dataclass(frozen=True)
class FleetSettings:
    """The autoscaler's surroundings."""

    rule: Rule
    cold_start_s: float
    """From a replica's start until it is ready."""
    scrape_s: float = 15.0
    evaluate_s: float = 15.0
    window_s: float = 60.0
    """Window of the rate in ``icportrait:queue_s``."""
    drain_s: float = 15.0
    """A replica that is to end stays at least so long."""

    def faster(self, factor: float) -> FleetSettings:
        """Return the settings with all times but the cold start's a factor shorter."""
        times = {name: getattr(self, name) / factor for name in ("scrape_s", "evaluate_s", "window_s", "drain_s")}
        return FleetSettings(self.rule.faster(factor), self.cold_start_s, **times)


@dataclass(frozen=True)
class Point:
    """The fleet at a moment at which the autoscaler looked."""

    at_s: float
    wanted: int
    ready: int
    metrics: dict[str, float]


@dataclass(frozen=True)
class FleetRun:
    """A fleet's run."""

    passages: Sequence[Passage]
    points: Sequence[Point]
    replica_s: float
    """Seconds of all replicas from their start to their end, that is what is paid."""
    duration_s: float

    def goodput(self, limit_ms: float) -> float:
        """Return the share of requests answered with portraits within a limit."""
        good = sum(each.code == OK and 1000 * each.latency_s <= limit_ms for each in self.passages)
        return good / max(len(self.passages), 1)

    def quantile_ms(self, share: float) -> float:
        """Return a quantile of the latency; a request without portraits takes for ever."""
        found = [1000 * each.latency_s if each.code == OK else math.inf for each in self.passages]
        return quantile(np.array(found), share)

    @property
    def refused(self) -> int:
        """Return the requests without portraits."""
        return sum(each.code != OK for each in self.passages)

    @property
    def most(self) -> int:
        """Return the largest number of replicas that was wanted."""
        return max(point.wanted for point in self.points)


class _Led(VirtualTime):
    """A clock of a thread of its own, which goes on no further than it is let."""

    def __init__(self, began_s: float) -> None:
        super().__init__()
        self.now_s = self._until_s = began_s
        self._wakes_s = -math.inf
        self._goes, self._rests = threading.Semaphore(0), threading.Semaphore(0)
        self._is_ending = False

    def advance(self, until_s: float) -> None:
        """Let it go on to a moment, and wait until it has come there. Called by the coordinator."""
        self._until_s = until_s
        next_s = self._events[0][0] if self._events else math.inf
        # Most of the time it has nothing to do until then, and waking it takes longer than what it would do.
        if min(self._wakes_s, next_s) <= until_s:
            self._wake()

    def end(self) -> None:
        """Let it go on to its end."""
        self._until_s, self._is_ending = math.inf, True
        self._wake()

    def begin(self) -> None:
        """Wait for the first moment; the first that its own thread does."""
        self._goes.acquire()

    def finish(self) -> None:
        """Let the coordinator go on; the last that its own thread does."""
        self._rests.release()

    def next(self) -> bool:
        """Let the next event happen, once the clock may go so far. Return False at the end."""
        while not self._events or self._events[0][0] > self._until_s:
            if self._is_ending:
                return False
            self._rest(math.inf)
        return super().next()

    def wait_until(self, time_s: float) -> None:
        """Let all events happen until a moment, once the clock may go so far."""
        while self._until_s < time_s:
            super().wait_until(self._until_s)
            self._rest(time_s)
        super().wait_until(time_s)

    def _wake(self) -> None:
        self._goes.release()
        self._rests.acquire()

    def _rest(self, wakes_s: float) -> None:
        self._wakes_s = wakes_s
        self._rests.release()
        self._goes.acquire()
        self._wakes_s = -math.inf


@dataclass(eq=False)
class _Replica:
    """A server with a thread of its own; its clock is led by the coordinator."""

    server: SimulatedServer
    time: _Led
    began_s: float
    ready_s: float
    samples: list[tuple[float, float, int, int]] = field(default_factory=list)
    """Moments with answers by then, queued requests and active slots."""
    ends_s: float | None = None
    """Set once it gets nothing new: the least moment of its end."""
    is_over: bool = False

    def __post_init__(self) -> None:
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def scrape(self, now_s: float, keep_s: float) -> None:
        server = self.server
        sample = now_s, float(server.answers), server.queued_requests, server.active_slots
        self.samples = [*(each for each in self.samples if each[0] >= now_s - keep_s), sample]

    def end(self) -> None:
        self.time.end()
        self._thread.join()
        self.is_over = True

    def _run(self) -> None:
        self.time.begin()
        try:
            self.server.serve()
        finally:
            self.time.finish()


class Fleet:
    """A fleet at work; it runs once."""

    def __init__(
        self,
        profile: ServiceProfile,
        settings: FleetSettings,
        replicas: int,
        server: ServerSettings | None = None,
        is_fixed: bool = False,
        begins_s: float = 0.0,
    ) -> None:
        """Begin with replicas that are ready.

        Args:
            profile: of each replica.
            settings: of the autoscaler and its surroundings.
            replicas: at the beginning.
            server: of each replica.
            is_fixed: they stay as many.
            begins_s: moment at which the autoscaler begins.
        """
        self._begins_s = begins_s
        self._profile, self._settings, self._server, self._is_fixed = profile, settings, server, is_fixed
        self._autoscaler = Autoscaler(settings.rule, replicas)
        self._replicas: list[_Replica] = []
        self._ended_s, self._turn = 0.0, 0
        self._queue_s = 0.0
        """The rules' values, as evaluated last and added."""
        self._points: list[Point] = []
        for _ in range(replicas):
            self._start(0.0, 0.0)

    def run(self, calls: Sequence[Call], duration_s: float) -> FleetRun:
        """Send requests at their moments, in order, and run until all are answered."""
        passages, sent = [], 0
        for at_s, event in self._ticks(duration_s):
            while sent < len(calls) and calls[sent].send_s <= at_s:
                passages.append(self._send(calls[sent]))
                sent += 1
            self._advance(at_s)
            event(at_s)
        for replica in self._replicas:
            replica.end()
        paid_s = self._ended_s + sum(duration_s - replica.began_s for replica in self._replicas)
        return FleetRun(passages, self._points, paid_s, duration_s)

    def _ticks(self, duration_s: float) -> list[tuple[float, Callable[[float], None]]]:
        """Return what happens beside requests, in order; at one moment scrapes, then rules, then the autoscaler."""
        settings = self._settings
        every = (
            (settings.scrape_s, self._scrape),
            (settings.evaluate_s, self._evaluate),
            (settings.rule.sync_s, self._decide),
        )
        ticks = [
            (number * period_s, order, event)
            for order, (period_s, event) in enumerate(every)
            for number in range(int(duration_s / period_s) + 1)
        ]
        return [(at_s, event) for at_s, _, event in sorted(ticks, key=lambda tick: tick[:2])]

    def _send(self, call: Call) -> Passage:
        self._advance(call.send_s)
        takers = [each for each in self._replicas if each.ends_s is None and each.ready_s <= call.send_s]
        if not takers:
            return Passage(call, NOBODY, answered_s=call.send_s)
        self._turn += 1
        first = self._turn % len(takers)
        return min([*takers[first:], *takers[:first]], key=lambda each: each.server.pending).server.send(call)

    def _advance(self, now_s: float) -> None:
        for replica in self._replicas:
            if replica.ready_s <= now_s:
                replica.time.advance(now_s)

    def _scrape(self, now_s: float) -> None:
        for replica in self._replicas:
            if replica.ready_s <= now_s:
                replica.scrape(now_s, self._settings.window_s)
            if replica.ends_s is not None and replica.ends_s <= now_s and not replica.server.pending:
                replica.end()
                self._ended_s += now_s - replica.began_s
        self._replicas = [each for each in self._replicas if not each.is_over]

    def _evaluate(self, now_s: float) -> None:
        self._queue_s = 0.0
        for replica in self._replicas:
            answers = [(at_s, count) for at_s, count, _, _ in replica.samples]
            pace = rate(answers, now_s, self._settings.window_s)
            if pace is not None:
                self._queue_s += replica.samples[-1][2] / max(pace, LEAST_RATE_PER_S)

    def _decide(self, now_s: float) -> None:
        slots = sum(replica.samples[-1][3] for replica in self._replicas if replica.samples)
        metrics = {QUEUE: self._queue_s, SLOTS: float(slots)}
        here = [each for each in self._replicas if each.ends_s is None]
        if not self._is_fixed and now_s >= self._begins_s:
            wanted = self._autoscaler.decide(now_s, metrics)
            for _ in range(wanted - len(here)):
                self._start(now_s, now_s + self._settings.cold_start_s)
            # The youngest first, as Kubernetes does: it may not even be ready.
            for replica in sorted(here, key=lambda each: -each.ready_s)[: max(0, len(here) - wanted)]:
                replica.ends_s = max(now_s, replica.ready_s) + self._settings.drain_s
        ready = sum(each.ends_s is None and each.ready_s <= now_s for each in self._replicas)
        self._points.append(Point(now_s, self._autoscaler.replicas, ready, metrics))

    def _start(self, now_s: float, ready_s: float) -> None:
        time = _Led(ready_s)
        self._replicas.append(_Replica(SimulatedServer(self._profile, self._server, time), time, now_s, ready_s))
