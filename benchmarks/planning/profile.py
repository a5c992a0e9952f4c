"""A service's profile: the times of a server's parts on one GPU and its host, measured or computed.

    {"device": "NVIDIA H200", "preset": "sd15-512", "precision": "fp16", "origin": "measured",
     "engines": {"unet": {"1": 11.8, "16": 117.9}, "vae_encoder": ...},
     "host": {"prepare_ms": 30, "step_outside_ms": {"1": 0.5, "16": 1.4}, ...},
     "assumptions": ["..."]}

``device``, ``preset`` and ``engines`` are a latency table, so a profile also serves as one for simulated engines.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from icportrait.contract import ENGINES
from icportrait.errors import IcPortraitError
from icportrait.presets import PRESETS, Preset
from icportrait.runtime.latency_table import LatencyTable

ORIGINS = ("measured", "computed")
LONGEST_MS = 600_000.0


class PlanningError(IcPortraitError):
    """A plan's input isn't what it should be; the text says what came, what was expected and how to mend it."""


@dataclass(frozen=True)
class Host:
    """The times outside of the engines, in milliseconds: medians of requests that had the server to themselves."""

    workers: int = 2
    """Processes that decode and encode pictures."""
    front_ms: float = 0.0
    """From the caller's sending to the lease: the way in, and the gateway's reading and checks."""
    prepare_ms: float = 0.0
    """A worker's, for one picture: it is decoded and searched for a face."""
    kept_ms: float = 0.0
    """The gateway's, from the lease to the call to Triton, beside the workers' time."""
    to_encoder_ms: float = 0.0
    """From the gateway to the VAE encoder's model."""
    to_loop_ms: float = 0.0
    """From the VAE encoder's model to the loop."""
    late_ms: float = 0.0
    """Time by which a run is longer than its engine's: until the host has noticed its end."""
    join_ms: float = 0.0
    """The loop's, from a request's arrival to its warping's begin, beside the engines' time."""
    step_outside_ms: Mapping[int, float] = field(default_factory=dict)
    """The loop's, between two runs of the UNet, by rows."""
    to_decoder_ms: float = 0.0
    """From the loop to the VAE decoder's model."""
    to_gateway_ms: float = 0.0
    """From the VAE decoder's model to the gateway."""
    encode_ms: float = 0.0
    """A worker's, for one portrait's file."""
    back_ms: float = 0.0
    """From the gateway's answer to the caller."""
    note: str = ""
    """Conditions of the measurement."""

    def outside_ms(self, rows: int) -> float:
        """Return the loop's own time before a step: linear between the listed rows, level beyond them."""
        points = sorted(self.step_outside_ms.items())
        if not points:
            return 0.0
        (low, low_ms), (high, high_ms) = points[0], points[-1]
        for known, known_ms in points:
            if known <= rows:
                low, low_ms = known, known_ms
            if known >= rows:
                high, high_ms = known, known_ms
                break
        share = 0.0 if high <= low else min(1.0, max(0.0, (rows - low) / (high - low)))
        return low_ms + share * (high_ms - low_ms)


