"""Plans that nothing can run, beside true manifests: for all that is decided before TensorRT sees a plan."""

from __future__ import annotations

import hashlib
from pathlib import Path

from engines.build_config import BuildConfig, Profile
from icportrait.contract import ENGINES, MODEL_ENGINES, ModelSpec, engine_specs
from icportrait.manifest import Manifest
from icportrait.runtime.tensorrt.plans import PlanManifest, PlanTensor

VERSIONS = {"tensorrt": "11.4.0.106", "tensorrt-rtx": "1.7.1.116"}


def write_fake_plans(
    directory: Path, export: Manifest, flavour: str, config: BuildConfig | None = None, *, cover_gaps: bool = True
) -> None:
    """Write what ``python -m engines build`` would; a plan's bytes are its own name."""
    directory.mkdir(parents=True, exist_ok=True)
    for engine in ENGINES:
        spec = engine_specs(export.preset, export.precision)[engine]
        gaps = cover_gaps and flavour == "tensorrt" and engine in MODEL_ENGINES
        for name, profiles in (config or BuildConfig()).plans(spec, cover_gaps=gaps).items():
            write_fake_plan(directory / name, spec, profiles, export, flavour)


def write_fake_plan(plan: Path, spec: ModelSpec, profiles: list[Profile], export: Manifest, flavour: str) -> None:
    content = plan.name.encode()
    plan.write_bytes(content)
    PlanManifest(
        engine=spec.name,
        preset=export.preset.name,
        precision=export.precision,
        flavour=flavour,
        tensorrt_version=VERSIONS[flavour],
        compute_capabilities=("8.9",),
        profiles=tuple(profiles),
        tensors=tuple(PlanTensor(tensor.name, True, "FLOAT", ()) for tensor in spec.inputs),
        contract_hash=export.contract_hash,
        onnx_sha256=export.engines[spec.name].sha256,
        plan_sha256=hashlib.sha256(content).hexdigest(),
        plan_bytes=len(content),
        build_seconds=1.0,
        peak_memory_bytes=1,
    ).write(plan)
