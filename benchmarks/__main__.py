"""Measure a running server: ``python -m benchmarks load``, ``python -m benchmarks perf-analyzer``."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from icportrait_client.errors import InvalidRequest, PortraitError

from benchmarks.perf_analyzer import PerfAnalyzerSettings, measure
from benchmarks.perf_analyzer import table as perf_table
from benchmarks.settings import LoadSettings

_INTERRUPTED = 130


def main(argv: list[str] | None = None) -> int:
    """Run one benchmark.

    Returns:
        0, 1 after an error, 130 where Ctrl-C ended it early. A wrong command line ends the process with 2.
    """
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    load = commands.add_parser("load", help="requests at random moments, open loop, and what became of them")
    load.set_defaults(settings=LoadSettings, run=_load)
    _add_load_arguments(load)
    perf_analyzer = commands.add_parser("perf-analyzer", help="NVIDIA's perf_analyzer: so many calls under way at once")
    perf_analyzer.set_defaults(settings=PerfAnalyzerSettings, run=_perf_analyzer)
    _add_perf_analyzer_arguments(perf_analyzer)
    args = vars(parser.parse_args(argv))
    command, make_settings, run, as_json = (args.pop(name) for name in ("command", "settings", "run", "json"))
    fields = {name: tuple(value) if isinstance(value, list) else value for name, value in args.items()}
    try:
        settings = make_settings(**fields)
    except InvalidRequest as error:
        commands.choices[command].error(str(error))
    try:
        return int(run(settings, as_json))
    except (PortraitError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("error: interrupted", file=sys.stderr)
        return _INTERRUPTED


def _add_load_arguments(load: argparse.ArgumentParser) -> None:
    shown = "(default: %(default)s)"
    load.add_argument("--url", default=LoadSettings.url, help=f"the server's gRPC address {shown}")
    load.add_argument("--model", default=LoadSettings.model, help=shown)
    for flag, name, meaning in (
        ("--rate", "rate_per_s", "requests a second, on average"),
        ("--duration", "duration_s", "seconds in which requests are sent"),
        ("--guidance", "guidance_scale", "guidance_scale of every request"),
        ("--warm-up", "warm_up_s", "seconds that the steady figures leave out"),
        ("--timeout", "timeout_s", "seconds that one call may take"),
    ):
        default = getattr(LoadSettings, name)
        load.add_argument(flag, dest=name, type=float, default=default, metavar="N", help=f"{meaning} {shown}")
    load.add_argument(
        "--steps",
        nargs=2,
        type=int,
        default=LoadSettings.steps,
        metavar=("LOW", "HIGH"),
        help="num_inference_steps is drawn from LOW..HIGH (default: {} {})".format(*LoadSettings.steps),
    )
    load.add_argument("--seed", type=int, default=LoadSettings.seed, help=f"the same seed, the same requests {shown}")
    _add_shared_arguments(load)


def _add_perf_analyzer_arguments(command: argparse.ArgumentParser) -> None:
    default = PerfAnalyzerSettings()
    command.add_argument("--url", default=default.url, help="the server's gRPC address (default: %(default)s)")
    command.add_argument(
        "--concurrency",
        default=default.concurrency,
        metavar="FIRST:LAST[:STEP]",
        help="calls under way at once, a level after the other (default: %(default)s)",
    )
    for flag, name, kind in (
        ("--steps", "num_inference_steps", int),
        ("--guidance", "guidance_scale", float),
        ("--seed", "seed", int),
    ):
        command.add_argument(flag, dest=name, type=kind, metavar="N", help=f"{name} of every call; default: not sent")
    for flag, name, meaning in (
        ("--window", "window_s", "seconds of one measurement"),
        ("--stability", "stability_percent", "percent by which three measurements in a row may differ"),
    ):
        help_text = f"{meaning} (default: {getattr(default, name):g})"
        command.add_argument(flag, dest=name, type=float, default=getattr(default, name), metavar="N", help=help_text)
    _add_shared_arguments(command)


def _add_shared_arguments(command: argparse.ArgumentParser) -> None:
    for name in ("profile", "reference"):
        head = getattr(LoadSettings, name)
        command.add_argument(f"--{name}", type=Path, default=head, metavar="FILE", help="default: a rendered head")
    command.add_argument("--json", action="store_true", help="print the figures and their conditions as JSON")


def _load(settings: LoadSettings, as_json: bool) -> int:
    from benchmarks.load import run_load
    from benchmarks.report import summarise, table

    run = run_load(settings, show_progress=True)
    report = summarise(run)
    print(json.dumps(report, indent=2) if as_json else table(report))
    return 0 if run.interrupted_s is None else _INTERRUPTED


def _perf_analyzer(settings: PerfAnalyzerSettings, as_json: bool) -> int:
    report = measure(settings, echo=sys.stderr if as_json else sys.stdout)
    print(json.dumps(report, indent=2) if as_json else f"\n{perf_table(report)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
