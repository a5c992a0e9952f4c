"""Pages of figures: every section shows its figures, and nothing is loaded from elsewhere."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from benchmarks.pages import write_page
from benchmarks.pages.page import number, rows_table
from benchmarks.pages.plan import plan_sections, replay_sections, validation_sections
from benchmarks.spread import interval_text

CONDITIONS: dict[str, Any] = {
    "commit": None,
    "date": "2026-01-01",
    "python": "3.11.0",
    "machine": {"cpu": "Some <CPU>", "instruction_set": "AVX2", "cores": 2, "memory_gb": 8.0},
    "arguments": {"rate_per_s": 4},
}


def written(tmp_path: Path, report: dict[str, Any], sections: list[str]) -> str:
    """Write a page and check that it stands alone."""
    path = tmp_path / "folder" / "page.html"
    write_page(path, "Some <title>", {**report, "conditions": CONDITIONS}, sections)
    text = path.read_text(encoding="utf-8")
    outside = set(re.findall(r"(?:src|href)=\"?([^\s\">]+)", text)) | set(re.findall(r"url\(([^)]+)\)", text))
    assert all(target.startswith("#") for target in outside)
    for plot in re.findall(r"<svg.*?</svg>", text, re.DOTALL):
        ElementTree.fromstring(plot)
    return text


def estimate(value: float | None) -> dict[str, float | None]:
    return {
        "value": value,
        "low": None if value is None else 0.9 * value,
        "high": None if value is None else 1.1 * value,
    }


def figures(p99_ms: float | None, goodput: float) -> dict[str, Any]:
    return {
        "p50_ms": estimate(123.0),
        "p99_ms": estimate(p99_ms),
        "goodput": estimate(goodput),
        "busy": {"device": 0.62},
        "stage_ms": {"queue": 3.0, "denoise": 250.0},
    }


def answer(name: str, cost: float | None) -> dict[str, Any]:
    return {
        "profile": name,
        "origin": "measured",
        "assumptions": ["something assumed"],
        "replicas": 3,
        "total": 5,
        "planned_rate_per_s": 8.0,
        "planned": figures(1345.0, 0.999),
        "images_an_hour": 28_800.0,
        "cost_an_hour": cost,
        "breaks_first": "device: busy",
        "knee": [{"load": load, **figures(p99, 0.9)} for load, p99 in ((0.5, 800.0), (1.0, 1345.0), (1.75, None))],
        "changes": [{"input": "rate", "factor": 1.2, "keeps_goal": False, **figures(2086.0, 0.985)}],
    }


def plan_report(*answers: dict[str, Any]) -> dict[str, Any]:
    question = {"rate_per_s": 8.0, "slo": {"p99_ms": 2000.0}, "currency": "USD", "slots": 16}
    return {"question": question, "answers": list(answers)}


def test_a_plans_page_has_every_gpu_with_its_replicas_knee_cost_and_changes(tmp_path: Path) -> None:
    none = {"profile": "l4", "replicas": None, "reason": "a request alone takes longer"}
    text = written(tmp_path, {}, plan_sections(plan_report(answer("h200", 12.5), answer("l40s", None), none)))
    for shown in ("h200", "l40s", "l4", "a request alone takes longer", "1,345 (1,210 to 1,480)", "28,800", "12.50"):
        assert shown in text, shown
    for shown in ("no price", "rate x 1.2", "isn&#x27;t kept", "something assumed", "Replicas for 8 requests a second"):
        assert shown in text, shown
    assert text.count("<svg") == 3 and "USD for 1,000 portraits in time" in text


def test_a_plan_without_prices_or_without_an_answer_has_no_plot_of_them(tmp_path: Path) -> None:
    text = written(tmp_path, {}, plan_sections(plan_report(answer("h200", None))))
    assert text.count("<svg") == 2 and "portraits in time" not in text
    none = {"profile": "l4", "replicas": None, "reason": "too slow"}
    assert "<svg" not in written(tmp_path, {}, plan_sections(plan_report(none)))


def test_predictions_stand_beside_measurements_and_misses_are_listed(tmp_path: Path) -> None:
    both = {"measured_ms": 500.0, "simulated_ms": 540.0, "error": 0.08, "interval_ms": [480.0, 600.0]}
    report = {
        "scenarios": [{"mix": "short", "load": 0.7, "rate_per_s": 3.5, "p50": both, "p99": {**both, "error": -0.21}}],
        "highest_rates": [
            {"mix": "short", "p99_goal_ms": 900.0, "measured_per_s": 4.1, "predicted_per_s": 4.0, "error": -0.024},
            {"mix": "long", "p99_goal_ms": 900.0, "measured_per_s": None, "predicted_per_s": 4.0, "error": None},
        ],
        "summary": {
            "intervals_cover": 0.875,
            "misses": ["short at 0.7: p99 -21 %; most by queue"],
            "abstain": ["long at 0.7: p99 +30 %"],
        },
    }
    text = written(tmp_path, {"simulated": True}, validation_sections(report))
    for shown in (
        "SIMULATED",
        "short",
        "540",
        "+8.0%",
        "-21.0%",
        "88%",
        "most by queue",
        "Too wide to judge: long at 0.7",
        "-2.4%",
        "not between the loads",
    ):
        assert shown in text, shown


def test_a_replay_has_both_sides_stages_and_the_requests_that_differ_most(tmp_path: Path) -> None:
    row = {"measured_ms": 500.0, "simulated_ms": 510.0, "error": 0.02}
    worst = {"send_s": 1.25, "steps": 9, "measured_ms": 900.0, "simulated_ms": 700.0, "cause": "queue: 200 ms more"}
    report = {
        "compared": 42,
        **dict.fromkeys(("p50", "p90", "p99"), row),
        "stage_ms": {"queue": {"measured": 5.0, "simulated": 4.0}},
        "worst": [worst],
    }
    text = written(tmp_path, {}, replay_sections(report))
    assert "42 requests" in text and "+2.0%" in text and "queue: 200 ms more" in text and "SIMULATED" not in text


def test_text_from_elsewhere_is_text(tmp_path: Path) -> None:
    text = written(tmp_path, {}, [rows_table(("<b>",), [("<script>",)])])
    for tag in ("<b>", "<script>", "<CPU>", "<title>Some <title>"):
        assert tag not in text
    assert "&lt;script&gt;" in text and "Some &lt;CPU&gt;" in text


@pytest.mark.parametrize(
    ("given", "shown"),
    [
        ({"p50": 12.34, "p50_low": 11.0, "p50_high": 13.0}, "12.3 (11.0 to 13.0)"),
        ({"p50": None}, "not enough samples"),
        ({"p50": 5.0}, "5.0"),
    ],
)
def test_a_figure_that_is_not_there_is_said_to_be_missing(given: dict[str, Any], shown: str) -> None:
    assert interval_text(given) == shown and number(None) == "none" and number(1234.5, 1) == "1,234.5"
