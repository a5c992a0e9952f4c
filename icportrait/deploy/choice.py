"""The runtime for this machine: ``python -m icportrait.deploy.choice`` gives it as arguments of make.

TensorRT where its plans can run, else torch where there is a GPU, else the CPU's. The reason is a line on standard
error.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

from icportrait.deploy.installation import find_installation
from icportrait.deploy.preflight import find_gpu
from icportrait.errors import IcPortraitError, RuntimeNotAvailable
from icportrait.policy import cpu_defaults
from icportrait.presets import PRESETS, Preset
from icportrait.runtime.cuda import Gpu
from icportrait.runtime.tensorrt.products import TENSORRT, TENSORRT_RTX, Flavour


def choose(
    preset: Preset,
    gpu: Callable[[], Gpu] = find_gpu,
    torch_has_gpu: Callable[[], bool] | None = None,
    has_backend: Callable[[], bool] | None = None,
) -> tuple[str, str]:
    """Return a runtime, and the reason for it.

    Args:
        preset: to be served.
        gpu: finds the GPU, or raises ``RuntimeNotAvailable``.
        torch_has_gpu: tells whether torch finds it too.
        has_backend: tells whether the tritonserver here has a TensorRT backend.
    """
    try:
        found = gpu()
    except RuntimeNotAvailable as error:
        return str(cpu_defaults(preset, "fp32")["runtime"]), str(error)
    reasons = []
    for flavour in (TENSORRT_RTX, TENSORRT):
        if reason := _missing(flavour, found, has_backend or _has_backend):
            reasons.append(f"{flavour.name}: {reason}")
        else:
            return flavour.name, f"{found.name}, compute capability {found.compute_capability}, runs its plans"
    if (torch_has_gpu or _torch_has_gpu)():
        return "torch", f"{found.name}; {'; '.join(reasons)}"
    reasons.append("torch: it finds no GPU; install a build of torch for CUDA")
    return str(cpu_defaults(preset, "fp32")["runtime"]), f"{found.name}; {'; '.join(reasons)}"


def _missing(flavour: Flavour, gpu: Gpu, has_backend: Callable[[], bool]) -> str:
    """Return the reason for which a product's plans can't run here, or an empty text."""
    try:
        supports = flavour.supports(gpu.compute_capability)
    except RuntimeNotAvailable:
        return "not installed"
    if not supports:
        return f"no kernels for compute capability {gpu.compute_capability}"
    if not flavour.compiles_without_gpu and not has_backend():
        return "the tritonserver here has no backend for it"
    return ""


def _has_backend() -> bool:
    try:
        return (find_installation(TENSORRT.name).tensorrt_backend / "libtriton_tensorrt.so").is_file()
    except RuntimeNotAvailable:
        return False


def _torch_has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m icportrait.deploy.choice", description=__doc__.splitlines()[0])
    parser.add_argument("--preset", choices=PRESETS, required=True)
    parser.add_argument("--precision", help="the one that was asked for")
    parser.add_argument("--out", type=Path, help="file for the arguments; standard output by default")
    args = parser.parse_args(argv)
    try:
        runtime, reason = choose(PRESETS[args.preset])
    except IcPortraitError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"runtime {runtime}: {reason}", file=sys.stderr)
    precision = " PRECISION=fp16" if runtime == "torch" and not args.precision else ""
    chosen = f"RUNTIME={runtime}{precision}"
    if args.out is None:
        print(chosen)
    else:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(chosen + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
