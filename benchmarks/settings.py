"""The settings of a run. The module imports nothing heavy, because the command line takes its defaults from it."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from icportrait_client import DEFAULT_URL
from icportrait_client.contract import load_contract
from icportrait_client.errors import InvalidRequest

from benchmarks.ladder_names import RUNGS
from benchmarks.mix import Mix, values_of
from icportrait.policy import BATCHING_MODES, CPU_RUNTIMES, ServingPolicy

ROOT = Path(__file__).parents[1]
HEADS = ROOT / "examples" / "heads"
LONGEST_S = 1e7
"""Four months. No clock that a run waits for takes much more."""
_REQUESTS, _CALLERS = 2_000_000, 10_000
"""Limits of the memory of a generator in one process."""
LEAST_ROUNDS = 6
"""With fewer, no interval of 95 % lies within what was measured."""
LATENCY_TABLE = ROOT / "benchmarks" / "latency" / "h200-torch-sd15-512.json"


@dataclass(frozen=True)
class LoadSettings:
    """One run: requests at random moments, ``rate_per_s`` of them on average, for ``duration_s``."""

    url: str = DEFAULT_URL
    model: str = load_contract().model
    rate_per_s: float = 4.0
    burstiness: float = 1.0
    """Coefficient of variation of the gaps between requests: 1 is a Poisson process, more comes in bursts."""
    trace: Path | None = None
    """A file of requests to replay, in place of drawn moments. It has its own rate and duration."""
    concurrency: int | None = None
    """Callers that each send again once they are answered (a closed loop), in place of drawn moments."""
    duration_s: float = 30.0
    ramp_s: float = 0.0
    """Seconds in which the rate, or the number of callers, grows to its full value; a part of the warm-up."""
    steps: tuple[int, int] = (5, 30)
    """The least and the largest ``num_inference_steps``; every whole number between is as likely."""
    steps_mix: Mix[int] | None = None
    """Numbers of steps with weights, in place of the range."""
    guidance_scale: float | Mix[float] = 1.0
    guidance_interval: tuple[float, float] | None = None
    """Begin and end of guided requests' steps with guidance, as shares of all; None isn't sent."""
    profile: tuple[Path, ...] = (HEADS / "profile.png",)
    reference: tuple[Path, ...] = (HEADS / "reference.png",)
    """Pictures that requests take in turn, profiles and references alike; after the last comes the first again."""
    returning: float | None = None
    """Share of requests whose profile an earlier request had; all others have a new one. None: the given pictures."""
    priority: int | Mix[int] | None = None
    deadline_ms: int | Mix[int] | None = None
    """None isn't sent. Goodput counts answers within it, from the moment a request was meant to leave."""
    leaving: float = 0.0
    """Share of callers who leave: each cancels at a random moment within ``leaving_ms``, unless it was answered."""
    leaving_ms: int = 1000
    seed: int = 0
    """Seed of moments, steps and portraits' seeds: the same seed asks for the same portraits at the same moments."""
    warm_up_s: float = 5.0
    """The steady figures leave out what is sent, or for the rate answered, before this."""
    timeout_s: float = 60.0
    """Seconds that one call may take, from its sending."""
    hdr: Path | None = None
    """File for the latencies as an HdrHistogram log."""

    def __post_init__(self) -> None:
        """Check the values.

        Raises:
            InvalidRequest: names the value, what came and what was expected.
        """
        for name, value in (("rate", self.rate_per_s), ("leaving-ms", self.leaving_ms)):
            _check_above_0(name, value)
        for name, value in (("duration", self.duration_s), ("timeout", self.timeout_s)):
            _check_above_0(name, value, LONGEST_S)
        if not 0.01 <= self.burstiness <= 1000:
            raise InvalidRequest(f"burstiness: {self.burstiness:g}, expected 0.01 to 1000")
        if not 0 <= self.warm_up_s < self.duration_s:
            raise InvalidRequest(
                f"warm-up: {self.warm_up_s:g} s, expected 0 or more and less than the duration, {self.duration_s:g} s"
            )
        if not 0 <= self.ramp_s <= self.warm_up_s:
            raise InvalidRequest(
                f"ramp: {self.ramp_s:g} s, expected 0 or more and within the warm-up, {self.warm_up_s:g} s"
            )
        for name, share in (("returning", self.returning), ("leaving", self.leaving)):
            if share is not None and not 0 <= share <= 1:
                raise InvalidRequest(f"{name}: {share:g}, expected a share from 0 to 1")
        if self.concurrency is not None and not 1 <= self.concurrency <= _CALLERS:
            raise InvalidRequest(f"concurrency: {self.concurrency}, expected 1 to {_CALLERS}")
        if self.concurrency is None and self.trace is None and self.rate_per_s * self.duration_s > _REQUESTS:
            raise InvalidRequest(
                f"rate: {self.rate_per_s:g}/s for {self.duration_s:g} s are {self.rate_per_s * self.duration_s:g} "
                f"requests, expected {_REQUESTS} at most: all are drawn before the run"
            )
        if self.trace is not None and (self.concurrency is not None or self.ramp_s or self.burstiness != 1):
            raise InvalidRequest("trace: has its own moments; leave out concurrency, ramp and burstiness")
        if self.concurrency is not None and (self.burstiness != 1 or self.returning is not None):
            raise InvalidRequest("concurrency: callers send when they are answered; leave out burstiness and returning")
        if self.steps[0] > self.steps[1]:
            raise InvalidRequest(f"steps: {self.steps[0]} {self.steps[1]}, expected the lower number first")
        inputs = load_contract().inputs
        for name, values in (
            ("num_inference_steps", (*self.steps, *values_of(self.steps_mix))),
            ("guidance_scale", values_of(self.guidance_scale)),
            ("priority", values_of(self.priority)),
            ("deadline_ms", values_of(self.deadline_ms)),
        ):
            for each in values:
                inputs[name].elements(each)
        if self.guidance_interval is not None:
            inputs["guidance_interval"].elements(self.guidance_interval)
        for name in ("profile", "reference"):
            if not getattr(self, name):
                raise InvalidRequest(f"{name}: no picture, expected one or more")
        if self.seed < 0:
            raise InvalidRequest(f"seed: {self.seed}, expected 0 or more")

    @property
    def step_range(self) -> tuple[int, int]:
        """Return the least and the largest number of steps."""
        values = values_of(self.steps_mix) or self.steps
        return min(values), max(values)


