"""The choice among a host's engines, before engines that let in, refuse and end as the test says."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from icportrait.errors import IcPortraitError, Unavailable
from icportrait.gateway import devices
from icportrait.gateway.devices import Devices
from icportrait.gateway.engine import EngineLostError
from icportrait.serving.control import Demand

DEMAND: Any = Demand(phases=((20, 1),), priority=0, deadline_ms=None, arrived_s=0.0, nbytes=0)


class Engine:
    def __init__(self) -> None:
        self.lost = asyncio.get_running_loop().create_future()
        self.rows = 0
        self.refusal: Exception | None = None
        self.replayed: list[bool] = []

    async def lease(self, key: str, demand: Demand, replayed: bool = False) -> None:
        if isinstance(self.refusal, EngineLostError):
            self.lost.set_result(None)
        if self.refusal:
            raise self.refusal
        self.replayed.append(replayed)
        self.rows += demand.rows


class Host:
    """An engine that is up until it is lost, and the next as soon as the test puts it there."""

    def __init__(self) -> None:
        self.current = Engine()
        self.ended = asyncio.get_running_loop().create_future()
        self.starts = 1

    @property
    def up(self) -> Engine | None:
        return None if self.current.lost.done() else self.current

    @property
    def refusal(self) -> Unavailable | None:
        return None if self.up else Unavailable(f"restarted, {'never' if self.ended.done() else 'soon'}")

    async def engine(self) -> Engine:
        while self.up is None:
            if self.ended.done():
                raise Unavailable("never")
            await asyncio.sleep(0)
        return self.up

    def lose(self) -> None:
        self.current.lost.set_result(None)


class World:
    def __init__(self, count: int) -> None:
        self.hosts = [Host() for _ in range(count)]
        hosts: Any = {str(number): host for number, host in enumerate(self.hosts)}
        self.devices = Devices(hosts)

    async def lease(self, profile: Any = None, failed: Any = None) -> int:
        """Take a lease, and return the number of the engine."""
        engine: Any = await self.devices.lease("key", DEMAND, profile, failed)
        return self.engines.index(engine)

    @property
    def engines(self) -> list[Engine]:
        return [host.current for host in self.hosts]

    @property
    def rows(self) -> list[int]:
        return [engine.rows for engine in self.engines]


Test = Callable[[World], Awaitable[None]]


def run(test: Test, count: int = 3) -> None:
    async def main() -> None:
        async with asyncio.timeout(30):
            await test(World(count))

    asyncio.run(main())


def test_a_request_goes_where_fewest_rows_are_asked_for_and_equals_take_turns() -> None:
    async def test(world: World) -> None:
        world.engines[1].rows = 2
        assert [await world.lease() for _ in range(4)] == [0, 2, 0, 2]
        assert world.rows == [2, 2, 2]
        assert [await world.lease() for _ in range(6)] == [1, 0, 2, 1, 0, 2]

    run(test)


def test_a_returning_profile_goes_to_its_engine_unless_another_has_less_to_do() -> None:
    async def test(world: World) -> None:
        assert await world.lease("a") == 0
        world.engines[0].rows = 0
        assert await world.lease("b") == 1
        world.engines[1].rows = 0
        assert [await world.lease("a"), world.rows] == [0, [1, 0, 0]]
        assert await world.lease("a") == 2, "its engine would be slower for it, and it has a new one now"
        for engine in world.engines:
            engine.rows = 5
        assert await world.lease("a") == 2
        assert await world.lease("b") == 1

    run(test)


def test_so_many_profiles_are_remembered_and_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "HOMES", 2)

    async def test(world: World) -> None:
        for profile in ("a", "b", "a", "c"):
            await world.lease(profile)
        assert list(world.devices._homes) == ["a", "c"]

    run(test)


def test_an_engine_that_is_not_up_is_not_asked_and_one_that_ends_meanwhile_is_left() -> None:
    async def test(world: World) -> None:
        world.hosts[0].lose()
        world.engines[1].refusal = EngineLostError("lost")
        assert [await world.lease() for _ in range(2)] == [2, 2]
        assert world.devices.refusal is None
        world.hosts[2].lose()
        world.hosts[0].ended.set_result(None)
        assert str(world.devices.refusal) == "restarted, soon", "not the words of one that won't come back"
        with pytest.raises(Unavailable, match="restarted, soon"):
            await world.lease()

    run(test)


def test_a_request_is_refused_only_where_every_engine_refuses_it_in_the_words_of_the_least_loaded() -> None:
    async def test(world: World) -> None:
        for number, engine in enumerate(world.engines):
            engine.rows, engine.refusal = 3 - number, Unavailable(f"full, {number}")
        with pytest.raises(Unavailable, match="full, 2"):
            await world.lease()
        world.engines[0].refusal = None
        assert await world.lease() == 0

    run(test)


def test_what_an_engine_has_failed_goes_to_another_before_it_goes_there_again() -> None:
    """Ask with an engine that has nothing to do, because it fails all requests."""

    async def test(world: World) -> None:
        world.engines[1].rows, world.engines[2].rows = 5, 6
        assert await world.lease(failed=world.engines[0]) == 1
        assert world.engines[1].replayed == [True]
        world.hosts[1].lose()
        world.hosts[2].lose()
        assert await world.lease(failed=world.engines[0]) == 0

    run(test)


def test_what_was_let_in_waits_for_the_next_engine_that_comes_up() -> None:
    async def test(world: World) -> None:
        for host in world.hosts:
            host.lose()
        world.hosts[0].ended.set_result(None)
        waiting = asyncio.create_task(world.lease(failed=world.engines[2]))
        for _ in range(5):
            await asyncio.sleep(0)
        assert not waiting.done()
        world.hosts[1].current = Engine()
        assert await waiting == 1 and world.engines[1].replayed == [True]
        world.hosts[1].lose()
        world.hosts[1].ended.set_result(None)
        world.hosts[2].ended.set_result(None)
        with pytest.raises(Unavailable, match="isn't started again"):
            await world.lease(failed=world.engines[1])

    run(test)


def test_an_engine_that_ends_too_often_is_told_of_and_the_last_one_ends_the_server() -> None:
    async def test(world: World) -> None:
        said: list[str] = []
        over = asyncio.create_task(world.devices.run_out(said.append))
        world.hosts[1].ended.set_exception(IcPortraitError("too often"))
        while not said:
            await asyncio.sleep(0)
        assert said == ["device 1: too often; it isn't started again, and 1 of 2 go on"] and not over.done()
        world.hosts[0].ended.set_exception(IcPortraitError("too often again"))
        with pytest.raises(IcPortraitError, match=r"^device 0: too often again$"):
            await over

    run(test, 2)


def test_an_engine_that_does_not_start_once_ends_the_server() -> None:
    async def test(world: World) -> None:
        world.hosts[1].starts = 0
        world.hosts[1].ended.set_exception(IcPortraitError("no GPU"))
        with pytest.raises(IcPortraitError, match=r"^device 1: no GPU$"):
            await world.devices.run_out(lambda line: pytest.fail(line))

    run(test)


def test_the_error_of_a_host_with_one_engine_is_its_own() -> None:
    async def test(world: World) -> None:
        world.hosts[0].ended.set_exception(OSError("no room"))
        with pytest.raises(OSError, match=r"^no room$"):
            await world.devices.run_out(lambda line: pytest.fail(line))

    run(test, 1)
