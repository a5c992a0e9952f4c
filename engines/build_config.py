"""What a build is asked for: the builder's options, and which batches the plans are made for."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from icportrait.contract import ModelSpec
from icportrait.errors import PlanError
from icportrait.runtime.plans import Shape

Profile = dict[str, tuple[Shape, Shape, Shape]]
LAYOUTS = ("profiles", "dynamic", "static")
BUCKETS = (1, 2, 4, 8, 16)
COMPUTE_CAPABILITIES = ("8.0", "8.6", "8.9", "12.0")


@dataclass(frozen=True)
class BuildConfig:
    """The options of one build."""

    layout: str = "profiles"
    """``profiles``: one plan with an optimization profile per bucket. ``dynamic``: one plan with one profile from the
    smallest batch to the largest. ``static``: a plan per bucket. The reasons are in docs/adr/0005."""
    buckets: tuple[int, ...] = BUCKETS
    """Batches; those that an engine's contract doesn't reach are left out, its largest is always there."""
    compute_capabilities: tuple[str, ...] = COMPUTE_CAPABILITIES
    """For compiling ahead of time: of the GPUs that the plans are to run on."""
    optimization_level: int | None = None
    """0..5; None leaves it to TensorRT."""
    workspace_bytes: int | None = None
    """Largest scratch memory of a kernel; None leaves it to TensorRT."""
    timing_cache: Path | None = None
    """A file that measured kernel times are read from and added to."""

    def __post_init__(self) -> None:
        if wrong := [bucket for bucket in self.buckets if bucket < 1]:
            raise PlanError(f"buckets: {wrong[0]}, expected batches of 1 or more, such as {BUCKETS}")

    def plans(self, spec: ModelSpec) -> dict[str, list[Profile]]:
        """The plan files of one engine, and each one's optimization profiles."""
        if self.layout == "dynamic":
            return {f"{spec.name}.plan": [spec.optimization_profile]}
        buckets = sorted({*(bucket for bucket in self.buckets if bucket <= spec.batch.max), spec.batch.max})
        fixed = {bucket: _fixed(spec, bucket) for bucket in buckets}
        if self.layout == "static":
            return {f"{spec.name}.batch{bucket}.plan": [profile] for bucket, profile in fixed.items()}
        return {f"{spec.name}.plan": list(fixed.values())}


def _fixed(spec: ModelSpec, batch: int) -> Profile:
    shapes = {tensor.name: tensor.shape(batch=batch) for tensor in spec.inputs}
    return {name: (shape, shape, shape) for name, shape in shapes.items()}
