"""Draw the Grafana dashboard's panels from a Prometheus: ``python -m benchmarks.dashboard --prometheus URL --out PNG``.

The queries are the dashboard's own, asked of a real Prometheus over HTTP. The picture is matplotlib's, not Grafana's.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import Any

DASHBOARD = Path(__file__).parents[1] / "deploy" / "monitoring" / "dashboard.json"
ROWS = 4
NOTE = "the dashboard's queries, asked of Prometheus and drawn by matplotlib; Grafana draws them otherwise"


@dataclass(frozen=True)
class Panel:
    """A panel's title, unit, and its queries with their legends."""

    title: str
    unit: str
    queries: tuple[tuple[str, str], ...]


def read_panels(path: Path = DASHBOARD) -> list[Panel]:
    """Read a dashboard's panels."""
    return [
        Panel(
            panel["title"],
            panel["fieldConfig"]["defaults"]["unit"],
            tuple((target["expr"], target["legendFormat"]) for target in panel["targets"]),
        )
        for panel in json.loads(path.read_text())["panels"]
    ]


def resolved(query: str, rate_interval: str) -> str:
    """Put values in the place of Grafana's variables."""
    return query.replace("$instance", ".*").replace("$__rate_interval", rate_interval)


def ask(prometheus: str, query: str, minutes: float, step_s: float) -> list[dict[str, Any]]:
    """Ask for the series of a query over the last minutes.

    Raises:
        ValueError: Prometheus refuses the query.
    """
    now = time.time()
    values = {"query": query, "start": now - 60 * minutes, "end": now, "step": step_s}
    url = f"{prometheus}/api/v1/query_range?{urllib.parse.urlencode(values)}"
    try:
        with urllib.request.urlopen(url, timeout=30) as answer:
            result: list[dict[str, Any]] = json.loads(answer.read())["data"]["result"]
            return result
    except urllib.error.HTTPError as error:
        with error:
            raise ValueError(f"{query}: {error.read().decode()}") from error


def legend(template: str, labels: dict[str, str]) -> str:
    """Fill a legend as Grafana does; without a key's name, say so, because matplotlib shows no empty one."""
    return re.sub(r"{{(\w+)}}", lambda match: labels.get(match[1], ""), template) or "(none)"


def draw(prometheus: str, out: Path, minutes: float, rate_interval: str) -> None:
    """Draw all panels into one picture."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    panels = read_panels()
    columns = -(-len(panels) // ROWS)
    figure, axes = pyplot.subplots(ROWS, columns, figsize=(6 * columns, 3 * ROWS), layout="constrained")
    for panel, axis in zip(panels, axes.flat, strict=True):
        for query, template in panel.queries:
            for series in ask(prometheus, resolved(query, rate_interval), minutes, max(1.0, minutes / 4)):
                times = [(float(at) - time.time()) / 60 for at, _ in series["values"]]
                axis.plot(
                    times, [float(value) for _, value in series["values"]], label=legend(template, series["metric"])
                )
        axis.set_title(f"{panel.title} ({panel.unit})", fontsize=9)
        axis.set_ylim(bottom=0)
        axis.tick_params(labelsize=7)
        axis.grid(alpha=0.3)
        if axis.lines:
            axis.legend(fontsize=6, loc="upper left")
    figure.supxlabel("minutes", fontsize=8)
    figure.suptitle(f"IC-Portrait Server: {NOTE}", fontsize=10)
    figure.savefig(out, dpi=80)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.dashboard", description=__doc__.splitlines()[0])
    parser.add_argument("--prometheus", default="http://127.0.0.1:9090", help="its address (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=Path("build/dashboard.png"), help="(default: %(default)s)")
    parser.add_argument("--minutes", type=float, default=10.0, help="before now (default: %(default)s)")
    parser.add_argument("--rate-interval", default="30s", help="of rates; four scrapes or more (default: %(default)s)")
    args = parser.parse_args(argv)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    try:
        draw(args.prometheus, args.out, args.minutes, args.rate_interval)
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(args.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
