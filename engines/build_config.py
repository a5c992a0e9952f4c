"""The settings of a build: the builder's options, and the batches that the plans are made for."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from icportrait.contract import ModelSpec
from icportrait.errors import PlanError
from icportrait.runtime.device_engine import BUCKETS
from icportrait.runtime.tensorrt.plans import Shape

Profile = dict[str, tuple[Shape, Shape, Shape]]
LAYOUTS = ("profiles", "dynamic", "static")
COMPUTE_CAPABILITIES = ("8.0", "8.6", "8.9", "12.0")
LEAST_CAPABILITIES = {"fp8": (8, 9)}
"""GPUs before Ada have no fp8 arithmetic."""


@dataclass(frozen=True)
class BuildConfig:
    """The options of one build."""

    layout: str = "profiles"
    """``profiles``: one plan with an optimization profile per bucket. ``dynamic``: one plan with one profile from the
    smallest batch to the largest. ``static``: a plan per bucket. The reasons are in docs/adr/0005."""
    buckets: tuple[int, ...] = BUCKETS
    """Batches that plans are made for. Batches beyond an engine's contract are left out; its largest is there."""
    compute_capabilities: tuple[str, ...] | None = None
    """Compute capabilities of the GPUs that the plans are to run on, for compiling ahead of time.

    None takes the ones of ``COMPUTE_CAPABILITIES`` that have the precision's arithmetic.
    """
    optimization_level: int | None = None
    """0..5; None leaves it to TensorRT."""
    workspace_bytes: int | None = None
    """Largest scratch memory of a kernel; None leaves it to TensorRT."""
    timing_cache: Path | None = None
    """A file that measured kernel times are read from and added to."""

    def __post_init__(self) -> None:
        if wrong := [bucket for bucket in self.buckets if bucket < 1]:
            raise PlanError(f"buckets: {wrong[0]}, expected batches of 1 or more, such as {BUCKETS}")
        if self.workspace_bytes is not None and self.workspace_bytes < 1:
            raise PlanError(f"workspace: {self.workspace_bytes} bytes, expected 1 or more")

    def compute_capabilities_for(self, precision: str) -> tuple[str, ...]:
        """Return the GPUs to compile an export in ``precision`` for.

        Raises:
            PlanError: one that was asked for lacks the precision's arithmetic.
        """
        least = LEAST_CAPABILITIES.get(precision, (0, 0))
        asked = self.compute_capabilities or COMPUTE_CAPABILITIES
        fit = tuple(capability for capability in asked if _version(capability) >= least)
        if self.compute_capabilities is not None and fit != asked:
            wrong = next(capability for capability in asked if capability not in fit)
            raise PlanError(
                f"compute capability {wrong}: has no {precision} arithmetic, expected {least[0]}.{least[1]} or newer"
            )
        return fit

    def plans(self, spec: ModelSpec, *, cover_gaps: bool = False) -> dict[str, list[Profile]]:
        """Return the plan files of one engine, and each file's optimization profiles.

        Args:
            spec: the engine.
            cover_gaps: a bucket's profile begins behind the bucket before it. Triton's own backend runs the batch that
                came, and fails it where no profile's range holds it: with fixed shapes a batch of 3 has no place
                between 2 and 4. Our runner fills the bucket up and needs none of it, but runs such a plan too.
        """
        if self.layout == "dynamic":
            return {f"{spec.name}.plan": [spec.optimization_profile]}
        buckets = sorted({*(bucket for bucket in self.buckets if bucket <= spec.batch.max), spec.batch.max})
        smallest = [before + 1 for before in (0, *buckets)] if cover_gaps else buckets
        profiles = {bucket: _profile(spec, low, bucket) for low, bucket in zip(smallest, buckets, strict=False)}
        if self.layout == "static":
            return {f"{spec.name}.batch{bucket}.plan": [profile] for bucket, profile in profiles.items()}
        return {f"{spec.name}.plan": list(profiles.values())}


def _version(capability: str) -> tuple[int, ...]:
    try:
        major, minor = map(int, capability.split("."))
    except ValueError as error:
        raise PlanError(f"compute capability: {capability!r}, expected one such as 8.9") from error
    return major, minor


def _profile(spec: ModelSpec, smallest: int, largest: int) -> Profile:
    """Make a profile of batches from ``smallest`` to ``largest``, with kernels chosen for ``largest``."""
    shapes = {tensor.name: (tensor.shape(batch=smallest), tensor.shape(batch=largest)) for tensor in spec.inputs}
    return {name: (low, high, high) for name, (low, high) in shapes.items()}
