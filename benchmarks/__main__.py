"""Measure a running server (``load``, ``perf-analyzer``), two (``pairs``), ways to batch, or the loop alone."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from icportrait_client.errors import InvalidRequest, PortraitError

from benchmarks.perf_analyzer import PerfAnalyzerSettings, measure
from benchmarks.perf_analyzer import table as perf_table
from benchmarks.perf_analyzer_program import PerfAnalyzerError
from benchmarks.settings import HEADS, CompareSettings, LoadSettings, LoopSettings, PairsSettings
from icportrait.errors import IcPortraitError
from icportrait.scheduling import BATCHING_MODES

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
    compare = commands.add_parser("compare", help="ways of batching under the same loads, with simulated engines")
    compare.set_defaults(settings=CompareSettings, run=_compare)
    _add_compare_arguments(compare)
    loop = commands.add_parser("loop", help="what the denoising loop alone takes, with simulated engines")
    loop.set_defaults(settings=LoopSettings, run=_loop)
    _add_loop_arguments(loop)
    pairs = commands.add_parser("pairs", help="two servers that are asked for the same portraits, and the ratio")
    pairs.set_defaults(settings=PairsSettings, run=_pairs)
    _add_pairs_arguments(pairs)
    args = vars(parser.parse_args(argv))
    command, make_settings, run, as_json = (args.pop(name) for name in ("command", "settings", "run", "json"))
    fields = {name: tuple(value) if isinstance(value, list) else value for name, value in args.items()}
    try:
        settings = make_settings(**fields)
    except InvalidRequest as error:
        commands.choices[command].error(str(error))
    try:
        return int(run(settings, as_json))
    except (PortraitError, IcPortraitError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("error: interrupted", file=sys.stderr)
        return _INTERRUPTED


def _add_load_arguments(load: argparse.ArgumentParser) -> None:
    shown = "(default: %(default)s)"
    load.add_argument("--url", default=LoadSettings.url, help=f"the server's gRPC address {shown}")
    load.add_argument("--model", default=LoadSettings.model, help=shown)
    _add_numbers(
        load,
        LoadSettings,
        ("--rate", "rate_per_s", float, "requests a second, on average"),
        ("--duration", "duration_s", float, "seconds in which requests are sent"),
        ("--guidance", "guidance_scale", float, "guidance_scale of every request"),
        ("--warm-up", "warm_up_s", float, "seconds that the steady figures leave out"),
        ("--timeout", "timeout_s", float, "seconds that one call may take"),
        ("--seed", "seed", int, "the same seed, the same requests"),
    )
    load.add_argument(
        "--steps",
        nargs=2,
        type=int,
        default=LoadSettings.steps,
        metavar=("LOW", "HIGH"),
        help="num_inference_steps is drawn from LOW..HIGH (default: {} {})".format(*LoadSettings.steps),
    )
    for flag, name, meaning in (
        ("--deadline-ms", "deadline_ms", "of every request, and what goodput counts"),
        ("--priority", "priority", "class of every request, 0 first"),
    ):
        load.add_argument(flag, dest=name, type=int, metavar="N", help=f"{meaning}; default: not sent")
    for name in ("profile", "reference"):
        default = getattr(LoadSettings, name)
        help_text = "several are used in turn; default: a rendered head"
        load.add_argument(f"--{name}", nargs="+", type=Path, default=default, metavar="FILE", help=help_text)
    _add_json_argument(load)


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
    _add_numbers(
        command,
        PerfAnalyzerSettings,
        ("--window", "window_s", float, "seconds of one measurement"),
        ("--stability", "stability_percent", float, "percent by which three measurements in a row may differ"),
    )
    _add_head_arguments(command)
    _add_json_argument(command)


def _add_compare_arguments(command: argparse.ArgumentParser) -> None:
    _add_simulation_arguments(command, CompareSettings)
    command.add_argument(
        "--modes",
        nargs="+",
        choices=tuple(BATCHING_MODES),
        default=CompareSettings.modes,
        metavar="MODE",
        help=f"default: {' '.join(CompareSettings.modes)}",
    )
    command.add_argument(
        "--loads",
        nargs="+",
        type=float,
        default=CompareSettings.loads,
        metavar="SHARE",
        help="shares of what whole batches can serve (default: {:g} {:g})".format(*CompareSettings.loads),
    )
    _add_numbers(
        command,
        CompareSettings,
        ("--duration", "duration_s", float, "seconds of one mode under one load"),
        ("--rounds", "rounds", int, "each has every mode under every load; medians are over them"),
        ("--seed", "seed", int, "the same seed, the same requests"),
    )
    _add_json_argument(command)


def _add_loop_arguments(command: argparse.ArgumentParser) -> None:
    _add_simulation_arguments(command, LoopSettings)
    _add_numbers(
        command,
        LoopSettings,
        ("--slots", "slots", int, "rows of the batch"),
        ("--guidance", "guidance_scale", float, "guidance_scale of every request; more than 1 takes two slots"),
        ("--seconds", "seconds", float, "how long it is measured"),
    )
    _add_json_argument(command)


def _add_pairs_arguments(command: argparse.ArgumentParser) -> None:
    for name in ("first", "second"):
        command.add_argument(name, metavar=name.upper(), help="gRPC address of a gateway or a standalone Triton")
    _add_numbers(
        command,
        PairsSettings,
        ("--rounds", "rounds", int, "each has its own ratio"),
        ("--requests", "requests", int, "of a round"),
        ("--seed", "seed", int, "of the noise that makes every picture new"),
    )
    command.add_argument("--steps", dest="num_inference_steps", type=int, metavar="N", help="default: not sent")
    _add_head_arguments(command)
    _add_json_argument(command)


def _add_simulation_arguments(
    command: argparse.ArgumentParser, settings: type[CompareSettings] | type[LoopSettings]
) -> None:
    command.add_argument("--export", type=Path, required=True, metavar="DIR", help="written by python -m export")
    help_text = f"what engines take (default: {settings.latency_table.name})"
    command.add_argument("--latency-table", type=Path, default=settings.latency_table, metavar="FILE", help=help_text)


def _add_numbers(
    command: argparse.ArgumentParser, settings: type[object], *numbers: tuple[str, str, type[int] | type[float], str]
) -> None:
    """Options of a number each: the flag, its name in the settings, which have the default, its type and meaning."""
    for flag, name, kind, meaning in numbers:
        default = getattr(settings, name)
        help_text = f"{meaning} (default: {default:g})"
        command.add_argument(flag, dest=name, type=kind, default=default, metavar="N", help=help_text)


def _add_head_arguments(command: argparse.ArgumentParser) -> None:
    for name in ("profile", "reference"):
        head = HEADS / f"{name}.png"
        command.add_argument(f"--{name}", type=Path, default=head, metavar="FILE", help="default: a rendered head")


def _add_json_argument(command: argparse.ArgumentParser) -> None:
    command.add_argument("--json", action="store_true", help="print the figures and their conditions as JSON")


def _load(settings: LoadSettings, as_json: bool) -> int:
    from benchmarks.load import run_load
    from benchmarks.report import summarise, table

    run = run_load(settings, show_progress=True)
    report = summarise(run)
    print(json.dumps(report, indent=2) if as_json else table(report))
    return 0 if run.interrupted_s is None else _INTERRUPTED


def _compare(settings: CompareSettings, as_json: bool) -> int:
    from benchmarks.compare import compare
    from benchmarks.compare_report import table

    report = compare(settings, lambda line: print(line, file=sys.stderr, flush=True))
    print(json.dumps(report, indent=2) if as_json else table(report))
    return 0


def _loop(settings: LoopSettings, as_json: bool) -> int:
    from benchmarks.loop import run_loop, table

    report = run_loop(settings)
    print(json.dumps(report, indent=2) if as_json else table(report))
    return 0


def _pairs(settings: PairsSettings, as_json: bool) -> int:
    from benchmarks.pairs import run_pairs, table

    report = run_pairs(settings)
    print(json.dumps(report, indent=2) if as_json else table(report))
    return 0


def _perf_analyzer(settings: PerfAnalyzerSettings, as_json: bool) -> int:
    report = measure(settings, echo=sys.stderr if as_json else sys.stdout)
    print(json.dumps(report, indent=2) if as_json else f"\n{perf_table(report)}")
    if report["unstable_at"] is None:
        return 0
    raise PerfAnalyzerError(
        f"windows of {settings.window_s:g} s never agreed within {settings.stability_percent:g} % at concurrency"
        f" {report['unstable_at']}; ask for longer ones with --window or for less with --stability"
    )


if __name__ == "__main__":
    sys.exit(main())
