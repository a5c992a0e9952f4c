"""Parts that several of the unit tests share."""

from __future__ import annotations

from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from tests.host_cuda import HostCuda


class Clock:
    """Seconds that only pass when they are said to, or slept."""

    def __init__(self) -> None:
        self.now_s = 1000.0
        self.late_ms = 0.0
        """Milliseconds by which a sleep takes longer than asked for."""

    def __call__(self) -> float:
        return self.now_s

    def pass_ms(self, milliseconds: float) -> None:
        self.now_s += milliseconds / 1000

    def sleep(self, seconds: float) -> None:
        self.pass_ms(1000 * seconds + self.late_ms if seconds else 0.001)

    def as_module(self) -> Any:
        """Return a stand-in for ``time`` in a module that imports it."""
        return SimpleNamespace(perf_counter=self, sleep=self.sleep)


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> HostCuda:
    from tests.host_cuda import HostCuda

    emulated = HostCuda()
    emulated.install(monkeypatch)
    return emulated
