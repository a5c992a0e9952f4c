"""The settings of a probe. The module imports nothing heavy, because the command line takes its defaults from it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from icportrait_client.errors import InvalidRequest

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
    """The engines' export; ``torch`` reads its manifest alone."""
    runtime: str = "torch"
    plans: Path | None = None
    """Folder of the plans; None with ``torch``."""
    seconds: float = 10.0
    """The time of each state that ``loop`` and ``share`` measure."""
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
