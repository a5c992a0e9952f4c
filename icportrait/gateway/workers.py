"""Processes that decode and encode pictures: one that dies or stops costs nobody a request.

Each has a pool of one process (pebble), so that it shares no pipe and no lock with another: a pool of several breaks
as a whole where one of them is killed while it waits (pebble 5.2). Work waits here, in the loop's own order.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import gc
import logging
import math
import multiprocessing
import os
import select
import signal
import threading
import time
from collections.abc import Callable
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from typing import Any, TypeVar

from pebble import ProcessExpired, ProcessPool

from icportrait.contract import Array
from icportrait.deploy import heap
from icportrait.deploy.stub_processes import describe, is_stopped
from icportrait.errors import IcPortraitError, InvalidRequest
from icportrait.gateway import bounded
from icportrait.gateway.c2pa_signing import Credentials
from icportrait.policy import Ranked, rank

logger = logging.getLogger(__name__)
Result = TypeVar("Result")
LARGE_BYTES = 1_000_000
"""Larger files leave one worker to the others' pictures."""
MAX_DEATHS = 2
"""A picture whose worker died is tried once more, because something else may have ended it."""
START_TIMEOUT_S = 60.0
STARTS = 3
"""Tries for the first start of a process."""
LOOK_EVERY_S = 0.5
RESTS_AFTER_S = 2.0
"""A process without work gives memory back after this time, because the next picture takes longer then (5 ms)."""
_CONTEXT = multiprocessing.get_context("spawn")
"""Not fork, which gRPC's and this process's other threads don't outlive."""


@dataclass(eq=False)
class _Turn:
    """Work that waits for a worker, or is done by one."""

    owners: list[Ranked]
    """Requests that wait for the result: several where they asked for the same."""
    name: str
    function: Callable[..., Any]
    data: bytes | Array
    """First argument of the function."""
    arguments: tuple[Any, ...]
    done: asyncio.Future[Any]
    waits_since_ns: int = field(default_factory=time.monotonic_ns)
    waited_ns: int = 0
    deaths: int = 0
    """Processes that have died over it."""
    context: contextvars.Context = field(default_factory=contextvars.copy_context)
    """The request's that asked first, for the log."""

    @property
    def is_large(self) -> bool:
        return isinstance(self.data, bytes) and len(self.data) > LARGE_BYTES


class _WorkerLostError(Exception):
    """The process ended, or had to be ended."""

    def __init__(self, text: str, had_begun: bool, is_over_time: bool = False) -> None:
        super().__init__(text)
        self.had_begun, self.is_over_time = had_begun, is_over_time


class _Worker:
    """One process, and the next when it has ended."""

    def __init__(
        self, cpu_s: float, memory_bytes: int, timeout_s: float, credentials: Credentials | None, is_filtered: bool
    ) -> None:
        self._bounds, self._timeout_s = (cpu_s, memory_bytes), timeout_s
        self._of_begin = credentials, is_filtered
        self._pool: ProcessPool | None = None
        self.pid = 0
        self._pidfd = -1
        self.turn: _Turn | None = None
        self.rests_at_s = math.inf
        """Time to give memory back, by ``time.monotonic``, where no picture comes before it."""
        self._changing = threading.Lock()
        """Held while it starts or stops, because a thread that starts it can't be cancelled."""

    def start(self) -> None:
        """Start the process and wait until it is there. Blocks: for a thread."""
        with self._changing:
            pool = ProcessPool(1, initializer=bounded.begin, initargs=self._of_begin, context=_CONTEXT)
            self._pool = pool
            self.pid = pool.schedule(os.getpid).result(START_TIMEOUT_S)
            self._pidfd = os.pidfd_open(self.pid)

    def stop(self) -> None:
        """End the process. Blocks for as long as it takes: for a thread."""
        with self._changing:
            if self._pidfd >= 0:
                self.kill()
                os.close(self._pidfd)
            pool, self._pool, self._pidfd = self._pool, None, -1
            if pool:
                pool.stop()
                pool.join()

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)

    @property
    def has_ended(self) -> bool:
        return self._pidfd >= 0 and bool(select.select([self._pidfd], [], [], 0)[0])

    async def run(self, turn: _Turn) -> Any:
        """Return the result of the turn's function.

        Raises:
            _WorkerLostError: the process has ended, or took too long and is to be replaced.
        """
        assert self._pool
        try:
            # Through a pipe: 17 MB take 37 ms, and by memory that both processes open 40 ms.
            arguments = [turn.function, *self._bounds, turn.data, *turn.arguments]
            future = asyncio.wrap_future(self._pool.schedule(bounded.bounded, args=arguments))
        except RuntimeError as error:
            raise _WorkerLostError("it had ended", had_begun=False) from error
        await asyncio.wait([future], timeout=self._timeout_s)
        if not future.done():
            future.cancel()
            raise _WorkerLostError(f"it took more than {self._timeout_s:g} s", had_begun=True)
        try:
            return future.result()
        except ProcessExpired as error:
            is_over_time = error.exitcode == -bounded.OVER_TIME
            raise _WorkerLostError(f"it {describe(error.exitcode or 0)}", True, is_over_time) from error
        except (BrokenProcessPool, asyncio.CancelledError) as error:
            raise _WorkerLostError("it had ended", had_begun=False) from error


