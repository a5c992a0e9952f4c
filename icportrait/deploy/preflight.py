"""The checks before tritonserver is started. Each refuses, in one line, a repository that can't run here.

The manifests of graphs and plans are the authority. No table here says which container release brings which TensorRT:
the library that the server would load is asked for its version.
"""

from __future__ import annotations

import ctypes
import ctypes.util
import dataclasses
import functools
import multiprocessing
import os
import shutil
from collections.abc import Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from icportrait.deploy.installation import Installation
from icportrait.deploy.leftovers import SHM
from icportrait.deploy.machine_memory import room
from icportrait.deploy.memory import fit, shared_memory, summary
from icportrait.deploy.repository import ENGINE_OWNERS, TRITON_PLAN_NAME
from icportrait.errors import CheckpointError, NotEnoughMemory, PlanError, RuntimeNotAvailable
from icportrait.manifest import MANIFEST_NAME, Manifest
from icportrait.policy import CPU_RUNTIMES, PLAN_RUNTIMES, ServingPolicy
from icportrait.runtime import cuda
from icportrait.runtime.cuda import Gpu
from icportrait.runtime.latency_table import LATENCY_TABLE_NAME, LatencyTable
from icportrait.runtime.load import keeps_compiled
from icportrait.runtime.tensorrt.plans import PlanHost, PlanManifest, check_content, check_host, find_plans
from icportrait.runtime.tensorrt.products import FLAVOURS, TENSORRT


def repository_policy(repository: Path, overrides: Mapping[str, str] = {}) -> ServingPolicy:
    """Read the policy that a repository was assembled with from the configuration that Triton reads too.

    Args:
        repository: the model repository.
        overrides: parameters that go before its own.
    """
    from google.protobuf import text_format
    from tritonclient.grpc import model_config_pb2 as pb

    try:
        config = text_format.Parse((repository / "denoise" / "config.pbtxt").read_text(), pb.ModelConfig())
    except (
        OSError,
        UnicodeDecodeError,
        text_format.ParseError,
    ):  # no repository of ours: Triton says what it makes of it
        return ServingPolicy.from_parameters(overrides)
    own = {key: value.string_value for key, value in config.parameters.items()}
    return ServingPolicy.from_parameters(own | dict(overrides))


def simulation_note(repository: Path) -> str:
    """Return the note that a user must read about a simulated server's figures; empty where engines really run.

    Raises:
        LatencyTableError: the repository's latency table is missing or wrong.
    """
    if not repository_policy(repository).is_simulated:
        return ""
    table = LatencyTable.read(repository / "denoise" / "1" / LATENCY_TABLE_NAME)
    return f"SIMULATED engines: their times are a table's for {table.device}, and pictures show nothing"


