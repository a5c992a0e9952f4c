"""The engine's host: starts a private Triton, watches it, and starts it again behind a gateway that lives on.

Triton is started from a thread of its own, because the kernel ends it with the thread that started it, and because a
start takes seconds. The gateway's event loop asks all questions that go over a connection.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable
from typing import Any, Protocol

from icportrait.deploy.stub_processes import StubProcess, is_stopped
from icportrait.deploy.supervisor import POLL_S, Ending, keep_running
from icportrait.errors import Unavailable
from icportrait.gateway.engine import Engine, EngineLostError, Pong

MISSED_PROBES = 2
"""Probes that fail in a row before the engine is ended."""
TURNS = 10
"""Turns of a probe's wait. A turn from which the event loop itself came back late counts as ``LATE_TURN``,"""
LATE_TURN = 0.1
"""not as nothing, so that an engine that hangs is found on a busy gateway too."""
LATE_S = 0.05
"""The event loop is late if it comes back from a turn this long after the turn's end."""
MANY_TIMES = 20
"""A step that runs this many times as long as expected doesn't end any more,"""
AT_LEAST_S = 10.0
"""if it has run for this long, because the first one after a pause may take a while."""
FIRST_START_S = 10.0
"""Assumed time of a start before one was measured."""
RUN_OUT = "the engine has ended, and isn't started again; the server's output has the cause"


class PrivateTriton(Protocol):
    """The part of ``triton_server.TritonServer`` that an engine's host needs."""

    @property
    def pid(self) -> int: ...

    @property
    def stubs(self) -> list[StubProcess]: ...

    def start(self) -> None: ...

    def interrupt(self) -> None: ...

    def kill(self) -> None: ...

    def what_ended(self) -> Ending | None: ...


class _StopRequested(Exception):
    """Raised in the host's thread, to end it in order."""


