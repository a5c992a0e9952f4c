"""ONNX to TensorRT plans with their manifests."""

from __future__ import annotations

import hashlib
import os
import resource
import signal
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from engines.build_config import BuildConfig, Profile
from engines.gpu_target import GpuTarget, gpu_target
from engines.inspection import inspect, table
from engines.network import ParsedNetwork, parse
from icportrait.contract import ModelSpec
from icportrait.errors import PlanError, VerificationError
from icportrait.manifest import Manifest
from icportrait.runtime.flavours import TENSORRT_RTX, Flavour
from icportrait.runtime.plans import PlanManifest, PlanTensor

LEAST_SHARE = 0.95
"""Of the convolutions' and linears' multiply-adds that are in the precision that was asked for."""


def build_engine(
    flavour: Flavour,
    onnx_directory: Path,
    manifest: Manifest,
    spec: ModelSpec,
    config: BuildConfig,
    out: Path,
    *,
    allow_mixed: bool = False,
) -> list[PlanManifest]:
    """Build one engine's plans into ``out``, each with its manifest, and print what the parser made of the graph.

    Args:
        flavour: the product that builds.
        onnx_directory: the export that ``manifest`` is of.
        manifest: the export's manifest.
        spec: the engine.
        config: what to build.
        out: directory for the plans, made where it is missing.
        allow_mixed: also build graphs that do much of their arithmetic in other types than the export's precision.

    Raises:
        CheckpointError: the graph isn't the one that its manifest names.
        PlanError: TensorRT couldn't build it.
        RuntimeNotAvailable: the product isn't installed, or needs a GPU that isn't here.
        VerificationError: TensorRT can't parse the graph, or its arithmetic isn't in the export's precision.
    """
    target = gpu_target(flavour, config.compute_capabilities)
    manifest.check_files(spec.name, onnx_directory)
    onnx = manifest.files(spec.name, onnx_directory)[0]
    found = inspect(parsed := parse(flavour, onnx))
    print(table(spec.name, found, parsed.warnings), flush=True)
    share = found.share(manifest.precision)
    if share < LEAST_SHARE and not allow_mixed:
        raise VerificationError(
            f"{onnx}: {100 * share:.1f} % of the convolutions' and linears' multiply-adds are {manifest.precision}, "
            f"expected {100 * LEAST_SHARE:.0f} % or more; export again, or allow it with --allow-mixed"
        )
    del parsed
    out.mkdir(parents=True, exist_ok=True)
    return [
        _build_plan(flavour, target, onnx, manifest, spec, config, profiles, out / name)
        for name, profiles in config.plans(spec).items()
    ]


def _build_plan(
    flavour: Flavour,
    target: GpuTarget,
    onnx: Path,
    manifest: Manifest,
    spec: ModelSpec,
    config: BuildConfig,
    profiles: list[Profile],
    plan: Path,
) -> PlanManifest:
    started = time.perf_counter()
    parsed = parse(flavour, onnx)
    with _monitor(flavour, plan.name) as monitor:
        serialized = _serialize(flavour, target, parsed, config, profiles, monitor)
    if serialized is None:
        reasons = "; ".join(parsed.warnings) or "it says nothing"
        raise PlanError(f"{onnx}: TensorRT couldn't build {plan.name}: {reasons}")
    # A plan without its manifest is never loaded, so neither half of an interrupted build is taken for a whole one.
    PlanManifest.path(plan).unlink(missing_ok=True)
    plan.write_bytes(serialized)
    network = parsed.network
    tensors = [
        PlanTensor(tensor.name, is_input, tensor.dtype.name, tuple(tensor.shape))
        for is_input, count, get in (
            (True, network.num_inputs, network.get_input),
            (False, network.num_outputs, network.get_output),
        )
        for tensor in map(get, range(count))
    ]
    built = PlanManifest(
        engine=spec.name,
        preset=manifest.preset.name,
        precision=manifest.precision,
        flavour=flavour.name,
        tensorrt_version=flavour.version(),
        compute_capabilities=target.compute_capabilities,
        profiles=tuple(profiles),
        tensors=tuple(tensors),
        contract_hash=manifest.contract_hash,
        onnx_sha256=manifest.engines[spec.name].sha256,
        plan_sha256=hashlib.sha256(serialized).hexdigest(),
        plan_bytes=plan.stat().st_size,
        build_seconds=round(time.perf_counter() - started, 3),
        peak_memory_bytes=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    )
    built.write(plan)
    return built