@dataclass(frozen=True)
class SearchSettings:
    """A search for the highest rate at which a server keeps what is asked of it."""

    load: LoadSettings
    """The load; its rate is the first that is tried, and its duration a probe's."""
    p99_ms: float | None = None
    """Latency that 99 % of the requests mustn't exceed; a request that failed exceeds any."""
    goodput: float | None = None
    """Share of the requests that must be answered within their own deadline."""
    longest_s: float = 240.0
    """Seconds that one probe may take, where its first ``load.duration_s`` leave a doubt."""
    probes: int = 8

    def __post_init__(self) -> None:
        """Check the values.

        Raises:
            InvalidRequest: names the value, what came and what was expected.
        """
        if (self.p99_ms is None) == (self.goodput is None):
            raise InvalidRequest("the objective: expected one of p99-ms and goodput")
        if self.p99_ms is not None:
            _check_above_0("p99-ms", self.p99_ms)
        if self.goodput is not None and not 0 < self.goodput < 1:
            raise InvalidRequest(f"goodput: {self.goodput:g}, expected a share between 0 and 1, such as 0.99")
        if self.goodput is not None and self.load.deadline_ms is None:
            raise InvalidRequest("goodput: counts answers within deadline-ms, which isn't given")
        if self.load.trace is not None or self.load.concurrency is not None:
            raise InvalidRequest("search: draws its moments by the rate; leave out trace and concurrency")
        if not self.load.duration_s <= self.longest_s <= LONGEST_S:
            raise InvalidRequest(
                f"longest: {self.longest_s:g} s, expected the duration, {self.load.duration_s:g} s, or more, up to "
                f"{LONGEST_S:g}"
            )
        if self.probes < 1:
            raise InvalidRequest(f"probes: {self.probes}, expected 1 or more")

    @property
    def seed(self) -> int:
        return self.load.seed

    @property
    def allowed_share(self) -> float:
        """Return the share of requests that may miss the objective."""
        return 0.01 if self.goodput is None else 1 - self.goodput


