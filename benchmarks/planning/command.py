"""The command lines of ``python -m benchmarks plan``, ``autoscale``, ``profile``, ``replay`` and ``validate``."""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from icportrait_client.errors import InvalidRequest

from benchmarks.output import Output, add_output_arguments
from benchmarks.planning import autoscale
from benchmarks.settings import LoadSettings
from icportrait.policy import CPU_RUNTIMES


@dataclass(frozen=True)
class PlanSettings:
    """One question; ``None`` leaves a value to the file."""

    question: Path | None = None
    rate_per_s: float | None = None
    p99_ms: float | None = None
    goodput: float | None = None
    within_ms: float | None = None
    profiles: tuple[str, ...] | None = None
    headroom: float | None = None
    spare: int | None = None
    processes: int | None = None
    """None is one a core."""
    seed: int = 0

    def __post_init__(self) -> None:
        """Check the values that aren't the question's.

        Raises:
            InvalidRequest: names the value, what came and what was expected.
        """
        _check("seed", self.seed, 0, 2**63)
        if self.processes is not None:
            _check("processes", self.processes, 1, 256)


@dataclass(frozen=True)
class ProfileSettings:
    """A server that is started here and measured."""

    like: str = "h200-sd15-512-fp16"
    """Profile whose engines' times a server with simulated engines takes; its host is measured."""
    latency: Path | None = None
    """Report of ``latency`` that the profile is made of; nothing is measured then."""
    export: Path | None = None
    """Export whose real engines are measured too, instead."""
    runtime: str = "onnxruntime"
    """Runtime of the real engines."""
    out: Path = Path("build/profile.json")
    requests: int = 20
    """Requests of each kind."""
    note: str = ""

    def __post_init__(self) -> None:
        """Check the values.

        Raises:
            InvalidRequest: names the value, what came and what was expected.
        """
        _check("requests", self.requests, 1, 1000)


@dataclass(frozen=True)
class ReplaySettings:
    """One load on a real server with simulated engines, and on the simulation."""

    profile: str = "h200-sd15-512-fp16"
    rate_per_s: float = 2.0
    duration_s: float = 60.0
    steps: tuple[int, int] = (5, 30)
    guidance_scale: float = 1.0
    deadline_ms: int | None = None
    export: Path | None = None
    """Export whose real engines the server runs; they are measured first."""
    runtime: str = "onnxruntime"
    small: bool = False
    """The server makes pictures of 128 px, whatever its profile says."""
    seed: int = 0

    def __post_init__(self) -> None:
        """Check the values.

        Raises:
            InvalidRequest: names the value, what came and what was expected.
        """
        _check("duration", self.duration_s, 2 * LoadSettings.warm_up_s, 86_400)
        _ = self.load

    @property
    def load(self) -> LoadSettings:
        """Return the load, but the server's address."""
        return LoadSettings(
            rate_per_s=self.rate_per_s,
            duration_s=self.duration_s,
            steps=self.steps,
            guidance_scale=self.guidance_scale,
            deadline_ms=self.deadline_ms,
            seed=self.seed,
        )


@dataclass(frozen=True)
class ValidationSettings:
    """Scenarios, measured and predicted."""

    duration_s: float = 120.0
    """Seconds of each scenario."""
    export: Path | None = None
    """Export of the scenarios with real engines; None leaves them out."""
    seed: int = 0

    def __post_init__(self) -> None:
        """Check the values.

        Raises:
            InvalidRequest: names the value, what came and what was expected.
        """
        _check("duration", self.duration_s, 20, 86_400)
        _check("seed", self.seed, 0, 2**31)


def _check(name: str, value: float, least: float, most: float) -> None:
    if not least <= value <= most:
        raise InvalidRequest(f"{name}: {value:g}, expected {least:g} to {most:g}")


