"""The requests of a load: moments, mixes, returning profiles, and traces."""

from __future__ import annotations

import json
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from icportrait_client.errors import InvalidRequest

from benchmarks.__main__ import main
from benchmarks.mix import Mix, mixed, weighted
from benchmarks.schedule import PlannedRequest, endless, poisson_schedule, read_trace, schedule_of
from benchmarks.settings import LoadSettings


def many(**settings: Any) -> list[PlannedRequest]:
    return list(islice(endless(LoadSettings(**settings)), 2000))


def test_bursts_have_the_gaps_that_were_asked_for() -> None:
    for burstiness in (0.25, 3.0):
        schedule = poisson_schedule(LoadSettings(rate_per_s=100, duration_s=100, burstiness=burstiness))
        gaps_s = np.diff([each.send_s for each in schedule])
        assert gaps_s.mean() == pytest.approx(1 / 100, rel=0.1)
        assert gaps_s.std() / gaps_s.mean() == pytest.approx(burstiness, rel=0.1)


def test_a_ramp_grows_evenly_to_the_full_rate() -> None:
    settings = LoadSettings(rate_per_s=1000, duration_s=20, warm_up_s=10, ramp_s=10)
    counts, _ = np.histogram([each.send_s for each in poisson_schedule(settings)], bins=[0, 5, 10, 15, 20])
    # Of the rate 100 t in the ramp, the integral: 1250 and 3750; then 5000.
    assert counts == pytest.approx([1250, 3750, 5000, 5000], rel=0.06)


def test_mixes_are_drawn_by_their_weights_each_from_its_own_stream() -> None:
    plain, mix = many(), many(guidance_scale=Mix((1.0, 7.5), (3, 1)), steps_mix=Mix((10, 20), (1, 1)))
    assert np.mean([each.guidance_scale == 7.5 for each in mix]) == pytest.approx(0.25, abs=0.03)
    assert np.mean([each.num_inference_steps == 20 for each in mix]) == pytest.approx(0.5, abs=0.03)
    assert [each.seed for each in mix] == [each.seed for each in plain]
    assert {(each.guidance_scale, each.priority, each.deadline_ms) for each in plain} == {(1.0, None, None)}
    assert {each.guidance_interval for each in many(guidance_interval=(0.2, 0.5))} == {(0.2, 0.5)}
    classes = many(priority=Mix((0, 9), (1, 9)), deadline_ms=Mix((500, 5000), (1, 1)))
    assert np.mean([each.priority == 0 for each in classes]) == pytest.approx(0.1, abs=0.02)
    assert {each.deadline_ms for each in classes} == {500, 5000}


def test_a_profile_is_new_or_was_there_before() -> None:
    """Count returning profiles; a new one has the next number."""
    profiles = [each.profile for each in many(returning=0.7)]
    assert profiles[0] == 0
    known, returned = 0, 0
    for profile in profiles:
        assert profile is not None and profile <= known
        returned += profile < known
        known += profile == known
    assert returned / len(profiles) == pytest.approx(0.7, abs=0.03)
    assert [each.profile for each in many(returning=0)[:3]] == [0, 1, 2]
    assert {each.profile for each in many()} == {None}


def test_callers_leave_within_their_time() -> None:
    leaves = [each.leaves_after_s for each in many(leaving=0.2, leaving_ms=500)]
    gone = [each for each in leaves if each is not None]
    assert len(gone) / len(leaves) == pytest.approx(0.2, abs=0.03)
    assert 0 <= min(gone) < 0.05 and 0.45 < max(gone) <= 0.5


def test_values_with_weights_are_read() -> None:
    assert weighted(int, "10:3") == (10, 3.0)
    assert weighted(float, "7.5") == (7.5, 1.0)
    assert mixed("steps", [(10, 1.0)]) == 10
    mix = mixed("steps", [(10, 3.0), (20, 1.0)])
    assert isinstance(mix, Mix)
    assert (str(mix), mix.shares) == ("10:3 20:1", (0.75, 0.25))


