"""Engines and slots of a policy's runtime. A runtime's own libraries are imported where they are asked for."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from icportrait.contract import MODEL_ENGINES, ModelSpec, engine_specs
from icportrait.errors import RuntimeNotAvailable
from icportrait.manifest import Manifest
from icportrait.policy import RUNTIMES, ServingPolicy
from icportrait.runtime.engine import Engine
from icportrait.runtime.portioned import PortionedEngine
from icportrait.runtime.slots import HostSlots, Slots
from icportrait.runtime.tensorrt.products import FLAVOURS

DECODER_ROWS = 4
"""Portraits that a GPU decodes at once, because a step of the UNet may wait for them: at most a step's time
(docs/capacity.md)."""


def load_engine(name: str, directory: Path, manifest: Manifest, policy: ServingPolicy) -> Engine:
    """Load engine ``name`` of an export into the policy's runtime. On a GPU the decoder runs in portions.

    Args:
        name: one of ``contract.ENGINES``.
        directory: holds the graph that the manifest names, or the plans that were built from it; of a simulated engine
            neither.
        manifest: the export's manifest.
        policy: says which runtime and how many threads.

    Raises:
        RuntimeNotAvailable: the runtime isn't installed, or there is no GPU where it needs one.
        LatencyTableError: the simulated device's latency table is missing or wrong.
    """
    spec = engine_specs(manifest.preset, manifest.precision)[name]
    if policy.runtime == "onnxruntime":
        from icportrait.runtime.ort import OrtEngine

        return OrtEngine(
            directory / manifest.engines[name].file, spec, policy.engine_threads, rows_at_once=policy.rows_at_once
        )
    if policy.runtime == "openvino":
        from icportrait.runtime.ov import OpenVinoEngine

        cache = compiled_folder(directory.parent.parent, manifest, name)
        return OpenVinoEngine(
            directory / manifest.engines[name].file,
            spec,
            buckets_at_once(spec, policy),
            policy.engine_threads,
            cache if cache.is_dir() else None,
        )
    if policy.runtime == "torch":
        if _torch_has_gpu():
            from icportrait.runtime.torch_device import load_modules

            return _beside_steps(load_modules([name], manifest, policy)[name])
        from icportrait.runtime.eager import TorchEngine

        return TorchEngine.from_manifest(name, manifest, policy)
    if policy.is_simulated:
        from icportrait.runtime.simulated import load_simulated

        return _beside_steps(load_simulated([name], directory, manifest, policy)[name])
    if policy.uses_plans:
        from icportrait.runtime.tensorrt.loading import load_plans

        rows = pinned_rows(spec, policy)
        pinned = None if rows is None else {name: rows}
        caches = _kernel_caches([name], directory, manifest)
        plans = load_plans([name], directory, manifest, FLAVOURS[policy.runtime], pinned, caches)
        return _beside_steps(plans[name])
    raise RuntimeNotAvailable(f"runtime: {policy.runtime!r}, expected one of {', '.join(RUNTIMES)}")


def _beside_steps(engine: Engine) -> Engine:
    """Let the decoder give the GPU back to the UNet between portions. All other engines stay as they are."""
    rows = most_rows(engine.spec)
    return engine if rows == engine.spec.batch.max else PortionedEngine(engine, rows)


def most_rows(spec: ModelSpec) -> int:
    """Return the most rows that an engine on a GPU runs at once."""
    return min(spec.batch.max, DECODER_ROWS) if spec.name == "vae_decoder" else spec.batch.max


def load_slots(directory: Path, manifest: Manifest, policy: ServingPolicy) -> Slots:
    """Load the warping network and the UNet, and make the rows where the policy's runtime computes.

    Args:
        directory: holds both engines' files; see ``load_engine``.
        manifest: the export's manifest.
        policy: says which runtime and how many rows.
    """
    if policy.uses_plans:
        from icportrait.runtime.tensorrt.loading import load_plans

        names = ("warping_network", "unet")
        specs = engine_specs(manifest.preset, manifest.precision)
        rows = {name: count for name in names if (count := pinned_rows(specs[name], policy))}
        caches = _kernel_caches(names, directory, manifest)
        plans = load_plans(names, directory, manifest, FLAVOURS[policy.runtime], rows, caches)
        from icportrait.runtime.device_slots import DeviceSlots

        return DeviceSlots(plans["warping_network"], plans["unet"], policy.slots)
    if policy.runtime == "torch" and _torch_has_gpu():
        from icportrait.runtime.device_slots import DeviceSlots
        from icportrait.runtime.torch_device import load_modules

        modules = load_modules(("warping_network", "unet"), manifest, policy)
        return DeviceSlots(modules["warping_network"], modules["unet"], policy.slots)
    if policy.is_simulated:
        from icportrait.runtime.simulated import SimulatedSlots, load_simulated

        engines = load_simulated(("warping_network", "unet"), directory, manifest, policy)
        return SimulatedSlots(engines["warping_network"], engines["unet"], policy.slots)
    warping, unet = (load_engine(name, directory, manifest, policy) for name in ("warping_network", "unet"))
    return HostSlots(warping, unet, policy.slots)


def _torch_has_gpu() -> bool:
    """Tell whether torch finds a GPU.

    Raises:
        RuntimeNotAvailable: torch isn't installed.
    """
    try:
        import torch
    except ImportError as error:
        raise RuntimeNotAvailable(f'runtime torch is not installed ({error}); run "make setup"') from error
    return torch.cuda.is_available()


def _kernel_caches(names: Iterable[str], directory: Path, manifest: Manifest) -> dict[str, Path]:
    """Return the file of each engine's compiled kernels, where there is a folder for it."""
    folders = {name: compiled_folder(directory.parent.parent, manifest, name) for name in names}
    return {name: folder / "kernels" for name, folder in folders.items() if folder.is_dir()}


def compiled_folder(repository: Path, manifest: Manifest, name: str) -> Path:
    """Return the folder of an engine's compiled models for OpenVINO, or of its kernels for TensorRT-RTX.

    It lies beside the repository, because the repository is written anew more often.
    """
    # The server reads the repository through a link, and it may be one itself.
    place = repository.resolve()
    return place.parent / f"{place.name}.compiled" / f"{name}-{manifest.engines[name].sha256[:12]}"


def keeps_compiled(repository: Path, manifest: Manifest) -> bool:
    """Tell whether there is a place for OpenVINO's compiled models: a repository that was copied may lie without it."""
    return all(os.access(compiled_folder(repository, manifest, name), os.W_OK | os.X_OK) for name in manifest.engines)


def buckets_at_once(spec: ModelSpec, policy: ServingPolicy) -> tuple[int, ...]:
    """Return the row counts that an OpenVINO engine is compiled for: powers of two; in the deterministic mode 1.

    Of the other runtimes' the last is the most that a run computes. ONNX Runtime has no deterministic mode to be in.
    """
    row_by_row = policy.deterministic and policy.runtime != "onnxruntime"
    most = 1 if row_by_row else min(policy.rows_at_once, spec.batch.max)
    return tuple(2**power for power in range(most.bit_length()))


def pinned_rows(spec: ModelSpec, policy: ServingPolicy) -> int | None:
    """Return the number of rows that every run of a plan has in the deterministic mode; None where the mode is off.

    It is the most rows that can come at once. An engine that batches across callers always runs ``most_rows``. An
    engine that fills slots runs no more rows than there are slots.
    """
    if not policy.deterministic:
        return None
    return most_rows(spec) if spec.name in MODEL_ENGINES else min(policy.slots, spec.batch.max)
