"""ONNX to TensorRT plans with their manifests."""

from __future__ import annotations

import hashlib
import resource
import time
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engines.build_config import BuildConfig, Profile
from engines.fusion import fusion
from engines.gpu_target import GpuTarget, gpu_target
from engines.inspection import Inspection, inspect, table, warning_lines
from engines.network import ParsedNetwork, parse, warnings_that_matter
from engines.polygraphy_setup import prepare_polygraphy
from engines.progress import progress_monitor
from icportrait.contract import MODEL_ENGINES, ModelSpec
from icportrait.disk import room_for
from icportrait.errors import PlanError, VerificationError
from icportrait.manifest import Manifest
from icportrait.runtime.tensorrt.plans import PlanManifest, PlanTensor
from icportrait.runtime.tensorrt.products import TENSORRT, TENSORRT_RTX, Flavour

LEAST_SHARE = 0.95
"""Least share of the convolutions' and linears' multiply-adds in the precision that was asked for."""


def build_engine(
    flavour: Flavour,
    onnx_directory: Path,
    manifest: Manifest,
    spec: ModelSpec,
    config: BuildConfig,
    out: Path,
    *,
    allow_mixed: bool = False,
    allow_warnings: bool = False,
    allow_unfused: bool = False,
) -> list[PlanManifest]:
    """Build one engine's plans into ``out``, each with its manifest, and print what the parser made of the graph.

    Args:
        flavour: the product that builds.
        onnx_directory: the export that ``manifest`` is of.
        manifest: the export's manifest.
        spec: the engine.
        config: what to build.
        out: directory for the plans, made where it is missing.
        allow_mixed: also build graphs that do much of their arithmetic in other types than the engine's precision.
        allow_warnings: also build where TensorRT's parser warns of something that isn't known to be harmless.
        allow_unfused: also build where the scores of an attention lie in scratch memory.

    Raises:
        CheckpointError: the graph isn't the one that its manifest names.
        PlanError: TensorRT couldn't build it.
        RuntimeNotAvailable: the product isn't installed, or needs a GPU that isn't here.
        VerificationError: TensorRT can't parse the graph or warns of it while it parses, its arithmetic isn't in the
            engine's precision, or an attention isn't fused.
        NotEnoughDisk: a plan is larger than the room that is left.
    """
    target = gpu_target(flavour, config.compute_capabilities_for(manifest.precision))
    manifest.check_files(spec.name, onnx_directory)
    onnx = manifest.files(spec.name, onnx_directory)[0]
    parsed = parse(flavour, onnx)
    found = inspect(parsed)
    print(table(spec.name, found, parsed.warnings), flush=True)
    if not allow_warnings:
        _refuse_warnings(onnx, parsed.warnings)
    precision = manifest.engines[spec.name].precision
    share = found.share(precision)
    if share < LEAST_SHARE and not allow_mixed:
        raise VerificationError(
            f"{onnx}: {100 * share:.1f} % of the convolutions' and linears' multiply-adds are {precision}, "
            f"expected {100 * LEAST_SHARE:.0f} % or more; export again, or allow it with --allow-mixed"
        )
    out.mkdir(parents=True, exist_ok=True)
    plans = config.plans(spec, cover_gaps=flavour is TENSORRT and spec.name in MODEL_ENGINES)
    # What is left of another layout would stand beside the new plans, and nothing says which are meant.
    for old in (*out.glob(f"{spec.name}.plan"), *out.glob(f"{spec.name}.batch*.plan")):
        if old.name not in plans:
            PlanManifest.path(old).unlink(missing_ok=True)
            old.unlink()
    return [
        _build_plan(target, parsed, found, onnx, manifest, spec, config, profiles, out / name, allow_unfused)
        for name, profiles in plans.items()
    ]


def _refuse_warnings(onnx: Path, warned: list[str]) -> None:
    if matter := warnings_that_matter(warned):
        raise VerificationError(
            f"{onnx}: TensorRT warns: {'; '.join(matter)}; export a graph that it doesn't warn of, or allow it with "
            "--allow-warnings"
        )


