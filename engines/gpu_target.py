"""The choice of the GPUs that a plan is built for."""

from __future__ import annotations

from dataclasses import dataclass

from icportrait.errors import RuntimeNotAvailable
from icportrait.runtime.cuda import find_gpu
from icportrait.runtime.tensorrt.products import TENSORRT_RTX, Flavour


@dataclass(frozen=True)
class GpuTarget:
    """The GPUs that a plan is built for."""

    compute_capabilities: tuple[str, ...]
    is_current_gpu: bool
    """It is built for the GPU of this machine, and not for capabilities by their names."""


def gpu_target(flavour: Flavour, asked: tuple[str, ...]) -> GpuTarget:
    """Choose the GPUs that a product can build for, among the ones that are asked for.

    Args:
        flavour: the product. One that doesn't compile ahead of time builds for this machine's GPU, whatever is asked.
        asked: compute capabilities such as 8.9. One that TensorRT-RTX has no name for is built on a GPU that has it.

    Raises:
        RuntimeNotAvailable: the product or the GPU that this needs isn't here; the text says what is missing.
    """
    if not flavour.compiles_without_gpu:
        return GpuTarget((_gpu_for(flavour),), is_current_gpu=True)
    named = flavour.load().ComputeCapability
    unnamed = [capability for capability in asked if not hasattr(named, f"SM{capability.replace('.', '')}")]
    if not unnamed:
        return GpuTarget(asked, is_current_gpu=False)
    only_there = f"{flavour.name} can't compile for compute capability {unnamed[0]} ahead of time, only on such a GPU"
    if len(asked) > 1:
        raise RuntimeNotAvailable(f"{only_there} and for it alone; leave it out of {', '.join(asked)}")
    try:
        found = find_gpu()
    except RuntimeNotAvailable as error:
        raise RuntimeNotAvailable(f"{only_there}: {error}") from error
    if found.compute_capability != unnamed[0]:
        raise RuntimeNotAvailable(f"{only_there}: {found.name} has {found.compute_capability}")
    return GpuTarget(asked, is_current_gpu=True)


def _gpu_for(flavour: Flavour) -> str:
    missing = []
    for needed in (find_gpu, flavour.load):
        try:
            needed()
        except RuntimeNotAvailable as error:
            missing.append(str(error))
    if missing:
        raise RuntimeNotAvailable(
            f"--target {flavour.name} builds on the GPU that will run the plans: {'; '.join(missing)}; or use --target "
            f"{TENSORRT_RTX.name}, which compiles without one"
        )
    return find_gpu().compute_capability
