"""What the denoising loop puts off until an engine runs: nobody waits for it between two runs."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable


class BacklogError(Exception):
    """Work that was put off has failed: no engine has, even where one ran meanwhile."""


class Backlog:
    """Work that is done later, in the order in which it came. Not thread-safe: the loop owns it."""

    def __init__(self) -> None:
        """Begin without any."""
        self._work: deque[Callable[[], object]] = deque()

    def add(self, work: Callable[[], object]) -> None:
        """Put something off."""
        self._work.append(work)

    def work_off(self) -> None:
        """Do all of it now.

        Raises:
            BacklogError: some of it has failed; what was left isn't done any more, because it may build on that.
        """
        try:
            while self._work:
                self._work.popleft()()
        except Exception as error:
            self._work.clear()
            raise BacklogError(f"{type(error).__name__}: {error}") from error