CSV = """offset_s,steps,guidance,deadline_ms,profile
0.5,10,,,anna
0.25,,7.5,900,bert
1.75,20,1,,anna
"""
LINES = [
    {"offset_s": 0.5, "steps": 10, "profile": "anna"},
    {"offset_s": 0.25, "guidance": 7.5, "deadline_ms": 900, "profile": "bert"},
    {"offset_s": 1.75, "steps": 20, "guidance": 1, "profile": "anna"},
]


def test_a_trace_is_read_as_csv_and_as_json_lines(tmp_path: Path) -> None:
    (tmp_path / "trace.csv").write_text(CSV)
    (tmp_path / "trace.jsonl").write_text("\n".join(map(json.dumps, LINES)) + "\n\n")
    settings = LoadSettings(trace=tmp_path / "trace.csv", steps=(3, 3), guidance_scale=1.5, warm_up_s=0)
    schedule, replayed = schedule_of(settings)
    assert schedule == read_trace(LoadSettings(trace=tmp_path / "trace.jsonl", steps=(3, 3), guidance_scale=1.5))
    # A profile's number is the order of its first line.
    assert [(each.send_s, each.num_inference_steps, each.guidance_scale, each.profile) for each in schedule] == [
        (0.25, 3, 7.5, 1),
        (0.5, 10, 1.5, 0),
        (1.75, 20, 1.0, 0),
    ]
    assert [each.deadline_ms for each in schedule] == [900, None, None]
    assert (replayed.duration_s, replayed.rate_per_s) == (1.75, pytest.approx(3 / 1.75))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no request, expected a line for each"),
        ("offset_s\nsoon\n", "line 2: offset_s: 'soon', expected a number"),
        ("offset_s\n-1\n", "line 2: offset_s: '-1', expected a number of 0 or more"),
        ("steps\n3\n", "line 2: offset_s: None, expected a number of 0 or more"),
        ("offset_s,steps\n0,500\n", "line 2: num_inference_steps: 500, expected 1..150"),
        ("offset_s,size\n0,1\n", "line 2: 'size', expected offset_s, steps, guidance, priority, deadline_ms, profile"),
        ("offset_s\n0,1\n", "line 2: 'more than the names', expected offset_s"),
        ('{"offset_s": 0}\n{"offset_s"\n', "line 2: no JSON ("),
        ('{"offset_s": 0}\n[0]\n', "line 2: '[0]', expected an object"),
        ('{"offset_s": 0, "steps": 2.5}\n', "line 1: steps: 2.5, expected a whole number"),
        ('{"offset_s": 0, "steps": true}\n', "line 1: steps: True, expected a number"),
        ('{"offset_s": 0, "steps": 1e999}\n', "line 1: steps: 'inf', expected a number"),
        ('{"offset_s": NaN}\n', "line 1: offset_s: nan, expected a number of 0 or more"),
        (f'{{"offset_s": 1{400 * "0"}}}\n', "line 1: offset_s: '1000"),
        (f'{{"offset_s": 1{5000 * "0"}}}\n', "line 1: no JSON (Exceeds the limit"),
        ("offset_s\n1e18\n", "line 2: offset_s: '1e18', expected a number of 0 or more, up to 1e+07"),
        (f"offset_s,profile\n0,{'x' * 200_000}\n", "line 2: no CSV (field larger than field limit"),
    ],
)
def test_a_trace_that_is_wrong_names_its_line(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "trace"
    path.write_text(text)
    with pytest.raises(InvalidRequest) as refused:
        read_trace(LoadSettings(trace=path))
    assert f"{path}: {message}" in str(refused.value)


def test_a_trace_of_a_spreadsheet_may_begin_with_its_signature(tmp_path: Path) -> None:
    path = tmp_path / "trace.csv"
    path.write_text("offset_s,steps\n0.5,7\n", "utf-8-sig")
    assert [each.num_inference_steps for each in read_trace(LoadSettings(trace=path))] == [7]


def test_a_trace_that_is_not_there_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["load", "--trace", str(tmp_path / "gone.csv")]) == 1
    assert capsys.readouterr().err == f"error: {tmp_path / 'gone.csv'}: can't be read (No such file or directory)\n"
