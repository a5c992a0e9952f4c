"""Profiles of what ``python -m benchmarks latency`` has measured on a CPU: its engines alone, and a request alone.

fixed + per step x steps    the time of Triton and Python, from requests of the fewest and of the most steps
fixed / 4                   each of the four ways between gateway, engines and loop
per step                    the loop's own time between two steps, whatever the rows
caller_and_door / 2         the way in, and the way out
pictures                    a picture's preparation; the file's encoding is in it
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from benchmarks.planning.measured import host_json
from benchmarks.planning.profile import Host, PlanningError, engines_json
from icportrait.contract import ENGINES


def profile_of_latency(path: Path, runtime: str) -> dict[str, Any]:
    """Make a profile, as JSON, of a latency report.

    Args:
        path: the report of ``latency --json``.
        runtime: one that the report has engines of, such as ``onnxruntime``.

    Raises:
        PlanningError: the file isn't such a report, or has nothing of the runtime.
    """
    try:
        report = json.loads(path.read_text())
        rows = [row for row in report["engines"] if row["runtime"].split("-")[0] == runtime]
        conditions, here = report["conditions"], report["conditions"]["machine"]
        times = {name: {row["batch"]: row["ms"]["p50"] for row in rows if row["engine"] == name} for name in ENGINES}
        host = _host(report, here)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise PlanningError(f"{path}: isn't a report of python -m benchmarks latency --json ({error!r})") from error
    if not rows:
        known = sorted({row["runtime"].split("-")[0] for row in report["engines"]})
        raise PlanningError(f"{path}: has no engines of {runtime}; expected one of {', '.join(known)}")
    runtimes = " and ".join(sorted({row["runtime"] for row in rows}))
    return {
        "device": f"{here['cpu']}, {here['instruction_set']}, {here['cores']} cores",
        "preset": conditions["preset"],
        "precision": conditions["precision"],
        "origin": "measured",
        "assumptions": [
            f"engines of {runtimes}, one at a time; in a server they share the cores with each other and with all else",
            "the file's encoding is in a picture's preparation",
        ],
        "host": host_json(host),
        "engines": engines_json(times),
    }


def _host(report: dict[str, Any], here: dict[str, Any]) -> Host:
    alone = [row for row in report["requests"] if row["options"]["guidance_scale"] <= 1]
    few, many = (choose(alone, key=lambda row: row["options"]["num_inference_steps"]) for choose in (min, max))
    steps = [row["options"]["num_inference_steps"] for row in (few, many)]
    times = [row["ms"]["triton_and_python"]["p50"] for row in (few, many)]
    step_ms = max(0.0, (times[1] - times[0]) / max(1, steps[1] - steps[0]))
    way_ms = max(0.0, times[0] - step_ms * steps[0]) / 4
    door_ms = many["ms"]["caller_and_door"]["p50"] / 2
    return Host(
        workers=max(2, here["cores"]),
        front_ms=round(door_ms, 3),
        prepare_ms=many["ms"]["pictures"]["p50"],
        to_encoder_ms=round(way_ms, 3),
        to_loop_ms=round(way_ms, 3),
        step_outside_ms={1: round(step_ms, 3)},
        to_decoder_ms=round(way_ms, 3),
        to_gateway_ms=round(way_ms, 3),
        back_ms=round(door_ms, 3),
        note=f"from {report['conditions']['date'][:10]}'s report of latency on this machine",
    )
