"""Intervals of quantiles: their coverage on synthetic latencies, and where none is given."""

from __future__ import annotations

import json

import numpy as np
import pytest

from benchmarks.__main__ import main
from benchmarks.coverage import CASES, Process, autoregression, exponential, lognormal, measure, queue
from benchmarks.settings import CoverageSettings
from benchmarks.statistics import least_samples, quantile, share


@pytest.mark.parametrize(("process", "count"), CASES, ids=lambda case: getattr(case, "name", str(case)))
def test_95_percent_intervals_of_p99_cover_in_93_to_97_percent(process: Process, count: int) -> None:
    figures = measure(process, count, CoverageSettings(trials=1000))
    assert 0.93 <= figures["coverage"] <= 0.97
    assert figures["answered"] > 0.9
    # No wider than what chance makes of the quantile itself, but for the price of not knowing tau.
    assert figures["width"] < 1.4


@pytest.mark.parametrize("level", [0.5, 0.9])
def test_intervals_of_other_quantiles_cover_too(level: float) -> None:
    for process in (lognormal(), autoregression(0.5)):
        figures = measure(process, 4000, CoverageSettings(trials=400, level=level, seed=1))
        assert 0.92 <= figures["coverage"] <= 0.98
        assert figures["answered"] > 0.9


@pytest.mark.parametrize(("process", "count"), [(autoregression(0.95), 2000), (queue(0.9), 5000)])
def test_a_run_that_is_too_short_for_its_autocorrelation_has_no_interval(process: Process, count: int) -> None:
    assert measure(process, count, CoverageSettings(trials=100))["answered"] <= 0.02
    found = quantile(process.draw(np.random.default_rng(0), 1, count)[0], 0.99)
    assert found.value is not None
    assert (found.low, found.high) == (None, None)
    assert found.needed is not None and found.needed > count


def test_below_the_order_statistics_floor_there_is_no_figure() -> None:
    """Compute 0.99^368 = 2.48 %: so often all of 368 independent samples lie below p99."""
    assert [least_samples(level) for level in (0.5, 0.9, 0.99, 0.999)] == [6, 36, 368, 3688]
    few = quantile(np.arange(367.0), 0.99)
    assert (few.value, few.low, few.high, few.needed) == (None, None, None, 368)
    assert quantile(np.arange(368.0), 0.99).value is not None
    # Dependence can't be seen in so few.
    assert quantile([1.0] * 10, 0.5).needed == 64


def test_requests_that_failed_are_slower_than_any() -> None:
    rng = np.random.default_rng(0)
    values = np.where(rng.random(4000) < 0.05, np.inf, rng.exponential(1, 4000))
    assert quantile(values, 0.99).value == np.inf
    median = quantile(values, 0.5)
    assert median.value is not None and median.low is not None and median.high is not None
    assert median.low < median.value < median.high < 1


def test_a_share_has_an_interval_that_grows_with_autocorrelation() -> None:
    rng = np.random.default_rng(0)
    independent = exponential().draw(rng, 1, 10_000)[0]
    alike = autoregression(0.9).draw(rng, 1, 10_000)[0]
    narrow = share(independent > np.log(100), independent)
    wide = share(alike > lognormal().quantile(0.99), alike)
    assert narrow.low < 0.01 < narrow.high
    assert wide.low < 0.01 < wide.high
    assert wide.high - wide.low > 1.5 * (narrow.high - narrow.low)


def test_a_share_of_none_or_all_is_still_uncertain() -> None:
    values = np.random.default_rng(0).exponential(1, 368)
    none, every = share(values > 99, values), share(values < 99, values)
    assert (none.value, none.low, every.value, every.high) == (0, 0, 1, 1)
    # The rule of three with 97.5 %: 0.99^368 is 2.5 %.
    assert none.high >= 1 - 0.025 ** (1 / 368) - 1e-9
    assert every.low == pytest.approx(1 - none.high)


def test_coverage_is_a_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["coverage", "--trials", "2", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["trials"], report["level"]) == (2, 0.99)
    assert report["holds"][0].keys() == {"process", "samples", "answered", "coverage", "width"}
    assert report["too_short"][0]["answered"] == 0
    assert main(["coverage", "--trials", "2"]) == 0
    assert "M/M/1, load 0.5" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(["coverage", "--level", "2"])
    assert "level: 2, expected 0.5..0.999" in capsys.readouterr().err
