"""What a run may be asked for. Imports nothing heavy: the command line takes its defaults from here."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from icportrait_client import DEFAULT_URL
from icportrait_client.contract import load_contract
from icportrait_client.errors import InvalidRequest

from icportrait.policy import ServingPolicy
from icportrait.scheduling import BATCHING_MODES

ROOT = Path(__file__).parents[1]
HEADS = ROOT / "examples" / "heads"
LATENCY_TABLE = ROOT / "benchmarks" / "latency" / "h200-like.json"


@dataclass(frozen=True)
class LoadSettings:
    """One run: requests at random moments, ``rate_per_s`` of them on average, for ``duration_s``."""

    url: str = DEFAULT_URL
    model: str = load_contract().model
    rate_per_s: float = 4.0
    duration_s: float = 30.0
    steps: tuple[int, int] = (5, 30)
    """The least and the largest ``num_inference_steps``; every whole number between is as likely."""
    guidance_scale: float = 1.0
    profile: tuple[Path, ...] = (HEADS / "profile.png",)
    reference: tuple[Path, ...] = (HEADS / "reference.png",)
    """Of both, each request takes the next, and after the last the first again."""
    priority: int | None = None
    deadline_ms: int | None = None
    """None isn't sent. Goodput counts answers within it, from the moment a request was meant to leave."""
    seed: int = 0
    """Of moments, steps and portraits' seeds: the same seed asks for the same portraits at the same moments."""
    warm_up_s: float = 5.0
    """The steady figures leave out what is sent, or for the rate answered, before this."""
    timeout_s: float = 60.0
    """Of one call, from its sending."""

    def __post_init__(self) -> None:
        """Check the values.

        Raises:
            InvalidRequest: names the value, what came and what was expected.
        """
        for name, value in (
            ("rate", self.rate_per_s),
            ("duration", self.duration_s),
            ("timeout", self.timeout_s),
        ):
            _check_above_0(name, value)
        if not 0 <= self.warm_up_s < self.duration_s:
            raise InvalidRequest(
                f"warm-up: {self.warm_up_s:g} s, expected 0 or more and less than the duration, {self.duration_s:g} s"
            )
        inputs = load_contract().inputs
        for bound in self.steps:
            inputs["num_inference_steps"].elements(bound)
        if self.steps[0] > self.steps[1]:
            raise InvalidRequest(f"steps: {self.steps[0]} {self.steps[1]}, expected the lower number first")
        for name, value in self.options.items():
            inputs[name].elements(value)
        for name in ("profile", "reference"):
            if not getattr(self, name):
                raise InvalidRequest(f"{name}: no picture, expected one or more")
        if self.seed < 0:
            raise InvalidRequest(f"seed: {self.seed}, expected 0 or more")

    @property
    def options(self) -> dict[str, Any]:
        """The optional inputs that all requests have alike."""
        values = {name: getattr(self, name) for name in ("guidance_scale", "priority", "deadline_ms")}
        return {name: value for name, value in values.items() if value is not None}


@dataclass(frozen=True)
class CompareSettings:
    """Ways of batching, each under the same loads."""

    export: Path
    latency_table: Path = LATENCY_TABLE
    modes: tuple[str, ...] = tuple(BATCHING_MODES)
    loads: tuple[float, ...] = (0.7, 1.1)
    """Shares of what whole batches can serve."""
    duration_s: float = 20.0
    """Of one mode under one load."""
    rounds: int = 3
    seed: int = 0

    def __post_init__(self) -> None:
        """Check the values.

        Raises:
            InvalidRequest: names the value, what came and what was expected.
        """
        for mode in self.modes:
            if mode not in BATCHING_MODES or self.modes.count(mode) > 1:
                raise InvalidRequest(f"modes: {' '.join(self.modes)}, expected some of {', '.join(BATCHING_MODES)}")
        if len(set(self.loads)) < len(self.loads):
            raise InvalidRequest(f"loads: {' '.join(map('{:g}'.format, self.loads))}, expected each once")
        for load in self.loads:
            _check_above_0("loads", load)
        _check_above_0("duration", self.duration_s)
        for name, value, least in (("rounds", self.rounds, 1), ("seed", self.seed, 0)):
            if value < least:
                raise InvalidRequest(f"{name}: {value}, expected {least} or more")

    @property
    def warm_up_s(self) -> float:
        return min(LoadSettings.warm_up_s, self.duration_s / 4)


@dataclass(frozen=True)
class LoopSettings:
    """The denoising loop alone, kept full for ``seconds``."""

    export: Path
    latency_table: Path = LATENCY_TABLE
    slots: int = ServingPolicy.slots
    guidance_scale: float = LoadSettings.guidance_scale
    seconds: float = 5.0
    steps: tuple[int, int] = LoadSettings.steps
    seed: int = 0

    def __post_init__(self) -> None:
        """Check the values.

        Raises:
            InvalidRequest: names the value, what came and what was expected.
        """
        load_contract().inputs["guidance_scale"].elements(self.guidance_scale)
        _check_above_0("seconds", self.seconds)
        if self.slots < self.rows:
            raise InvalidRequest(f"slots: {self.slots}, expected {self.rows} or more at this guidance")

    @property
    def rows(self) -> int:
        """Slots of one request."""
        return 2 if self.guidance_scale > 1 else 1


@dataclass(frozen=True)
class PairsSettings:
    """Two servers that are asked for the same portraits."""

    first: str
    second: str
    """gRPC addresses, each of a gateway or of a Triton with the standalone pipeline."""
    rounds: int = 5
    requests: int = 200
    """Of a round."""
    num_inference_steps: int | None = None
    """None isn't sent."""
    profile: Path = HEADS / "profile.png"
    reference: Path = HEADS / "reference.png"
    seed: int = 0
    """Of the noise that makes pictures new."""

    def __post_init__(self) -> None:
        """Check the values.

        Raises:
            InvalidRequest: names the value, what came and what was expected.
        """
        for name, value, least in (("rounds", self.rounds, 1), ("requests", self.requests, 1), ("seed", self.seed, 0)):
            if value < least:
                raise InvalidRequest(f"{name}: {value}, expected {least} or more")
        if self.num_inference_steps is not None:
            load_contract().inputs["num_inference_steps"].elements(self.num_inference_steps)

    @property
    def urls(self) -> tuple[str, str]:
        return self.first, self.second


def _check_above_0(name: str, value: float) -> None:
    if not (math.isfinite(value) and value > 0):
        raise InvalidRequest(f"{name}: {value:g}, expected a number above 0")