@dataclass(frozen=True)
class DevicesSettings:
    """One device and several behind one gateway."""

    devices: int = 4
    profile: str = "h200-sd15-512-fp16"
    """Name of a profile, or its file: the engines' times."""
    slower: float = 4.0
    """Factor on the engines' times, so that this machine's cores are not the limit."""
    rate_per_s: float = 1.0
    """Requests a second for each device."""
    duration_s: float = 150.0
    """Seconds of a round of several devices."""
    rounds: int = 2
    returning: float = 0.5
    """Share of requests whose profile an earlier request had."""
    cost_rate_per_s: float = 4.0
    """Rate at which the CPU time of a portrait is measured."""
    cost_s: float = 45.0
    """Seconds for which it is."""
    idle_s: float = 15.0
    """Seconds for which the CPU time of a server without requests is."""
    seed: int = 0

    def __post_init__(self) -> None:
        """Check the values.

        Raises:
            InvalidRequest: names the value, what came and what was expected.
        """
        for name, value, least in (("devices", self.devices, 2), ("rounds", self.rounds, 0)):
            if value < least:
                raise InvalidRequest(f"{name}: {value}, expected {least} or more")
        _check_above_0("slower", self.slower)
        _check_above_0("idle_s", self.idle_s, LONGEST_S)
        for name, seconds in (("duration", self.duration_s), ("cost_s", self.cost_s)):
            if not seconds > LoadSettings.warm_up_s:
                raise InvalidRequest(
                    f"{name}: {seconds:g} s, expected more than the warm-up, {LoadSettings.warm_up_s:g} s"
                )
            LoadSettings(rate_per_s=self.rate_per_s, duration_s=seconds, seed=self.seed)


@dataclass(frozen=True)
class GeneratorSettings:
    """Rates that are tried, each for a while."""

    rates_per_s: tuple[float, ...] = (50.0, 100.0, 200.0, 400.0)
    duration_s: float = 8.0
    latency_ms: float = 100.0
    """Time that the server takes for every answer."""
    image_bytes: int = 25_000
    """Size of an answer's picture."""
    seed: int = 0

    def __post_init__(self) -> None:
        """Check the values.

        Raises:
            InvalidRequest: names the value, what came and what was expected.
        """
        if not 2 < self.duration_s <= LONGEST_S:
            raise InvalidRequest(f"duration: {self.duration_s:g} s, expected more than 2 s, up to {LONGEST_S:g}")
        for rate_per_s in self.rates_per_s:
            LoadSettings(rate_per_s=rate_per_s, duration_s=self.duration_s, warm_up_s=0.0)
        if not 0 <= self.latency_ms <= 1000 * LONGEST_S:
            raise InvalidRequest(f"latency-ms: {self.latency_ms:g}, expected 0 to {1000 * LONGEST_S:g}")
        if not 0 <= self.image_bytes <= 2**30:
            raise InvalidRequest(f"image-bytes: {self.image_bytes}, expected 0 to {2**30}")


@dataclass(frozen=True)
class ClientOverheadSettings:
    """Requests that are made by the client and by a bare stub."""

    requests: int = 400
    seed: int = 7

    def __post_init__(self) -> None:
        """Check the value.

        Raises:
            InvalidRequest: there would be nothing to tell.
        """
        if self.requests < 1:
            raise InvalidRequest(f"requests: {self.requests}, expected 1 or more")


@dataclass(frozen=True)
class MergeSettings:
    """Logs of several runs."""

    logs: tuple[Path, ...]