@dataclass(frozen=True)
class ServiceProfile:
    """The times of one server."""

    name: str
    device: str
    preset: Preset
    precision: str
    origin: str
    """One of ``ORIGINS``: where the engines' times come from."""
    engine_ms: Mapping[str, Mapping[int, float]]
    """Milliseconds by engine and batch, every size up to the engine's largest."""
    host: Host
    assumptions: tuple[str, ...] = ()

    @classmethod
    def read(cls, path: Path) -> ServiceProfile:
        """Read a profile's JSON file.

        Raises:
            LatencyTableError: its engines aren't a latency table.
            PlanningError: anything else isn't what it should be.
        """
        table = LatencyTable.read(path)
        fields = json.loads(path.read_text())
        try:
            return cls._parse(path.stem, table, fields)
        except PlanningError as error:
            raise PlanningError(f"{path}: {error}") from error

    @classmethod
    def of_table(cls, name: str, table: LatencyTable, preset: Preset, **fields: Any) -> ServiceProfile:
        """Return the profile of a latency table; ``fields`` are the class's own."""
        largest = {
            "vae_encoder": preset.max_vae_batch,
            "warping_network": preset.max_warping_batch,
            "unet": preset.max_unet_batch,
            "vae_decoder": preset.max_vae_batch,
        }
        times = {engine: {size: table.of(engine, size) for size in range(1, largest[engine] + 1)} for engine in ENGINES}
        return cls(name, table.device, preset, engine_ms=times, **fields)

    @classmethod
    def _parse(cls, name: str, table: LatencyTable, fields: Mapping[str, Any]) -> ServiceProfile:
        preset = PRESETS.get(fields.get("preset", ""))
        if preset is None:
            raise PlanningError(f"preset is {fields.get('preset')!r}, expected one of {', '.join(PRESETS)}")
        if fields.get("origin") not in ORIGINS:
            raise PlanningError(
                f"origin is {fields.get('origin')!r}, expected one of {', '.join(ORIGINS)}: say where the engines' "
                'times come from; a latency table alone becomes a profile with "origin", "precision" and "host"'
            )
        precision, assumptions = fields.get("precision"), fields.get("assumptions", [])
        if not isinstance(precision, str):
            raise PlanningError(f"precision is {precision!r}, expected a name such as fp16")
        if not isinstance(assumptions, list) or not all(isinstance(each, str) for each in assumptions):
            raise PlanningError("assumptions: expected a list of sentences")
        host = read_host(fields.get("host", {}))
        return cls.of_table(
            name,
            table,
            preset,
            precision=precision,
            origin=fields["origin"],
            host=host,
            assumptions=tuple(assumptions),
        )

    def scaled(self, factor: float) -> ServiceProfile:
        """Return the profile with engines that take a factor of their time."""
        times = {
            engine: {size: factor * latency_ms for size, latency_ms in points.items()}
            for engine, points in self.engine_ms.items()
        }
        return dataclasses.replace(self, engine_ms=times)


def engines_json(times: Mapping[str, Mapping[int, float]]) -> dict[str, dict[str, float]]:
    """Return engines' times as JSON has them."""
    return {engine: {str(rows): ms for rows, ms in points.items()} for engine, points in times.items()}


def read_host(fields: Any) -> Host:
    """Read a host's times from JSON.

    Raises:
        PlanningError: names the member, what came and what was expected.
    """
    if not isinstance(fields, dict):
        raise PlanningError(f"host is {json.dumps(fields)[:60]}, expected an object")
    names = [each.name for each in dataclasses.fields(Host)]
    values: dict[str, Any] = {}
    for name, value in fields.items():
        if name not in names:
            raise PlanningError(f"host: {name!r} is unknown, expected some of {', '.join(names)}")
        if name == "note":
            values[name] = str(value)
        elif name == "workers":
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise PlanningError(f"host: workers is {json.dumps(value)}, expected a whole number from 1")
            values[name] = value
        elif name == "step_outside_ms":
            if not isinstance(value, dict) or not all(rows.isdecimal() and int(rows) for rows in value):
                raise PlanningError(f"host: {name} is {json.dumps(value)[:60]}, expected milliseconds by rows")
            values[name] = {int(rows): _milliseconds(f"{name}, {rows} rows", each) for rows, each in value.items()}
        else:
            values[name] = _milliseconds(name, value)
    return Host(**values)


def as_number(value: object) -> float:
    """Return a number of JSON or TOML: NaN for what is none, and infinity for an integer that no float holds."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        return math.nan
    try:
        return float(value)
    except OverflowError:
        return math.inf if value > 0 else -math.inf


def _milliseconds(name: str, value: Any) -> float:
    if not 0 <= as_number(value) <= LONGEST_MS:
        raise PlanningError(f"host: {name} is {json.dumps(value)[:60]}, expected milliseconds, 0 to {LONGEST_MS:g}")
    return float(value)