def fit_memory(repository: Path, policy: ServingPolicy, engines: int = 1) -> tuple[ServingPolicy, str]:
    """Return the policy that fits into this machine's memory, and a line that says so where engines run on a CPU.

    Args:
        repository: the model repository; its manifest says what engines need.
        policy: the one that it was assembled with.
        engines: number of engines that are to share the memory.

    Raises:
        NotEnoughMemory: see ``memory.fit``.
    """
    try:
        manifest = Manifest.read(repository / "denoise" / "1")
    except CheckpointError:  # no repository of ours: Triton says what it makes of it
        return policy, ""
    here = room()
    if engines > 1:
        share = f"each of {engines} engines on {here.owner}"
        here = dataclasses.replace(here, free_bytes=here.free_bytes // engines, owner=share)
    fitted, found = fit(manifest, policy, here, keeps_compiled(repository, manifest))
    return fitted, summary(fitted, found, here) if manifest.memory else ""


def check_shared_memory(repository: Path, policy: ServingPolicy, engines: int = 1) -> None:
    """Compare what the models' processes share with Triton at most with what /dev/shm has room for.

    Args:
        repository: the model repository.
        policy: how it is to be served.
        engines: number of engines that are to share it.

    Raises:
        NotEnoughMemory: there is less.
    """
    try:
        manifest = Manifest.read(repository / "denoise" / "1")
    except CheckpointError:  # no repository of ours: Triton says what it makes of it
        return
    needed, free = engines * shared_memory(manifest, policy), shutil.disk_usage(SHM).free
    if free < needed:
        raise NotEnoughMemory(
            f"{SHM} has {free / 2**20:.0f} MB left, and the models' processes share up to {needed / 2**20:.0f} MB with "
            "tritonserver there; remove what others have left in it, or allow it more: of a container with --shm-size"
        )


def check_graphs(repository: Path, policy: ServingPolicy) -> None:
    """Compare the graphs that a CPU's runtime would load with the exported ones, because a damaged graph may load.

    Args:
        repository: the model repository.
        policy: how it is to be served.

    Raises:
        CheckpointError: a graph is missing or was changed, or a manifest can't be read.
    """
    if policy.runtime not in CPU_RUNTIMES or not (repository / "denoise" / "1" / MANIFEST_NAME).is_file():
        return  # no repository of ours: Triton says what it makes of it
    for engine, model in ENGINE_OWNERS.items():
        folder = repository / model / "1"
        manifest = Manifest.read(folder)
        present = [path for path in manifest.files(engine, folder) if path.is_file()]
        stats = [(str(path), path.stat()) for path in present]
        _check_graph(engine, folder, manifest.engines[engine], *((name, s.st_mtime_ns, s.st_size) for name, s in stats))


@functools.cache
def _check_graph(engine: str, folder: Path, *_: object) -> None:
    """Check an engine's files; files that haven't changed since aren't read again when Triton is started again."""
    Manifest.read(folder).check_files(engine, folder)


def check_plans(repository: Path, runtime: str, installation: Installation, device: str | None = None) -> None:
    """Compare a repository's plans with what is here. A repository without plans needs nothing.

    Args:
        repository: the model repository.
        runtime: the one that it was assembled for.
        installation: the tritonserver that is to be started on it.
        device: the GPU, by number or UUID; None is the one that CUDA finds first.

    Raises:
        RuntimeNotAvailable: there is no GPU, the server has no TensorRT backend, or a product isn't installed.
        PlanError: a plan is missing or was changed, or was built for another TensorRT, contract or GPU than would load
            it.
    """
    if runtime == "torch":
        _check_precision(repository, device)
    if runtime not in PLAN_RUNTIMES:
        return
    try:
        gpu = find_gpu(device)
    except RuntimeNotAvailable as error:
        raise RuntimeNotAvailable(f"{repository}: was assembled for {runtime}, and {error}") from error
    export = Manifest.read(repository / "denoise" / "1")
    for plan in _plans(repository):
        manifest = PlanManifest.read(plan)
        if plan.name != TRITON_PLAN_NAME:
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
        host = PlanHost(runtime, manifest.tensorrt_version, export.contract_hash, gpu.compute_capability, gpu.name)
        check_host(plan, manifest, host)
        check_content(plan, manifest)


def _check_precision(repository: Path, device: str | None) -> None:
    """Refuse an export for torch that needs a GPU where there is none."""
    manifest = Manifest.read(repository / "denoise" / "1")
    if manifest.precision == "fp32":
        return
    try:
        find_gpu(device)
    except RuntimeNotAvailable as error:
        raise RuntimeNotAvailable(
            f"{repository}: is {manifest.precision}, which torch computes on a GPU only, and {error}; export with "
            "--precision fp32"
        ) from error


def _plans(repository: Path) -> Iterator[Path]:
    """Yield every plan that a repository must have. Our runner finds a Python model's plans, Triton the others."""
    for engine, model in ENGINE_OWNERS.items():
        folder = repository / model / "1"
        if (folder / "model.py").is_file():
            yield from find_plans(folder, engine)
        else:
            yield folder / TRITON_PLAN_NAME


def find_gpu(device: str | None = None) -> Gpu:
    """Run ``cuda.find_gpu`` in a process that ends, because CUDA, once asked, keeps GPU memory and survives no fork.

    Args:
        device: the only GPU that the process sees; None shows it all.
    """
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, spawn, _show_only, (device,)) as process:
        return process.submit(cuda.find_gpu).result()


def _show_only(device: str | None) -> None:
    os.environ.update(cuda.only_visible(device))


def backend_version(installation: Installation, wanted: str) -> str:
    """Return the version of the TensorRT that Triton's own backend loads, such as 11.4.0. Asking for it needs no GPU.

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
