"""An open-loop load by the project's own client, and what becomes of each request.

A request leaves at a moment drawn beforehand, whatever the answers do, and its latency counts from that moment. It is
lost where the client gives up, all its attempts included.
"""

from __future__ import annotations

import asyncio
import itertools
import math
import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from icportrait_client import AsyncPortraitClient, Portrait, PortraitError

TIMEOUT_S = 60.0
_LONGEST_SLEEP_S = 0.1


@dataclass(frozen=True)
class Outcome:
    """The outcome of one request. Times are of ``time.monotonic``."""

    due_s: float
    sent_s: float
    latency_ms: float
    version: str
    """The answering model's; empty where there is no answer."""
    stage_ms: dict[str, float]
    error: str = ""


@dataclass(frozen=True)
class Figures:
    """The figures of a phase's requests."""

    requests: int
    lost: int
    attempts: float
    """Attempts of a request, on average."""
    p50_ms: float
    p99_ms: float
    late_p99_ms: float
    """Lateness of the sender."""
    errors: dict[str, int]


def moments(rate_per_s: float, seed: int) -> Iterator[float]:
    """Yield moments of a Poisson process, in seconds from its start."""
    drawn, now_s = random.Random(seed), 0.0
    while True:
        now_s += drawn.expovariate(rate_per_s)
        yield now_s


class OpenLoad:
    """Callers that send until the block ends, and then wait for their answers.

    A request is a caller's number and the keyword arguments of ``PortraitClient.generate``. Each caller has a
    connection of its own.
    """

    def __init__(
        self,
        callers: Sequence[tuple[str | Sequence[str], dict[str, Any]]],
        requests: Iterable[tuple[int, dict[str, Any]]],
        moments_s: Iterable[float],
    ) -> None:
        """Prepare.

        Args:
            callers: for each the servers' addresses and the client's options.
            requests: taken in turn; begun anew where they end.
            moments_s: at which they leave, from the load's start.
        """
        self._callers, self._requests, self._moments_s = callers, list(requests), moments_s
        self.outcomes: list[Outcome] = []
        self.began_s = math.nan
        """The moment from which the others count."""
        self.attempts: list[tuple[float, int]] = []
        """Attempts of all clients by now, now and then."""
        self._stopping = threading.Event()
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="load")

    def __enter__(self) -> OpenLoad:
        self._thread.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.stop()

    def stop(self) -> None:
        """Send no more, and wait until all is answered."""
        self._stopping.set()
        self._thread.join()
        if self._failure:
            raise self._failure

    def wait(self) -> None:
        """Wait until the last request is sent and answered, where the moments have an end."""
        self._thread.join()

    def between(self, from_s: float, to_s: float) -> list[Outcome]:
        """Return what became of the requests that were due between two moments; they must have been answered."""
        return [outcome for outcome in list(self.outcomes) if from_s <= outcome.due_s < to_s]

    def figures(self, from_s: float, to_s: float) -> Figures:
        """Return the figures of the requests that were due between two moments."""
        found = self.between(from_s, to_s)
        served = np.array([each.latency_ms for each in found if not each.error])
        tried = [count for at_s, count in self.attempts if from_s <= at_s < to_s]
        return Figures(
            len(found),
            sum(bool(each.error) for each in found),
            (tried[-1] - tried[0]) / max(len(found), 1) if tried else float("nan"),
            float(np.median(served)),
            float(np.percentile(served, 99)),
            float(np.percentile([1000 * (each.sent_s - each.due_s) for each in found], 99)),
            dict(Counter(each.error for each in found if each.error)),
        )

    def _run(self) -> None:
        try:
            asyncio.run(self._send())
        except BaseException as error:
            self._failure = error

    async def _send(self) -> None:
        clients = [AsyncPortraitClient(servers, **options) for servers, options in self._callers]
        # Read and checked once: a picture's way through the client isn't what is measured.
        prepared = [
            (clients[caller], clients[caller].prepare(values.pop("profile"), values.pop("reference"), values))
            for caller, given in self._requests
            for values in (dict(given),)
        ]
        tasks = set[asyncio.Task[None]]()
        self.began_s = time.monotonic()
        counting = asyncio.create_task(self._count(clients))
        try:
            for (client, request), moment_s in zip(itertools.cycle(prepared), self._moments_s, strict=False):
                due_s = self.began_s + moment_s
                while (left_s := due_s - time.monotonic()) > 0 and not self._stopping.is_set():
                    await asyncio.sleep(min(left_s, _LONGEST_SLEEP_S))
                if self._stopping.is_set():
                    break
                task = asyncio.create_task(self._ask(client, request, due_s))
                tasks.add(task)
                task.add_done_callback(tasks.discard)
            await asyncio.gather(*tasks)
        finally:
            counting.cancel()
            for client in clients:
                await client.close()

    async def _ask(self, client: AsyncPortraitClient, request: Any, due_s: float) -> None:
        sent_s, error, version, stages = time.monotonic(), "", "", {}
        try:
            portrait: Portrait = await client.send(request, TIMEOUT_S)
            version, stages = portrait.metadata.versions.model_version, dict(portrait.metadata.stage_ms)
        except PortraitError as failure:
            error = f"{type(failure).__name__}: {failure}"
        latency_ms = 1000 * (time.monotonic() - due_s)
        self.outcomes.append(Outcome(due_s, sent_s, latency_ms, version, stages, error))

    async def _count(self, clients: Sequence[AsyncPortraitClient]) -> None:
        while True:
            self.attempts.append((time.monotonic(), sum(client.counts.attempts for client in clients)))
            await asyncio.sleep(_LONGEST_SLEEP_S)


def until(holds: Callable[[], bool], timeout_s: float = 60.0) -> float:
    """Wait until something holds, and return the seconds that it took."""
    began_s = time.monotonic()
    while not holds():
        assert time.monotonic() < began_s + timeout_s
        time.sleep(0.05)
    return time.monotonic() - began_s
