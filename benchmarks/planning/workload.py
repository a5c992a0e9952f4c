"""A workload: the moments at which requests come, and what each of them asks for.

A load balancer deals the requests of all callers to the replicas. One replica is simulated with the part that comes to
it: each request by chance (``random``), or every n-th (``round-robin``).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from benchmarks.planning.profile import PlanningError, as_number
from icportrait.contract import Array
from icportrait.phases import ALL_STEPS, Phases, guided_steps, phases_of
from icportrait.request import INPUTS

BALANCERS = ("random", "round-robin")
_RATES = 1e-10, 1e9
"""A clock of 64 bits still tells milliseconds apart at the lowest rate."""
_PICTURES = 10**9
MAX_STEPS = int(next(given.maximum for given in INPUTS if given.name == "num_inference_steps") or 0)


@dataclass(frozen=True, slots=True)
class Call:
    """One request, as the simulation takes it."""

    send_s: float
    steps: int
    rows: int
    """The portraits, or with guidance twice as many."""
    portraits: int
    priority: int
    deadline_ms: int | None
    profile: int
    """A number for each profile picture: equal numbers are the same file."""
    reference: int
    """A number for each reference picture."""
    guidance_interval: tuple[float, float] = ALL_STEPS

    @property
    def guidance_scale(self) -> float:
        """Return 1 without guidance, and else some other scale: none takes other rows."""
        return 1.0 if self.rows == self.portraits else 2.0

    @property
    def phases(self) -> Phases:
        """Return the rows that the request takes over its steps."""
        guided = guided_steps(self.guidance_scale, self.guidance_interval, self.steps)
        return phases_of(self.portraits, guided, self.steps)


@dataclass(frozen=True)
class Workload:
    """Requests of all callers."""

    rate_per_s: float = 4.0
    hourly: tuple[float, ...] = ()
    """Requests a second by hour of the day, 24 of them; ``rate_per_s`` is then the highest."""
    burstiness: float = 1.0
    """Coefficient of variation of the gaps between requests: 1 is Poisson, more comes in bursts (gamma)."""
    steps: Mapping[int, float] = field(default_factory=lambda: dict.fromkeys(range(5, 31), 1.0))
    """Weight of each number of steps."""
    guided: float = 0.0
    """Share of requests with guidance, whose portraits take two rows."""
    guidance_interval: tuple[float, float] = ALL_STEPS
    """Begin and end of their steps with guidance, as shares of all; at the others they take one row."""
    portraits: Mapping[int, float] = field(default_factory=lambda: {1: 1.0})
    """Weight of each number of portraits."""
    priorities: Mapping[int, float] = field(default_factory=lambda: {1: 1.0})
    """Weight of each class."""
    deadlines_ms: Mapping[int, float] = field(default_factory=dict)
    """Share of requests that send each deadline; the rest send none."""
    returning: float = 0.0
    """Share of requests whose profile is one of the last ``profiles``."""
    profiles: int = 1000
    references: int = 0
    """Pictures that references are drawn from; 0 makes each a new one."""

    def __post_init__(self) -> None:
        """Check the values.

        Raises:
            PlanningError: names the value, what came and what was expected.
        """
        _check("rate_per_s", self.rate_per_s, *_RATES, "requests a second, more than 0, up to {1:g}".format(*_RATES))
        _check("burstiness", self.burstiness, 0.01, 1000, "a coefficient of variation, 0.01 to 1000")
        for name in ("guided", "returning"):
            _check(name, getattr(self, name), 0, 1, "a share from 0 to 1")
        begin, end = self.guidance_interval
        _check("guidance_interval: begin", begin, 0, 1, "a share from 0 to 1")
        _check("guidance_interval: end", end, begin, 1, f"a share from {begin:g} to 1")
        for name, most in (("steps", MAX_STEPS), ("portraits", 8), ("priorities", 9)):
            least = 0 if name == "priorities" else 1
            weights = getattr(self, name)
            if not weights or not sum(weights.values()) > 0:
                raise PlanningError(f"{name}: no weight above 0, expected a weight for one value or more")
            for value, weight in weights.items():
                _check(name, value, least, most, f"a number from {least} to {most}")
                _check(f"{name}: weight of {value}", weight, 0, 1e9, "a weight from 0 to 1e+09")
        for value, share in self.deadlines_ms.items():
            _check("deadlines_ms", value, 1, 3_600_000, "milliseconds from 1 to 3600000")
            _check(f"deadlines_ms: share of {value}", share, 0, 1, "a share from 0 to 1")
        if sum(self.deadlines_ms.values()) > 1 + 1e-9:
            raise PlanningError(f"deadlines_ms: shares sum to {sum(self.deadlines_ms.values()):g}, expected 1 or less")
        if self.hourly and len(self.hourly) != 24:
            raise PlanningError(f"hourly: {len(self.hourly)} rates, expected 24, one an hour")
        for rate in self.hourly:
            _check("hourly", rate, 0, _RATES[1], "requests a second, 0 or more")
        for name, least in (("profiles", 1), ("references", 0)):
            _check(name, getattr(self, name), least, _PICTURES, f"a number from {least} to {_PICTURES}")

    @property
    def mean_steps(self) -> float:
        """Return the mean number of steps."""
        return _mean(self.steps)

    @property
    def mean_rows(self) -> float:
        """Return the mean rows of a request's step."""
        guided = {steps: len(guided_steps(2.0, self.guidance_interval, steps)) for steps in self.steps}
        share = sum(weight * guided[steps] for steps, weight in self.steps.items()) / sum(
            weight * steps for steps, weight in self.steps.items()
        )
        return _mean(self.portraits) * (1 + self.guided * share)

    @property
    def mean_portraits(self) -> float:
        """Return the mean portraits of a request."""
        return _mean(self.portraits)

    def with_steps_scaled(self, factor: float) -> Workload:
        """Return the workload with numbers of steps that are a factor of these, rounded."""
        scaled: dict[int, float] = {}
        for steps, weight in self.steps.items():
            # Rounded down and up in proportion, so that the mean is scaled by the factor and not by what rounding left.
            exact = min(max(factor * steps, 1.0), float(MAX_STEPS))
            low = math.floor(exact)
            for value, share in ((low, 1 - (exact - low)), (low + 1, exact - low)):
                if share > 0:
                    scaled[value] = scaled.get(value, 0.0) + share * weight
        return _replaced(self, steps=scaled)

    def at(self, rate_per_s: float) -> Workload:
        """Return the workload at another constant rate."""
        return _replaced(self, rate_per_s=rate_per_s, hourly=())

    def calls(self, count: int, seed: int, replicas: int = 1, balancer: str = "random") -> list[Call]:
        """Draw the first requests that come to one of the replicas.

        Gaps, choices and pictures have streams of their own: another mix of steps leaves the moments as they are.

        Args:
            count: of requests.
            seed: the same seed, the same requests.
            replicas: that all requests are dealt to.
            balancer: one of ``BALANCERS``.
        """
        streams = map(np.random.default_rng, np.random.SeedSequence(seed).spawn(10))
        gaps, dealt, steps, portraits_of, guides, classes, limits, returning, back_to, seconds = streams
        # The replica's requests are those at these places of all callers'.
        if replicas == 1:
            places = np.arange(count)
        elif balancer == "round-robin":
            places = np.arange(count) * replicas + int(dealt.integers(replicas))
        else:
            places = np.cumsum(dealt.geometric(1 / replicas, count)) - 1
        shape, total = 1 / self.burstiness**2, int(places[-1]) + 1
        send_s = np.cumsum(gaps.gamma(shape, 1 / (shape * self.rate_per_s), total))[places]
        chosen_steps = _choose(steps, self.steps, count)
        portraits = _choose(portraits_of, self.portraits, count)
        guided = guides.random(count) < self.guided
        priorities = _choose(classes, self.priorities, count)
        deadlines = [*self.deadlines_ms.items()]
        bounds, drawn = np.cumsum([share for _, share in deadlines]), limits.random(count)
        which = np.searchsorted(bounds, drawn, side="right") if deadlines else np.zeros(count, int)
        returns, back = returning.random(total) < self.returning, back_to.random(total)
        references = seconds.integers(self.references, size=count) if self.references else np.arange(count)
        profile_of = self._profiles(returns, back, places)
        calls = []
        for index in range(count):
            number = int(portraits[index])
            rows = number * (2 if guided[index] else 1)
            deadline = deadlines[which[index]][0] if which[index] < len(deadlines) else None
            calls.append(
                Call(
                    float(send_s[index]),
                    int(chosen_steps[index]),
                    rows,
                    number,
                    int(priorities[index]),
                    deadline,
                    profile_of[index],
                    int(references[index]),
                    self.guidance_interval,
                )
            )
        return calls

    def _profiles(self, returns: Array, back: Array, places: Array) -> list[int]:
        """Return the profile's number of the requests at some places of all callers' requests."""
        if self.returning == 0.0:
            return [int(place) for place in places]
        # Numbers from 0 on are new people in the order of their coming; a person who returns is one of the last.
        numbers, newest = np.empty(len(returns), np.int64), -1
        for index, is_back in enumerate(returns):
            if is_back and newest >= 0:
                known = min(self.profiles, newest + 1)
                numbers[index] = newest - int(back[index] * known)
            elif is_back:
                newest = 0
                numbers[index] = 0
            else:
                newest += 1
                numbers[index] = newest
        return [int(number) for number in numbers[places]]


def uniform(low: int, high: int) -> dict[int, float]:
    """Return equal weights of all whole numbers from ``low`` to ``high``."""
    return dict.fromkeys(range(low, high + 1), 1.0)


def _replaced(workload: Workload, **changes: object) -> Workload:
    return Workload(**{**vars(workload), **changes})


def _mean(weights: Mapping[int, float]) -> float:
    return sum(value * weight for value, weight in weights.items()) / sum(weights.values())


def _choose(generator: np.random.Generator, weights: Mapping[int, float], count: int) -> Array:
    values = np.array(list(weights))
    # By the inverse of the distribution: the same draw means about as much under another mix.
    order = np.argsort(values)
    shares = np.cumsum(np.array(list(weights.values()))[order])
    chosen: Array = values[order][np.searchsorted(shares, generator.random(count) * shares[-1], side="right")]
    return chosen


def _check(name: str, value: object, least: float, most: float, expected: str) -> None:
    if not least <= as_number(value) <= most:
        raise PlanningError(f"{name}: {str(value)[:60]}, expected {expected}")
