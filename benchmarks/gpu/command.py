"""The command line of ``python -m benchmarks gpu-probe``."""

from __future__ import annotations

import argparse
import importlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from icportrait_client.errors import InvalidRequest

from benchmarks.output import Output, add_output_arguments
from icportrait.policy import PLAN_RUNTIMES

PROBES = {
    "facts": "the GPU, its driver, the libraries, and the runtime that would serve",
    "copies": "what a step and a join copy: pinned and pageable memory, one call and many",
    "capture": "each batch with and without its CUDA graph: recorded, as fast, the same bytes?",
    "steps": "the latency table of all four engines, as benchmarks/latency has them",
    "loop": "the denoising loop on this GPU, kept full: the time outside of the engine",
    "share": "steps beside another process that decodes: how much later are they?",
}
"""The probes in the order of a first session."""
RUNTIMES = ("torch", *PLAN_RUNTIMES)


@dataclass(frozen=True)
class GpuProbeSettings:
    """One probe."""

    probe: str
    export: Path = Path("build/export/sd15-512-fp16-opset23")
    """Of it ``torch`` reads the manifest alone."""
    runtime: str = "torch"
    plans: Path | None = None
    """Folder of the plans; None with ``torch``."""
    seconds: float = 10.0
    """For each state that ``loop`` and ``share`` measure."""
    out: Path | None = None
    """File for the figures as JSON; of ``steps`` the latency table."""
    seed: int = 0

    def __post_init__(self) -> None:
        """Check the values.

        Raises:
            InvalidRequest: names the value, what came and what was expected.
        """
        if not 0 < self.seconds <= 60:
            raise InvalidRequest(f"seconds: {self.seconds:g}, expected a number above 0, up to 60")
        if (self.plans is None) != (self.runtime == "torch"):
            expected = "none with torch" if self.plans else "the folder of the plans"
            raise InvalidRequest(f"plans: {self.plans}, expected {expected}")


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
