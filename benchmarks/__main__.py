"""Measure a running server: ``python -m benchmarks load``."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from icportrait_client.errors import InvalidRequest, PortraitError

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
    _add_load_arguments(load)
    args = parser.parse_args(argv)
    as_json = args.json
    fields = {name: value for name, value in vars(args).items() if name not in ("command", "json")}
    try:
        settings = LoadSettings(**{**fields, "steps": tuple(args.steps)})
    except InvalidRequest as error:
        load.error(str(error))
    try:
        return _load(settings, as_json)
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
    for name in ("profile", "reference"):
        load.add_argument(
            f"--{name}", type=Path, default=getattr(LoadSettings, name), metavar="FILE", help="default: a rendered head"
        )
    load.add_argument("--seed", type=int, default=LoadSettings.seed, help=f"the same seed, the same requests {shown}")
    load.add_argument("--json", action="store_true", help="print the figures and their conditions as JSON")


def _load(settings: LoadSettings, as_json: bool) -> int:
    from benchmarks.load import run_load
    from benchmarks.report import summarise, table

    run = run_load(settings, show_progress=True)
    report = summarise(run)
    print(json.dumps(report, indent=2) if as_json else table(report))
    return 0 if run.interrupted_s is None else _INTERRUPTED


if __name__ == "__main__":
    sys.exit(main())
