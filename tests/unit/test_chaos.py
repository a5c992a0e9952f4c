"""The verdicts of ``make chaos`` and ``make soak`` on figures that the test makes."""

from __future__ import annotations

import random
from collections import Counter

import pytest

from tests.chaos.__main__ import Result
from tests.chaos.callers import plain
from tests.chaos.faults import FAULTS, REFUSED, SHORT, Fault, Recovery
from tests.soak.load import noise_png
from tests.soak.readings import Reading, drift, growths

FAULT = Fault("a fault", lambda _: None, Recovery.ENGINE, REFUSED)
HINT = "gRPC UNAVAILABLE: the engine is being restarted; try again later; retry_after_ms: N"


@pytest.mark.parametrize(
    ("changes", "wrong"),
    [
        ({}, ""),
        ({"took_s": [1.0, 1.25, 9.0]}, "took 1.2 s, expected 1.2 s or less"),
        ({"took_s": [1.0, 1.1, 9.0]}, ""),
        ({"took_s": [1.9], "cold_s": 1.6}, ""),
        ({"lost": ["no answer"]}, "1 lost: no answer"),
        ({"changed": 1}, "1 portraits were other ones"),
        ({"seen": Counter(["served", "gRPC INTERNAL: denoising failed"])}, "callers got: gRPC INTERNAL"),
        ({"has_traceback": True}, "a traceback in the log"),
        ({"failed": "not within 60 s"}, "not within 60 s"),
    ],
    ids=lambda value: next(iter(value), "right") if isinstance(value, dict) else "",
)
def test_a_fault_passes_only_where_nothing_is_lost_changed_slow_or_unheard_of(
    changes: dict[str, object], wrong: str
) -> None:
    made = {"took_s": [1.0], "seen": Counter(["served", HINT]), **changes}
    assert Result(FAULT, **made).verdict(1.0).startswith(wrong)  # type: ignore[arg-type]
    assert bool(Result(FAULT, **made).verdict(1.0)) == bool(wrong)  # type: ignore[arg-type]


def test_times_do_not_count_in_the_short_run() -> None:
    assert not Result(FAULT, took_s=[99.0]).verdict(None)


def test_answers_are_counted_by_their_text() -> None:
    assert plain("gRPC UNAVAILABLE: full; retry_after_ms: 120") == "gRPC UNAVAILABLE: full; retry_after_ms: N"
    assert plain("gRPC UNAVAILABLE: failed to connect to all addresses") == "gRPC connection refused"
    assert plain("HTTP no answer: <urlopen error [Errno 104] Connection reset by peer>") == "HTTP connection cut"


def test_every_fault_has_a_name_of_its_own_and_the_short_ones_exist() -> None:
    names = [fault.name for fault in FAULTS]
    assert len(set(names)) == len(names) and set(SHORT) <= set(names)


def readings(last: float, quantity: str = "RSS", first: float = 100.0) -> list[Reading]:
    """Return thirty readings that grow evenly, and a process that doesn't."""
    steps = [first + (last - first) * number / 29 for number in range(30)]
    return [{("gateway", quantity): step, ("denoise", "RSS"): 50.0} for step in steps]


@pytest.mark.parametrize(
    ("first", "last", "quantity", "is_too_much"),
    [
        (100.0, 106.0, "RSS", True),
        (100.0, 101.0, "RSS", False),
        (100.0, 80.0, "RSS", False),
        (0.1, 0.2, "shared", False),
        (40.0, 43.0, "descriptors", True),
        (20.0, 21.0, "threads", False),
        (20.0, 25.0, "threads", True),
    ],
)
def test_growth_is_from_the_first_third_to_the_last(
    first: float, last: float, quantity: str, is_too_much: bool
) -> None:
    gateway, denoise = growths(readings(last, quantity, first))
    assert gateway.is_too_much is is_too_much and not denoise.is_too_much


def test_a_process_that_came_or_went_is_named() -> None:
    made = readings(100.0)
    made[20] = {("gateway", "RSS"): 100.0, ("denoise 7", "RSS"): 50.0}
    with pytest.raises(ValueError, match="come or gone: denoise, denoise 7"):
        growths(made)


def test_a_drift_is_told_from_windows_that_differ() -> None:
    rng = random.Random(0)
    steady = [100 + rng.uniform(-10, 10) for _ in range(50)]
    slower = [value + number for number, value in enumerate(steady)]
    assert not drift(steady).is_too_much and drift(steady).low < 0 < drift(steady).high
    assert drift(slower).is_too_much and drift(slower).share == pytest.approx(0.4, abs=0.1)
    assert not drift(slower[::-1]).is_too_much


def test_large_pictures_are_as_large_as_they_say() -> None:
    assert 4_800_000 < len(noise_png(5_000_000)) <= 5_000_000