class EngineHost:
    """Keeps one engine running."""

    def __init__(
        self,
        triton: PrivateTriton,
        connect: Callable[[], Any],
        say: Callable[[str], None],
        ready: str,
        probe_every_s: float = 1.0,
    ) -> None:
        """Prepare; ``start`` starts it.

        Args:
            triton: not started yet.
            connect: gives a coroutine that connects to a started one, an ``Engine``.
            say: takes a line for whoever runs the server.
            ready: the line to say each time that the engine is ready.
            probe_every_s: an answer that takes longer is missed, unless the event loop itself was late meanwhile.
        """
        self._triton, self._connect, self._say, self._ready = triton, connect, say, ready
        self._probe_every_s = probe_every_s
        self._loop = asyncio.get_running_loop()
        self._thread = threading.Thread(target=self._run, name="engine-host")
        self._stop_requested = threading.Event()
        self._is_starting = False
        self._hung: Ending | None = None
        self._up: asyncio.Future[Engine] = self._loop.create_future()
        """The engine, once there is one; another future as soon as it is lost."""
        self._engine: Engine | None = None
        self._probing: asyncio.Task[None] | None = None
        self._start_began_s, self._start_takes_s = time.monotonic(), FIRST_START_S
        self.starts = 0
        self.ended: asyncio.Future[None] = self._loop.create_future()
        """Done when no engine will come any more: with an error, unless ``stop`` was called."""

    def start(self) -> None:
        """Start the engine; ``engine`` waits for it."""
        self._thread.start()

    async def stop(self) -> None:
        """End the engine, whatever runs on it, and let its files go."""
        self._stop_requested.set()
        if self._thread.ident is None:
            return
        while not self.ended.done():
            if self._is_starting:
                self._triton.interrupt()
            await asyncio.wait([self.ended], timeout=POLL_S)
        await asyncio.to_thread(self._thread.join)

    @property
    def up(self) -> Engine | None:
        """Return the engine that is up, None where there is none now."""
        engine = self._up.result() if self._up.done() and not self._up.exception() else None
        return engine if engine and not engine.lost.done() else None

    @property
    def refusal(self) -> Unavailable | None:
        """Return the error that says why there is no engine now, None where there is one."""
        if self.up:
            return None
        left_s = self._start_began_s + self._start_takes_s - time.monotonic()
        hint = f"retry_after_ms: {max(500, round(1000 * left_s))}"
        return Unavailable(f"the engine is being {'re' if self.starts else ''}started; try again later; {hint}")

    async def engine(self) -> Engine:
        """Return the engine that is up, or wait for the next.

        Raises:
            Unavailable: none will come.
        """
        while (engine := await asyncio.shield(self._up)).lost.done():
            await asyncio.sleep(0)
        return engine

    # In the host's thread.

    def _run(self) -> None:
        error: BaseException | None = None
        try:
            keep_running(_Watched(self), self._say, self._ready, sleep=self._sleep)
        except _StopRequested:
            pass
        except BaseException as ended:
            error = None if self._stop_requested.is_set() else ended
        self._loop.call_soon_threadsafe(self._end, error)

    def _sleep(self, seconds: float) -> None:
        if self._stop_requested.wait(seconds):
            raise _StopRequested

    def start_triton(self) -> None:
        """Start Triton and connect to it."""
        if self._stop_requested.is_set():
            raise _StopRequested
        self._hung = None
        self._start_began_s = began_s = time.monotonic()
        self._is_starting = True
        try:
            self._triton.start()
        except BaseException:
            if self._stop_requested.is_set():  # and ``stop`` has interrupted it
                raise _StopRequested from None
            raise
        finally:
            self._is_starting = False
        asyncio.run_coroutine_threadsafe(self._come_up(), self._loop).result()
        self._start_takes_s = time.monotonic() - began_s

    def stop_triton(self) -> None:
        """Kill Triton. Admitted requests are answered by now, or are asked of the next one."""
        self._triton.kill()
        asyncio.run_coroutine_threadsafe(self._go_down(), self._loop).result()

    def what_ended(self) -> Ending | None:
        """Return the ending of a part that has ended or hangs, and then give up the engine; None while all work."""
        ended = self._triton.what_ended() or self._hung
        if ended:
            self._start_began_s = time.monotonic()
            self._loop.call_soon_threadsafe(self._lose)
        return ended

    # In the event loop.

    async def _come_up(self) -> None:
        engine = await self._connect()
        engine.lost.add_done_callback(self._expect_another)
        stubs = [(stub.pid, f"the process of model {stub.model}") for stub in self._triton.stubs]
        parts = [(self._triton.pid, "tritonserver"), *stubs]
        self._probing = asyncio.create_task(self._probe(engine, parts))
        self.starts += 1
        self._engine = engine
        self._up.set_result(engine)

    async def _go_down(self) -> None:
        if self._probing:
            self._probing.cancel()
        engine, self._engine = self._engine, None
        if engine:
            await engine.close()

    def _lose(self) -> None:
        if self._engine:
            self._engine.lose()

    def _expect_another(self, _: object) -> None:
        self._up = self._loop.create_future()

    def _end(self, error: BaseException | None) -> None:
        if self._up.done():
            self._up = self._loop.create_future()
        self._up.set_exception(Unavailable(RUN_OUT))
        self._up.exception()  # where nobody waits for it, nobody asks
        if error:
            self.ended.set_exception(error)
            self.ended.exception()  # nor for a second one that ends with the first
        else:
            self.ended.set_result(None)

    async def _probe(self, engine: Engine, parts: list[tuple[int, str]]) -> None:
        """Ask Triton and the loop again and again, and look at the processes; what is wrong becomes ``_hung``."""
        missed = 0
        asked: asyncio.Task[Pong] | None = None
        while self._hung is None:
            if asked is None or asked.done():
                asked = asyncio.create_task(_answers(engine))
                asked.add_done_callback(_take_note)
            left = float(TURNS)
            while left > 0 and not asked.done() and self._hung is None:
                left -= 1 if await self._is_on_time(asked, self._probe_every_s / TURNS) else LATE_TURN
                self._look_for_stopped(parts)
            has_answered = asked.done() and not asked.exception()
            missed = 0 if has_answered else missed + 1
            if self._hung is None and missed >= MISSED_PROBES:
                self._hung = Ending(f"the engine has missed {missed} probes of {self._probe_every_s:g} s")
            elif self._hung is None and has_answered and _hangs(asked.result()):
                self._hung = Ending("a step of the denoising loop runs many times its expected time")
            for _ in range(TURNS if asked.done() else 0):
                await asyncio.sleep(self._probe_every_s / TURNS)
                self._look_for_stopped(parts)

    async def _is_on_time(self, asked: asyncio.Task[Pong], turn_s: float) -> bool:
        """Wait for an answer, for one turn, and tell whether the event loop came back from the wait in time."""
        ends_s = self._loop.time() + turn_s
        await asyncio.wait([asked], timeout=turn_s)
        return self._loop.time() < ends_s + LATE_S

    def _look_for_stopped(self, parts: list[tuple[int, str]]) -> None:
        if stopped := next((part for pid, part in parts if is_stopped(pid)), None):
            self._hung = Ending(f"{stopped} has been stopped by a signal")


class _Watched:
    """The engine as ``supervisor.keep_running`` takes it."""

    def __init__(self, host: EngineHost) -> None:
        self.start, self.stop, self.what_ended = host.start_triton, host.stop_triton, host.what_ended


async def _answers(engine: Engine) -> Pong:
    """Ask the loop for its progress, once Triton has answered too."""
    if not await engine.is_live():
        raise EngineLostError("Triton isn't live")
    return await engine.ping()


def _take_note(asked: asyncio.Task[Pong]) -> None:
    """Retrieve the error of a probe whose probing has ended meanwhile, because asyncio would log it otherwise."""
    if not asked.cancelled():
        asked.exception()


def _hangs(pong: Pong) -> bool:
    expected_ms = max(MANY_TIMES * pong.expected_ms, 1000 * AT_LEAST_S)
    return pong.is_busy and pong.expected_ms > 0 and pong.step_age_ms > expected_ms
