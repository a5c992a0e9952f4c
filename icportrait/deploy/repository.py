"""Assemble a model repository that Triton can load: ``python -m icportrait.deploy.repository``.

``triton_repo/`` holds each model's ``model.py`` and its committed ``config.pbtxt``. A repository adds the exported
engines, or the plans built from them, and the manifest, and writes the configurations anew for the preset and policy
that are to be served.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import shutil
import sys
from pathlib import Path

from icportrait.contract import (
    ENGINES,
    ENSEMBLE,
    MODEL_ENGINES,
    QUANTIZED_PRECISIONS,
    STANDALONE_ENSEMBLE,
    engine_specs,
)
from icportrait.deploy.graph_memory import graph_memory
from icportrait.deploy.triton_config import PRIVATE_MODELS, STANDALONE_MODELS, model_configs, write_configs
from icportrait.disk import existing, room_for
from icportrait.errors import CheckpointError, IcPortraitError, PlanError
from icportrait.manifest import EngineMemory, Manifest
from icportrait.policy import BATCHING_MODES, CPU_RUNTIMES, RUNTIMES, SIMULATED, ServingPolicy, cpu_defaults
from icportrait.presets import DEMO_128
from icportrait.request import client_contract_text
from icportrait.runtime.latency_table import LATENCY_TABLE_NAME, LatencyTable
from icportrait.runtime.load import compiled_folder
from icportrait.runtime.tensorrt.plans import BatchRange, PlanManifest, fitting_plans
from icportrait.runtime.tensorrt.products import TENSORRT, TENSORRT_RTX

ROOT = Path(__file__).parents[2]
TEMPLATE = ROOT / "triton_repo"
CLIENT_CONTRACT = ROOT / "client" / "src" / "icportrait_client" / "contract.json"
ENGINE_OWNERS = {name: name if name in MODEL_ENGINES else "denoise" for name in ENGINES}
"""The Triton model that runs each engine."""
TRITON_PLAN_NAME = "model.plan"
"""Under which Triton's own backend looks for a plan."""
ENSEMBLES = (ENSEMBLE, STANDALONE_ENSEMBLE)
Plans = dict[str, dict[Path, PlanManifest]]
"""Plans by engine."""


def assemble(
    export: Path,
    repository: Path,
    policy: ServingPolicy,
    template: Path = TEMPLATE,
    plans: Path | None = None,
    standalone: bool = False,
) -> Manifest:
    """Write ``repository`` from the template's models and an export's engines, replacing what was there.

    Args:
        export: directory written by ``python -m export``; of it a simulated runtime needs the manifest alone.
        repository: directory to write; a folder for each model.
        policy: the deployment's settings; the repository gets a copy of its latency table.
        template: the folder of ``model.py`` files.
        plans: directory written by ``python -m engines build``, for a runtime that runs plans.
        standalone: for another tritonserver than the gateway's own.

    Raises:
        CheckpointError: the export is incomplete, was made for another contract or runtime, or a graph isn't the one
            its manifest names.
        PlanError: a plan is missing or changed, or wasn't built from this export for this runtime.
        LatencyTableError: the policy's latency table can't be read or isn't one.
        IcPortraitError: ``repository`` holds something else, or there are plans or a latency table for a runtime
            without or none for one with.
        NotEnoughDisk: the repository is on another disk than the export, and there is no room for a copy.
    """
    manifest = Manifest.read(export)
    table = _read_table(policy)
    if not policy.is_simulated:
        for name in ENGINES:
            manifest.check_files(name, export)
    if policy.runtime == "torch" and manifest.precision in QUANTIZED_PRECISIONS:
        raise CheckpointError(
            f"{export}: is {manifest.precision}, expected fp32, or for a GPU fp16 or bf16: torch runs nothing quantised"
        )
    if policy.runtime == "onnxruntime" and manifest.precision == "bf16":
        raise CheckpointError(f"{export}: is bf16, for which ONNX Runtime has no CPU kernels, expected fp32 or fp16")
    if policy.runtime == "openvino" and manifest.precision not in ("fp32", "fp16"):
        raise CheckpointError(
            f"{export}: is {manifest.precision}, which was not tried with OpenVINO, expected fp32 or fp16"
        )
    found = _find_plans(manifest, policy, plans)
    ranges = _batch_ranges(manifest, found) if policy.runtime == TENSORRT.name and not policy.deterministic else {}
    described = dataclasses.replace(manifest, memory=_memory(manifest, export, policy))
    written = dataclasses.replace(policy, latency_table=LATENCY_TABLE_NAME) if policy.is_simulated else policy
    configs = model_configs(manifest.preset, manifest.precision, written, ranges)
    found_models = {path.parent.parent.name for path in template.glob("*/1/model.py")}
    if expected := set(configs) - set(ENSEMBLES) - found_models:
        raise CheckpointError(f"{template}: model {min(expected)} is missing")
    served = STANDALONE_MODELS if standalone else PRIVATE_MODELS
    configs = {name: configs[name] for name in served}
    (ensemble,) = set(ENSEMBLES) & set(served)
    placed = [plan for plans_of_one in found.values() for plan in plans_of_one]
    if policy.runtime in CPU_RUNTIMES:
        placed += [path for name in ENGINES for path in manifest.files(name, export)]
    with room_for("the repository", repository, _copied_bytes(placed, repository), ["*"]):
        _remove_old(repository)
        if policy.runtime in ("openvino", TENSORRT_RTX.name):
            _make_compiled_folders(repository, manifest)
        for model in sorted(set(served) - {ensemble}):
            version = repository / model / "1"
            version.mkdir(parents=True)
            if model in ranges:
                (plan,) = found[model]
                _place_plan(plan, version / TRITON_PLAN_NAME)
                continue
            shutil.copy(template / model / "1" / "model.py", version)
            described.write(version)
            if policy.is_simulated and model in ENGINE_OWNERS.values():
                (version / LATENCY_TABLE_NAME).write_bytes(table)
            for name, owner in ENGINE_OWNERS.items():
                if owner == model and policy.runtime in CPU_RUNTIMES:
                    for path in manifest.files(name, export):
                        _place(path, version / path.name)
                elif owner == model:
                    for plan in found.get(name, {}):
                        _place_plan(plan, version / plan.name)
        # An ensemble has no files of its own, but Triton wants its version folder.
        (repository / ensemble / "1").mkdir(parents=True)
        write_configs(repository, configs)
    return manifest


