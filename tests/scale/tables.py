"""The tables that ``make scale-test`` prints at its end and writes to ``build/scale/report.json``."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.machine import machine
from tests.conftest import ROOT

REPORT = ROOT / "build" / "scale" / "report.json"
Row = Mapping[str, Any]


@dataclass
class Tables:
    """Tables by title; each row has the same columns. Notes have the conditions."""

    tables: dict[str, list[Row]] = field(default_factory=dict)
    notes: dict[str, str] = field(default_factory=dict)

    def add(self, title: str, *rows: Row, note: str = "") -> None:
        """Add rows to a table."""
        self.tables.setdefault(title, []).extend(rows)
        if note:
            self.notes[title] = note

    def lines(self) -> list[str]:
        """Write all tables as Markdown."""
        lines = []
        for title, rows in self.tables.items():
            names = list(rows[0])
            lines += ["", f"{title}: {self.notes.get(title, '')}".rstrip(": "), ""]
            lines += [_line(names), _line(["---"] * len(names))]
            lines += [_line([_cell(row[name]) for name in names]) for row in rows]
        return lines

    def write(self, path: Path = REPORT) -> None:
        """Write all tables with the machine as JSON."""
        path.parent.mkdir(parents=True, exist_ok=True)
        content = {"kind": "scale-test", "machine": machine(), "notes": self.notes, "tables": self.tables}
        path.write_text(json.dumps(content, indent=1) + "\n")


def _line(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _cell(value: Any) -> str:
    return f"{value:,.4g}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else str(value)


TABLES = Tables()
"""The tables of this run."""
