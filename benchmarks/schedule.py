"""What a load run will send and when, drawn before it starts: a Poisson process, as of many independent callers."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from icportrait_client.errors import InvalidRequest

from benchmarks.settings import LoadSettings

_DRAWN_SEEDS = 2**31


@dataclass(frozen=True)
class PlannedRequest:
    """One request of the schedule."""

    send_s: float
    """When it is meant to leave, from the run's start."""
    num_inference_steps: int
    seed: int


def poisson_schedule(settings: LoadSettings) -> list[PlannedRequest]:
    """The requests of a run: exponential gaps, uniform steps, each from its own stream of the seed.

    A longer run of the same seed and rate begins with the shorter one's requests, and another range of steps leaves the
    moments as they are.

    Raises:
        InvalidRequest: none falls into the duration.
    """
    gaps, steps, seeds = map(np.random.default_rng, np.random.SeedSequence(settings.seed).spawn(3))
    low, high = settings.steps
    schedule = []
    send_s = gaps.exponential(1 / settings.rate_per_s)
    while send_s < settings.duration_s:
        schedule.append(
            PlannedRequest(send_s, int(steps.integers(low, high, endpoint=True)), int(seeds.integers(_DRAWN_SEEDS)))
        )
        send_s += gaps.exponential(1 / settings.rate_per_s)
    if not schedule:
        raise InvalidRequest(
            f"no request falls into {settings.duration_s:g} s at {settings.rate_per_s:g}/s; raise rate or duration"
        )
    return schedule
