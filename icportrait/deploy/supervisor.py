"""Keep a server running: when a part of it has ended, all of it is started again, a few times."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import NoReturn, Protocol

from icportrait.errors import IcPortraitError, NotEnoughMemory

MAX_RESTARTS = 3
WITHIN_S = 600.0
AGAIN_WITHIN_S = 24 * 3600.0
"""A kill for want of memory this long after the last one is another one, and not the same again."""
POLL_S = 0.1
AGAIN_AFTER_S = 1.0
"""Seconds until a restart that failed is tried again."""


@dataclass(frozen=True)
class Ending:
    """The ending of a part of a server."""

    text: str
    """A sentence without its end."""
    for_memory: bool = False
    """The kernel killed it for want of memory, or another process in the same moment."""

    def __str__(self) -> str:
        return self.text


class Server(Protocol):
    """The methods of a server that ``keep_running`` needs."""

    def start(self) -> None: ...

    def stop(self) -> None: ...

    def what_ended(self) -> Ending | None: ...


def keep_running(
    server: Server,
    say: Callable[[str], None],
    ready: str,
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
) -> NoReturn:
    """Start a server and start it again when a part of it has ended, until an exception comes, as from a signal.

    A restart that fails counts as one, and is followed by another; only the first start of all has no second try.
    However this ends, the server is stopped. An exception may come while it stops, but no second one.

    Args:
        server: not started yet.
        say: takes a line for whoever runs the server.
        ready: the line to say each time that the server is ready.
        clock: seconds.
        sleep: waits so many seconds.

    Raises:
        IcPortraitError: it didn't start, parts of it end too often, or one was killed for want of memory again.
        OSError: it didn't start.
    """
    has_run = False
    restarts: deque[float] = deque()
    killed_at = -math.inf
    window = f"{WITHIN_S / 60:.0f} minutes"
    try:
        while True:
            failed: Exception | None = None
            ended: Ending | None
            try:
                server.start()
            except (IcPortraitError, OSError) as error:
                if not has_run:
                    raise
                failed, ended = error, Ending(str(error), isinstance(error, NotEnoughMemory))
            else:
                has_run = True
                say(ready)
                while (ended := server.what_ended()) is None:
                    sleep(POLL_S)
            while restarts and clock() - restarts[0] >= WITHIN_S:
                restarts.popleft()
            may_restart = len(restarts) < MAX_RESTARTS
            if ended.for_memory and clock() - killed_at < AGAIN_WITHIN_S:
                # Start-up has looked at the memory that there was left, and the same has happened.
                if failed:
                    raise failed
                raise IcPortraitError(
                    f"{ended}, for the second time; end other programs, allow more memory, or serve a smaller preset"
                )
            if ended.for_memory:
                killed_at = clock()
            if may_restart:
                restarts.append(clock())
                say(f"{ended}; restarting the server, {len(restarts)} of at most {MAX_RESTARTS} times in {window}")
            server.stop()
            if failed and not may_restart:
                raise IcPortraitError(f"{ended}; that was after {MAX_RESTARTS} restarts in {window}") from failed
            if not may_restart:
                raise IcPortraitError(f"{ended}, after {MAX_RESTARTS} restarts in {window}; the cause is in its output")
            if failed:
                sleep(AGAIN_AFTER_S)
    finally:
        server.stop()
