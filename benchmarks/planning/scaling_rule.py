"""The rule by which Kubernetes' HorizontalPodAutoscaler (autoscaling/v2) makes a number of replicas follow metrics.

As https://kubernetes.io/docs/concepts/workloads/autoscaling/horizontal-pod-autoscale/ and the controller's source
(``pkg/controller/podautoscaler``) have it, for metrics of type AverageValue, which KEDA makes of its triggers:

    desired = ceil(metric / target), and no change while the metric is within a tolerance of target x replicas

The largest of all metrics' numbers counts. A number goes up to the least that was recommended within the window for
going up, and down to the most within the window for going down, and no further than the policies allow in a period. A
metric that can't be had takes no replica away; a query without a result is 0, by KEDA's default. The treatment of pods
that aren't ready or have no value is for metrics of single pods. These are sums over the servers that Prometheus has.

The numbers are those of ``deploy/kubernetes/components/autoscaling/scaled.yaml``, and nowhere else.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

SCALED = Path(__file__).parents[2] / "deploy" / "kubernetes" / "components" / "autoscaling" / "scaled.yaml"
SYNC_S, TOLERANCE = 15.0, 0.1
"""The controller's own defaults (``--horizontal-pod-autoscaler-sync-period``, ``-tolerance``)."""
QUEUE, SLOTS = "queue", "slots"
"""The rule's triggers: seconds until the queue is empty at the present pace, and slots in use."""


@dataclass(frozen=True)
class Policy:
    """The most by which replicas may change within a period."""

    kind: str
    """``Pods`` or ``Percent``."""
    value: int
    period_s: float


@dataclass(frozen=True)
class Direction:
    """Behaviour on the way up, or on the way down. Of several policies the one with the largest change counts."""

    window_s: float
    policies: tuple[Policy, ...]


@dataclass(frozen=True)
class Trigger:
    """A metric, added over all replicas, and a replica's share of it."""

    name: str
    query: str
    target: float


@dataclass(frozen=True)
class Rule:
    """An autoscaler's settings."""

    least: int
    most: int
    triggers: tuple[Trigger, ...]
    up: Direction
    down: Direction
    sync_s: float = SYNC_S
    tolerance: float = TOLERANCE

    def faster(self, factor: float) -> Rule:
        """Return the rule with all times a factor shorter, the target of seconds in the queue too."""

        def shorter(direction: Direction) -> Direction:
            policies = tuple(replace(each, period_s=each.period_s / factor) for each in direction.policies)
            return Direction(direction.window_s / factor, policies)

        triggers = tuple(
            replace(each, target=each.target / factor) if each.name == QUEUE else each for each in self.triggers
        )
        return replace(
            self, triggers=triggers, up=shorter(self.up), down=shorter(self.down), sync_s=self.sync_s / factor
        )


def read_rule(path: Path = SCALED) -> Rule:
    """Read the rule of a ScaledObject."""
    import yaml

    spec = yaml.safe_load(path.read_text())["spec"]
    behavior = spec["advanced"]["horizontalPodAutoscalerConfig"]["behavior"]

    def direction(given: Mapping[str, Any]) -> Direction:
        policies = (Policy(each["type"], each["value"], each["periodSeconds"]) for each in given["policies"])
        return Direction(given["stabilizationWindowSeconds"], tuple(policies))

    triggers = (
        Trigger(each["name"], each["metadata"]["query"], float(each["metadata"]["threshold"]))
        for each in spec["triggers"]
    )
    up, down = direction(behavior["scaleUp"]), direction(behavior["scaleDown"])
    return Rule(spec["minReplicaCount"], spec["maxReplicaCount"], tuple(triggers), up, down)


