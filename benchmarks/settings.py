"""What a load run may be asked for. Imports nothing heavy: the command line takes its defaults from here."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from icportrait_client import DEFAULT_URL
from icportrait_client.contract import load_contract
from icportrait_client.errors import InvalidRequest

ROOT = Path(__file__).parents[1]
HEADS = ROOT / "examples" / "heads"


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
    profile: Path = HEADS / "profile.png"
    reference: Path = HEADS / "reference.png"
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
            if not (math.isfinite(value) and value > 0):
                raise InvalidRequest(f"{name}: {value:g}, expected a number above 0")
        if not 0 <= self.warm_up_s < self.duration_s:
            raise InvalidRequest(
                f"warm-up: {self.warm_up_s:g} s, expected 0 or more and less than the duration, {self.duration_s:g} s"
            )
        inputs = load_contract().inputs
        for bound in self.steps:
            inputs["num_inference_steps"].elements(bound)
        if self.steps[0] > self.steps[1]:
            raise InvalidRequest(f"steps: {self.steps[0]} {self.steps[1]}, expected the lower number first")
        inputs["guidance_scale"].elements(self.guidance_scale)
        if self.seed < 0:
            raise InvalidRequest(f"seed: {self.seed}, expected 0 or more")
