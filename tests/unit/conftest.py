"""What several of the unit tests share."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

import icportrait.loop_times
import icportrait.step_alarm
from tests.label_slots import LabelSlots


class Clock:
    """Seconds that only pass when they are said to, or slept."""

    def __init__(self) -> None:
        self.now_s = 1000.0
        self.late_ms = 0.0
        """By which a sleep takes longer than it was asked for."""

    def __call__(self) -> float:
        return self.now_s

    def pass_ms(self, milliseconds: float) -> None:
        self.now_s += milliseconds / 1000

    def sleep(self, seconds: float) -> None:
        self.pass_ms(1000 * seconds + self.late_ms if seconds else 0.001)

    def as_module(self) -> Any:
        """What a module that imports ``time`` may be given for it."""
        return SimpleNamespace(perf_counter=self, sleep=self.sleep)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """By which the loop times its engines."""
    made = Clock()
    for module in (icportrait.loop_times, icportrait.step_alarm):
        monkeypatch.setattr(module, "time", made.as_module())
    return made


@pytest.fixture(params=[False, True], ids=["waits", "overlaps"])
def overlaps(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether the loop's thread is free while engines run; then it decides a step ahead."""
    monkeypatch.setattr(LabelSlots, "overlaps", request.param)
    return bool(request.param)
