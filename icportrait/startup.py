"""What is refused before tritonserver is started, each with one line: a repository of plans that can't run here.

The plans' manifests are the authority. Which container release brings which TensorRT is nowhere written down here: the
library that the server would load is asked for its version.
"""

from __future__ import annotations

import ctypes
import ctypes.util
from pathlib import Path

from icportrait.errors import PlanError, RuntimeNotAvailable
from icportrait.installation import Installation
from icportrait.policy import PLAN_RUNTIMES, ServingPolicy
from icportrait.runtime.cuda import find_gpu
from icportrait.runtime.flavours import FLAVOURS, TENSORRT
from icportrait.runtime.plans import PlanManifest, check_content


def repository_runtime(repository: Path) -> str:
    """The runtime that a repository was assembled for, as its configuration says; Triton reads the same file."""
    from google.protobuf import text_format
    from tritonclient.grpc import model_config_pb2 as pb

    try:
        config = text_format.Parse((repository / "denoise" / "config.pbtxt").read_text(), pb.ModelConfig())
    except (OSError, text_format.ParseError):  # no repository of ours: Triton says what it makes of it
        return ServingPolicy.runtime
    return str(config.parameters["runtime"].string_value)


def check_plans(repository: Path, runtime: str, installation: Installation) -> None:
    """Compare a repository's plans with what is here. A repository without plans needs nothing.

    Args:
        repository: the model repository.
        runtime: the one that it was assembled for.
        installation: the tritonserver that is to be started on it.

    Raises:
        RuntimeNotAvailable: there is no GPU, the server has no TensorRT backend, or a product isn't installed.
        PlanError: a plan was built by another TensorRT than the one that would load it, or was changed.
    """
    if runtime not in PLAN_RUNTIMES:
        return
    try:
        find_gpu()
    except RuntimeNotAvailable as error:
        raise RuntimeNotAvailable(f"{repository}: was assembled for {runtime}, and {error}") from error
    plans = {plan: PlanManifest.read(plan) for plan in sorted(repository.glob("*/1/*.plan"))}
    for plan, manifest in plans.items():
        # A Python model lies beside the plans that our runner loads.
        if (plan.parent / "model.py").is_file():
            found, built_by, where = FLAVOURS[runtime].version(), manifest.tensorrt_version, "the Python package here"
            way_out = f"install {built_by}"
        else:
            release = ".".join(manifest.tensorrt_version.split(".")[:3])
            found, built_by, where = backend_version(installation, release), release, str(installation.binary)
            way_out = f"use the container release whose TRT_VERSION is {release}"
        if found != built_by:
            raise PlanError(
                f"{plan}: was built by {manifest.flavour} {manifest.tensorrt_version}, and {where} has {found}; "
                f"{way_out}, or build the plans with {found}"
            )
        check_content(plan, manifest)


def backend_version(installation: Installation, wanted: str) -> str:
    """The version of the TensorRT that Triton's own backend loads, such as 11.4.0. Asking for it needs no GPU.

    Args:
        installation: the tritonserver.
        wanted: the version that is needed, for the errors' text.

    Raises:
        RuntimeNotAvailable: the server has no TensorRT backend, or TensorRT's library can't be loaded.
    """
    container = f"NVIDIA's container nvcr.io/nvidia/tritonserver:YY.MM-py3 of the release whose TRT_VERSION is {wanted}"
    if not (installation.tensorrt_backend / "libtriton_tensorrt.so").is_file():
        raise RuntimeNotAvailable(
            f"{installation.binary} has no TensorRT backend, which runtime {TENSORRT.name} needs; run this in "
            f"{container}, or assemble for tensorrt-rtx"
        )
    beside = sorted(installation.tensorrt_backend.glob("libnvinfer.so.*"))
    library = str(beside[0]) if beside else ctypes.util.find_library("nvinfer")
    try:
        if library is None:
            raise OSError("no libnvinfer.so is installed")
        # major * 10000 + minor * 100 + patch, since TensorRT 10
        version = int(ctypes.CDLL(library).getInferLibVersion())
    except (OSError, AttributeError) as error:
        raise RuntimeNotAvailable(
            f"{installation.binary}: its TensorRT can't be loaded ({error}); use {container}"
        ) from error
    return f"{version // 10000}.{version // 100 % 100}.{version % 100}"
