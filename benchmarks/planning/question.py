"""A plan's question: the load, the goal, the GPUs and their prices, from a TOML file and flags.

[workload]
rate_per_s = 40
steps = { from = 5, to = 30 }        # or weights: { 4 = 1, 20 = 3 }

[slo]
p99_ms = 2000

[fleet]
profiles = ["h200-sd15-512-fp16"]    # of benchmarks/profiles, or paths
spare = 1

[prices]
currency = "USD"
H200 = 3.50                          # a GPU's hour

[server]
slots = 16
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.planning.profile import PlanningError, ServiceProfile, as_number
from benchmarks.planning.simulation import ServerSettings
from benchmarks.planning.workload import BALANCERS, Workload, uniform
from icportrait.errors import IcPortraitError
from icportrait.policy import BATCHING_MODES, ServingPolicy

PROFILES = Path(__file__).parents[1] / "profiles"
_SERVER = ("slots", "max_queued_slots", "max_pending_requests", "cache_bytes", "cache_s", "batching")
_TABLES = ("workload", "slo", "fleet", "prices", "server")


@dataclass(frozen=True)
class Goal:
    """Promise to the callers."""

    p99_ms: float | None = None
    goodput: float | None = None
    """Share of requests that must be answered within ``within_ms``."""
    within_ms: float | None = None
    """None is ``p99_ms``."""

    def __post_init__(self) -> None:
        """Check the values.

        Raises:
            PlanningError: names the value, what came and what was expected.
        """
        if self.p99_ms is None and self.goodput is None:
            raise PlanningError("slo: empty, expected p99_ms, or goodput with within_ms")
        for name in ("p99_ms", "within_ms"):
            value = getattr(self, name)
            if value is not None and not 0 < _number(f"slo: {name}", value) < math.inf:
                raise PlanningError(f"slo: {name} is {value:g}, expected milliseconds above 0")
        if self.goodput is not None:
            if not 0 < _number("slo: goodput", self.goodput) <= 1:
                raise PlanningError(f"slo: goodput is {self.goodput:g}, expected a share above 0, up to 1")
            if self.within_ms is None and self.p99_ms is None:
                raise PlanningError("slo: goodput has no within_ms; say within how many milliseconds")

    @property
    def limit_ms(self) -> float:
        """Return the milliseconds that goodput counts within."""
        return float(self.within_ms or self.p99_ms or math.inf)


@dataclass(frozen=True)
class Question:
    """Input of a plan."""

    workload: Workload
    goal: Goal
    profiles: Sequence[ServiceProfile]
    prices: Mapping[str, float] = field(default_factory=dict)
    """A GPU's hour, by a word of its device's name."""
    currency: str = ""
    headroom: float = 0.0
    """Share by which the planned rate is above the workload's."""
    spare: int = 0
    """Replicas beyond those that the goal needs."""
    zones: int = 1
    survive_zone: bool = False
    """The goal is kept with one zone lost."""
    balancer: str = "random"
    settings: ServerSettings = field(default_factory=ServerSettings)
    seed: int = 0

    def __post_init__(self) -> None:
        """Check the values.

        Raises:
            PlanningError: names the value, what came and what was expected.
        """
        if not self.profiles:
            raise PlanningError(f"fleet: no profile, expected some of {', '.join(known_profiles())}, or paths")
        if not 0 <= _number("fleet: headroom", self.headroom) <= 10:
            raise PlanningError(f"fleet: headroom is {self.headroom:g}, expected a share such as 0.2, 0 to 10")
        for name, least, most in (("spare", 0, 10_000), ("zones", 1, 1000)):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
                raise PlanningError(f"fleet: {name} is {value!r}, expected a whole number from {least} to {most}")
        if not isinstance(self.survive_zone, bool):
            raise PlanningError(f"fleet: survive_zone is {self.survive_zone!r}, expected true or false")
        if self.survive_zone and self.zones < 2:
            raise PlanningError(f"fleet: survive_zone with zones = {self.zones}, expected 2 zones or more")
        if self.balancer not in BALANCERS:
            raise PlanningError(f"fleet: balancer is {self.balancer!r}, expected one of {', '.join(BALANCERS)}")
        for name, price in self.prices.items():
            if not 0 <= _number(f"prices: {name}", price) < math.inf:
                raise PlanningError(f"prices: {name} is {price!r}, expected a GPU's hour in your currency, 0 or more")

    def price(self, profile: ServiceProfile) -> float | None:
        """Return the price of an hour of a profile's GPU; None where none was given."""
        words = profile.device.casefold().split()
        return next((price for name, price in self.prices.items() if name.casefold() in words), None)


