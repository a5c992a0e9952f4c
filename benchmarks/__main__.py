"""Measure a running server (``load``, ``search``, ``perf-analyzer``), two (``pairs``), ways to batch, or faces."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from icportrait_client.errors import InvalidRequest, PortraitError

from benchmarks.gpu import command as gpu
from benchmarks.ladder_names import RUNGS
from benchmarks.mix import mixed, weighted
from benchmarks.output import Output, add_output_arguments, check_file
from benchmarks.planning import command as planning
from benchmarks.settings import (
    HEADS,
    LEAST_ROUNDS,
    CompareSettings,
    CoverageSettings,
    DevicesSettings,
    FacesSettings,
    LatencySettings,
    LoadSettings,
    LoopSettings,
    MergeSettings,
    PairsSettings,
    PerfAnalyzerSettings,
    SearchSettings,
)
from icportrait.errors import IcPortraitError
from icportrait.policy import BATCHING_MODES, CPU_RUNTIMES

_INTERRUPTED = 130


def main(argv: list[str] | None = None) -> int:
    """Run one benchmark.

    Returns:
        0, 1 after an error or an invalid run, 130 where Ctrl-C ended it early. A wrong command line ends the process
        with 2.
    """
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    load = commands.add_parser("load", help="requests at random moments or by busy callers, and what became of them")
    load.set_defaults(settings=LoadSettings, run=_load)
    _add_load_arguments(load)
    search = commands.add_parser("search", help="the highest rate at which a server keeps an objective")
    search.set_defaults(settings=_search_settings, run=_search)
    _add_search_arguments(search)
    merge = commands.add_parser("merge", help="the quantiles of several logs that load --hdr wrote")
    merge.set_defaults(settings=MergeSettings, run=_merge)
    _add_merge_arguments(merge)
    coverage = commands.add_parser("coverage", help="how often the 95 %% intervals cover, on synthetic latencies")
    coverage.set_defaults(settings=CoverageSettings, run=_coverage)
    _add_coverage_arguments(coverage)
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
    latency = commands.add_parser("latency", help="engines alone, a request alone, and peers: how fast, and why")
    latency.set_defaults(settings=LatencySettings, run=_latency)
    _add_latency_arguments(latency)
    devices = commands.add_parser("devices", help="one simulated GPU and several at the same rate for each")
    devices.set_defaults(settings=DevicesSettings, run=_devices)
    _add_devices_arguments(devices)
    faces = commands.add_parser("faces", help="what the face finder finds, beside OpenCV's cascade: some minutes")
    faces.set_defaults(settings=FacesSettings, run=_faces)
    _add_faces_arguments(faces)
    planning.add_commands(commands)
    gpu.add_commands(commands)
    args = vars(parser.parse_args(argv))
    command, make_settings, run = (args.pop(name) for name in ("command", "settings", "run"))
    output = Output(args.pop("json"), args.pop("report", None))
    fields = {name: tuple(value) if isinstance(value, list) else value for name, value in args.items()}
    try:
        settings = make_settings(**fields)
    except InvalidRequest as error:
        commands.choices[command].error(str(error))
    try:
        for path in (output.page, getattr(settings, "hdr", None), getattr(settings, "out", None)):
            check_file(path)
        return int(run(settings, output))
    except (PortraitError, IcPortraitError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("error: interrupted", file=sys.stderr)
        return _INTERRUPTED


def _add_load_arguments(load: argparse.ArgumentParser) -> None:
    _add_request_arguments(load)
    _add_numbers(load, LoadSettings, ("--rate", "rate_per_s", float, "requests a second, on average"))
    _add_numbers(load, LoadSettings, ("--duration", "duration_s", float, "seconds in which requests are sent"))
    load.add_argument(
        "--concurrency", type=int, metavar="N", help="callers that send again once answered (a closed loop); no rate"
    )
    load.add_argument(
        "--trace",
        type=Path,
        metavar="FILE",
        help="requests to replay, JSON lines or CSV: offset_s, and steps, guidance, priority, deadline_ms, profile",
    )
    load.add_argument("--hdr", type=Path, metavar="FILE", help="write the latencies as an HdrHistogram log")
    add_output_arguments(load, has_page=True)


def _add_search_arguments(search: argparse.ArgumentParser) -> None:
    search.add_argument("--p99-ms", type=float, metavar="N", help="the objective: 99 %% of the requests within it")
    search.add_argument(
        "--goodput", type=float, metavar="SHARE", help="the objective: this share answered within --deadline-ms"
    )
    _add_request_arguments(search)
    _add_numbers(search, LoadSettings, ("--start", "rate_per_s", float, "requests a second of the first probe"))
    _add_numbers(search, LoadSettings, ("--duration", "duration_s", float, "seconds of a probe that leaves no doubt"))
    _add_numbers(
        search,
        SearchSettings,
        ("--longest", "longest_s", float, "seconds of a probe that leaves one"),
        ("--probes", "probes", int, "rates that are tried"),
    )
    add_output_arguments(search, has_page=True)


def _add_merge_arguments(merge: argparse.ArgumentParser) -> None:
    merge.add_argument("logs", nargs="+", type=Path, metavar="FILE", help="written by load --hdr")
    add_output_arguments(merge)


def _add_coverage_arguments(coverage: argparse.ArgumentParser) -> None:
    _add_numbers(
        coverage,
        CoverageSettings,
        ("--trials", "trials", int, "runs of each kind of latencies"),
        ("--level", "level", float, "the quantile: 0.99 is p99"),
        ("--seed", "seed", int, "of the latencies"),
    )
    add_output_arguments(coverage)


def _add_request_arguments(command: argparse.ArgumentParser) -> None:
    """Add the options that say what requests are like."""
    shown = "(default: %(default)s)"
    command.add_argument("--url", default=LoadSettings.url, help=f"the server's gRPC address {shown}")
    command.add_argument("--model", default=LoadSettings.model, help=shown)
    _add_numbers(
        command,
        LoadSettings,
        ("--burstiness", "burstiness", float, "coefficient of variation of the gaps; more than 1 comes in bursts"),
        ("--ramp", "ramp_s", float, "seconds of the warm-up in which the rate or the callers grow"),
        ("--leaving", "leaving", float, "share of callers who cancel"),
        ("--leaving-ms", "leaving_ms", int, "milliseconds within which they do, at a random moment"),
        ("--warm-up", "warm_up_s", float, "seconds that the steady figures leave out"),
        ("--timeout", "timeout_s", float, "seconds that one call may take"),
        ("--seed", "seed", int, "the same seed, the same requests"),
    )
    command.add_argument(
        "--steps",
        nargs="+",
        action=_StepsAction,
        default=LoadSettings.steps,
        metavar="N",
        help="LOW HIGH: num_inference_steps is drawn from LOW..HIGH; or a mix: 10:3 20:1 is 10 three times of four"
        " (default: {} {})".format(*LoadSettings.steps),
    )
    for flag, name, kind, meaning in (
        ("--guidance", "guidance_scale", float, "guidance_scale; default: 1"),
        ("--deadline-ms", "deadline_ms", int, "what goodput counts; default: not sent"),
        ("--priority", "priority", int, "class, 0 first; default: not sent"),
    ):
        help_text = f"of every request, or a mix; {meaning}"
        default = getattr(LoadSettings, name)
        command.add_argument(
            flag,
            dest=name,
            nargs="+",
            action=_MixAction,
            kind=kind,
            default=default,
            metavar="N[:WEIGHT]",
            help=help_text,
        )
    command.add_argument(
        "--guidance-interval",
        nargs=2,
        type=float,
        metavar=("BEGIN", "END"),
        help="of guided requests: the steps with guidance, as shares of all; default: not sent",
    )
    command.add_argument(
        "--returning", type=float, metavar="SHARE", help="of requests whose profile was seen before; else it is new"
    )
    for name in ("profile", "reference"):
        default = getattr(LoadSettings, name)
        help_text = "several are used in turn; default: a rendered head"
        command.add_argument(f"--{name}", nargs="+", type=Path, default=default, metavar="FILE", help=help_text)


class _MixAction(argparse.Action):
    """Keeps a number, or a mix of several with weights."""

    def __init__(self, option_strings: list[str], dest: str, kind: type[int] | type[float] = int, **more: Any) -> None:
        """Take the numbers' type beside what any action takes."""
        super().__init__(option_strings, dest, **more)
        self._kind = kind

    def __call__(self, parser: argparse.ArgumentParser, namespace: Any, values: Any, option: Any = None) -> None:
        """Read ``N[:WEIGHT]``, once or more."""
        setattr(namespace, self.dest, self._read(parser, values))

    def _read(self, parser: argparse.ArgumentParser, words: list[str]) -> Any:
        flag = self.option_strings[0]
        try:
            return mixed(flag.removeprefix("--"), [weighted(self._kind, word) for word in words])
        except ValueError:
            parser.error(f"{flag}: {' '.join(words)}, expected N or N:WEIGHT, with weights above 0")
        except InvalidRequest as error:
            parser.error(str(error))


