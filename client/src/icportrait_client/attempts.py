"""A request's way through its attempts: retries, hedges, and streams that go on elsewhere.

Both clients run this on an event loop. The rules:

- A request has one time limit for all attempts, and a seed, so that each attempt is the same request.
- After UNAVAILABLE it is tried at another server at once, else again after the server's hint or a jittered pause that
  doubles. A budget keeps retries a small share of all requests, so that a fallen server isn't held down by them.
- A hedge asks a second server where the first takes long, and cancels the slower one. A stream that breaks goes on at
  another server. Both only between servers whose answers have the same ``numerics_id``, unless ``any_numerics``.
"""

from __future__ import annotations

import asyncio
import math
import random
from collections import deque
from collections.abc import AsyncGenerator, Callable, Iterator
from contextlib import aclosing, contextmanager
from dataclasses import dataclass

from icportrait_client import wire
from icportrait_client.contract import load_contract
from icportrait_client.errors import (
    DeadlineExceeded,
    InvalidRequest,
    PortraitError,
    ServerError,
    ServerUnavailable,
    too_late,
)
from icportrait_client.messages import Event, Request, check_contract, no_contract, read_answer, read_event
from icportrait_client.portraits import Portrait, Progress
from icportrait_client.servers import Addresses, Server, Servers
from icportrait_client.transport import INFER, MODEL_METADATA, SERVER_READY, STREAM_INFER, Transport

PAUSE_S, MOST_PAUSE_S = 0.1, 2.0
"""The first pause before a second attempt at the same server, and the longest."""
RETRIES_A_REQUEST, HEDGES_A_REQUEST = 0.2, 0.5
RETRIES_AT_ONCE, HEDGES_AT_ONCE = 64.0, 10.0
"""Retries, and hedges, that may be made after a calm time: a server that falls breaks all that is under way there."""
POLL_S, POLL_TIMEOUT_S = 1.0, 2.0
DURATIONS, LEAST_DURATIONS = 200, 20
"""Answers of which a percentile is taken, and the fewest of which one is."""


@dataclass(frozen=True)
class Policy:
    """Rules of a client's attempts.

    >>> from icportrait_client import PortraitClient
    >>> servers = [server.address, server.address]
    >>> with PortraitClient(servers, attempts=3, hedge_after_ms=400, balance="round-robin") as client:
    ...     client.generate(profile=profile, reference=reference).metadata.steps
    20
    """

    attempts: int = 5
    """Most attempts of a request, hedges not counted."""
    hedge_after_ms: float | None = None
    hedge_percentile: float | None = None
    """Hedge when a request takes longer than this percentile of the last 200."""
    any_numerics: bool = False

    def __post_init__(self) -> None:
        if self.attempts < 1:
            raise InvalidRequest(f"attempts: {self.attempts}, expected 1 or more")
        if self.hedge_after_ms is not None and self.hedge_percentile is not None:
            raise InvalidRequest("hedge_after_ms, hedge_percentile: both are given, expected one of them")
        if self.hedge_after_ms is not None and not self.hedge_after_ms > 0:
            raise InvalidRequest(f"hedge_after_ms: {self.hedge_after_ms:g}, expected milliseconds above 0")
        if self.hedge_percentile is not None and not 0 < self.hedge_percentile < 100:
            raise InvalidRequest(f"hedge_percentile: {self.hedge_percentile:g}, expected a number between 0 and 100")


class Budget:
    """Tokens for work beyond one attempt a request: each request adds a share of one."""

    def __init__(self, a_request: float, at_once: float) -> None:
        self._a_request, self._at_once, self._tokens = a_request, at_once, at_once

    def add(self) -> None:
        self._tokens = min(self._tokens + self._a_request, self._at_once)

    def take(self) -> bool:
        if self._tokens < 1.0:
            return False
        self._tokens -= 1.0
        return True


