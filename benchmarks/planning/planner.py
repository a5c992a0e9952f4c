"""The replicas that a load needs, by simulation: the fewest with which the goal is kept.

A number of replicas keeps the goal where the upper end of the p99's 90 % interval is within it, and the lower end of
the goodput's is not below it. The search begins at the GPUs that the work alone would fill, and halves what is left.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from benchmarks.planning.bound import BatchService, whole_batches
from benchmarks.planning.evaluation import Figures, Scenario, Simulator
from benchmarks.planning.profile import PlanningError, ServiceProfile
from benchmarks.planning.question import Goal, Question

MOST_REPLICAS = 10_000
KNEE = (0.5, 0.75, 1.0, 1.25, 1.5, 1.75)
"""Loads of the knee curve, as shares of the planned rate."""
SENSITIVITY = 0.2
SEARCH = (4, 300)
"""Runs and requests of one number of replicas, while the search looks for it."""
FINAL = (10, 400)
CURVE = (4, 200)
_BEGIN, _GROWTH = 1.5, 1.5
"""First guess, by the replicas that the work alone would fill; then by the guess before."""


@dataclass(frozen=True)
class Change:
    """One input changed, and the same fleet's figures."""

    name: str
    factor: float
    figures: Figures
    keeps_goal: bool


@dataclass(frozen=True)
class Plan:
    """An answer for one kind of GPU."""

    profile: ServiceProfile
    replicas: int
    """With which the goal is kept."""
    total: int
    """With spare replicas, and those of a zone that may be lost."""
    figures: Figures
    """Figures of the planned rate on ``replicas``."""
    normal: Figures
    """Figures of the workload's own rate on all replicas."""
    knee: Sequence[tuple[float, Figures]]
    changes: Sequence[Change]
    breaks_first: str
    bound: BatchService
    hour_price: float | None
    day: Sequence[int]
    """Replicas that each hour of the workload's day needs, spare ones included; empty without hours."""

    @property
    def images_an_hour(self) -> float:
        """Return the portraits that the workload's own rate gives in an hour."""
        workload = self.normal.scenario.workload
        return 3600 * workload.rate_per_s * workload.mean_portraits * self.normal.answered.value

    @property
    def cost_an_hour(self) -> float | None:
        """Return the price of all replicas' hour; None without prices."""
        return None if self.hour_price is None else self.hour_price * self.total


@dataclass(frozen=True)
class NoPlan:
    """The reason for which no number of replicas keeps the goal on one kind of GPU."""

    profile: ServiceProfile
    figures: Figures
    """Figures of a replica with next to no load."""
    reason: str


def plan(question: Question, simulator: Simulator, say: Callable[[str], None] = lambda _: None) -> list[Plan | NoPlan]:
    """Answer a question for each of its profiles, the cheapest first, those without an answer last."""
    answers = [_plan(question, profile, simulator, say) for profile in question.profiles]

    def order(answer: Plan | NoPlan) -> tuple[int, float]:
        if isinstance(answer, NoPlan):
            return 2, 0.0
        cost = answer.cost_an_hour
        return (0, cost) if cost is not None else (1, answer.total)

    return sorted(answers, key=order)


def keeps(goal: Goal, figures: Figures) -> bool:
    """Tell whether figures keep a goal, by the ends of their intervals."""
    in_time = goal.p99_ms is None or figures.p99_ms.high <= goal.p99_ms
    return in_time and (goal.goodput is None or figures.goodput.low >= goal.goodput)


def least_replicas(scenario: Scenario) -> int:
    """Return the replicas that the work alone would fill, with full batches and nothing between them."""
    profile, workload = scenario.profile, scenario.workload
    slots = min(scenario.settings.policy.slots, profile.preset.max_unet_batch)

    def of_a_row(engine: str, most: int) -> float:
        return profile.engine_ms[engine][most] / most

    milliseconds = (
        workload.mean_steps * workload.mean_rows * of_a_row("unet", slots)
        + (2 - workload.returning) * of_a_row("vae_encoder", profile.preset.max_vae_batch)
        + of_a_row("warping_network", profile.preset.max_warping_batch)
        + workload.mean_portraits * of_a_row("vae_decoder", profile.preset.max_vae_batch)
    )
    return max(1, math.ceil(workload.rate_per_s * milliseconds / 1000))


