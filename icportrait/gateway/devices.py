"""The engines of a host, one a GPU: a lease goes to the engine with the least to do.

The measure is the rows that an engine has been asked for, because each row makes a step of all others longer. Among
equals the engine is chosen that has encoded the request's profile before, else the one whose last turn was longest ago.
Each engine has a host of its own (``host``), which starts it again alone.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Callable, Hashable, Mapping

from icportrait.errors import IcPortraitError, Unavailable
from icportrait.gateway.engine import Engine, EngineLostError
from icportrait.gateway.host import RUN_OUT, EngineHost
from icportrait.serving.control import Demand

HOMES = 2**14
"""Profiles whose engine is remembered; the latents of more fit into no engine's cache by its default size."""


class Devices:
    """Implement ``service.Engines``."""

    def __init__(self, hosts: Mapping[str | None, EngineHost]) -> None:
        """Take the engines' hosts.

        Args:
            hosts: by device. One engine alone may have none, which is None.
        """
        self.hosts = dict(hosts)
        self._by_turn = list(self.hosts.values())
        """The host whose last turn was longest ago comes first."""
        self._homes: OrderedDict[Hashable, EngineHost] = OrderedDict()

    @property
    def count(self) -> int:
        """Return the number of engines, up or not."""
        return len(self.hosts)

    @property
    def refusal(self) -> Unavailable | None:
        """Return the error that says why there is no engine now, None where one is up."""
        if any(host.up for host in self._by_turn):
            return None
        return next((host for host in self._by_turn if not host.ended.done()), self._by_turn[0]).refusal

    async def lease(self, key: str, demand: Demand, profile: Hashable = None, failed: Engine | None = None) -> Engine:
        """Take a lease on an engine; see ``service.Engines``. Each engine that is up is asked before a refusal."""
        refusal: Unavailable | None = None
        asked: set[Engine] = set()
        while True:
            if (host := self._choose(profile, asked, failed)) is None:
                if refusal or failed is None:
                    ended = "the engine has ended; try again later; retry_after_ms: 1000"
                    raise refusal or self.refusal or Unavailable(ended)
                await self._wait()
                asked.clear()
                continue
            engine = host.up
            assert engine
            asked.add(engine)
            try:
                await engine.lease(key, demand, replayed=failed is not None)
            except EngineLostError:
                continue
            except Unavailable as error:
                # That of the least loaded, which has room the soonest.
                refusal = refusal or error
                continue
            self._by_turn.remove(host)
            self._by_turn.append(host)
            if profile is not None:
                self._remember(profile, host)
            return engine

    def _choose(self, profile: Hashable, asked: set[Engine], failed: Engine | None) -> EngineHost | None:
        """Return the host of the engine to ask next; None where every engine that is up was asked.

        An engine that fails its requests soon has the least to do. The engine that has failed this one comes last.
        """
        home = self._homes.get(profile)

        def load(host: EngineHost) -> tuple[bool, int, bool]:
            assert host.up
            return host.up is failed, host.up.rows, host is not home

        return min((host for host in self._by_turn if host.up and host.up not in asked), key=load, default=None)

    def _remember(self, profile: Hashable, host: EngineHost) -> None:
        self._homes[profile] = host
        self._homes.move_to_end(profile)
        if len(self._homes) > HOMES:
            self._homes.popitem(last=False)

    async def _wait(self) -> None:
        """Wait until an engine is up.

        Raises:
            Unavailable: none will be.
        """
        waiting = [asyncio.create_task(_comes_up(host)) for host in self._by_turn]
        try:
            for comes_up in asyncio.as_completed(waiting):
                if await comes_up:
                    return
            raise Unavailable(RUN_OUT)
        finally:
            for each in waiting:
                each.cancel()

    def start(self) -> None:
        """Start all engines."""
        for host in self._by_turn:
            host.start()

    async def stop(self) -> None:
        """End all engines, whatever runs on them."""
        await asyncio.gather(*(host.stop() for host in self._by_turn))

    async def run_out(self, say: Callable[[str], None]) -> None:
        """Wait until no engine will come any more, or the first start of one has failed.

        Args:
            say: takes a line on each engine before the last that isn't started again.

        Raises:
            IcPortraitError: the reason.
            OSError: likewise.
        """
        devices = {host.ended: (device, host) for device, host in self.hosts.items()}
        while devices:
            done, _ = await asyncio.wait(devices, return_when=asyncio.FIRST_COMPLETED)
            for ended in done:
                device, host = devices.pop(ended)
                error = ended.exception()
                if error and devices and host.starts:
                    say(f"device {device}: {error}; it isn't started again, and {len(devices)} of {self.count} go on")
                elif error and self.count > 1:
                    raise IcPortraitError(f"device {device}: {error}") from error
                elif error:
                    raise error


async def _comes_up(host: EngineHost) -> bool:
    try:
        await host.engine()
    except Unavailable:
        return False
    return True
