"""A line on standard error that says how many portraits there are."""

from __future__ import annotations

import sys
from collections.abc import Sized


class Bar:
    """Overwrites its line on a terminal; elsewhere it writes a line for each tenth."""

    def __init__(self, requests: object, is_shown: bool) -> None:
        self._is_shown, self._count, self._said = is_shown, 0, -1
        self._total = len(requests) if isinstance(requests, Sized) else None

    def advance(self) -> None:
        """Count one more."""
        self._count += 1
        if not self._is_shown:
            return
        is_terminal = sys.stderr.isatty()
        tenth = 10 * self._count // self._total if self._total else self._count // 10
        if is_terminal or tenth != self._said:
            self._said = tenth
            of_all = f" of {self._total}" if self._total is not None else ""
            sys.stderr.write(f"{self._count}{of_all} portraits" + ("\r" if is_terminal else "\n"))
            sys.stderr.flush()

    def close(self) -> None:
        """End the line."""
        if self._is_shown and sys.stderr.isatty():
            sys.stderr.write("\n")
