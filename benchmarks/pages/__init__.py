"""Pages of figures: one self-contained HTML file of a benchmark's report."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.pages.page import page


def write_page(path: Path, title: str, report: Mapping[str, Any], sections: list[str]) -> None:
    """Write the page of a report.

    Args:
        path: of the HTML file; its folder is made.
        title: the page's heading.
        report: has ``conditions``, and says whether its engines were simulated.
        sections: HTML, in their order.

    Raises:
        OSError: the file can't be written.
    """
    text = page(title, report["conditions"], [each for each in sections if each], report.get("simulated") is True)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