class Workers:
    """Runs functions on pictures for requests, the most urgent first."""

    def __init__(
        self,
        count: int | None,
        cpu_s: float,
        memory_bytes: int,
        timeout_s: float,
        credentials: Credentials | None = None,
        is_filtered: bool = False,
    ) -> None:
        """Prepare; ``start`` starts them.

        Args:
            count: of processes; None for one a core, and two at least.
            cpu_s: seconds of a core that one picture may take.
            memory_bytes: that one picture may take.
            timeout_s: for one picture, on a machine that does other things too.
            credentials: what the processes sign portraits with; None where they don't.
            is_filtered: the processes give up what no picture needs; see ``sandbox``.
        """
        self._cpu_s = cpu_s
        count = count or max(2, len(os.sched_getaffinity(0)))
        self._workers = [_Worker(cpu_s, memory_bytes, timeout_s, credentials, is_filtered) for _ in range(count)]
        self._free: list[_Worker] = []
        self._waiting: list[_Turn] = []
        self._shared: dict[Any, _Turn] = {}
        self._most_large = max(1, count - 1)
        self._tasks: set[asyncio.Task[Any]] = set()
        self.lost = 0
        """Processes that had to be replaced."""

    async def start(self) -> None:
        """Start all processes and wait until they are there.

        Raises:
            IcPortraitError: one can't be started.
        """
        await asyncio.gather(*(self._start(worker, STARTS) for worker in self._workers))
        self._free = list(self._workers)
        self._spawn(self._watch())

    async def stop(self) -> None:
        """End all processes; work that waits or runs is cancelled."""
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for turn in self._waiting:
            turn.done.cancel()
        await asyncio.gather(*(asyncio.to_thread(worker.stop) for worker in self._workers))

    @property
    def pids(self) -> list[int]:
        return [worker.pid for worker in self._workers]

    async def run(
        self,
        owner: Ranked,
        function: Callable[..., Result],
        data: bytes | Array,
        *arguments: Any,
        name: str = "picture",
        key: Any = None,
        on_waited: Callable[[int], None] = lambda _: None,
    ) -> Result:
        """Run ``function(data, *arguments)`` in a process.

        Cancelling takes work that nobody else waits for out of the queue; what a process has begun, it ends for nobody.

        Args:
            owner: its request; see ``policy.rank``.
            function: of a module's own, so that a process finds it.
            data: the first argument.
            arguments: the others.
            name: of the input that the data came in, for messages.
            key: equal for the same work, which is done once for all who ask meanwhile; None is like no other.
            on_waited: takes the nanoseconds that it waited for a process, once there is a result.

        Raises:
            InvalidRequest: it takes too much time, or two processes died over it.
            IcPortraitError: the function raised it, or failed otherwise.
        """
        turn = self._shared.get(key)
        if turn is None or turn.done.done():
            turn = _Turn([], name, function, data, arguments, asyncio.get_running_loop().create_future())
            self._waiting.append(turn)
            if key is not None:
                self._share(key, turn)
        turn.owners.append(owner)
        self._assign()
        try:
            result: Result = await asyncio.shield(turn.done)
        finally:
            turn.owners.remove(owner)
            if not turn.owners:
                turn.done.cancel()
                if turn in self._waiting:
                    self._waiting.remove(turn)
        on_waited(turn.waited_ns)
        return result

    def _share(self, key: Any, turn: _Turn) -> None:
        def forget(_: Any) -> None:
            if self._shared.get(key) is turn:
                del self._shared[key]

        self._shared[key] = turn
        turn.done.add_done_callback(forget)

    def _assign(self) -> None:
        """Give free workers the most urgent work."""
        while self._free and self._waiting:
            large = sum(worker.turn.is_large for worker in self._workers if worker.turn)
            allowed = [turn for turn in self._waiting if large < self._most_large or not turn.is_large]
            if not allowed:
                return
            now_s = time.monotonic()
            turn = min(allowed, key=lambda turn: min(rank(owner, now_s) for owner in turn.owners))
            self._waiting.remove(turn)
            turn.waited_ns += time.monotonic_ns() - turn.waits_since_ns
            worker = self._free.pop()
            worker.turn = turn
            self._spawn(self._serve(worker, turn), turn.context)

    async def _serve(self, worker: _Worker, turn: _Turn) -> None:
        try:
            result = await worker.run(turn)
        except _WorkerLostError as error:
            logger.warning("a picture's process was lost and is replaced: %s", error)
            turn.deaths += error.had_begun
            if error.is_over_time and isinstance(turn.data, bytes):
                text = (
                    f"takes more than {self._cpu_s:g} s of a processor; scale it down, or save it anew as a plain JPEG"
                )
                _fail(turn, InvalidRequest(f"{turn.name}: the picture {text}"))
            elif turn.deaths < MAX_DEATHS:
                self._put_back(turn)
            else:
                text = "twice ended the process that worked on it, or took too long"
                # A caller's file may be why; of pixels of ours nothing is.
                is_file = isinstance(turn.data, bytes)
                _fail(turn, InvalidRequest(f"{turn.name}: the picture {text}") if is_file else _ours(turn.name, text))
            await self._replace(worker)
        except Exception as error:
            if not isinstance(error, IcPortraitError):
                logger.exception("%s failed", turn.function.__name__)
                error = IcPortraitError("a picture could not be handled on this server; its log has the cause")
            _fail(turn, error)
        else:
            if not turn.done.done():
                turn.done.set_result(result)
        worker.turn, worker.rests_at_s = None, time.monotonic() + RESTS_AFTER_S
        self._free.append(worker)
        self._assign()

    def _put_back(self, turn: _Turn) -> None:
        if not turn.done.done():
            turn.waits_since_ns = time.monotonic_ns()
            self._waiting.append(turn)
            self._assign()

    async def _replace(self, worker: _Worker) -> None:
        self.lost += 1
        await self._start(worker)

    async def _start(self, worker: _Worker, tries: float = math.inf) -> None:
        """Start a process anew, and try again where that fails."""
        while True:
            try:
                await asyncio.to_thread(worker.stop)
                await asyncio.to_thread(worker.start)
                return
            except Exception as error:
                tries -= 1
                if not tries:
                    raise IcPortraitError(f"a picture's process can't be started ({error!r})") from error
                logger.exception("a picture's process could not be started; it is tried again")
                await asyncio.sleep(LOOK_EVERY_S)

    async def _watch(self) -> None:
        """Look after processes without work, and end what a signal has stopped: it would keep its work.

        One that has ended is replaced. One that has rested gives memory back, never two of them at once.
        """
        while True:
            await asyncio.sleep(LOOK_EVERY_S)
            for worker in self._workers:
                if is_stopped(worker.pid):
                    worker.kill()
            for worker in [worker for worker in self._free if worker.has_ended]:
                self._free.remove(worker)
                self._spawn(self._bring_back(worker))
            if rested := [worker for worker in self._free if worker.rests_at_s < time.monotonic()]:
                self._free.remove(rested[0])
                self._spawn(self._rest(rested[0]))

    async def _rest(self, worker: _Worker) -> None:
        worker.turn = _Turn([], "memory", bounded.rest, b"", (), asyncio.get_running_loop().create_future())
        worker.turn.done.cancel()  # because nobody waits for it
        await self._serve(worker, worker.turn)
        worker.rests_at_s = math.inf
        # This process has had the pictures too. Errors keep what they refer to until they are collected.
        gc.collect()
        await asyncio.to_thread(heap.trim)

    async def _bring_back(self, worker: _Worker) -> None:
        await self._replace(worker)
        self._free.append(worker)
        self._assign()

    def _spawn(self, coroutine: Any, context: contextvars.Context | None = None) -> None:
        task = asyncio.get_running_loop().create_task(coroutine, context=context)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


def _ours(name: str, text: str) -> IcPortraitError:
    logger.error("a %s %s", name, text)
    return IcPortraitError(f"a {name} could not be handled on this server; its log has the cause")


def _fail(turn: _Turn, error: IcPortraitError) -> None:
    if not turn.done.done():
        turn.done.set_exception(error)
