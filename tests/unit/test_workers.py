"""Picture processes that die, stop, take too long or too much: nobody else's request is lost."""

from __future__ import annotations

import asyncio
import gc
import io
import mmap
import multiprocessing
import os
import signal
import time
import weakref
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pytest
from PIL import Image

import icportrait.gateway.workers as workers_module
from icportrait.errors import IcPortraitError, InvalidRequest
from icportrait.gateway.c2pa_signing import Credentials, Ingredient, encode_and_sign
from icportrait.gateway.workers import LARGE_BYTES, Workers
from icportrait.pictures.imaging import encode_picture
from icportrait.pictures.prepare import prepare
from tests.certificates import make_chain, report
from tests.e2e.supervised import resident_bytes

Result = TypeVar("Result")
MEMORY = 2**30


@dataclass(frozen=True)
class Owner:
    priority: int = 1
    deadline_s: float = float("inf")
    arrived_s: float = 0.0


def now(priority: int = 1) -> Owner:
    return Owner(priority, arrived_s=time.monotonic())


# Functions that processes run; a folder tells them and us apart what has happened.


def wait_for(_: bytes, folder: str, name: str) -> int:
    """Say that the work has begun, and end when the test says so."""
    unseen = Path(folder, f"{name}.written")
    unseen.write_text(str(os.getpid()))
    unseen.rename(Path(folder, f"{name}.begun"))
    while not Path(folder, f"{name}.end").exists():
        time.sleep(0.01)
    return os.getpid()


def die(_: bytes) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def die_once(_: bytes, folder: str) -> str:
    if not Path(folder, "died").exists():
        Path(folder, "died").touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return "done"


def allocate(_: bytes, count: int) -> int:
    return len(bytearray(count))


def keep(_: bytes, count: int) -> int:
    kept.append(mmap.mmap(-1, count))
    return len(kept)


kept: list[mmap.mmap | bytes] = []


