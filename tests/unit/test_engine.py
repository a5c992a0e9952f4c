"""The way to the loop, before the loop's own end of the line; and what must never be done to a call to Triton."""

from __future__ import annotations

import ast
import asyncio
import base64
import inspect
import queue
import socket
import threading
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from icportrait.errors import DeadlineMissed, IcPortraitError, Unavailable, from_wire, to_wire
from icportrait.gateway import engine as module
from icportrait.gateway.engine import Engine, EngineLostError, Pong
from icportrait.serving.control import VERSION, Asked, ControlServer, Demand, Hello, Peer, frame

SHAPE = (2, 3, 4)
DEMAND = Demand(phases=((20, 2),), priority=1, deadline_ms=None, arrived_s=5.0, nbytes=7)


class Loop:
    """The loop's end: what came, and who it came from."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "loop"
        self.came: queue.SimpleQueue[Asked] = queue.SimpleQueue()
        self.peer: Peer | None = None
        self.answers = True
        self.gone = threading.Event()
        self.server = ControlServer(self.path, self.take, lambda _: self.gone.set())

    def take(self, peer: Peer, message: Asked) -> None:
        self.peer = peer
        if message.op == "lease" and self.answers:
            is_let_in = message.replayed or message.demand.rows < 8
            refusal = "" if is_let_in else to_wire(Unavailable("full; retry_after_ms: 5"))
            peer.send({"op": "leased", "key": message.key, "refusal": refusal})
        elif message.op == "ping" and self.answers:
            peer.send({"op": "pong", "id": message.id, "busy": True, "step_age_ms": 3.5, "expected_ms": 2.0})
        self.came.put(message)


class Heard:
    """Messages of the loop about one request."""

    def __init__(self) -> None:
        self.said: list[Any] = []

    def on_step(self, step: int, total_steps: int) -> None:
        self.said.append((step, total_steps))

    def on_preview(self, step: int, total_steps: int, latent: Any) -> None:
        self.said.append((step, total_steps, latent))


@pytest.fixture
def run(tmp_path: Path) -> Callable[[Callable[[Engine, Loop], Awaitable[None]]], None]:
    def run(test: Callable[[Engine, Loop], Awaitable[None]]) -> None:
        async def main() -> None:
            loop = Loop(tmp_path)
            async with asyncio.timeout(30):
                # No Triton: a channel connects when it is first used.
                engine = await Engine.connect(f"unix:{tmp_path}/t:1", loop.path, SHAPE)
                try:
                    await test(engine, loop)
                finally:
                    await engine.close()
            loop.server.close()

        asyncio.run(main())

    return run


async def until(condition: Callable[[], Any]) -> None:
    while not condition():
        await asyncio.sleep(0.01)


def test_leases_are_given_refused_and_granted_again(run: Callable[..., None]) -> None:
    async def test(engine: Engine, loop: Loop) -> None:
        await engine.lease("a", DEMAND)
        message = loop.came.get(timeout=10)
        assert message.op == "lease" and message.demand == DEMAND
        large = Demand(((20, 8),), 1, 100, 5.0, 7)
        with pytest.raises(Unavailable, match="full; retry_after_ms: 5"):
            await engine.lease("b", large)
        await engine.lease("c", large, replayed=True)

    run(test)


def test_rows_are_those_of_requests_that_have_a_lease_or_ask_for_one(run: Callable[..., None]) -> None:
    async def test(engine: Engine, loop: Loop) -> None:
        asking = [asyncio.create_task(engine.lease(key, DEMAND)) for key in ("a", "b")]
        await asyncio.sleep(0)
        assert engine.rows == 4, "before any answer"
        await asyncio.gather(*asking)
        with pytest.raises(Unavailable):
            await engine.lease("c", Demand(((20, 8),), 1, 100, 5.0, 7))
        assert engine.rows == 4
        engine.release("a")
        engine.release("a")
        assert engine.rows == 2
        loop.answers = False
        asking = [asyncio.create_task(engine.lease("d", DEMAND))]
        await asyncio.sleep(0)
        assert engine.rows == 4
        asking[0].cancel()
        await asyncio.wait(asking)
        assert engine.rows == 2

    run(test)


def test_a_loop_that_does_not_answer_is_not_waited_for_and_its_lease_is_given_back(
    run: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "LEASE_TIMEOUT_S", 0.05)

    async def test(engine: Engine, loop: Loop) -> None:
        loop.answers = False
        with pytest.raises(Unavailable, match=r"doesn't answer; retry_after_ms: \d+"):
            await engine.lease("a", DEMAND)
        assert [(await asyncio.to_thread(loop.came.get, timeout=10)).op for _ in range(2)] == ["lease", "release"]
        # Also where the caller goes while it is asked for.
        asking = asyncio.create_task(engine.lease("b", DEMAND))
        await asyncio.to_thread(loop.came.get, timeout=10)
        asking.cancel()
        await asyncio.wait([asking])
        assert (await asyncio.to_thread(loop.came.get, timeout=10)).op == "release"

    run(test)


def test_steps_and_previews_reach_their_request_and_no_other(run: Callable[..., None]) -> None:
    async def test(engine: Engine, loop: Loop) -> None:
        heard = Heard()
        engine.listen("a", heard)
        await engine.lease("a", DEMAND)
        assert loop.peer
        latent = np.arange(48, dtype=np.float32).reshape(2, *SHAPE)
        preview = {"op": "preview", "total_steps": 9, "latent": base64.b64encode(latent).decode()}
        loop.peer.send({"op": "step", "key": "b", "step": 1, "total_steps": 9})
        loop.peer.send({"op": "step", "key": "a", "step": 1, "total_steps": 9})
        loop.peer.send({**preview, "key": "a", "step": 2})
        await until(lambda: len(heard.said) == 2)
        assert heard.said[0] == (1, 9)
        step, _, shown = heard.said[1]
        assert step == 2 and np.array_equal(shown, latent)
        engine.seen("a")
        engine.cancel("a")
        engine.release("a", {"denoise": 1.0})
        ops = [(await asyncio.to_thread(loop.came.get, timeout=10)).op for _ in range(4)]
        assert ops == ["lease", "seen", "cancel", "release"]

    run(test)


def test_the_loop_says_how_it_gets_on(run: Callable[..., None]) -> None:
    async def test(engine: Engine, loop: Loop) -> None:
        assert await engine.ping() == Pong(is_busy=True, step_age_ms=3.5, expected_ms=2.0)

    run(test)


def test_a_line_that_breaks_ends_the_engine_and_all_that_waits_for_it(run: Callable[..., None]) -> None:
    async def test(engine: Engine, loop: Loop) -> None:
        await engine.lease("a", DEMAND)
        loop.answers = False
        waiting = [asyncio.create_task(engine.lease("b", DEMAND)), asyncio.create_task(engine.ping())]
        await asyncio.sleep(0)
        assert loop.peer
        loop.peer.close()
        await engine.lost
        for task in waiting:
            with pytest.raises(EngineLostError):
                await task
        with pytest.raises(EngineLostError):
            await engine.decode(np.zeros((1, *SHAPE), np.float32))

    run(test)


@asynccontextmanager
async def loop_that_says(path: Path, data: bytes) -> AsyncIterator[None]:
    """Start a loop that says the same whatever it is asked, to one gateway."""
    is_over = asyncio.Event()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(data)
        await reader.read()
        writer.close()
        await writer.wait_closed()
        is_over.set()

    async with await asyncio.start_unix_server(serve, path):
        yield
        await is_over.wait()


@pytest.mark.parametrize("data", [b"\0\0\0\2[]", b"\xff\xff\xff\xff", b"\0\0\0\1{", frame({"op": "step", "key": "a"})])
def test_a_message_that_is_none_ends_the_line(tmp_path: Path, data: bytes) -> None:
    async def main() -> None:
        async with asyncio.timeout(10), loop_that_says(tmp_path / "loop", frame(Hello(version=VERSION)) + data):
            engine = await Engine.connect(f"unix:{tmp_path}/t:1", tmp_path / "loop", SHAPE)
            engine.listen("a", Heard())
            await engine.lost
            await engine.close()

    asyncio.run(main())


def test_a_loop_of_another_version_is_named(tmp_path: Path) -> None:
    async def main() -> None:
        async with loop_that_says(tmp_path / "loop", frame(Hello(version=VERSION + 1))):
            expected = f"speaks version {VERSION + 1} of the control line, expected {VERSION}"
            with pytest.raises(IcPortraitError, match=expected):
                await Engine.connect("unix:/none", tmp_path / "loop", SHAPE)

    asyncio.run(main())


def test_a_loop_that_is_not_there_is_said_so(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as bound:
        bound.bind(str(tmp_path / "loop"))
        with pytest.raises(IcPortraitError, match="the denoising loop can't be reached"):
            asyncio.run(Engine.connect("unix:/none", tmp_path / "loop", SHAPE))


def test_a_deadline_that_was_missed_is_known_behind_triton_and_a_refused_one_is_not() -> None:
    missed = "deadline_ms: passed after 3 of 20 steps; allow more time, or ask for fewer steps"
    refused = "deadline_ms: 1000, and it would take about 2000 ms now"
    assert type(from_wire(f"in ensemble: {to_wire(DeadlineMissed(missed))}")) is DeadlineMissed
    assert type(from_wire(to_wire(Unavailable(refused)))) is Unavailable


def test_no_call_to_triton_is_cut_short() -> None:
    """Check that no call gets a deadline or is cancelled, because Triton 2.51 doesn't outlive that."""
    tree = ast.parse(inspect.getsource(module))
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    to_triton = [call for call in calls if "_triton." in ast.unparse(call.func)]
    assert len(to_triton) == 2
    assert all(len(call.args) == 1 and not call.keywords for call in to_triton)
    cancels = [call for call in calls if ast.unparse(call.func).endswith(".cancel")]
    assert cancels == []