class _StepsAction(_MixAction):
    """Keeps a range, or a mix where a word has a weight."""

    def __call__(self, parser: argparse.ArgumentParser, namespace: Any, values: Any, option: Any = None) -> None:
        """Read ``LOW HIGH``, or ``N:WEIGHT`` twice or more."""
        if len(values) == 2 and not any(":" in word for word in values):
            namespace.steps = tuple(self._read(parser, [word]) for word in values)
        elif isinstance(found := self._read(parser, values), int):
            namespace.steps = found, found
        else:
            namespace.steps_mix = found


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
        ("--rounds", "rounds", int, "with --beside: runs of perf_analyzer, each between two of ours"),
    )
    command.add_argument("--beside", action="store_true", help="measure with our closed loop too, in turn")
    _add_head_arguments(command)
    add_output_arguments(command)


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
    add_output_arguments(command)


def _add_loop_arguments(command: argparse.ArgumentParser) -> None:
    _add_simulation_arguments(command, LoopSettings)
    _add_numbers(
        command,
        LoopSettings,
        ("--slots", "slots", int, "rows of the batch"),
        ("--guidance", "guidance_scale", float, "guidance_scale of every request; more than 1 takes two slots"),
        ("--seconds", "seconds", float, "how long it is measured"),
    )
    add_output_arguments(command)


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
    add_output_arguments(command)