@dataclass(frozen=True)
class CoverageSettings:
    """Synthetic runs whose quantile is known."""

    trials: int = 1000
    level: float = 0.99
    seed: int = 0

    def __post_init__(self) -> None:
        """Check the values.

        Raises:
            InvalidRequest: names the value, what came and what was expected.
        """
        for name, value, least in (("trials", self.trials, 1), ("seed", self.seed, 0)):
            if value < least:
                raise InvalidRequest(f"{name}: {value}, expected {least} or more")
        if not 0.5 <= self.level <= 0.999:
            raise InvalidRequest(f"level: {self.level:g}, expected 0.5..0.999")


@dataclass(frozen=True)
class LatencySettings:
    """Engines alone, a request alone, peers beside each other, and the gateway's own limits."""

    export: Path
    checkpoint: Path = ROOT / "checkpoints" / "demo-128"
    """Directory of the weights that the export is of, for the peers in torch."""
    runtime: str = ServingPolicy.runtime
    """Runtime that is served."""
    runtimes: tuple[str, ...] = ("onnxruntime", "openvino")
    """Runtimes whose engines are measured alone."""
    rungs: tuple[str, ...] = tuple(RUNGS)
    num_inference_steps: int = 20
    guidance_scale: float = 1.0
    rounds: int = 10
    """Requests of each rung, and of each setting of a request alone."""
    seconds: float = 2.0
    """Time for one engine at one batch size, and for each of the gateway's limits."""
    profile: Path = HEADS / "profile.png"
    reference: Path = HEADS / "reference.png"
    seed: int = 0
    out: Path | None = None
    """File for the figures as JSON, beside standard output."""
    compare_with: tuple[Path, ...] = ()
    """JSON of committed runs; this one may not lose against the one that was measured on such a machine."""

    def __post_init__(self) -> None:
        """Check the values.

        Raises:
            InvalidRequest: names the value, what came and what was expected.
        """
        inputs = load_contract().inputs
        for name in ("num_inference_steps", "guidance_scale"):
            inputs[name].elements(getattr(self, name))
        for name, known in (("runtimes", CPU_RUNTIMES), ("rungs", RUNGS)):
            given = getattr(self, name)
            if not set(given) <= set(known) or len(set(given)) < len(given):
                raise InvalidRequest(f"{name}: {' '.join(given)}, expected some of {', '.join(known)}, each once")
        if self.runtime not in CPU_RUNTIMES:
            raise InvalidRequest(f"runtime: {self.runtime}, expected one of {', '.join(CPU_RUNTIMES)}")
        _check_above_0("seconds", self.seconds)
        for name, value, least in (("rounds", self.rounds, LEAST_ROUNDS), ("seed", self.seed, 0)):
            if value < least:
                raise InvalidRequest(f"{name}: {value}, expected {least} or more")


@dataclass(frozen=True)
class CompareSettings:
    """Ways of batching, each under the same loads."""

    export: Path
    latency_table: Path = LATENCY_TABLE
    modes: tuple[str, ...] = tuple(BATCHING_MODES)
    loads: tuple[float, ...] = (0.7, 0.9, 1.1)
    """Shares of what whole batches can serve."""
    duration_s: float = 20.0
    """Seconds of one mode under one load."""
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
    guidance_scale: float = 1.0
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
        """Return the slots of one request."""
        return 2 if self.guidance_scale > 1 else 1


@dataclass(frozen=True)
class PairsSettings:
    """Two servers that are asked for the same portraits."""

    first: str
    second: str
    """gRPC addresses, each of a gateway or of a Triton with the standalone pipeline."""
    rounds: int = 5
    requests: int = 200
    """Requests of a round."""
    num_inference_steps: int | None = None
    """None isn't sent."""
    profile: Path = HEADS / "profile.png"
    reference: Path = HEADS / "reference.png"
    seed: int = 0
    """Seed of the noise that makes pictures new."""

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


