"""The places that a report goes to: standard output, as text or as JSON, and a page where one is asked for."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Output:
    """The places that one run's report goes to."""

    as_json: bool = False
    page: Path | None = None
    """File of the page; None writes none."""

    def show(
        self,
        report: Mapping[str, Any],
        table: Callable[[Any], str],
        title: str = "",
        sections: Callable[[Any], list[str]] | None = None,
    ) -> None:
        """Print a report, and write its page.

        Args:
            report: figures and ``conditions``, ready for JSON.
            table: writes the report as lines for a reader.
            title: the page's heading.
            sections: makes the page's sections of the report, for a command that has pages.

        Raises:
            OSError: the page can't be written.
        """
        print(json.dumps(report, indent=2) if self.as_json else table(report))
        if self.page and sections:
            from benchmarks.pages import write_page

            write_page(self.page, title, report, sections(report))


def check_file(path: Path | None) -> None:
    """Refuse a file that can't be written, before a run spends minutes on its content. Make the file's folder.

    Raises:
        OSError: the reason.
    """
    if path is None:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.is_dir():
        raise IsADirectoryError(f"{path}: is a folder, expected a file to write")
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise PermissionError(f"{path}: can't be written here; name another file")


def add_output_arguments(command: argparse.ArgumentParser, has_page: bool = False) -> None:
    """Add ``--json``, and ``--report`` to a command that has pages."""
    command.add_argument("--json", action="store_true", help="print the figures and their conditions as JSON")
    if has_page:
        command.add_argument("--report", type=Path, metavar="FILE", help="write one self-contained HTML page here")