def _add_latency_arguments(command: argparse.ArgumentParser) -> None:
    command.add_argument("--export", type=Path, required=True, metavar="DIR", help="written by python -m export")
    command.add_argument(
        "--checkpoint",
        type=Path,
        default=LatencySettings.checkpoint,
        metavar="DIR",
        help="weights that the export is of (default: checkpoints/demo-128)",
    )
    command.add_argument(
        "--runtime",
        choices=CPU_RUNTIMES,
        default=LatencySettings.runtime,
        help="runtime that is served (default: %(default)s)",
    )
    for flag, known, meaning in (
        ("--runtimes", CPU_RUNTIMES, "runtimes whose engines are measured alone"),
        ("--rungs", RUNGS, "ways to make a portrait, measured side by side"),
    ):
        help_text = f"{meaning} (default: {' '.join(known)})"
        command.add_argument(flag, nargs="+", choices=known, default=known, metavar="NAME", help=help_text)
    _add_numbers(
        command,
        LatencySettings,
        ("--steps", "num_inference_steps", int, "of the ladder's requests"),
        ("--guidance", "guidance_scale", float, "of the ladder's requests"),
        ("--rounds", "rounds", int, f"requests of each rung, {LEAST_ROUNDS} or more"),
        ("--seconds", "seconds", float, "for one engine at one batch size, and for each limit of the gateway"),
        ("--seed", "seed", int, "of the noise that makes every picture new"),
    )
    _add_head_arguments(command)
    command.add_argument("--out", type=Path, metavar="FILE", help="write the figures as JSON here too")
    command.add_argument(
        "--compare-with",
        type=Path,
        nargs="+",
        default=(),
        metavar="FILE",
        help="latency.json of other runs; a loss against the first that was measured on such a machine is an error",
    )
    add_output_arguments(command, has_page=True)