@dataclass
class Autoscaler:
    """A rule at work. The caller asks every ``rule.sync_s`` seconds, and starts and ends replicas."""

    rule: Rule
    replicas: int
    """Number that is wanted by now."""
    _recommended: list[tuple[float, int]] = field(default_factory=list)
    _changes: list[tuple[float, int]] = field(default_factory=list)
    """Moments, and replicas added (above 0) or taken away."""

    def decide(self, now_s: float, metrics: Mapping[str, float | None], there: int | None = None) -> int:
        """Return the number of replicas that there should be from now on.

        Args:
            now_s: by any clock that only grows.
            metrics: by the triggers' names, added over all replicas; None where it can't be had.
            there: replicas that exist, ready or not; None is as many as were wanted.
        """
        if not self._recommended:
            # As the controller does: else a window would begin with what the first metrics say.
            self._recommended.append((now_s, self.replicas))
        wanted = self._wanted(metrics, self.replicas if there is None else there)
        if wanted is None:
            return self.replicas
        stable = self._stabilised(now_s, wanted)
        allowed = min(max(self._limited(now_s, stable), self.rule.least), self.rule.most)
        if allowed != self.replicas:
            self._changes.append((now_s, allowed - self.replicas))
            self.replicas = allowed
        return allowed

    def _wanted(self, metrics: Mapping[str, float | None], there: int) -> int | None:
        found = [
            self._of_metric(value, trigger.target, there)
            for trigger in self.rule.triggers
            if (value := metrics.get(trigger.name)) is not None and math.isfinite(value)
        ]
        is_all = len(found) == len(self.rule.triggers)
        # With a metric missing, the others may ask for more replicas and not for fewer.
        return max(found) if found and (is_all or max(found) >= self.replicas) else None

    def _of_metric(self, value: float, target: float, there: int) -> int:
        if there and abs(1 - value / (target * there)) <= self.rule.tolerance:
            return there
        return math.ceil(value / target)

    def _stabilised(self, now_s: float, wanted: int) -> int:
        up, down = self.rule.up.window_s, self.rule.down.window_s
        least = min([wanted, *(number for at_s, number in self._recommended if at_s > now_s - up)])
        most = max([wanted, *(number for at_s, number in self._recommended if at_s > now_s - down)])
        self._recommended = [each for each in self._recommended if each[0] > now_s - max(up, down)]
        self._recommended.append((now_s, wanted))
        return min(max(self.replicas, least), most)

    def _limited(self, now_s: float, wanted: int) -> int:
        """Return as much of a change as the policies allow."""
        now = self.replicas
        if wanted > now:
            limits = [
                before + policy.value if policy.kind == "Pods" else math.ceil(before * (1 + policy.value / 100))
                for policy in self.rule.up.policies
                for before in (self._before(now_s, policy.period_s),)
            ]
            return min(wanted, max(now, *limits))
        if wanted < now:
            limits = [
                before - policy.value if policy.kind == "Pods" else int(before * (1 - policy.value / 100))
                for policy in self.rule.down.policies
                for before in (self._before(now_s, policy.period_s),)
            ]
            return max(wanted, min(now, *limits))
        return now

    def _before(self, now_s: float, period_s: float) -> int:
        """Return the replicas that were wanted when the period began."""
        return self.replicas - sum(change for at_s, change in self._changes if at_s > now_s - period_s)


def rate(samples: Sequence[tuple[float, float]], now_s: float, window_s: float) -> float | None:
    """Return a counter's increase per second over a window, as Prometheus' ``rate`` extrapolates it.

    Args:
        samples: moments and values, in order; the counter didn't begin anew.
        now_s: the window's end.
        window_s: its length.

    Returns:
        The rate, None where the window has fewer than two samples.
    """
    within = [each for each in samples if now_s - window_s <= each[0] <= now_s]
    if len(within) < 2:
        return None
    (first_s, first), (last_s, last) = within[0], within[-1]
    sampled_s, increase = last_s - first_s, last - first
    gap_s = sampled_s / (len(within) - 1)
    before_s, after_s = first_s - (now_s - window_s), now_s - last_s
    if increase > 0 and first >= 0:
        # A counter doesn't go below 0, so it began no earlier than that.
        before_s = min(before_s, sampled_s * first / increase)
    extended_s = sampled_s
    for beyond_s in (before_s, after_s):
        extended_s += beyond_s if beyond_s < 1.1 * gap_s else gap_s / 2
    return increase * extended_s / sampled_s / window_s