def _memory(manifest: Manifest, export: Path, policy: ServingPolicy) -> dict[str, EngineMemory]:
    """Return the memory that every engine takes where it runs on a CPU."""
    if policy.uses_plans or policy.is_simulated or (policy.runtime == "torch" and manifest.precision != "fp32"):
        return {}
    found = {}
    for name, spec in engine_specs(manifest.preset, manifest.precision).items():
        graph = graph_memory(manifest.files(name, export)[0])
        rows = (2**power for power in range(spec.batch.max.bit_length()))
        found[name] = EngineMemory(graph.weights_bytes, {count: count * graph.row_bytes for count in rows})
    return found


def _read_table(policy: ServingPolicy) -> bytes:
    """Read and check the latency table's file before a repository that may hold it is replaced."""
    if not policy.is_simulated:
        if policy.latency_table:
            raise IcPortraitError(
                f"{policy.latency_table}: runtime {policy.runtime} takes as long as it takes, and no "
                f"latency table; expected runtime {SIMULATED}"
            )
        return b""
    if not policy.latency_table:
        raise IcPortraitError(
            f"runtime {SIMULATED} takes its times from a latency table: name its file, such as "
            "benchmarks/latency/h200-torch-sd15-512.json"
        )
    path = Path(policy.latency_table)
    LatencyTable.read(path)
    return path.read_bytes()


def _find_plans(manifest: Manifest, policy: ServingPolicy, plans: Path | None) -> Plans:
    """Find every engine's plans, and check that all are of this export and for this runtime."""
    if plans is None and policy.uses_plans:
        raise IcPortraitError(
            f'runtime {policy.runtime} runs plans: name their directory, of "python -m engines build"'
        )
    if plans is None:
        return {}
    if not policy.uses_plans:
        raise IcPortraitError(f"{plans}: runtime {policy.runtime} runs no plans, expected tensorrt or tensorrt-rtx")
    return {name: fitting_plans(plans, name, manifest, policy.runtime) for name in ENGINES}