@dataclass(frozen=True)
class FacesSettings:
    """Face finders on the same pictures."""

    heads: int = 12
    """People in each view."""
    without_faces: Path | None = None
    """A folder of pictures that show no face, beside those that are made here."""
    seed: int = 1000
    """Seed of the people; training draws others."""

    def __post_init__(self) -> None:
        """Check the values.

        Raises:
            InvalidRequest: names the value, what came and what was expected.
        """
        for name, value, least in (("heads", self.heads, 1), ("seed", self.seed, 0)):
            if value < least:
                raise InvalidRequest(f"{name}: {value}, expected {least} or more")
        if self.without_faces and not self.without_faces.is_dir():
            raise InvalidRequest(f"without-faces: {self.without_faces} isn't a folder")


@dataclass(frozen=True)
class MarkingSettings:
    """Time and size of marking a portrait."""

    certificate: Path
    key: Path
    """PEM files that manifests are signed with."""
    picture: Path = ROOT / "examples" / "astronaut.jpg"
    sizes: tuple[int, ...] = (128, 512)
    rounds: int = 100
    """Each does everything once."""
    seed: int = 0
    """Not used: nothing is drawn."""

    def __post_init__(self) -> None:
        """Check the values.

        Raises:
            InvalidRequest: names the value, what came and what was expected.
        """
        if self.rounds < 1:
            raise InvalidRequest(f"rounds: {self.rounds}, expected 1 or more")


def _check_above_0(name: str, value: float, most: float = math.inf) -> None:
    if not (math.isfinite(value) and 0 < value <= most):
        limit = "" if math.isinf(most) else f", up to {most:g}"
        raise InvalidRequest(f"{name}: {value:g}, expected a number above 0{limit}")


@dataclass(frozen=True)
class PerfAnalyzerSettings:
    """One run: ``concurrency`` levels one after the other."""

    url: str = DEFAULT_URL
    model: str = load_contract().model
    concurrency: str = "1:8"
    """FIRST, FIRST:LAST or FIRST:LAST:STEP calls under way at once."""
    profile: Path = HEADS / "profile.png"
    reference: Path = HEADS / "reference.png"
    num_inference_steps: int | None = None
    guidance_scale: float | None = None
    seed: int | None = None
    """None leaves it out of every call, as the two above."""
    window_s: float = 5.0
    stability_percent: float = 25.0
    """Percent that throughput and latency of three windows in a row may lie apart.

    perf_analyzer's own default is 10, which no shared CPU holds.
    """
    beside: bool = False
    """Measure with our closed loop too, in turn, in windows of ``window_s`` or longer."""
    rounds: int = 3
    """Runs of perf_analyzer at each concurrency of ``beside``, each between two of ours."""

    def __post_init__(self) -> None:
        """Check the values.

        Raises:
            InvalidRequest: names the value, what came and what was expected.
        """
        if not self.levels:
            raise InvalidRequest(f"concurrency: {self.concurrency!r}, expected such as 4, 1:8 or 2:8:2")
        if self.rounds < 1:
            raise InvalidRequest(f"rounds: {self.rounds}, expected 1 or more")
        for name, value in (("window", self.window_s), ("stability", self.stability_percent)):
            if not (math.isfinite(value) and value > 0):
                raise InvalidRequest(f"{name}: {value:g}, expected a number above 0")
        inputs = load_contract().inputs
        for name, value in self.options.items():
            inputs[name].elements(value)

    @property
    def levels(self) -> range:
        """Return the concurrencies, none where the text isn't of that form."""
        match = re.fullmatch(r"([1-9]\d*)(?::([1-9]\d*)(?::([1-9]\d*))?)?", self.concurrency)
        if match is None:
            return range(0)
        return range(int(match[1]), int(match[2] or match[1]) + 1, int(match[3] or 1))

    @property
    def options(self) -> dict[str, Any]:
        """Return the optional inputs that every call has."""
        values = {name: getattr(self, name) for name in ("num_inference_steps", "guidance_scale", "seed")}
        return {name: value for name, value in values.items() if value is not None}