def _build_plan(
    target: GpuTarget,
    parsed: ParsedNetwork,
    found: Inspection,
    onnx: Path,
    manifest: Manifest,
    spec: ModelSpec,
    config: BuildConfig,
    profiles: list[Profile],
    plan: Path,
    allow_unfused: bool,
) -> PlanManifest:
    started, known, planned = time.perf_counter(), len(parsed.warnings), len(parsed.planned)
    with progress_monitor(parsed.flavour, plan.name) as monitor:
        serialized = _serialize(target, parsed, config, profiles, monitor)
    warned = parsed.warnings[known:]
    if serialized is None:
        raise PlanError(f"{onnx}: TensorRT couldn't build {plan.name}: {'; '.join(warned) or 'it says nothing'}")
    # The builder warns of tactics that it skipped, of the machine, and of much that says nothing against the plan.
    for line in warning_lines(warned):
        print(line, flush=True)
    precision = manifest.engines[spec.name].precision
    largest = max(shapes[2][0] for profile in profiles for shapes in profile.values())
    attention = fusion(parsed.planned[planned:], found, precision, len(profiles), largest)
    print(f"  {attention}", flush=True)
    if attention.is_unfused and precision != "fp32" and not allow_unfused:  # fp32 has no fused kernels
        raise VerificationError(
            f"{onnx}: {plan.name}: {attention}: a step would write them each time; export with another head size, or "
            "allow it with --allow-unfused"
        )
    network = parsed.network
    tensors = [
        PlanTensor(tensor.name, is_input, tensor.dtype.name, tuple(tensor.shape))
        for is_input, count, get in (
            (True, network.num_inputs, network.get_input),
            (False, network.num_outputs, network.get_output),
        )
        for tensor in map(get, range(count))
    ]
    size_bytes = memoryview(serialized).nbytes
    built = PlanManifest(
        engine=spec.name,
        preset=manifest.preset.name,
        precision=precision,
        flavour=parsed.flavour.name,
        tensorrt_version=parsed.flavour.version(),
        compute_capabilities=target.compute_capabilities,
        profiles=tuple(profiles),
        tensors=tuple(tensors),
        contract_hash=manifest.contract_hash,
        onnx_sha256=manifest.engines[spec.name].sha256,
        plan_sha256=hashlib.sha256(serialized).hexdigest(),
        plan_bytes=size_bytes,
        build_seconds=round(time.perf_counter() - started, 3),
        peak_memory_bytes=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        gpu_name=target.gpu_name,
        warnings=tuple(dict.fromkeys(text.strip() for text in warned)),
        scratch_bytes=attention.scratch_bytes,
        attentions=attention.attentions,
        fused_attentions=attention.fused,
    )
    with room_for("the plan", plan.parent, size_bytes, (plan.name, PlanManifest.path(plan).name)):
        # A plan without its manifest is never loaded, so neither half of an interrupted build is taken for a whole one.
        PlanManifest.path(plan).unlink(missing_ok=True)
        plan.unlink(missing_ok=True)  # a repository may hold a link to it
        plan.write_bytes(serialized)
        built.write(plan)
    return built


def _serialize(
    target: GpuTarget,
    parsed: ParsedNetwork,
    config: BuildConfig,
    profiles: list[Profile],
    monitor: Any,
) -> Any:
    """Build the plan's bytes. Return None where TensorRT gave up."""
    flavour = parsed.flavour
    if TYPE_CHECKING:
        import tensorrt as trt
    else:
        trt = flavour.load()
    prepare_polygraphy(flavour)
    from polygraphy.backend.tensorrt_rtx import CreateConfigRTX
    from polygraphy.backend.trt import CreateConfig, engine_bytes_from_network
    from polygraphy.backend.trt import Profile as PolygraphyProfile
    from polygraphy.exception import PolygraphyException

    cache = str(config.timing_cache) if config.timing_cache else None
    settings: dict[str, Any] = {
        "profiles": [PolygraphyProfile() for _ in profiles],
        "builder_optimization_level": config.optimization_level,
        "load_timing_cache": cache if config.timing_cache and config.timing_cache.is_file() else None,
        "progress_monitor": monitor,
        "profiling_verbosity": trt.ProfilingVerbosity.DETAILED,
    }
    for profile, shapes in zip(settings["profiles"], profiles, strict=True):
        for name, (smallest, best, largest) in shapes.items():
            profile.add(name, smallest, best, largest)
    if config.workspace_bytes is not None:
        settings["memory_pool_limits"] = {trt.MemoryPoolType.WORKSPACE: config.workspace_bytes}
    if flavour is not TENSORRT_RTX:
        create = CreateConfig(**settings)
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
