"""``report.md`` and ``report.json`` of a GPU acceptance: failed checks first, every figure with its conditions."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from engines.acceptance import Acceptance
from engines.checks import Check
from engines.ladder import Rung


def write_report(acceptances: list[Acceptance], directory: Path) -> Path:
    """Write both forms; returns the readable one's path."""
    directory.mkdir(parents=True, exist_ok=True)
    found = {
        "passed": all(acceptance.passed for acceptance in acceptances),
        "products": [_as_json(acceptance) for acceptance in acceptances],
    }
    text = json.dumps(found, indent=2, allow_nan=False) + "\n"
    (directory / "report.json").write_text(text, encoding="utf-8")
    report = directory / "report.md"
    report.write_text(as_markdown(acceptances), encoding="utf-8")
    return report


def as_markdown(acceptances: list[Acceptance]) -> str:
    """Write the report as text: the failures of all products, then each one's ladder and checks."""
    checks = [(acceptance.product, check) for acceptance in acceptances for check in acceptance.checks]
    failed = [(product, check) for product, check in checks if not check.passed]
    verdict = f"FAILED: {len(failed)} of {len(checks)}" if failed else f"all {len(checks)} passed"
    lines = ["# GPU acceptance", "", f"Checks: {verdict}.", ""]
    if failed:
        lines += _table(["product", *_CHECK_COLUMNS], [[product, *_row(check)] for product, check in failed])
    for acceptance in acceptances:
        conditions = [f"{name.replace('_', ' ')} {value}" for name, value in acceptance.conditions.items()]
        lines += [f"## {acceptance.product}", "", f"{', '.join(conditions)}.", ""]
        lines += _ladder(acceptance.ladder)
        lines += _table(_CHECK_COLUMNS, [_row(check) for check in sorted(acceptance.checks, key=lambda c: c.passed)])
    return "\n".join(lines)


_CHECK_COLUMNS = ["engine", "check", "batch", "result", "worst figure"]


def _row(check: Check) -> list[str]:
    batch = "" if check.batch is None else str(check.batch)
    return [check.engine, check.name, batch, "passed" if check.passed else "FAILED", check.text]


def _ladder(rungs: list[Rung]) -> list[str]:
    """Write measured rungs as a table, and why the other rungs weren't measured."""
    rows = [
        [rung.name, str(rung.batch), f"{rung.ms:.3f}", f"{rung.rows_per_s:.1f}", _ratio(rung.speedup(rungs))]
        for rung in rungs
        if rung.ms is not None
    ]
    lines = _table(["one UNet step", "batch", "ms, median", "image-steps/s", "of eager torch's"], rows) if rows else []
    missing = [f"Not measured: {rung.name}, batch {rung.batch}: {rung.missing}." for rung in rungs if rung.missing]
    return lines + [line for text in missing for line in (text, "")]


def _ratio(value: float | None) -> str:
    return "" if value is None else f"x {value:.2f}"


def _table(columns: list[str], rows: list[list[str]]) -> list[str]:
    lines = [columns, ["---"] * len(columns), *([cell.replace("|", "\\|") for cell in row] for row in rows)]
    return [f"| {' | '.join(cells)} |" for cells in lines] + [""]


def _as_json(acceptance: Acceptance) -> dict[str, Any]:
    rungs = [
        {
            "name": rung.name,
            "batch": rung.batch,
            "ms": rung.ms,
            "image_steps_per_s": rung.rows_per_s,
            "speedup_over_eager": rung.speedup(acceptance.ladder),
            "not_measured_because": rung.missing or None,
            **acceptance.conditions,
        }
        for rung in acceptance.ladder
    ]
    checks = [
        {
            "engine": check.engine,
            "check": check.name,
            "batch": check.batch,
            "passed": check.passed,
            "tensor": check.figure and check.figure.tensor,
            "figure": check.figure and check.figure.name,
            # JSON has no NaN; the check failed where a figure has no value.
            "value": check.figure.value if check.figure and math.isfinite(check.figure.value) else None,
            "limit": check.figure and check.figure.limit,
            "error": check.error or None,
        }
        for check in sorted(acceptance.checks, key=lambda check: check.passed)
    ]
    return {
        "product": acceptance.product,
        "passed": acceptance.passed,
        "conditions": acceptance.conditions,
        "ladder": rungs,
        "checks": checks,
    }
