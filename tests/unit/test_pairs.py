"""Two servers side by side: the ratio of their times."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import count
from typing import Any

import numpy as np
import pytest

from benchmarks import pairs
from benchmarks.__main__ import main
from benchmarks.settings import PairsSettings


class Client:
    """Stands in for tritonclient's; each answer takes what ``clock`` is moved by."""

    def __init__(self, url: str) -> None:
        self.url = url

    def is_server_ready(self) -> bool:
        return True

    def is_model_ready(self, name: str) -> bool:
        return self.url == "standalone"

    def close(self) -> None: ...

    def infer(self, model: str, inputs: list[Any]) -> Any:
        asked.append((self.url, model, tuple(each.name() for each in inputs), inputs[0]._get_content()))
        clock[0] += (0.2 if self.url == "gateway" else 0.1) * next(speeds)
        return self

    def as_numpy(self, name: str) -> Any:
        return np.array([b'{"stage_ms": {"denoise": 60.0, "decode": 10.0}}'], object)


clock = [0.0]
asked: list[Any] = []
speeds: Iterator[float] = iter(())


@pytest.fixture(autouse=True)
def fakes(monkeypatch: pytest.MonkeyPatch) -> None:
    # The machine becomes slower with every pair of requests.
    monkeypatch.setitem(globals(), "speeds", (1 + number // 2 for number in count()))
    monkeypatch.setattr(pairs, "InferenceServerClient", Client)
    monkeypatch.setattr(pairs.time, "perf_counter", lambda: clock[0])
    asked.clear()


def test_the_ratio_is_of_requests_side_by_side_whatever_the_machine_does() -> None:
    report = pairs.run_pairs(PairsSettings("standalone", "gateway", rounds=3, requests=4))
    assert report["ratio_median_of_rounds"] == 2.0
    assert [each["ratio"] for each in report["rounds"]] == 3 * [{"median": 2.0, "low": 2.0, "high": 2.0}]
    first, second = report["rounds"][0]["median_ms"]
    assert (first["denoise"], first["beside_stages"]) == (60.0, round(first["whole"] - 70.0, 2))
    assert second["whole"] == pytest.approx(2 * first["whole"])
    table = pairs.table(report)
    assert "first standalone, second gateway; 3 rounds of 4 requests" in table and "round 3: second to first" in table


def test_each_pair_has_pictures_of_its_own_and_either_server_is_first() -> None:
    pairs.run_pairs(PairsSettings("standalone", "gateway", rounds=2, requests=3, num_inference_steps=5))
    firsts = [url for url, *_ in asked[::2]]
    assert len(asked) == 2 * (pairs.WARM_UP + 6) and {*firsts} == {"standalone", "gateway"}
    pictures = [content for *_, content in asked]
    assert pictures[::2] == pictures[1::2] and len({*pictures}) == len(asked) / 2
    assert {(url, model, names) for url, model, names, _ in asked} == {
        ("standalone", "standalone_pipeline", ("profile", "reference", "request")),
        ("gateway", "ic_portrait", ("profile", "reference", "num_inference_steps", "seed")),
    }


def test_no_requests_are_none_to_compare(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["pairs", "a", "b", "--requests", "0"])
    assert "requests: 0, expected 1 or more" in capsys.readouterr().err