def read(path: Path | None, flags: Mapping[str, Any]) -> Question:
    """Read a question.

    Args:
        path: a TOML file; None is an empty one.
        flags: go before the file: ``rate_per_s``, ``p99_ms``, ``goodput``, ``within_ms``, ``profiles``, ``headroom``,
            ``spare``, ``seed``; None isn't given.

    Raises:
        PlanningError: something isn't what it should be; names the table and the member.
    """
    tables = _tables(path)
    given = {name: value for name, value in flags.items() if value is not None}
    workload = tables["workload"]
    if {"rate_per_s", "hourly"} <= set(workload):
        raise PlanningError("workload: has rate_per_s and hourly, expected one of them")
    if "rate_per_s" in given:
        workload = {name: value for name, value in workload.items() if name != "hourly"}
        workload["rate_per_s"] = given["rate_per_s"]
    goal = tables["slo"] | {name: given[name] for name in ("p99_ms", "goodput", "within_ms") if name in given}
    fleet = tables["fleet"] | {name: given[name] for name in ("headroom", "spare") if name in given}
    names = given.get("profiles") or fleet.pop("profiles", ())
    fleet.pop("profiles", None)
    prices = dict(tables["prices"])
    currency = prices.pop("currency", "")
    _check_members("fleet", fleet, ("headroom", "spare", "zones", "survive_zone", "balancer"))
    if not isinstance(names, list | tuple):
        raise PlanningError(f"fleet: profiles is {names!r}, expected a list of names or paths")
    return Question(
        read_workload(workload),
        Goal(**_checked("slo", goal, Goal)),
        [find_profile(str(name), path.parent if path else Path()) for name in names],
        prices,
        str(currency),
        settings=_settings(tables["server"]),
        seed=given.get("seed", 0),
        **fleet,
    )


def known_profiles() -> list[str]:
    """Return the names of the profiles in the repository."""
    return sorted(path.stem for path in PROFILES.glob("*.json"))


def find_profile(name: str, folder: Path) -> ServiceProfile:
    """Read a profile by its name in the repository, or by its path.

    Args:
        name: such as ``h200-sd15-512-fp16``, or a path that ends with ``.json``.
        folder: that a path is relative to.

    Raises:
        PlanningError: there is none, or it isn't one.
    """
    path = folder / name if name.endswith(".json") else PROFILES / f"{name}.json"
    if not path.is_file():
        close = difflib.get_close_matches(name, known_profiles(), 1)
        hint = f"; did you mean {close[0]}?" if close else ""
        raise PlanningError(f"profile {name!r}: no such file, expected one of {', '.join(known_profiles())}{hint}")
    return ServiceProfile.read(path)


def read_workload(fields: Mapping[str, Any]) -> Workload:
    """Read a workload's table.

    Raises:
        PlanningError: names the member, what came and what was expected.
    """
    values = _checked("workload", fields, Workload)
    for name in ("steps", "portraits", "priorities", "deadlines_ms"):
        if name in values:
            values[name] = _weights(name, values[name])
    if "hourly" in values:
        hourly = values["hourly"]
        if not isinstance(hourly, list) or len(hourly) != 24:
            raise PlanningError(f"workload: hourly is {str(hourly)[:60]}, expected a list of 24 rates, one an hour")
        values["hourly"] = tuple(_number("workload: hourly", rate) for rate in hourly)
        values["rate_per_s"] = max(values["hourly"])
    for name in ("rate_per_s", "burstiness", "guided", "returning"):
        if name in values:
            values[name] = _number(f"workload: {name}", values[name])
    if "guidance_interval" in values:
        interval = values["guidance_interval"]
        if not isinstance(interval, list) or len(interval) != 2:
            raise PlanningError(f"workload: guidance_interval is {str(interval)[:60]}, expected [begin, end]")
        values["guidance_interval"] = tuple(_number("workload: guidance_interval", share) for share in interval)
    for name in ("profiles", "references"):
        if name in values and (not isinstance(values[name], int) or isinstance(values[name], bool)):
            raise PlanningError(f"workload: {name} is {values[name]!r}, expected a whole number")
    try:
        return Workload(**values)
    except PlanningError as error:
        raise PlanningError(f"workload: {error}") from error


