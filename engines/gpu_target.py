"""The choice of the GPUs that a plan is built for."""

from __future__ import annotations

from dataclasses import dataclass

from icportrait.errors import RuntimeNotAvailable
from icportrait.runtime.cuda import Gpu, find_gpu
from icportrait.runtime.tensorrt.products import TENSORRT, TENSORRT_RTX, Flavour


@dataclass(frozen=True)
class GpuTarget:
    """The GPUs that a plan is built for."""

    compute_capabilities: tuple[str, ...]
    gpu_name: str = ""
    """The model of this machine's GPU, which a plan that is built on it belongs to; empty for one compiled ahead of
    time."""


def gpu_target(flavour: Flavour, asked: tuple[str, ...]) -> GpuTarget:
    """Choose the GPUs that a product can build for, among the ones that are asked for.

    Args:
        flavour: the product. One that doesn't compile ahead of time builds for this machine's GPU, whatever is asked.
        asked: compute capabilities such as 8.9.

    Raises:
        RuntimeNotAvailable: the product or the GPU that this needs isn't here, or the product has no kernels for a
            capability; the text says what is missing, and what to use instead.
    """
    if not flavour.compiles_without_gpu:
        gpu = _gpu_for(flavour)
        return GpuTarget((gpu.compute_capability,), gpu.name)
    if unsupported := [capability for capability in asked if not flavour.supports(capability)]:
        raise RuntimeNotAvailable(no_kernels(flavour, unsupported[0]))
    return GpuTarget(asked)


def no_kernels(flavour: Flavour, capability: str) -> str:
    """Say that a product can't run on GPUs of a compute capability, and what can."""
    data_centre = " (H100, H200)" if capability == "9.0" else ""
    return (
        f"{flavour.name} has no kernels for compute capability {capability}{data_centre}; on such a GPU use --target "
        f"{TENSORRT.name}, or serve with RUNTIME=torch, which needs no plans"
    )


def _gpu_for(flavour: Flavour) -> Gpu:
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
    return find_gpu()