@dataclass
class Counts:
    """Numbers of a client's requests and attempts, for its owner's metrics.

    >>> from icportrait_client import PortraitClient
    >>> with PortraitClient(server.address) as client:
    ...     portrait = client.generate(profile=profile, reference=reference)
    ...     client.counts
    Counts(requests=1, attempts=1, retries=0, hedges=0, hedges_won=0, resumed=0)
    """

    requests: int = 0
    attempts: int = 0
    retries: int = 0
    hedges: int = 0
    hedges_won: int = 0
    resumed: int = 0
    """Streams that went on at another server."""


class _Limit:
    """The end of a request's time, by the event loop's clock."""

    def __init__(self, timeout_s: float, deadline_ms: int | None, now: Callable[[], float]) -> None:
        self._timeout_s, self._now = timeout_s, now
        self._ends_s = now() + timeout_s
        self._deadline_s = math.inf if deadline_ms is None else now() + deadline_ms / 1e3
        self._deadline_ms = deadline_ms

    @property
    def left_s(self) -> float:
        return min(self._ends_s, self._deadline_s) - self._now()

    def attempt(self, address: str) -> tuple[float, int | None]:
        """Return what is left of the time and of ``deadline_ms``.

        Raises:
            DeadlineExceeded: nothing.
        """
        now_s = self._now()
        if now_s >= self._ends_s:
            raise too_late(address, self._timeout_s)
        left_ms = math.inf if self._deadline_ms is None else (self._deadline_s - now_s) * 1e3
        if left_ms < 1:
            raise DeadlineExceeded(f"{address}: deadline_ms: {self._deadline_ms} have passed")
        return self._ends_s - now_s, None if self._deadline_ms is None else int(left_ms)

    def passed(self, address: str, error: DeadlineExceeded) -> DeadlineExceeded:
        """Return the error that names the caller's own limit: a call has what was left of it."""
        if self._deadline_ms is None or self._now() >= self._ends_s:
            return too_late(address, self._timeout_s)
        return error