def _tables(path: Path | None) -> dict[str, dict[str, Any]]:
    if path is None:
        return {name: {} for name in _TABLES}
    try:
        found = tomllib.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise PlanningError(f"{path}: can't be read as TOML ({' '.join(str(error).split())})") from error
    _check_members(str(path), found, _TABLES)
    for name, table in found.items():
        if not isinstance(table, dict):
            raise PlanningError(f"{path}: {name} is {table!r}, expected a table [{name}]")
    return {name: found.get(name, {}) for name in _TABLES}


def _settings(fields: Mapping[str, Any]) -> ServerSettings:
    _check_members("server", fields, (*_SERVER, "pictures_kept", "pictures_kept_s", "picture_bytes"))
    policy = {name: fields[name] for name in _SERVER if name in fields}
    rest = {name: fields[name] for name in fields if name not in _SERVER}
    for name, value in {**policy, **rest}.items():
        if name == "batching":
            if not isinstance(value, str):
                raise PlanningError(f"server: batching is {value!r}, expected one of {', '.join(BATCHING_MODES)}")
        elif not 0 <= _number(f"server: {name}", value) < math.inf:
            raise PlanningError(f"server: {name} is {value!r}, expected 0 or more")
        elif not isinstance(value, int) and not name.endswith("_s"):
            raise PlanningError(f"server: {name} is {value!r}, expected a whole number")
    try:
        return ServerSettings(ServingPolicy(**policy), **rest)
    except PlanningError:
        raise
    except IcPortraitError as error:
        raise PlanningError(f"server: {error}") from error


def _checked(table: str, fields: Mapping[str, Any], of: type[Any]) -> dict[str, Any]:
    _check_members(table, fields, [each.name for each in dataclasses.fields(of)])
    return dict(fields)


def _check_members(table: str, fields: Mapping[str, Any], names: Sequence[str]) -> None:
    for name in fields:
        if name not in names:
            close = difflib.get_close_matches(name, names, 1)
            hint = f"; did you mean {close[0]}?" if close else ""
            raise PlanningError(f"{table}: {name!r} is unknown, expected some of {', '.join(names)}{hint}")


def _weights(name: str, given: Any) -> dict[int, float]:
    """Read weights by whole numbers, or the ends of a range of equal weights."""
    if isinstance(given, int) and not isinstance(given, bool):
        return {given: 1.0}
    if not isinstance(given, dict):
        raise PlanningError(
            f"workload: {name} is {given!r}, expected a number, weights such as {{ 4 = 1, 20 = 3 }}, or "
            "{ from = 5, to = 30 }"
        )
    if set(given) == {"from", "to"}:
        low, high = given["from"], given["to"]
        if not (isinstance(low, int) and isinstance(high, int) and 0 <= low <= high <= 10**7):
            raise PlanningError(f"workload: {name} is from {low!r} to {high!r}, expected the lower whole number first")
        if high - low > 10_000:
            raise PlanningError(f"workload: {name} is from {low} to {high}, expected at most 10000 numbers")
        return uniform(low, high)
    weights = {}
    for value, weight in given.items():
        if not str(value).isdecimal():
            raise PlanningError(f"workload: {name} has {value!r}, expected whole numbers with their weights")
        weights[int(value)] = _number(f"workload: {name}: weight of {value}", weight)
    return weights


def _number(name: str, value: Any) -> float:
    number = as_number(value)
    if math.isnan(number):
        raise PlanningError(f"{name} is {value!r}, expected a number")
    return number
