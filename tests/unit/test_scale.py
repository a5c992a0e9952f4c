"""The figures of docs/scale.md are the planner's."""

from __future__ import annotations

import json
from typing import Any

import pytest

from benchmarks.planning.answer import figures_json, to_json
from benchmarks.planning.evaluation import Scenario, Simulator
from benchmarks.planning.planner import FINAL, keeps, total_replicas
from benchmarks.planning.question import Question, read
from benchmarks.scale import CACHES, DOCUMENT, QUESTION, RESULTS, with_tables

RESULTS_JSON: dict[str, Any] = json.loads(RESULTS.read_text())
MEASURED = "h200-sd15-512-fp16"
AGAIN = 'the planner or the question has changed: run "python -m benchmarks.scale"'


@pytest.fixture(scope="module")
def question() -> Question:
    return read(QUESTION, {"seed": RESULTS_JSON["conditions"]["seed"]})


@pytest.fixture(scope="module")
def answer() -> dict[str, Any]:
    (found,) = [each for each in RESULTS_JSON["answers"] if each["profile"] == MEASURED]
    return dict(found)


def planned(question: Question, answer: dict[str, Any]) -> Scenario:
    """Return the scenario that the plan's figures are of."""
    (profile,) = [each for each in question.profiles if each.name == MEASURED]
    workload = question.workload.at(question.workload.rate_per_s * (1 + question.headroom))
    return Scenario(profile, workload, answer["replicas"], question.balancer, question.settings)


def test_the_documents_tables_are_of_the_committed_answers() -> None:
    assert DOCUMENT.read_text() == with_tables(DOCUMENT.read_text(), RESULTS_JSON), AGAIN


def test_the_answers_are_to_the_committed_question(question: Question) -> None:
    assert to_json(question, [], 0, 0.0)["question"] == RESULTS_JSON["question"], AGAIN
    assert {each["profile"] for each in RESULTS_JSON["answers"]} == {each.name for each in question.profiles}
    for each in RESULTS_JSON["answers"]:
        (profile,) = [profile for profile in question.profiles if profile.name == each["profile"]]
        total = total_replicas(each["replicas"], question.spare, question.zones, question.survive_zone)
        assert each["total"] == total
        assert each["cost_an_hour"] == pytest.approx((question.price(profile) or 0) * total), AGAIN


def test_the_planner_still_gives_these_answers(question: Question, answer: dict[str, Any]) -> None:
    fleet = planned(question, answer)
    with Simulator(1) as simulator:
        figures, cached = simulator.evaluate(
            [fleet, CACHES[2].scenario(fleet)], *FINAL, question.goal.limit_ms, question.seed
        )
    for found, wanted in (
        (figures_json(figures), answer["planned"]),
        (figures_json(cached), RESULTS_JSON["caches"][2]),
    ):
        for name in ("p50_ms", "p99_ms", "goodput"):
            assert found[name]["value"] == pytest.approx(wanted[name]["value"], rel=0.01), AGAIN
    assert keeps(question.goal, figures)


def test_what_the_document_says_of_its_tables_is_so() -> None:
    answers = RESULTS_JSON["answers"]
    assert all(each["breaks_first"].startswith("device:") for each in answers)
    assert [each["profile"] for each in answers if each["origin"] == "measured"] == [MEASURED]
    (own,) = [each for each in answers if each["origin"] == "measured"]
    planned, more = [each for each in own["knee"] if each["load"] in (1.0, 1.25)]
    assert more["busy"]["device"] - planned["busy"]["device"] < 0.1
    assert more["p99_ms"]["value"] > 2 * planned["p99_ms"]["value"]
    none, any_server, half, most = RESULTS_JSON["caches"]
    assert any_server["p99_ms"] == none["p99_ms"]
    for name in ("p50_ms", "p99_ms"):
        assert none[name]["value"] > half[name]["value"] > most[name]["value"]
    assert none["busy"]["device"] - most["busy"]["device"] < 0.05