class Attempts:
    """Runs requests on an event loop, on the servers of one client."""

    def __init__(self, transport: Transport, addresses: Addresses, servers: Servers, policy: Policy) -> None:
        self.counts = Counts()
        self._transport, self._addresses, self._servers, self._policy = transport, addresses, servers, policy
        self._retries = Budget(RETRIES_A_REQUEST, RETRIES_AT_ONCE)
        self._hedges = Budget(HEDGES_A_REQUEST, HEDGES_AT_ONCE)
        self._durations_s: deque[float] = deque(maxlen=DURATIONS)
        self._random = random.Random()
        self._poller: asyncio.Task[None] | None = None

    async def close(self) -> None:
        """End what is under way."""
        if self._poller:
            self._poller.cancel()
        await self._transport.close()

    async def generate(self, request: Request, timeout_s: float) -> Portrait:
        """Ask until there is a portrait, no time, or no hope.

        Raises:
            PortraitError: the last attempt's.
        """
        limit = await self._begin(request, timeout_s)
        tried: list[Server] = []
        while True:
            try:
                return await self._hedged(request, limit, tried)
            except ServerUnavailable as error:
                await self._pause(error, tried, limit)

    async def stream(self, request: Request, timeout_s: float) -> AsyncGenerator[Event, None]:
        """Yield a request's events, each step once.

        Raises:
            PortraitError: the last attempt's.
        """
        limit = await self._begin(request, timeout_s)
        tried: list[Server] = []
        told, numerics_id = 0, None
        while True:
            server = self._servers.choose(_now(), tried, numerics_id)
            assert server, "a stream is broken only where another server may go on"
            tried.append(server)
            expected, has_portrait = server.numerics_id, False
            try:
                async with aclosing(self._events(server, request, limit)) as events:
                    async for event in events:
                        if isinstance(event, Progress):
                            if event.step <= told:
                                continue
                            told = event.step
                        elif numerics_id not in (None, event.metadata.numerics_id):
                            raise ServerError(f"{server.address}: it went on with a stream, and computes otherwise")
                        expected = server.numerics_id or expected
                        has_portrait = isinstance(event, Portrait)
                        yield event
                # Read to the end, past the portrait, because a stream that has ended isn't cancelled.
                if has_portrait:
                    return
                raise ServerError(
                    f"{server.address}: the stream ended without portraits; is this an IC-Portrait Server?"
                )
            except PortraitError as error:
                if has_portrait:
                    return
                if not isinstance(error, ServerUnavailable):
                    raise
                if told and not self._policy.any_numerics:
                    numerics_id = numerics_id or expected
                    if numerics_id is None or not self._servers.choose(_now(), tried, numerics_id):
                        raise
                await self._pause(error, tried, limit)
                if told:
                    self.counts.resumed += 1

    async def any_ready(self, timeout_s: float) -> bool:
        """Tell whether a server takes requests now."""
        await self._resolve()
        ready = await asyncio.gather(*(self._is_ready(server, timeout_s) for server in self._servers.all))
        return any(ready)

    async def _is_ready(self, server: Server, timeout_s: float) -> bool:
        try:
            answer = await self._transport.unary(server.address, SERVER_READY, b"", timeout_s)
            return wire.read_flag(answer)
        except (PortraitError, wire.WireError):
            return False

    # Attempts.

    async def _begin(self, request: Request, timeout_s: float) -> _Limit:
        limit = _Limit(timeout_s, request.deadline_ms, _now)
        await self._resolve()
        if self._poller is None and (self._addresses.is_resolved or len(self._servers.all) > 1):
            self._poller = asyncio.create_task(self._poll())
        self.counts.requests += 1
        self._retries.add()
        self._hedges.add()
        return limit

    async def _resolve(self) -> None:
        if self._addresses.is_resolved and not self._servers.all:
            self._servers.replace(await self._addresses.resolve())

    async def _hedged(self, request: Request, limit: _Limit, tried: list[Server]) -> Portrait:
        """Ask one server, and another one too where the first takes long."""
        first = self._servers.choose(_now(), tried)
        assert first
        tried.append(first)
        delay_s = self._hedge_delay_s()
        if delay_s is None:
            return await self._attempt(first, request, limit)
        attempts = [asyncio.create_task(self._attempt(first, request, limit))]
        try:
            await asyncio.wait(attempts, timeout=delay_s)
            if not attempts[0].done() and (second := self._second(first)):
                self.counts.hedges += 1
                tried.append(second)
                attempts.append(asyncio.create_task(self._attempt(second, request, limit)))
            waiting = set(attempts)
            while waiting:
                done, waiting = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
                for attempt in done:
                    if attempt.exception() is None:
                        self.counts.hedges_won += attempt is not attempts[0]
                        return attempt.result()
            return attempts[0].result()
        finally:
            for attempt in attempts:
                attempt.cancel()
            # The losers' errors are nobody's.
            await asyncio.gather(*attempts, return_exceptions=True)

    def _hedge_delay_s(self) -> float | None:
        if self._policy.hedge_after_ms is not None:
            return self._policy.hedge_after_ms / 1e3
        if self._policy.hedge_percentile is None or len(self._durations_s) < LEAST_DURATIONS:
            return None
        ordered = sorted(self._durations_s)
        return ordered[int(len(ordered) * self._policy.hedge_percentile / 100)]

    def _second(self, first: Server) -> Server | None:
        """Return a server for a hedge: it would give the same picture, and is no busier."""
        numerics_id = None if self._policy.any_numerics else first.numerics_id
        if numerics_id is None and not self._policy.any_numerics:
            return None
        now_s = _now()
        second = self._servers.choose(now_s, [first], numerics_id, "least-loaded")
        if second is None or second is first or not second.takes(now_s) or second.in_flight > first.in_flight:
            return None
        return second if self._hedges.take() else None

    async def _attempt(self, server: Server, request: Request, limit: _Limit) -> Portrait:
        began_s = _now()
        with self._under_way(server, limit):
            await self._check(server, limit)
            left_s, deadline_ms = limit.attempt(server.address)
            answer = await self._transport.unary(
                server.address, INFER, request.message(deadline_ms, is_stream=False), left_s
            )
            portrait = read_answer(answer, server.address)
        server.said(portrait.metadata, _now())
        self._durations_s.append(_now() - began_s)
        return portrait

    async def _events(self, server: Server, request: Request, limit: _Limit) -> AsyncGenerator[Event, None]:
        with self._under_way(server, limit):
            await self._check(server, limit)
            left_s, deadline_ms = limit.attempt(server.address)
            message = request.message(deadline_ms, is_stream=True)
            async with aclosing(self._transport.stream(server.address, STREAM_INFER, message, left_s)) as answers:
                async for answer in answers:
                    for event in read_event(answer, server.address):
                        if isinstance(event, Portrait):
                            server.said(event.metadata, _now())
                        yield event

    @contextmanager
    def _under_way(self, server: Server, limit: _Limit) -> Iterator[None]:
        """Count an attempt at a server, and note what its failure says of the server and of the limit."""
        self.counts.attempts += 1
        server.in_flight += 1
        try:
            yield
        except ServerUnavailable as error:
            server.failed(error, _now())
            raise
        except DeadlineExceeded as error:
            raise limit.passed(server.address, error) from None
        finally:
            server.in_flight -= 1

    async def _pause(self, error: ServerUnavailable, tried: list[Server], limit: _Limit) -> None:
        """Wait until the next attempt.

        Raises:
            ServerUnavailable: there is none.
        """
        # A server that says when to come again asks for the attempt; it costs no budget.
        if len(tried) >= self._policy.attempts or (error.retry_after_ms is None and not self._retries.take()):
            raise error
        now_s, pause_s = _now(), 0.0
        if not self._servers.another_takes(now_s, tried):
            rounds = len(tried) // max(len(self._servers.all), 1)
            pause_s = min(PAUSE_S * 2 ** min(max(rounds - 1, 0), 10), MOST_PAUSE_S) * self._random.uniform(0.5, 1.0)
            if error.retry_after_ms is not None:
                # Others were told the same moment: come after it, and not all at once.
                pause_s += error.retry_after_ms / 1e3
        if pause_s >= limit.left_s:
            raise error
        self.counts.retries += 1
        await asyncio.sleep(pause_s)

    # Servers.

    async def _check(self, server: Server, limit: _Limit) -> None:
        """Make sure, once, that a server's inputs and outputs are this client's."""
        if server.is_checked:
            return
        left_s, _ = limit.attempt(server.address)
        message = wire.named_request(load_contract().model)
        try:
            answer = await self._transport.unary(server.address, MODEL_METADATA, message, left_s)
        except (InvalidRequest, ServerError) as error:
            raise no_contract(server.address, error) from None
        check_contract(answer, server.address)
        server.is_checked = True

    async def _poll(self) -> None:
        """Ask every server, again and again, whether it takes requests."""
        while True:
            await asyncio.gather(*map(self._look, self._servers.all))
            await asyncio.sleep(POLL_S * self._random.uniform(0.75, 1.25))
            if self._addresses.is_resolved:
                try:
                    self._servers.replace(await self._addresses.resolve())
                except ServerUnavailable:
                    continue  # the addresses that were found before still hold

    async def _look(self, server: Server) -> None:
        was_ready = server.is_ready
        server.is_ready = await self._is_ready(server, POLL_TIMEOUT_S)
        if server.is_ready and not was_ready:
            server.held_until_s = 0.0


def _now() -> float:
    return asyncio.get_running_loop().time()
