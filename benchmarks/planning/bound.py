"""The closed-form bound of a batch-service queue's mean latency, as a line beside the simulation.

Y. Inoue, "Queueing analysis of GPU-based inference servers with dynamic batching: a closed-form characterization",
arXiv 1912.06322: jobs come as a Poisson process of rate l, a free server takes all that wait, and b jobs take
a b + t seconds. The derivation here is our own, and gives the paper's two bounds.

Let H be a batch's time, B its jobs and p the probability that none comes meanwhile; then the next batch is one job.
With x = l a and y = l t, in equilibrium

    E[B] = l E[H] + p            E[H] = a E[B] + t
    E[B^2] = l E[H] + l^2 E[H^2] + p            E[H^2] = a^2 E[B^2] + 2 a t E[B] + t^2

and a job waits for the rest of the run in which it came, E[H^2] / (2 E[H]) on average, and then for its own batch.
The mean latency that follows falls with p. p is at least 0, and at least 1 - x - y because a batch has a job or more:

    p = 0            3 t / (2 (1 - x)) + a (x + 2) / (2 (1 - x^2))
    p = 1 - x - y    (a + t) / (2 (1 - x)) (1 + 2 y + (1 - y) / (1 + x))

The smaller of the two is an upper bound, and near the exact mean where batches aren't limited.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from benchmarks.planning.evaluation import Scenario


@dataclass(frozen=True)
class BatchService:
    """A line through the times of whole batches: ``slope_s`` a job and ``fixed_s`` a batch."""

    slope_s: float
    fixed_s: float

    def mean_latency_s(self, rate_per_s: float) -> float:
        """Return the upper bound of the mean latency; infinite where the queue grows without end."""
        x, y = rate_per_s * self.slope_s, rate_per_s * self.fixed_s
        if x >= 1:
            return math.inf
        without_pauses = 1.5 * self.fixed_s / (1 - x) + self.slope_s * (x + 2) / (2 * (1 - x**2))
        with_pauses = (self.slope_s + self.fixed_s) / (2 * (1 - x)) * (1 + 2 * y + (1 - y) / (1 + x))
        return min(without_pauses, with_pauses)

    def mean_batch(self, rate_per_s: float) -> float:
        """Return the mean jobs of a batch, pauses left out: at most a batch's limit, else the bound says nothing."""
        x = rate_per_s * self.slope_s
        return math.inf if x >= 1 else max(1.0, rate_per_s * self.fixed_s / (1 - x))


def fit(times_s: Sequence[tuple[int, float]]) -> BatchService:
    """Fit a line to batches' times: by size, seconds. Neither part of it is below 0."""
    sizes, seconds = np.array(times_s).T
    slope = float(np.polyfit(sizes, seconds, 1)[0]) if len(times_s) > 1 else 0.0
    slope = max(0.0, slope)
    return BatchService(slope, max(0.0, float(np.mean(seconds - slope * sizes))))


def whole_batches(scenario: Scenario) -> BatchService:
    """Fit the line of a server that runs whole batches of the scenario's mean request, one after the other.

    A batch of b requests takes all its engines' runs in turn.
    """
    profile, workload = scenario.profile, scenario.workload
    rows = workload.mean_rows
    most = max(1, int(min(scenario.settings.policy.slots, profile.preset.max_unet_batch) / rows))
    times = []
    for requests in range(1, most + 1):
        pictures = requests * (2 - workload.returning)
        milliseconds = (
            workload.mean_steps * (_ms(scenario, "unet", requests * rows) + profile.host.outside_ms(most))
            + _ms(scenario, "vae_encoder", pictures)
            + _ms(scenario, "warping_network", requests)
            + _ms(scenario, "vae_decoder", requests * workload.mean_portraits)
        )
        times.append((requests, milliseconds / 1000))
    return fit(times)


def _ms(scenario: Scenario, engine: str, rows: float) -> float:
    """Return the time of a number of rows, in as few runs as it takes."""
    points = scenario.profile.engine_ms[engine]
    full, rest = divmod(math.ceil(rows), max(points))
    return full * points[max(points)] + (points[rest] if rest else 0.0)
