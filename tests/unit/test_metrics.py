"""A server's counts, and their way to Triton's metrics endpoint."""

from __future__ import annotations

import math
import subprocess
import sys
import threading
import weakref
from types import SimpleNamespace

import pytest

import icportrait.serving.triton_loop
from icportrait.metrics import FAMILIES, LARGEST, REFUSALS, STAGES, Kind, Metrics, description
from icportrait.serving.triton_loop import MetricsPublisher
from tests.stage_front import until


def values(metrics: Metrics, name: str) -> dict[tuple[tuple[str, str], ...], float]:
    return {labels: value for (series, labels), (_, value) in metrics.series().items() if series == name}


def test_counters_count_by_label_and_are_there_from_the_start() -> None:
    metrics = Metrics()
    metrics.count("answers_total")
    for reason in ("deadline", "queue_bytes", "deadline"):
        metrics.count("refusals_total", reason=reason)
    assert values(metrics, "answers_total") == {(): 1}
    assert values(metrics, "refusals_total") == {
        (("reason", "queue_slots"),): 0,
        (("reason", "queue_bytes"),): 1,
        (("reason", "deadline"),): 2,
    }
    with pytest.raises(KeyError):
        metrics.count("refusals_total", reason="another")


def test_a_histogram_is_cumulative_with_its_sum_and_count() -> None:
    metrics = Metrics()
    for slots in (1, 2, 2.5, 4, 16, 17):
        metrics.observe("step_slots", slots)
    buckets = {labels[0][1]: value for labels, value in values(metrics, "step_slots_bucket").items()}
    assert buckets == {"1": 1, "2": 2, "4": 4, "8": 4, "16": 5, "+Inf": 6}
    assert list(buckets) == ["1", "2", "4", "8", "16", "+Inf"]
    assert values(metrics, "step_slots_sum") == {(): 42.5}
    assert values(metrics, "step_slots_count") == {(): 6}


def test_a_histogram_with_labels_has_one_for_each() -> None:
    metrics = Metrics()
    metrics.observe("stage_ms", 3.0, stage="decode")
    counts = values(metrics, "stage_ms_count")
    assert counts == {(("stage", stage),): float(stage == "decode") for stage in STAGES}
    assert values(metrics, "stage_ms_bucket")[(("stage", "decode"), ("le", "5"))] == 1
    assert values(metrics, "stage_ms_bucket")[(("stage", "decode"), ("le", "2"))] == 0
    bounds = [dict(labels)["le"] for labels in values(metrics, "stage_ms_bucket") if ("stage", "denoise") in labels]
    assert bounds[-3:] == ["10000", "30000", "+Inf"]  # and no 1e+04


def test_a_gauge_is_read_when_it_is_asked_for() -> None:
    metrics, requests = Metrics(), [1, 2, 3]
    metrics.gauge("queued_requests", lambda: len(requests))
    assert values(metrics, "queued_requests") == {(): 3}
    requests.clear()
    assert metrics.series()["queued_requests", ()] == (Kind.GAUGE, 0)


def test_every_series_has_a_description() -> None:
    metrics = Metrics()
    for name, family in FAMILIES.items():
        if family.kind is Kind.GAUGE:
            metrics.gauge(name, lambda: 0)
    found = {name: description(name) for name, _ in metrics.series()}
    assert all(found.values())
    families = {name for name, family in FAMILIES.items() if family.kind is not Kind.HISTOGRAM}
    families |= {
        f"{name}_{part}"
        for name, family in FAMILIES.items()
        for part in ("bucket", "sum", "count")
        if family.kind is Kind.HISTOGRAM
    }
    assert set(found) == families
    assert found["step_ms_bucket"] == "UNet forward of one step, until the loop takes its output (bucket)"
    assert found["queued_slots"] == FAMILIES["queued_slots"].description


