"""The command line of ``python -m benchmarks gpu-probe``."""

from __future__ import annotations

import argparse
import importlib
import json
from pathlib import Path
from typing import Any

from benchmarks.gpu.settings import PROBES, RUNTIMES, GpuProbeSettings
from benchmarks.output import Output, add_output_arguments


def add_commands(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the probes' command."""
    command = commands.add_parser("gpu-probe", help="what an NVIDIA GPU does with this server's work: minutes each")
    command.set_defaults(settings=GpuProbeSettings, run=run)
    command.add_argument("probe", choices=PROBES, help="; ".join(f"{name}: {what}" for name, what in PROBES.items()))
    default = GpuProbeSettings("facts")
    command.add_argument(
        "--export", type=Path, default=default.export, metavar="DIR", help="of the engines (default: %(default)s)"
    )
    command.add_argument("--runtime", choices=RUNTIMES, default=default.runtime, help="default: %(default)s")
    command.add_argument("--plans", type=Path, metavar="DIR", help="written by python -m engines build")
    command.add_argument(
        "--seconds",
        type=float,
        default=default.seconds,
        metavar="N",
        help="for each state that loop and share measure (default: %(default)g)",
    )
    command.add_argument("--out", type=Path, metavar="FILE", help="write the figures here too; of steps the table")
    command.add_argument("--seed", type=int, default=default.seed, metavar="N", help="of the inputs")
    add_output_arguments(command)


def run(settings: GpuProbeSettings, output: Output) -> int:
    """Run one probe.

    Raises:
        RuntimeNotAvailable: there is no GPU, or the runtime isn't installed.
    """
    from benchmarks.gpu.engines import conditions

    here = conditions(settings)  # asks for the GPU, before anything heavy is loaded
    module = importlib.import_module(f"benchmarks.gpu.{settings.probe}")
    report: dict[str, Any] = module.probe(settings)
    if settings.probe != "steps":  # whose report is a latency table, conditions in one line
        report |= {"conditions": here}
    output.show(report, module.table)
    if settings.out:
        settings.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    return 0