def total_replicas(needed: int, spare: int, zones: int, survive_zone: bool) -> int:
    """Return the replicas to buy: equally many a zone, with which the loss of one leaves those that are needed."""
    if survive_zone:
        return zones * math.ceil((needed + spare) / (zones - 1))
    return needed + spare


def _plan(
    question: Question, profile: ServiceProfile, simulator: Simulator, say: Callable[[str], None]
) -> Plan | NoPlan:
    goal, planned = question.goal, question.workload.rate_per_s * (1 + question.headroom)
    scenario = Scenario(profile, question.workload.at(planned), 1, question.balancer, question.settings)

    def evaluate(scenarios: Sequence[Scenario], size: tuple[int, int]) -> list[Figures]:
        return simulator.evaluate(scenarios, *size, goal.limit_ms, question.seed)

    def excess(replicas: int) -> float:
        (figures,) = evaluate([replace(scenario, replicas=replicas)], SEARCH)
        kept = keeps(goal, figures)
        say(f"{profile.name}: {replicas} replicas, p99 {figures.p99_ms.value:.0f} ms{'' if kept else ': too few'}")
        by = figures.p99_ms.high / goal.p99_ms if goal.p99_ms is not None else 1.0
        return min(by, 1.0) if kept else max(by, 1.0 + 1e-9)

    needed = fewest(excess, least_replicas(scenario))
    figures = evaluate([replace(scenario, replicas=needed)], FINAL)[0] if needed else None
    # The longer runs have narrower intervals but other requests: one replica more or less may be right.
    while needed and figures and not keeps(goal, figures) and needed < MOST_REPLICAS:
        needed += max(1, needed // 50)
        figures = evaluate([replace(scenario, replicas=needed)], FINAL)[0]
    if not needed or figures is None:
        (alone,) = evaluate([replace(scenario.at(0.001 / profile.engine_ms["unet"][1]), replicas=1)], SEARCH)
        reason = f"a request that has a server to itself has a p99 of {alone.p99_ms.value:.0f} ms"
        if keeps(goal, alone):
            reason += f", and {most_tried(least_replicas(scenario))} replicas or fewer don't keep the goal"
        return NoPlan(profile, alone, f"{reason}; ask for fewer steps, a faster GPU or more time")
    total = total_replicas(needed, question.spare, question.zones, question.survive_zone)
    fleet = replace(scenario, replicas=needed)
    knee = [fleet.at(share * planned) for share in KNEE]
    changed: list[tuple[str, Callable[[float], Scenario]]] = [
        ("rate", lambda factor: fleet.at(factor * planned)),
        ("steps", lambda factor: replace(fleet, workload=fleet.workload.with_steps_scaled(factor))),
        ("engine time", lambda factor: replace(fleet, profile=profile.scaled(factor))),
    ]
    factors = (1 - SENSITIVITY, 1 + SENSITIVITY)
    changes = [(name, factor, make(factor)) for name, make in changed for factor in factors]
    # The fleet as it usually runs: at the workload's own rate, with its spare replicas.
    normal = replace(scenario.at(question.workload.rate_per_s), replicas=total)
    drawn = evaluate([*knee, *(each for _, _, each in changes), normal], CURVE)
    *curve, own = like(figures, drawn[KNEE.index(1.0)], drawn)
    points = list(zip(KNEE, curve[: len(knee)], strict=True))
    moved = [
        Change(name, factor, found, keeps(goal, found))
        for (name, factor, _), found in zip(changes, curve[len(knee) :], strict=True)
    ]
    return Plan(
        profile,
        needed,
        total,
        figures,
        own,
        points,
        moved,
        _breaks_first(points),
        whole_batches(fleet),
        question.price(profile),
        [
            total_replicas(max(1, math.ceil(needed * rate / question.workload.rate_per_s)), *_redundancy(question))
            for rate in question.workload.hourly
        ],
    )


def like(longer: Figures, shorter: Figures, others: Sequence[Figures]) -> list[Figures]:
    """Scale figures of few runs by what more runs have shown of one of them: all had the same draws (ratio estimate).

    Args:
        longer: of many runs.
        shorter: the same scenario's, of few.
        others: of as few runs with the same draws.
    """
    p50, p99 = (_ratio(getattr(longer, name).value, getattr(shorter, name).value) for name in ("p50_ms", "p99_ms"))
    scaled = []
    for each in others:
        p50_ms = each.p50_ms.scaled(p50)
        # Each has a factor of its own, which must not bring a p99 below its p50.
        scaled.append(replace(each, p50_ms=p50_ms, p99_ms=each.p99_ms.scaled(p99).at_least(p50_ms.value)))
    return scaled


def _ratio(longer_ms: float, shorter_ms: float) -> float:
    """Return the factor between two figures; 1 where either of them tells nothing."""
    return longer_ms / shorter_ms if math.isfinite(longer_ms) and 0 < shorter_ms < math.inf else 1.0


def _redundancy(question: Question) -> tuple[int, int, bool]:
    return question.spare, question.zones, question.survive_zone


def fewest(excess: Callable[[int], float], least: int) -> int:
    """Search the fewest replicas that are enough, 0 where even the most aren't.

    Args:
        excess: a latency with some replicas, by the longest that is enough; more replicas have less.
        least: fewer can't be enough.
    """
    known: dict[int, float] = {}
    low, high = least - 1, max(least, math.ceil(_BEGIN * least))
    while (found := excess(high)) > 1:
        known[high] = found
        if high >= most_tried(least):
            return 0
        low, high = high, math.ceil(_GROWTH * high)
    known[high] = found
    while high - low > 1:
        middle = _between(low, high, known)
        known[middle] = excess(middle)
        low, high = (low, middle) if known[middle] <= 1 else (middle, high)
    return high


def most_tried(least: int) -> int:
    """Return the replicas beyond which no search goes."""
    return min(MOST_REPLICAS, 8 * least + 16)


def _between(low: int, high: int, known: Mapping[int, float]) -> int:
    """Return a number between two: by a line through the logarithms where both are known, else halfway."""
    ends = known.get(low, math.inf), known[high]
    middle = (low + high) // 2
    if math.isfinite(ends[0]) and 0 < ends[1] < ends[0]:
        share = math.log(ends[0]) / (math.log(ends[0]) - math.log(ends[1]))
        middle = round(math.exp(math.log(low) + share * (math.log(high) - math.log(low))))
    return min(max(middle, low + 1), high - 1)


def _breaks_first(points: Sequence[tuple[float, Figures]]) -> str:
    """Say which part is nearest to its limit at the highest load, and which stage grows most on the way there."""
    low, high = points[0][1], points[-1][1]
    part = max(high.busy, key=lambda name: high.busy[name] if name != "loop" else 0.0)
    share = high.busy[part]
    text = f"{part}: {share:.0%} busy at {points[-1][0]:g} of the planned rate"
    stages = set(low.stage_ms) & set(high.stage_ms)
    if stages:
        grown = max(sorted(stages), key=lambda name: high.stage_ms[name] - low.stage_ms[name])
        text += f"; {grown} grows most, from {low.stage_ms[grown]:.0f} to {high.stage_ms[grown]:.0f} ms (median)"
    refused = {code: count for code, count in high.codes.items() if code != "OK"}
    if refused:
        reason = max(refused, key=lambda code: refused[code])
        text += f"; {sum(refused.values()) / high.requests:.1%} get no portrait, mostly by {reason}"
    return text


def check_size(question: Question) -> None:
    """Refuse a question that no fleet can be simulated for.

    Raises:
        PlanningError: a request needs more rows than a server has, or all need more replicas than are tried.
    """
    planned = question.workload.at(question.workload.rate_per_s * (1 + question.headroom))
    for profile in question.profiles:
        slots = min(question.settings.policy.slots, profile.preset.max_unet_batch)
        most = max(number for number, weight in question.workload.portraits.items() if weight)
        rows = most * (2 if question.workload.guided else 1)
        if rows > slots:
            raise PlanningError(
                f"workload: a request of {most} portraits takes {rows} rows, and "
                f"{profile.name} has {slots} slots; ask for fewer portraits, or raise server.slots"
            )
        least = least_replicas(Scenario(profile, planned, settings=question.settings))
        if least > MOST_REPLICAS:
            raise PlanningError(
                f"workload: {planned.rate_per_s:g} requests a second take {least:,} replicas of {profile.name} or "
                f"more, expected {MOST_REPLICAS:,} at most; plan for a part of them"
            )
