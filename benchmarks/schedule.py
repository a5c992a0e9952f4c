"""The requests of a load run, drawn before it starts or read from a trace.

Drawn moments are a renewal process: the gaps between requests are independent, exponential (a Poisson process, as of
independent callers), or of a gamma distribution with another coefficient of variation c. Its shape is 1 / c^2, so that
bursts with pauses between come with c above 1, and nearly even gaps with c below.
"""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from icportrait_client.contract import load_contract
from icportrait_client.errors import InvalidRequest

from benchmarks.mix import Mix, Number
from benchmarks.settings import LONGEST_S, LoadSettings

_DRAWN_SEEDS = 2**31
TRACE_FIELDS = {
    "steps": "num_inference_steps",
    "guidance": "guidance_scale",
    "priority": "priority",
    "deadline_ms": "deadline_ms",
}
"""A trace's optional fields, and the server's inputs that they are. ``offset_s`` and ``profile`` are beside them."""


@dataclass(frozen=True)
class PlannedRequest:
    """One request of the schedule."""

    send_s: float
    """Time at which the request is meant to leave, from the run's start."""
    num_inference_steps: int
    seed: int
    guidance_scale: float = 1.0
    priority: int | None = None
    deadline_ms: int | None = None
    """None isn't sent."""
    profile: int | None = None
    """Number of the profile among those made for the run; None takes the given pictures in turn."""
    guidance_interval: tuple[float, float] | None = None
    """None isn't sent."""
    leaves_after_s: float | None = None
    """Time from the sending at which the caller cancels; None waits for the answer."""

    @property
    def options(self) -> dict[str, Any]:
        """Return the inputs beside the pictures."""
        names = ("seed", "num_inference_steps", "guidance_scale", "guidance_interval", "priority", "deadline_ms")
        return {name: value for name in names if (value := getattr(self, name)) is not None}


def schedule_of(settings: LoadSettings) -> tuple[list[PlannedRequest], LoadSettings]:
    """Return an open loop's requests, and the settings with the rate and duration that a trace has.

    Raises:
        InvalidRequest: no request falls into the duration, or the trace can't be read.
    """
    if settings.trace is None:
        return poisson_schedule(settings), settings
    schedule = read_trace(settings)
    duration_s = max(schedule[-1].send_s, 1e-3)
    return schedule, replace(settings, duration_s=duration_s, rate_per_s=len(schedule) / duration_s)


def poisson_schedule(settings: LoadSettings) -> list[PlannedRequest]:
    """Draw the requests of a run, each property from its own stream of the seed.

    A longer run of the same seed and rate begins with the shorter one's requests, and another range of steps leaves the
    moments as they are.

    Raises:
        InvalidRequest: none falls into the duration.
    """
    drawn, schedule = endless(settings), []
    for send_s in _moments(settings):
        if send_s >= settings.duration_s:
            break
        schedule.append(replace(next(drawn), send_s=send_s))
    if not schedule:
        raise InvalidRequest(
            f"no request falls into {settings.duration_s:g} s at {settings.rate_per_s:g}/s; raise rate or duration"
        )
    return schedule


def _moments(settings: LoadSettings) -> Iterator[float]:
    """Yield growing moments without end."""
    rng, mean_s = _streams(settings)[0], 1 / settings.rate_per_s
    variance = settings.burstiness**2
    full_s = 0.0
    while True:
        full_s += rng.exponential(mean_s) if variance == 1 else rng.gamma(1 / variance, variance * mean_s)
        yield _ramped(full_s, settings.ramp_s)


def _ramped(full_s: float, ramp_s: float) -> float:
    """Return the moment at which a rate that grows evenly for ``ramp_s`` has sent what the full one has in ``full_s``.

    By t the growing rate has sent t^2 / (2 ramp_s) seconds' worth, and later t - ramp_s / 2.
    """
    return math.sqrt(2 * ramp_s * full_s) if full_s < ramp_s / 2 else full_s + ramp_s / 2


def _streams(settings: LoadSettings) -> list[np.random.Generator]:
    return [np.random.default_rng(seed) for seed in np.random.SeedSequence(settings.seed).spawn(8)]


def endless(settings: LoadSettings) -> Iterator[PlannedRequest]:
    """Yield requests without end, whose moment is 0."""
    _, steps, seeds, guidance, priority, deadline, profiles, leaves = _streams(settings)
    low, high = settings.steps
    drawn_profiles = _profiles(profiles, settings.returning)
    while True:
        yield PlannedRequest(
            0.0,
            _pick(steps, settings.steps_mix) if settings.steps_mix else int(steps.integers(low, high, endpoint=True)),
            int(seeds.integers(_DRAWN_SEEDS)),
            _pick(guidance, settings.guidance_scale),
            None if settings.priority is None else _pick(priority, settings.priority),
            None if settings.deadline_ms is None else _pick(deadline, settings.deadline_ms),
            next(drawn_profiles),
            settings.guidance_interval,
            _leaving(leaves, settings),
        )