def hoard(_: bytes, count: int) -> int:
    """Leave free memory before a block that stays, and return the process's id."""
    blocks = [b"x" * 100_000 for _ in range(count // 100_000)]
    kept.append(blocks[-1])
    return os.getpid()


def length(data: bytes) -> int:
    return len(data)


def spin(_: bytes, cpu_s: float, folder: str = "") -> str:
    if folder:
        Path(folder, str(os.getpid())).touch()
    end_s = time.process_time() + cpu_s
    while time.process_time() < end_s:
        pass
    return "done"


def run(
    test: Callable[[Workers], Awaitable[Result]],
    count: int = 2,
    timeout_s: float = 20.0,
    cpu_s: float = 10.0,
    credentials: Credentials | None = None,
) -> Result:
    async def main() -> Result:
        workers = Workers(count, cpu_s, MEMORY, timeout_s, credentials)
        await workers.start()
        try:
            return await test(workers)
        finally:
            await workers.stop()

    return asyncio.run(main())


async def until(condition: Callable[[], Any]) -> None:
    while not condition():
        await asyncio.sleep(0.01)


def test_a_picture_comes_back_as_its_crop_and_a_broken_one_as_the_callers_mistake() -> None:
    buffer = io.BytesIO()
    Image.fromarray(np.full((40, 60, 3), 200, np.uint8)).save(buffer, "PNG")

    async def test(workers: Workers) -> None:
        crop, pixels = await workers.run(now(), prepare, buffer.getvalue(), "profile", None, False, 32)
        assert (crop.source, pixels.shape, pixels.dtype) == ("centre", (32, 32, 3), np.uint8)
        with pytest.raises(InvalidRequest, match="reference: 3 bytes that begin with b'abc' are no picture"):
            await workers.run(now(), prepare, b"abc", "reference", None, False, 32)
        assert (await workers.run(now(), encode_picture, pixels, "png")).startswith(b"\x89PNG")

    run(test)


def test_a_process_signs_and_so_does_the_one_that_takes_its_place(caplog: pytest.LogCaptureFixture) -> None:
    chain = make_chain()

    async def test(workers: Workers) -> None:
        pixels, inputs = np.zeros((32, 32, 3), np.uint8), (Ingredient("profile"), Ingredient("reference"))
        for _ in range(2):
            signed = await workers.run(now(), encode_and_sign, pixels, "png", inputs)
            assert report(signed.file, "image/png")["validation_state"] == "Valid"
            with pytest.raises(InvalidRequest):
                await workers.run(now(), die, b"")
            await until(lambda: workers.lost and len(workers._free) == 1)

    run(test, count=1, credentials=Credentials(chain.certificates, chain.key, "es256", None))
    assert "PRIVATE KEY" not in caplog.text


def test_how_long_work_has_waited_for_a_process_is_told(tmp_path: Path) -> None:
    async def test(workers: Workers) -> None:
        waits_ns: list[int] = []
        began_ns = time.monotonic_ns()
        first = asyncio.ensure_future(
            workers.run(now(), wait_for, b"", str(tmp_path), "first", on_waited=waits_ns.append)
        )
        await until((tmp_path / "first.begun").exists)
        asked_ns = time.monotonic_ns()
        second = asyncio.ensure_future(workers.run(now(), length, b"x", on_waited=waits_ns.append))
        await until(lambda: workers._waiting)
        went_ns = time.monotonic_ns()
        (tmp_path / "first.end").touch()
        await asyncio.gather(first, second)
        assert waits_ns[0] <= asked_ns - began_ns and waits_ns[1] >= went_ns - asked_ns > 0

    run(test, count=1)


def test_work_whose_process_is_killed_is_done_by_another(tmp_path: Path) -> None:
    async def test(workers: Workers) -> None:
        assert await workers.run(now(), die_once, b"", str(tmp_path)) == "done"
        await until(lambda: workers.lost == 1)

    run(test)


def test_work_that_kills_its_process_twice_is_refused_and_others_are_served() -> None:
    async def test(workers: Workers) -> None:
        bad = asyncio.ensure_future(workers.run(now(), die, b""))
        others = [await workers.run(now(), length, b"x") for _ in range(20)]
        assert others == [1] * 20
        with pytest.raises(InvalidRequest, match="twice ended the process"):
            await bad

    run(test)


def test_a_process_that_ends_twice_over_pixels_of_ours_is_no_callers_fault() -> None:
    async def test(workers: Workers) -> None:
        with pytest.raises(IcPortraitError, match="could not be handled on this server") as error:
            await workers.run(now(), die, np.zeros((4, 4, 3), np.uint8), name="portrait")
        assert not isinstance(error.value, InvalidRequest)

    run(test)


def test_processes_that_are_killed_while_they_wait_cost_nothing() -> None:
    async def test(workers: Workers) -> None:
        killed = set(workers.pids)
        for pid in killed:
            os.kill(pid, signal.SIGKILL)
        assert await workers.run(now(), length, b"x") == 1
        await until(lambda: not killed & set(workers.pids))

    run(test)


def test_a_process_that_is_killed_while_it_starts_is_started_again() -> None:
    async def main() -> None:
        workers = Workers(1, 10.0, MEMORY, 20.0, None)
        starting = asyncio.ensure_future(workers.start())
        await until(multiprocessing.active_children)
        (killed,) = (child.pid for child in multiprocessing.active_children())
        assert killed
        os.kill(killed, signal.SIGKILL)
        await starting
        try:
            assert killed not in workers.pids
            assert await workers.run(now(), length, b"x") == 1
        finally:
            await workers.stop()

    asyncio.run(main())


def test_a_process_that_is_stopped_is_replaced_and_its_work_done(tmp_path: Path) -> None:
    async def test(workers: Workers) -> None:
        work = asyncio.ensure_future(workers.run(now(), wait_for, b"", str(tmp_path), "a"))
        await until((tmp_path / "a.begun").exists)
        stopped = int((tmp_path / "a.begun").read_text())
        os.kill(stopped, signal.SIGSTOP)
        (tmp_path / "a.end").touch()
        assert await work != stopped

    run(test)


def test_work_that_takes_too_long_is_ended(tmp_path: Path) -> None:
    async def test(workers: Workers) -> None:
        with pytest.raises(InvalidRequest, match="took too long"):
            await workers.run(now(), wait_for, b"", str(tmp_path), "never ended")

    run(test, timeout_s=0.3)


def test_a_picture_that_takes_more_of_a_core_than_it_may_is_refused_at_once_and_others_go_on(tmp_path: Path) -> None:
    async def test(workers: Workers) -> None:
        bad = asyncio.ensure_future(workers.run(now(), spin, b"", 60.0, str(tmp_path), name="profile"))
        assert [await workers.run(now(), length, b"x") for _ in range(20)] == 20 * [1]
        with pytest.raises(InvalidRequest, match=r"^profile: the picture takes more than 0.2 s of a processor"):
            await bad
        assert len(list(tmp_path.iterdir())) == 1, "it was tried again"
        await until(lambda: workers.lost == 1)
        assert await workers.run(now(), length, b"x") == 1

    run(test, cpu_s=0.2)


def test_time_is_counted_for_each_picture() -> None:
    async def test(workers: Workers) -> None:
        pids = workers.pids
        assert [await workers.run(now(), spin, b"", 0.3) for _ in range(5)] == 5 * ["done"]
        assert (workers.pids, workers.lost) == (pids, 0)

    run(test, count=1, cpu_s=1.0)


def test_memory_is_counted_for_each_picture() -> None:
    async def test(workers: Workers) -> None:
        for _ in range(3):
            assert await workers.run(now(), keep, b"", MEMORY * 3 // 4) > 0

    run(test, count=1)


def test_a_process_without_work_gives_freed_memory_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers_module, "RESTS_AFTER_S", 0.1)
    own: list[None] = []
    monkeypatch.setattr(workers_module.heap, "trim", lambda: own.append(None))

    gc.disable()
    error = InvalidRequest("which refers to itself, as one with a traceback may")
    error.__cause__, garbage = error, weakref.ref(error)
    del error

    async def test(workers: Workers) -> None:
        await workers.run(now(), length, b"")  # which imports this file
        before = resident_bytes(workers.pids[0])
        pid = await workers.run(now(), hoard, b"", 60_000_000)
        assert pid == workers.pids[0]
        await until(lambda: own and not garbage() and resident_bytes(pid) < before + 20_000_000)
        assert await workers.run(now(), length, b"abc") == 3 and workers.pids == [pid] and not workers.lost

    try:
        run(test, count=1)
    finally:
        gc.enable()


def test_equal_work_at_once_is_done_once_and_whoever_is_left_gets_it(tmp_path: Path) -> None:
    async def test(workers: Workers) -> None:
        folder = str(tmp_path)
        blocker = asyncio.ensure_future(workers.run(now(), wait_for, b"", folder, "blocker"))
        await until((tmp_path / "blocker.begun").exists)
        other = asyncio.ensure_future(workers.run(now(priority=5), wait_for, b"", folder, "other"))
        equal = [
            asyncio.ensure_future(workers.run(now(priority), spin, b"", 0.0, folder, key="same"))
            for priority in (9, 9, 1)
        ]
        await until(lambda: len(workers._waiting) == 2)
        equal[0].cancel()
        (tmp_path / "blocker.end").touch()
        assert await asyncio.gather(*equal[1:]) == ["done", "done"]
        # It went before the other, because one of those who want it is more urgent.
        assert not (tmp_path / "other.begun").exists() or not other.done()
        (tmp_path / "other.end").touch()
        await asyncio.gather(blocker, other)
        assert sum(path.name.isdigit() for path in tmp_path.iterdir()) == 1
        again = asyncio.ensure_future(workers.run(now(), length, b"x", key="same"))
        await asyncio.sleep(0)
        again.cancel()
        for run in (equal[0], again):
            with pytest.raises(asyncio.CancelledError):
                await run
        assert await workers.run(now(), length, b"xy", key="same") == 2, "nobody waits for what was given up"

    run(test, count=1)


def test_a_process_that_asks_for_too_much_memory_is_refused_it() -> None:
    async def test(workers: Workers) -> None:
        with pytest.raises(IcPortraitError, match="could not be handled"):
            await workers.run(now(), allocate, b"", 8 * 2**30)
        assert await workers.run(now(), allocate, b"", 2**20) == 2**20
        assert workers.lost == 0

    run(test)


def test_large_files_leave_a_worker_to_the_others_and_the_more_urgent_goes_first(tmp_path: Path) -> None:
    large = bytes(LARGE_BYTES + 1)

    async def test(workers: Workers) -> list[str]:
        folder, order = str(tmp_path), []

        async def work(name: str, data: bytes, owner: Owner) -> None:
            await workers.run(owner, wait_for, data, folder, name)
            order.append(name)

        tasks = [asyncio.ensure_future(work(f"large{n}", large, now())) for n in range(3)]
        await until((tmp_path / "large0.begun").exists)
        (tmp_path / "small.end").touch()
        await work("small", b"", now(priority=9))
        assert not (tmp_path / "large1.begun").exists(), "a large one took the last worker"
        tasks.append(asyncio.ensure_future(work("urgent", large, now(priority=0))))
        await asyncio.sleep(0)
        for name in ("large0", "large1", "large2", "urgent"):
            (tmp_path / f"{name}.end").touch()
        await asyncio.gather(*tasks)
        return order

    assert run(test) == ["small", "large0", "urgent", "large1", "large2"]


def test_work_that_waits_and_is_cancelled_is_never_begun(tmp_path: Path) -> None:
    async def test(workers: Workers) -> None:
        folder = str(tmp_path)
        running = [asyncio.ensure_future(workers.run(now(), wait_for, b"", folder, name)) for name in "ab"]
        await until(lambda: all((tmp_path / f"{name}.begun").exists() for name in "ab"))
        waiting = asyncio.ensure_future(workers.run(now(), wait_for, b"", folder, "c"))
        await asyncio.sleep(0)
        waiting.cancel()
        for name in "abc":
            (tmp_path / f"{name}.end").touch()
        await asyncio.gather(*running)
        assert await workers.run(now(), length, b"x") == 1
        assert not (tmp_path / "c.begun").exists()

    run(test)