def test_threads_lose_no_count() -> None:
    metrics = Metrics()

    def count() -> None:
        for _ in range(2000):
            metrics.count("answers_total")
            metrics.observe("step_ms", 1.0)

    threads = [threading.Thread(target=count) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert values(metrics, "answers_total") == {(): 8000}
    assert values(metrics, "step_ms_sum") == {(): 8000}


class Metric:
    """Triton's: a counter takes increments only, and a gauge its value."""

    def __init__(self, kind: str) -> None:
        self.kind, self.value, self.calls = kind, 0.0, 0

    def increment(self, by: float) -> None:
        assert self.kind == "COUNTER" and by > 0
        self.value += by
        self.calls += 1

    def set(self, value: float) -> None:
        assert self.kind == "GAUGE"
        self.value = value
        self.calls += 1


class Family:
    """Triton's, which may be made once for each name."""

    COUNTER, GAUGE = "COUNTER", "GAUGE"
    made: dict[str, Family]
    published: dict[tuple[str, tuple[tuple[str, str], ...]], Metric]

    def __init__(self, name: str, description: str, kind: str) -> None:
        assert name not in self.made and description
        self.made[name], self._name, self._kind = self, name, kind

    def Metric(self, labels: dict[str, str]) -> Metric:  # noqa: N802 - Triton's name
        key = self._name, tuple(labels.items())
        assert key not in self.published
        self.published[key] = Metric(self._kind)
        return self.published[key]


@pytest.fixture
def family(monkeypatch: pytest.MonkeyPatch) -> type[Family]:
    fresh = type("FreshFamily", (Family,), {"made": {}, "published": {}})
    monkeypatch.setitem(sys.modules, "triton_python_backend_utils", SimpleNamespace(MetricFamily=fresh))
    monkeypatch.setattr(icportrait.serving.triton_loop, "PUBLISH_EVERY_S", 0.005)
    return fresh


def test_the_publisher_brings_every_series_and_only_what_is_new(family: type[Family]) -> None:
    metrics = Metrics()
    queued = [5]
    metrics.gauge("queued_requests", lambda: queued[0])
    metrics.count("answers_total")
    publisher = MetricsPublisher(metrics)
    answers, warpings = ("icportrait_answers_total", ()), ("icportrait_warping_ms_count", ())
    until(lambda: answers in family.published and family.published[answers].value == 1)
    for _ in range(3):
        metrics.count("answers_total")
    metrics.observe("warping_ms", 7.0)
    queued[0] = 2
    until(lambda: warpings in family.published and family.published[warpings].value == 1)
    queued[0] = 0
    publisher.close()
    published = {key: metric.value for key, metric in family.published.items()}
    expected = metrics.series()
    assert published == {(f"icportrait_{name}", labels): value for (name, labels), (_, value) in expected.items()}
    assert published[answers] == 4
    assert published["icportrait_queued_requests", ()] == 0
    assert [published["icportrait_refusals_total", (("reason", reason),)] for reason in REFUSALS] == [0, 0, 0]
    assert family.published["icportrait_previews_total", ()].calls == 0


def test_no_metric_lives_longer_than_its_publisher(family: type[Family]) -> None:
    """Check that no metric is left, because Triton's would end the process."""
    publisher = MetricsPublisher(Metrics())
    until(lambda: ("icportrait_answers_total", ()) in family.published)
    publisher.close()
    alive = [weakref.ref(made) for made in (*family.made.values(), *family.published.values())]
    family.made.clear()
    family.published.clear()
    assert len(alive) > 100 and not any(made() for made in alive)


def test_closing_publishes_what_was_counted_last(family: type[Family], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(icportrait.serving.triton_loop, "PUBLISH_EVERY_S", 60)
    metrics = Metrics()
    publisher = MetricsPublisher(metrics)
    metrics.count("previews_total")
    publisher.close()
    assert family.published["icportrait_previews_total", ()].value == 1


def test_metrics_that_cannot_be_published_are_said_once_keep_no_other_and_come_later(
    family: type[Family], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    make, is_failing, failures = family.Metric, [True], []

    def metric(self: Family, labels: dict[str, str]) -> Metric:
        if is_failing and self._name == "icportrait_answers_total":
            failures.append(1)
            raise MemoryError
        return make(self, labels)

    monkeypatch.setattr(family, "Metric", metric)
    metrics = Metrics()
    metrics.count("answers_total")
    publisher = MetricsPublisher(metrics)
    until(lambda: len(failures) > 2)
    assert "icportrait_previews_total" in {name for name, _ in family.published}
    is_failing.clear()
    until(lambda: ("icportrait_answers_total", ()) in family.published)
    publisher.close()
    assert family.published["icportrait_answers_total", ()].value == 1
    assert caplog.text.count("could not be published") == 1 and "MemoryError" in caplog.text


def test_a_gauge_that_cannot_be_read_ends_no_publisher(family: type[Family], caplog: pytest.LogCaptureFixture) -> None:
    metrics, reads = Metrics(), []

    def read() -> float:
        reads.append(1)
        if len(reads) < 4:
            raise RuntimeError("it changed meanwhile")
        return 7.0

    metrics.gauge("active_slots", read)
    publisher = MetricsPublisher(metrics)
    until(lambda: ("icportrait_active_slots", ()) in family.published)
    publisher.close()
    assert family.published["icportrait_active_slots", ()].value == 7


@pytest.mark.parametrize(
    ("value", "kept"), [(-1e19, 0.0), (1e25, LARGEST), (math.inf, LARGEST), (-math.inf, 0.0), (math.nan, LARGEST)]
)
def test_what_was_measured_wrong_keeps_a_histogram_growing(value: float, kept: float) -> None:
    metrics = Metrics()
    metrics.observe("first_step_ms", 5.0)
    metrics.observe("first_step_ms", value)
    assert values(metrics, "first_step_ms_sum") == {(): 5.0 + kept}
    assert values(metrics, "first_step_ms_count") == {(): 2}


def test_a_process_ends_whose_metrics_call_never_returns() -> None:
    """Run a process as where tritonserver has died: the call keeps Python's lock, and so every thread."""
    program = """
import ctypes, sys, time, types
utils = types.ModuleType("triton_python_backend_utils")
class Metric:
    def increment(self, value): ctypes.PyDLL(None).sleep(60)
    set = increment
class MetricFamily:
    COUNTER, GAUGE, HISTOGRAM = range(3)
    def __init__(self, **_): pass
    def Metric(self, labels): return Metric()
utils.MetricFamily = MetricFamily
sys.modules["triton_python_backend_utils"] = utils
from icportrait.metrics import Metrics
from icportrait.serving import triton_loop
triton_loop.PUBLISH_TIMEOUT_S = 0.5
metrics = Metrics()
metrics.count("answers_total")
triton_loop.MetricsPublisher(metrics)
time.sleep(60)
"""
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=30)
    assert run.returncode == 1 and "Timeout" in run.stderr
