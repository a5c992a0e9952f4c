"""The engine's host, before a Triton and an engine that end and hang as the test says."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import threading
import time
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from icportrait.deploy.stub_processes import StubProcess
from icportrait.deploy.supervisor import Ending
from icportrait.errors import IcPortraitError, Unavailable
from icportrait.gateway.engine import EngineLostError, Pong
from icportrait.gateway.host import AT_LEAST_S, LATE_S, MANY_TIMES, EngineHost

WELL = Pong(is_busy=True, step_age_ms=5.0, expected_ms=5.0)


class Triton:
    """A process that does nothing, in place of Triton's and of a model's."""

    def __init__(self) -> None:
        self.process: subprocess.Popen[bytes] | None = None
        self.starts = 0
        self.starting, self.may_start = threading.Event(), threading.Event()
        self.may_start.set()

    @property
    def pid(self) -> int:
        assert self.process
        return self.process.pid

    @property
    def stubs(self) -> list[StubProcess]:
        return [StubProcess("denoise", os.getpid(), "0")]

    def start(self) -> None:
        self.starts += 1
        self.starting.set()
        self.may_start.wait()
        self.process = subprocess.Popen(["sleep", "1000"])
        if self.starts == 5:
            raise IcPortraitError("it doesn't start")

    def interrupt(self) -> None:
        self.starts = 5
        self.may_start.set()

    def kill(self) -> None:
        if self.process:
            self.process.kill()
            self.process.wait()

    def what_ended(self) -> Ending | None:
        assert self.process
        return None if self.process.poll() is None else Ending("tritonserver was ended")


class Engine:
    """An engine that answers as it is told."""

    def __init__(self) -> None:
        self.lost = asyncio.get_running_loop().create_future()
        self.pong: Pong | None = WELL
        self.is_closed = False

    async def is_live(self) -> bool:
        return True

    async def ping(self) -> Pong:
        if self.pong is None:
            await self.lost
            raise EngineLostError("lost")
        return self.pong

    def lose(self) -> None:
        if not self.lost.done():
            self.lost.set_result(None)

    async def close(self) -> None:
        self.lose()
        self.is_closed = True


class World:
    def __init__(self) -> None:
        self.triton = Triton()
        self.engines: list[Engine] = []
        self.said: list[str] = []
        parts: Any = self.triton, self.connect
        self.host = EngineHost(*parts, self.said.append, "ready", probe_every_s=0.05)

    async def connect(self) -> Engine:
        self.engines.append(Engine())
        return self.engines[-1]


@pytest.fixture
def run() -> Callable[[Callable[[World], Awaitable[None]]], None]:
    def run(test: Callable[[World], Awaitable[None]]) -> None:
        async def main() -> None:
            world = World()
            async with asyncio.timeout(30):
                try:
                    await test(world)
                finally:
                    await world.host.stop()
                    world.triton.kill()
            assert all(engine.is_closed for engine in world.engines)

        asyncio.run(main())

    return run


async def until(condition: Callable[[], Any]) -> None:
    while not condition():
        await asyncio.sleep(0.01)


def test_an_engine_is_waited_for_and_refusals_say_until_when(run: Callable[..., None]) -> None:
    async def test(world: World) -> None:
        assert "the engine is being started; try again later; retry_after_ms: " in str(world.host.refusal)
        waiting = asyncio.ensure_future(world.host.engine())
        world.host.start()
        assert await waiting is world.engines[0]  # type: ignore[comparison-overlap]
        assert world.host.refusal is None
        await until(lambda: world.said == ["ready"])

    run(test)


def ended(world: World) -> None:
    world.triton.kill()


def stopped(world: World) -> None:
    os.kill(world.triton.pid, signal.SIGSTOP)


def silent(world: World) -> None:
    world.engines[0].pong = None


def endless(world: World) -> None:
    world.engines[0].pong = Pong(True, 1000 * AT_LEAST_S + 1, 1.0)


WRONG = [
    (ended, "tritonserver was ended"),
    (stopped, "tritonserver has been stopped by a signal"),
    (silent, "the engine has missed 2 probes of 0.05 s"),
    (endless, "a step of the denoising loop runs many times its expected time"),
]


@pytest.mark.parametrize(("break_", "text"), WRONG, ids=[each.__name__ for each, _ in WRONG])
def test_an_engine_that_ends_or_hangs_is_lost_at_once_and_another_comes(
    run: Callable[..., None], break_: Callable[[World], None], text: str
) -> None:
    async def test(world: World) -> None:
        world.host.start()
        first = await world.host.engine()
        pid = world.triton.pid
        break_(world)
        await first.lost
        assert "the engine is being restarted; try again later; retry_after_ms: " in str(world.host.refusal)
        second = await world.host.engine()
        assert second is world.engines[1] is not first  # type: ignore[comparison-overlap]
        assert world.triton.pid != pid and world.host.starts == 2
        assert world.said[1] == f"{text}; restarting the server, 1 of at most 3 times in 10 minutes"

    run(test)


@pytest.mark.parametrize(
    "pong",
    [
        Pong(True, 1000 * AT_LEAST_S - 1, 1.0),
        Pong(True, 1000 * AT_LEAST_S * 5, 1000 * AT_LEAST_S * 5 / MANY_TIMES),
        Pong(False, 1e9, 1.0),
        Pong(True, 1e9, 0.0),
    ],
    ids=["soon", "as expected", "idle", "nothing measured"],
)
def test_a_step_that_may_still_end_is_let_run(run: Callable[..., None], pong: Pong) -> None:
    async def test(world: World) -> None:
        world.host.start()
        await world.host.engine()
        asked: list[None] = []

        async def ping() -> Pong:
            asked.append(None)
            return pong

        world.engines[0].ping = ping  # type: ignore[method-assign]
        await until(lambda: len(asked) == 3)
        assert world.host.refusal is None and world.host.starts == 1

    run(test)


def test_one_slow_answer_costs_no_engine(run: Callable[..., None]) -> None:
    async def test(world: World) -> None:
        world.host.start()
        await world.host.engine()
        engine, asked = world.engines[0], 0

        async def ping() -> Pong:
            nonlocal asked
            asked += 1
            await asyncio.sleep(0.07 if asked % 2 else 0)
            return WELL

        engine.ping = ping  # type: ignore[method-assign]
        await until(lambda: asked == 4)
        assert world.host.starts == 1

    run(test)


def test_an_event_loop_that_is_late_itself_costs_no_engine(run: Callable[..., None]) -> None:
    """Keep the loop longer in one turn than a probe waits."""

    async def test(world: World) -> None:
        world.host.start()
        await world.host.engine()
        answers: list[None] = []

        async def ping() -> Pong:
            for _ in range(12):
                await asyncio.sleep(0)
            answers.append(None)
            return WELL

        world.engines[0].ping = ping  # type: ignore[method-assign]
        while len(answers) < 2 and not world.host._hung:
            time.sleep(LATE_S + 0.02)
            await asyncio.sleep(0)
        assert world.host._hung is None and world.host.refusal is None

    run(test)


def test_a_process_that_is_stopped_is_seen_between_two_probes(run: Callable[..., None]) -> None:
    async def test(world: World) -> None:
        world.host._probe_every_s = 20.0
        world.host.start()
        await world.host.engine()
        await asyncio.sleep(0.5)  # the first probe is answered by now
        stopped(world)
        async with asyncio.timeout(10):
            await until(lambda: world.host.starts == 2)

    run(test)


def test_a_process_that_is_stopped_is_seen_though_the_event_loop_is_late(run: Callable[..., None]) -> None:
    async def test(world: World) -> None:
        world.host.start()
        await world.host.engine()
        silent(world)
        stopped(world)
        while not world.host._hung:
            time.sleep(LATE_S + 0.02)
            await asyncio.sleep(0)
        assert str(world.host._hung) == "tritonserver has been stopped by a signal"

    run(test)


def test_a_restart_that_fails_is_followed_by_another_and_all_that_wait_are_served(
    run: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("icportrait.deploy.supervisor.AGAIN_AFTER_S", 0.0)

    async def test(world: World) -> None:
        world.host.start()
        first = await world.host.engine()
        world.triton.starts = 4
        ended(world)
        await first.lost
        assert await world.host.engine() is world.engines[1]  # type: ignore[comparison-overlap]
        await until(lambda: world.said[-1] == "ready")
        assert world.said[1:] == [
            "tritonserver was ended; restarting the server, 1 of at most 3 times in 10 minutes",
            "it doesn't start; restarting the server, 2 of at most 3 times in 10 minutes",
            "ready",
        ]

    run(test)


def test_a_restart_that_is_under_way_is_cut_short_by_a_stop_without_a_word(run: Callable[..., None]) -> None:
    async def test(world: World) -> None:
        world.host.start()
        first = await world.host.engine()
        world.triton.may_start.clear()
        world.triton.starting.clear()
        ended(world)
        await first.lost
        await until(world.triton.starting.is_set)
        await world.host.stop()
        await world.host.ended
        assert len(world.said) == 2 and world.said[1].startswith("tritonserver was ended")

    run(test)


def test_a_start_that_fails_ends_the_host_and_all_that_wait_are_told(run: Callable[..., None]) -> None:
    async def test(world: World) -> None:
        world.triton.starts = 4
        world.host.start()
        with pytest.raises(Unavailable, match="isn't started again"):
            await world.host.engine()
        with pytest.raises(IcPortraitError, match="it doesn't start"):
            await world.host.ended
        assert world.host.refusal

    run(test)


def test_a_start_that_is_under_way_is_cut_short_by_a_stop(run: Callable[..., None]) -> None:
    async def test(world: World) -> None:
        world.triton.may_start.clear()
        world.host.start()
        await until(world.triton.starting.is_set)
        await world.host.stop()
        await world.host.ended
        assert world.engines == []

    run(test)


def test_a_host_that_was_not_started_stops(run: Callable[..., None]) -> None:
    async def test(world: World) -> None:
        await world.host.stop()

    run(test)