def _pick(rng: np.random.Generator, setting: Number | Mix[Number]) -> Number:
    if not isinstance(setting, Mix):
        return setting
    return setting.values[int(rng.choice(len(setting.values), p=setting.shares))]


def _profiles(rng: np.random.Generator, returning: float | None) -> Iterator[int | None]:
    """Yield each request's profile: one of those before with the probability ``returning``, else a new one."""
    known = 0
    while True:
        if returning is None:
            yield None
        elif known and rng.random() < returning:
            yield int(rng.integers(known))
        else:
            yield known
            known += 1


def _leaving(rng: np.random.Generator, settings: LoadSettings) -> float | None:
    if settings.leaving == 0:
        return None
    leaves, after = rng.random(2)
    return after * settings.leaving_ms / 1000 if leaves < settings.leaving else None


def read_trace(settings: LoadSettings) -> list[PlannedRequest]:
    """Read the requests of a trace: JSON lines, or CSV with a line of names.

    Each has ``offset_s``, from the trace's start, and may have ``steps``, ``guidance``, ``priority``, ``deadline_ms``
    and ``profile``. Equal texts of ``profile`` are one profile. A field that is absent or empty is drawn as without a
    trace.

    Raises:
        InvalidRequest: the file can't be read, or names the line, what came and what was expected.
    """
    path = settings.trace
    assert path is not None
    drawn, profiles = endless(settings), dict[str, int]()
    schedule = []
    for number, row in _rows(path):
        unknown = set(row) - {"offset_s", "profile", *TRACE_FIELDS}
        if unknown:
            known = ", ".join(["offset_s", *TRACE_FIELDS, "profile"])
            raise InvalidRequest(f"{path}: line {number}: {min(map(str, unknown))!r}, expected {known}")
        given = {name: value for name, value in row.items() if value not in (None, "")}
        try:
            changes: dict[str, Any] = {"send_s": _offset_s(given.get("offset_s"))}
            for field, name in TRACE_FIELDS.items():
                if field in given:
                    kind = int if load_contract().inputs[name].dtype.startswith("INT") else float
                    changes[name] = load_contract().inputs[name].elements(_number(kind, field, given[field]))[0]
        except InvalidRequest as error:
            raise InvalidRequest(f"{path}: line {number}: {error}") from None
        if "profile" in given:
            changes["profile"] = profiles.setdefault(str(given["profile"]), len(profiles))
        schedule.append(replace(next(drawn), **changes))
    if not schedule:
        raise InvalidRequest(f"{path}: no request, expected a line for each")
    return sorted(schedule, key=lambda request: request.send_s)


def _rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    try:
        lines = path.read_text("utf-8-sig").splitlines()  # spreadsheets write the signature
    except (OSError, ValueError) as error:
        raise InvalidRequest(f"{path}: can't be read ({getattr(error, 'strerror', None) or error})") from None
    if not next((line for line in lines if line.strip()), "").lstrip().startswith("{"):
        rows = csv.DictReader(lines, restkey="more than the names")
        try:
            yield from ((rows.line_num, row) for row in rows)
        except csv.Error as error:
            raise InvalidRequest(f"{path}: line {rows.line_num + 1}: no CSV ({error})") from None
        return
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                message = getattr(error, "msg", None) or error
                raise InvalidRequest(f"{path}: line {number}: no JSON ({message})") from None
            if not isinstance(row, dict):
                raise InvalidRequest(f"{path}: line {number}: {line.strip()[:40]!r}, expected an object")
            yield number, row


def _offset_s(value: Any) -> float:
    offset_s = -1.0 if value is None else _number(float, "offset_s", value)
    if not 0 <= offset_s <= LONGEST_S:
        raise InvalidRequest(f"offset_s: {value!r}, expected a number of 0 or more, up to {LONGEST_S:g}")
    return offset_s


def _number(kind: Callable[[Any], Number], name: str, value: Any) -> Number:
    try:
        number = kind(value)
    except (TypeError, ValueError, OverflowError):
        raise InvalidRequest(f"{name}: {str(value)[:40]!r}, expected a number") from None
    if isinstance(value, bool):
        raise InvalidRequest(f"{name}: {value!r}, expected a number")
    if kind is int and isinstance(value, float) and number != value:
        raise InvalidRequest(f"{name}: {value!r}, expected a whole number")
    return number
