"""A self-contained page of figures: tables as text, plots as SVG, nothing that is loaded from elsewhere."""

from __future__ import annotations

import html
import io
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import matplotlib
from matplotlib import pyplot as plt
from matplotlib.figure import Figure

matplotlib.use("svg")
# Else every run's page differs in its ids, and text in paths can't be searched or copied.
matplotlib.rcParams.update({"svg.hashsalt": "icportrait", "svg.fonttype": "none", "font.family": "sans-serif"})

COLOURS = ("#4477aa", "#ee6677", "#228833", "#ccbb44", "#66ccee", "#aa3377", "#bbbbbb")
"""Paul Tol's bright scheme, which colour-blind readers can tell apart."""
STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 74rem; margin: 2rem auto; padding: 0 1rem; color: #222; }
h1 { font-size: 1.5rem; } h2 { margin-top: 2.5rem; font-size: 1.2rem; border-bottom: 1px solid #ccc; }
table { border-collapse: collapse; margin: 1rem 0; font-variant-numeric: tabular-nums; }
th, td { padding: .15rem .7rem; text-align: right; border-bottom: 1px solid #eee; white-space: nowrap; }
td:last-child { white-space: normal; }
th:first-child, td:first-child { text-align: left; } th { color: #666; font-weight: 600; white-space: normal; }
.wide { overflow-x: auto; }
svg { max-width: 100%; height: auto; } .note { color: #666; } .simulated { background: #fff3cd; padding: .5rem 1rem; }
"""
"""The page's own style sheet."""
Row = Sequence[object]


def page(title: str, conditions: Mapping[str, Any], sections: Sequence[str], is_simulated: bool = False) -> str:
    """Return the page's HTML.

    Args:
        title: its heading.
        conditions: of the figures; see ``report.conditions_here``.
        sections: HTML, in their order.
        is_simulated: engines were simulated, which the page's first line then says.
    """
    simulated = '<p class="simulated">SIMULATED engines: no figure is a real engine\'s.</p>' if is_simulated else ""
    here = conditions["machine"]
    where = (
        f"{here['cores']} cores of {here['cpu']}, {here['instruction_set']}, {here['memory_gb']} GB; commit"
        f" {conditions['commit'] or 'unknown'}; {conditions['date']}; Python {conditions['python']}"
    )
    rows = [(name, value) for name, value in conditions.items() if name not in ("machine", "arguments")]
    rows += [(f"--{name}", value) for name, value in conditions["arguments"].items()]
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{html.escape(title)}</title>'
        f"<style>{STYLE}</style><h1>{html.escape(title)}</h1>{simulated}<p class=note>{html.escape(where)}</p>"
        + "".join(sections)
        + section("Conditions", rows_table(("", ""), rows))
    )


def section(title: str, *parts: str) -> str:
    """Return a part of the page under a heading."""
    return f"<h2>{html.escape(title)}</h2>{''.join(parts)}"


def note(text: str) -> str:
    """Return a line of explanation."""
    return f"<p class=note>{html.escape(text)}</p>"


def rows_table(head: Row, rows: Sequence[Row]) -> str:
    """Return a table; each cell is a text, or a number that is written as it is."""

    def line(cells: Row, tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{html.escape(str(cell))}</{tag}>" for cell in cells) + "</tr>"

    return f"<div class=wide><table>{line(head, 'th')}{''.join(line(row, 'td') for row in rows)}</table></div>"


def plot(draw: Callable[[Any], None], width: float = 8.0, height: float = 3.6) -> str:
    """Return what ``draw`` puts on a pair of axes, as SVG.

    Args:
        draw: takes matplotlib's axes.
        width: inches.
        height: inches.
    """
    figure: Figure
    figure, axes = plt.subplots(figsize=(width, height), layout="constrained")
    try:
        axes.spines[["top", "right"]].set_visible(False)
        draw(axes)
        file = io.StringIO()
        figure.savefig(file, format="svg", metadata={"Date": None})
    finally:
        plt.close(figure)
    text = file.getvalue()
    return text[text.index("<svg") :]


def interval_of(estimate: Mapping[str, Any], digits: int = 0) -> str:
    """Write a value with its ``low`` and ``high``; None of them isn't finite."""
    low, high = (number(estimate[name], digits) for name in ("low", "high"))
    return f"{number(estimate['value'], digits)} ({low} to {high})"


def number(value: float | None, digits: int = 1) -> str:
    """Write a number, or for None that there is none."""
    return "none" if value is None else f"{value:,.{digits}f}"