def _serialize(
    flavour: Flavour,
    target: GpuTarget,
    parsed: ParsedNetwork,
    config: BuildConfig,
    profiles: list[Profile],
    monitor: Any,
) -> Any:
    """The plan's bytes, or None where TensorRT gave up."""
    if TYPE_CHECKING:
        import tensorrt as trt
    else:
        trt = flavour.load()
    # Polygraphy chooses the product when it is imported; a process builds for one.
    os.environ["POLYGRAPHY_USE_TENSORRT_RTX"] = str(int(flavour is TENSORRT_RTX))
    from polygraphy.backend.tensorrt_rtx import CreateConfigRTX
    from polygraphy.backend.trt import CreateConfig, engine_bytes_from_network
    from polygraphy.backend.trt import Profile as PolygraphyProfile
    from polygraphy.exception import PolygraphyException
    from polygraphy.logger import G_LOGGER

    G_LOGGER.module_severity = G_LOGGER.CRITICAL + 1
    cache = str(config.timing_cache) if config.timing_cache else None
    settings: dict[str, Any] = {
        "profiles": [PolygraphyProfile() for _ in profiles],
        "builder_optimization_level": config.optimization_level,
        "load_timing_cache": cache if config.timing_cache and config.timing_cache.is_file() else None,
        "progress_monitor": monitor,
    }
    for profile, shapes in zip(settings["profiles"], profiles, strict=True):
        for name, (smallest, best, largest) in shapes.items():
            profile.add(name, smallest, best, largest)
    if config.workspace_bytes is not None:
        settings["memory_pool_limits"] = {trt.MemoryPoolType.WORKSPACE: config.workspace_bytes}
    if flavour is not TENSORRT_RTX:
        create = CreateConfig(**settings)
    elif target.is_current_gpu:
        create = CreateConfigRTX(use_gpu=True, **settings)
    else:
        capabilities = [tuple(map(int, capability.split("."))) for capability in target.compute_capabilities]
        create = CreateConfigRTX(compute_capabilities=capabilities, **settings)

    def configured(*network: Any) -> Any:
        made = create(*network)
        if flavour is TENSORRT_RTX:  # which else may allocate while a CUDA graph is captured
            made.set_flag(flavour.load().BuilderFlag.REQUIRE_USER_ALLOCATION)
        return made

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # Polygraphy always sets a timing cache
            return engine_bytes_from_network(
                (parsed.builder, parsed.network, parsed.parser), config=configured, save_timing_cache=cache
            )
    except PolygraphyException as error:
        if monitor.stopped:
            raise KeyboardInterrupt from error
        return None


@contextmanager
def _monitor(flavour: Flavour, title: str) -> Iterator[Any]:
    """TensorRT's progress as a bar. An interrupt stops the build at its next step: Python can't raise through it."""
    if TYPE_CHECKING:
        import tensorrt as trt
    else:
        trt = flavour.load()

    class Monitor(trt.IProgressMonitor):
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self.stopped = False
            self.steps: dict[str, int] = {}

        def phase_start(self, phase: str, parent: str | None, steps: int) -> None:
            self.steps[phase] = steps
            bar.total += steps
            bar.set_postfix_str(phase.lower(), refresh=False)
            bar.refresh()

        def step_complete(self, phase: str, step: int) -> bool:
            if self.steps.get(phase, 0):
                self.steps[phase] -= 1
                bar.update()
            return not self.stopped

        def phase_finish(self, phase: str) -> None:
            bar.update(self.steps.pop(phase, 0))

    monitor = Monitor()

    def stop(*_: object) -> None:
        monitor.stopped = True

    before = signal.signal(signal.SIGINT, stop)
    try:
        with tqdm(total=0, desc=title, unit="step") as bar:
            yield monitor
    finally:
        signal.signal(signal.SIGINT, before)
