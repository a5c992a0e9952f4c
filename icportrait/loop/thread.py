"""The loop's thread and its inbox; a simulation in virtual time replaces both."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Protocol

Message = Callable[[], None]


class Inbox(Protocol):
    """The queue of the loop's messages: ``queue.SimpleQueue``, or one in virtual time."""

    def put(self, item: Message, /) -> None: ...

    def get(self, *, timeout: float | None) -> Message: ...

    def empty(self) -> bool: ...


def in_thread(run: Callable[[], None]) -> Callable[[], None]:
    """Start to run a loop in a thread of its own, and return a function that waits for the thread's end."""
    thread = threading.Thread(target=run, name="denoise", daemon=True)
    thread.start()
    return thread.join