def add_commands(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the planner's commands."""
    plan = commands.add_parser("plan", help="how many GPUs a load needs, by simulation in virtual time")
    plan.set_defaults(settings=PlanSettings, run=run)
    _add_plan_arguments(plan)
    autoscale.add_command(commands)
    profile = commands.add_parser("profile", help="a server's times outside of its engines, for plan: a minute")
    profile.set_defaults(settings=ProfileSettings, run=run_profile)
    _add_profile_arguments(profile)
    replay = commands.add_parser("replay", help="one load on a real server and on plan's simulation, compared")
    replay.set_defaults(settings=ReplaySettings, run=run_replay)
    _add_replay_arguments(replay)
    validate = commands.add_parser("validate", help="plan's simulation and measurements: half an hour")
    validate.set_defaults(settings=ValidationSettings, run=run_validation)
    shown = "(default: %(default)g)"
    default = ValidationSettings.duration_s
    validate.add_argument(
        "--duration", dest="duration_s", type=float, default=default, metavar="N", help=f"seconds of each {shown}"
    )
    validate.add_argument("--seed", type=int, default=0, metavar="N", help="of the first scenario (default: 0)")
    validate.add_argument(
        "--export",
        type=Path,
        metavar="DIR",
        help="for three scenarios with its real engines, beside nine simulated ones",
    )
    add_output_arguments(validate, has_page=True)


def _add_plan_arguments(command: argparse.ArgumentParser) -> None:
    command.add_argument("question", nargs="?", type=Path, metavar="TOML", help="the question; flags go before it")
    for flag, name, kind, meaning in (
        ("--rate", "rate_per_s", float, "requests a second of all callers"),
        ("--p99-ms", "p99_ms", float, "goal: p99 from sending to the answer"),
        ("--goodput", "goodput", float, "goal: share of requests answered in time"),
        ("--within-ms", "within_ms", float, "in time, for --goodput; default: --p99-ms"),
        ("--headroom", "headroom", float, "share by which the planned rate is above the given one"),
        ("--spare", "spare", int, "replicas beyond those that the goal needs"),
        ("--processes", "processes", int, "that simulate; default: one a core"),
    ):
        command.add_argument(flag, dest=name, type=kind, metavar="N", help=meaning)
    command.add_argument(
        "--profiles", nargs="+", metavar="NAME", help="of benchmarks/profiles, or paths that end with .json"
    )
    command.add_argument("--seed", type=int, default=PlanSettings.seed, metavar="N", help="default: %(default)s")
    add_output_arguments(command, has_page=True)


def _add_profile_arguments(command: argparse.ArgumentParser) -> None:
    default = ProfileSettings()
    command.add_argument(
        "--like", default=default.like, metavar="NAME", help="profile of the engines (default: %(default)s)"
    )
    command.add_argument("--latency", type=Path, metavar="FILE", help="make it of a report of latency; measure nothing")
    _add_export(command)
    command.add_argument("--out", type=Path, default=default.out, metavar="FILE", help="default: %(default)s")
    command.add_argument(
        "--requests", type=int, default=default.requests, metavar="N", help="of each kind (default: %(default)s)"
    )
    command.add_argument("--note", default="", help="the machine, for the profile")
    add_output_arguments(command)


def _add_replay_arguments(command: argparse.ArgumentParser) -> None:
    default = ReplaySettings()
    command.add_argument("--profile", default=default.profile, metavar="NAME", help="default: %(default)s")
    _add_export(command)
    for flag, name, kind, meaning in (
        ("--rate", "rate_per_s", float, "requests a second"),
        ("--duration", "duration_s", float, "seconds"),
        ("--guidance", "guidance_scale", float, "guidance_scale of every request"),
        ("--seed", "seed", int, "the same seed, the same requests"),
    ):
        command.add_argument(
            flag,
            dest=name,
            type=kind,
            default=getattr(default, name),
            metavar="N",
            help=f"{meaning} (default: {getattr(default, name):g})",
        )
    command.add_argument("--deadline-ms", type=int, metavar="N", help="of every request; default: not sent")
    command.add_argument("--steps", nargs=2, type=int, default=default.steps, metavar=("LOW", "HIGH"))
    command.add_argument("--small", action="store_true", help="pictures of 128 px, which two cores can make")
    add_output_arguments(command, has_page=True)


def _add_export(command: argparse.ArgumentParser) -> None:
    command.add_argument("--export", type=Path, metavar="DIR", help="measure and run its engines, and simulate none")
    command.add_argument(
        "--runtime", choices=CPU_RUNTIMES, default="onnxruntime", help="of --export (default: %(default)s)"
    )


def run(settings: PlanSettings, output: Output) -> int:
    """Answer a question, and print the answer."""
    from benchmarks.pages.plan import plan_sections
    from benchmarks.planning.answer import table, to_json
    from benchmarks.planning.evaluation import Simulator
    from benchmarks.planning.planner import check_size, plan
    from benchmarks.planning.question import read
    from benchmarks.report import conditions_here

    began_s = time.perf_counter()
    flags = {name: value for name, value in vars(settings).items() if name not in ("question", "processes")}
    question = read(settings.question, flags)
    check_size(question)
    with Simulator(settings.processes) as simulator:
        answers = plan(question, simulator, lambda line: print(line, file=sys.stderr, flush=True))
        took = simulator.requests, time.perf_counter() - began_s
    report = {**to_json(question, answers, *took), "conditions": conditions_here(cast(Any, settings))}
    output.show(report, lambda _: table(question, answers, *took), "Capacity", plan_sections)
    return 0


def run_profile(settings: ProfileSettings, output: Output) -> int:
    """Write a profile: of what is measured here, or of a report of ``latency``."""
    from benchmarks.planning.from_latency import profile_of_latency

    made = profile_of_latency(settings.latency, settings.runtime) if settings.latency else _measured(settings)
    settings.out.parent.mkdir(parents=True, exist_ok=True)
    settings.out.write_text(json.dumps(made, indent=1) + "\n")
    if output.as_json:
        print(json.dumps(made, indent=2))
    else:
        for name, value in made["host"].items():
            print(f"{name:<18}{value}")
        print(f"written: {settings.out}")
    return 0


def _measured(settings: ProfileSettings) -> dict[str, Any]:
    from benchmarks.planning.measured import (
        as_served,
        measure_engines,
        measure_host,
        profile_json,
        real_server,
        simulated_server,
    )
    from benchmarks.planning.question import find_profile
    from icportrait.policy import ServingPolicy

    if settings.export is None:
        profile = find_profile(settings.like, Path())
        with simulated_server(profile) as server:
            return profile_json(profile, measure_host(profile, server, settings.requests, note=settings.note))
    profile = measure_engines(settings.export, settings.runtime)
    with real_server(settings.export, ServingPolicy(runtime=settings.runtime)) as server:
        profile = as_served(profile, server)
        return profile_json(profile, measure_host(profile, server, settings.requests, note=settings.note))


def run_replay(settings: ReplaySettings, output: Output) -> int:
    """Compare a real server with the simulation, request by request."""
    from benchmarks.pages.plan import replay_sections
    from benchmarks.planning.measured import host_json, measure_engines
    from benchmarks.planning.question import find_profile
    from benchmarks.planning.replay import replay, small, table
    from benchmarks.planning.simulation import ServerSettings
    from benchmarks.report import conditions_here
    from icportrait.policy import ServingPolicy

    policy = ServingPolicy(runtime=settings.runtime) if settings.export else ServingPolicy()
    profile = (
        measure_engines(settings.export, settings.runtime)
        if settings.export
        else find_profile(settings.profile, Path())
    )
    engines = small(profile) if settings.small else profile
    found, host = replay(engines, settings.load, ServerSettings(policy), settings.export)
    report = {**found.to_json(), "host": host_json(host), "conditions": conditions_here(cast(Any, settings))}
    output.show(report, table, "A load, measured and simulated", replay_sections)
    return 0


def run_validation(settings: ValidationSettings, output: Output) -> int:
    """Compare predictions with measurements."""
    from benchmarks.pages.plan import validation_sections
    from benchmarks.planning.question import find_profile
    from benchmarks.planning.validation import MIXES, table, validate
    from benchmarks.report import conditions_here

    report = validate(
        MIXES,
        lambda name: find_profile(name, Path()),
        settings.duration_s,
        settings.seed,
        lambda line: print(line, file=sys.stderr, flush=True),
        settings.export,
    )
    report = {"kind": "validation", "simulated": True, **report, "conditions": conditions_here(cast(Any, settings))}
    output.show(report, table, "Predictions against measurements", validation_sections)
    return 0