def _add_devices_arguments(command: argparse.ArgumentParser) -> None:
    _add_numbers(
        command,
        DevicesSettings,
        ("--devices", "devices", int, "devices beside one alone"),
        ("--slower", "slower", float, "factor on the engines' times, so that this machine's cores are not the limit"),
        ("--rate", "rate_per_s", float, "requests a second for each device"),
        ("--duration", "duration_s", float, "seconds of a round of several devices"),
        ("--rounds", "rounds", int, "each has one device and several; 0 measures CPU time alone"),
        ("--cost-s", "cost_s", float, "seconds of a measurement of CPU time"),
        ("--seed", "seed", int, "the same seed, the same requests"),
    )
    command.add_argument("--profile", default=DevicesSettings.profile, metavar="NAME", help="default: %(default)s")
    add_output_arguments(command)


def _add_faces_arguments(command: argparse.ArgumentParser) -> None:
    _add_numbers(
        command,
        FacesSettings,
        ("--heads", "heads", int, "rendered people in each view"),
        ("--seed", "seed", int, "of the people"),
    )
    help_text = "more pictures that show no face; default: those made here alone"
    command.add_argument("--without-faces", type=Path, metavar="DIR", help=help_text)
    add_output_arguments(command)


def _add_simulation_arguments(
    command: argparse.ArgumentParser, settings: type[CompareSettings] | type[LoopSettings]
) -> None:
    command.add_argument("--export", type=Path, required=True, metavar="DIR", help="written by python -m export")
    help_text = f"what engines take (default: {settings.latency_table.name})"
    command.add_argument("--latency-table", type=Path, default=settings.latency_table, metavar="FILE", help=help_text)


def _add_numbers(
    command: argparse.ArgumentParser, settings: type[object], *numbers: tuple[str, str, type[int] | type[float], str]
) -> None:
    """Add options of a number each: the flag, its name in the settings (which have the default), type and meaning."""
    for flag, name, kind, meaning in numbers:
        default = getattr(settings, name)
        help_text = f"{meaning} (default: {default:g})"
        command.add_argument(flag, dest=name, type=kind, default=default, metavar="N", help=help_text)


def _add_head_arguments(command: argparse.ArgumentParser) -> None:
    for name in ("profile", "reference"):
        head = HEADS / f"{name}.png"
        command.add_argument(f"--{name}", type=Path, default=head, metavar="FILE", help="default: a rendered head")


def _load(settings: LoadSettings, output: Output) -> int:
    from benchmarks.load import run_load
    from benchmarks.pages.load import load_sections
    from benchmarks.report import summarise, table

    run = run_load(settings, show_progress=True)
    report = summarise(run)
    output.show(report, table, f"Load on {settings.url}", lambda report: load_sections(report, run))
    if settings.hdr is not None:
        from benchmarks.hdr import write_log

        write_log(run, settings.hdr)
    return _INTERRUPTED if run.interrupted_s is not None else _validity(report["fell_behind"])


def _validity(fell_behind: bool) -> int:
    """Return the exit status of a run, and say where it is invalid."""
    if fell_behind:
        print("error: the run is invalid: requests left late by more than 1 % of the median latency", file=sys.stderr)
    return int(fell_behind)


def _search_settings(**fields: Any) -> SearchSettings:
    own = {name: fields.pop(name) for name in ("p99_ms", "goodput", "longest_s", "probes")}
    return SearchSettings(load=LoadSettings(**fields), **own)


