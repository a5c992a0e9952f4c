"""The regression guard: ratios within one run against the same ratios of a committed run.

A time differs from machine to machine and from hour to hour. A ratio of two times of the same moments differs far less,
but still by instruction set, so only runs on equal ones are compared.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.ladder_names import OURS
from benchmarks.spread import ratio_text
from icportrait.errors import IcPortraitError

MOST_LOSS = 0.15
"""Share by which a ratio may be worse."""


@dataclass(frozen=True)
class Compared:
    """One ratio, lower is better, in the committed run and in the new one."""

    name: str
    before: Mapping[str, float]
    """``median``, ``low`` and ``high``."""
    after: Mapping[str, float]

    @property
    def loss(self) -> float:
        """Return the share by which the median is worse; below 0 where it is better."""
        return self.after["median"] / self.before["median"] - 1

    @property
    def is_lost(self) -> bool:
        """Tell whether more than ``MOST_LOSS`` was lost, and both runs' intervals lie apart."""
        return self.loss > MOST_LOSS and self.after["low"] > self.before["high"]


def compared_with_any(runs: Sequence[Mapping[str, Any]], after: Mapping[str, Any]) -> list[Compared]:
    """Compare a run with the first of ``runs`` that can be compared with it.

    Raises:
        IcPortraitError: none can; the text has the reason of each.
    """
    reasons = []
    for before in runs:
        try:
            return compared(before, after)
        except IcPortraitError as error:
            reasons.append(str(error))
    raise IcPortraitError(f"no run to compare with: {'; '.join(reasons)}; commit one that was measured here")


def compared(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[Compared]:
    """Compare two runs of ``latency_run.measure_latency``.

    Raises:
        IcPortraitError: the runs can't be compared: other instruction sets, presets, precisions or steps; or they have
            no ratio in common.
    """
    for name, one, other in (
        ("instruction set", *(each["conditions"]["machine"]["instruction_set"] for each in (before, after))),
        ("cores", *(each["conditions"]["machine"]["cores"] for each in (before, after))),
        *((name, before["conditions"][name], after["conditions"][name]) for name in ("preset", "precision")),
        *(
            (name, before["conditions"]["arguments"][name], after["conditions"]["arguments"][name])
            for name in ("num_inference_steps", "guidance_scale", "runtime")
        ),
    ):
        if one != other:
            raise IcPortraitError(f"{name}: {other}, expected {one}, as in the run to compare with")
    ratios, others = _ratios(before), _ratios(after)
    found = [Compared(name, ratio, others[name]) for name, ratio in ratios.items() if name in others]
    if not found:
        raise IcPortraitError("the runs have no ratio in common; measure the same rungs and runtimes")
    return found


def _ratios(run: Mapping[str, Any]) -> dict[str, Mapping[str, float]]:
    """Return the ratios that say how good the product is: the server by its peers, and its ways by its engines."""
    ratios = {
        f"{OURS} by {name}": rung["ours_by_this"]
        for name, rung in run["ladder"].items()
        if name != OURS and "ours_by_this" in rung
    }
    for request in run["requests"]:
        steps, guidance = request["options"]["num_inference_steps"], request["options"]["guidance_scale"]
        ratios[f"a request by its engines, {steps} steps, guidance {guidance:g}"] = request["by_engines"]
    return ratios


def read_run(path: Path) -> dict[str, Any]:
    """Read a run that ``python -m benchmarks latency --out`` has written.

    Raises:
        IcPortraitError: the file isn't there, or isn't such a run.
    """
    try:
        run = json.loads(path.read_text(encoding="utf-8"))
        run["ladder"], run["requests"], run["conditions"]["machine"]["instruction_set"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise IcPortraitError(f"{path}: no run of the latency benchmark ({error!r}); expected its JSON") from error
    return run  # type: ignore[no-any-return]


def table(ratios: list[Compared]) -> str:
    """Write the ratios as lines for a reader."""
    lines = [f"{'ratio, lower is better':<58}{'before':>24}{'now':>24}{'loss':>8}"]
    for each in ratios:
        mark = "   LOST" if each.is_lost else ""
        lines.append(f"{each.name:<58}{ratio_text(each.before):>24}{ratio_text(each.after):>24}{each.loss:>8.1%}{mark}")
    return "\n".join(lines)