def _batch_ranges(manifest: Manifest, plans: Plans) -> dict[str, tuple[BatchRange, ...]]:
    """Return the batch ranges of the plans that Triton's own backend runs.

    That backend takes one file an engine, and fails a batch that no profile holds.
    """
    specs, ranges = engine_specs(manifest.preset, manifest.precision), {}
    for name in MODEL_ENGINES:
        (plan, built), *others = plans[name].items()
        if others:
            raise PlanError(
                f"{plan}: {name} has {1 + len(others)} plans, and Triton's TensorRT backend takes one; build it again "
                "with --layout profiles"
            )
        batches = range(1, specs[name].batch.max + 1)
        if missing := [n for n in batches if not any(low <= n <= high for low, high in built.batch_ranges)]:
            raise PlanError(
                f"{plan}: no optimization profile holds a batch of {missing[0]}, and Triton's TensorRT backend runs "
                f"all from 1 to {batches[-1]}; build it again"
            )
        ranges[name] = built.batch_ranges
    return ranges


def _remove_old(repository: Path) -> None:
    """Remove an earlier repository, and nothing that isn't one."""
    if repository.exists() and any(repository.iterdir()) and not (repository / "denoise" / "config.pbtxt").is_file():
        raise IcPortraitError(f"{repository}: isn't empty and no model repository; choose another folder")
    shutil.rmtree(repository, ignore_errors=True)


def _make_compiled_folders(repository: Path, manifest: Manifest) -> None:
    """Make a folder for what is compiled of each engine, and remove what was compiled of other graphs."""
    folders = [compiled_folder(repository, manifest, name) for name in ENGINES]
    ours = {path for name in ENGINES for path in folders[0].parent.glob(f"{name}-{'[0-9a-f]' * 12}")}
    for stale in ours - set(folders):
        shutil.rmtree(stale)
    for folder in folders:
        folder.mkdir(parents=True, exist_ok=True)


def _place_plan(plan: Path, target: Path) -> None:
    """Place a plan and its manifest, because a plan without a manifest isn't loaded."""
    _place(plan, target)
    _place(PlanManifest.path(plan), PlanManifest.path(target))


def _copied_bytes(files: list[Path], repository: Path) -> int:
    """Return the bytes of the files that aren't linked, because the repository lies on another file system."""
    here = existing(repository).stat().st_dev
    return sum(file.stat().st_size for file in files if file.stat().st_dev != here)


def _place(path: Path, target: Path) -> None:
    """Link a file, or copy it across file systems."""
    try:
        os.link(path, target)
    except OSError:
        shutil.copy(path, target)


def main(argv: list[str] | None = None) -> int:
    policy = ServingPolicy()
    parser = argparse.ArgumentParser(prog="python -m icportrait.deploy.repository", description=__doc__.splitlines()[0])
    parser.add_argument("--export", type=Path, help="directory written by python -m export")
    parser.add_argument("--out", type=Path, help="the repository to write")
    parser.add_argument("--runtime", choices=RUNTIMES, help="default: the faster of the CPU's for the export's preset")
    parser.add_argument("--plans", type=Path, help="directory written by python -m engines build, for TensorRT")
    parser.add_argument("--latency-table", default=policy.latency_table, help="JSON file, for the simulated runtime")
    parser.add_argument("--batching", choices=BATCHING_MODES, default=policy.batching, help="default: %(default)s")
    parser.add_argument(
        "--deterministic",
        action="store_true",
        help="a seed's bytes don't depend on what runs beside it, at a price (with ONNX Runtime they never do)",
    )
    parser.add_argument(
        "--standalone", action="store_true", help="for another tritonserver, without this project's gateway"
    )
    parser.add_argument("--configs", action="store_true", help="only rewrite what is generated and committed")
    args = parser.parse_args(argv)
    if args.configs:
        write_configs(TEMPLATE, model_configs(DEMO_128, "fp32", ServingPolicy()))
        CLIENT_CONTRACT.write_text(client_contract_text())
        return 0
    if not (args.export and args.out):
        parser.error("--export and --out are required")
    try:
        exported = Manifest.read(args.export)
        policy = ServingPolicy(
            **cpu_defaults(exported.preset, exported.precision, args.runtime),
            batching=args.batching,
            latency_table=args.latency_table,
            deterministic=args.deterministic,
        )
        manifest = assemble(args.export, args.out, policy, plans=args.plans, standalone=args.standalone)
    except (IcPortraitError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"{args.out}: {manifest.preset.name}, {manifest.precision}, {policy.runtime}, model {manifest.model_version}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