def _search(settings: SearchSettings, output: Output) -> int:
    from benchmarks.pages.load import search_sections
    from benchmarks.search import run_search, table

    report = run_search(settings, lambda line: print(line, file=sys.stderr, flush=True))
    output.show(report, table, f"Search on {settings.load.url}", search_sections)
    if report["contradictory"]:
        print("error: the search is invalid: a rate surely missed more than a higher one", file=sys.stderr)
        return 1
    return _validity(any(probe["fell_behind"] for probe in report["probes"]))


def _merge(settings: MergeSettings, output: Output) -> int:
    from benchmarks.hdr import merge, table

    output.show(merge(settings.logs), table)
    return 0


def _coverage(settings: CoverageSettings, output: Output) -> int:
    from benchmarks.coverage import run_coverage, table

    output.show(run_coverage(settings), table)
    return 0


def _compare(settings: CompareSettings, output: Output) -> int:
    from benchmarks.compare import compare
    from benchmarks.compare_report import table

    output.show(compare(settings, lambda line: print(line, file=sys.stderr, flush=True)), table)
    return 0


def _loop(settings: LoopSettings, output: Output) -> int:
    from benchmarks.loop import run_loop, table

    output.show(run_loop(settings), table)
    return 0


def _pairs(settings: PairsSettings, output: Output) -> int:
    from benchmarks.pairs import run_pairs, table

    output.show(run_pairs(settings), table)
    return 0


def _latency(settings: LatencySettings, output: Output) -> int:
    from benchmarks import regressions
    from benchmarks.latency_run import measure_latency, table
    from benchmarks.pages.latency import latency_sections

    before = [regressions.read_run(path) for path in settings.compare_with]
    report = measure_latency(settings, lambda line: print(line, file=sys.stderr, flush=True))
    conditions = report["conditions"]
    title = f"Latency of {conditions['preset']}, {conditions['precision']}, {conditions['model_version']}"
    output.show(report, table, title, latency_sections)
    if settings.out:
        settings.out.parent.mkdir(parents=True, exist_ok=True)
        settings.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    if not before:
        return 0
    ratios = regressions.compared_with_any(before, report)
    print(f"\n{regressions.table(ratios)}", file=sys.stderr if output.as_json else sys.stdout)
    if lost := [each.name for each in ratios if each.is_lost]:
        raise IcPortraitError(f"slower by more than {regressions.MOST_LOSS:.0%}: {', '.join(lost)}")
    return 0


def _devices(settings: DevicesSettings, output: Output) -> int:
    from benchmarks.devices import measure, table

    report = measure(settings, lambda line: print(line, file=sys.stderr, flush=True))
    output.show(report, table)
    return _validity(any(found["fell_behind"] for found in report["devices"].values()))


def _faces(settings: FacesSettings, output: Output) -> int:
    from benchmarks.faces import run_faces, table

    output.show(run_faces(settings), table)
    return 0


def _perf_analyzer(settings: PerfAnalyzerSettings, output: Output) -> int:
    if settings.beside:
        return _beside(settings, output)
    from benchmarks.perf_analyzer import measure, table
    from benchmarks.perf_analyzer_program import PerfAnalyzerError

    report = measure(settings, echo=sys.stderr if output.as_json else sys.stdout)
    output.show(report, lambda report: f"\n{table(report)}")
    if report["unstable_at"] is None:
        return 0
    raise PerfAnalyzerError(
        f"windows of {settings.window_s:g} s never agreed within {settings.stability_percent:g} % at concurrency"
        f" {report['unstable_at']}; ask for longer ones with --window or for less with --stability"
    )


def _beside(settings: PerfAnalyzerSettings, output: Output) -> int:
    from benchmarks.beside import measure_both, table

    report = measure_both(settings, echo=sys.stderr if output.as_json else sys.stdout)
    output.show(report, lambda report: f"\n{table(report)}")
    return int(not report["agree"])


if __name__ == "__main__":
    sys.exit(main())
