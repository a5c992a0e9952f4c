"""The one interface through which everything above runs an engine."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

from icportrait.contract import MODEL_ENGINES, Array, ModelSpec, engine_specs
from icportrait.errors import RuntimeNotAvailable
from icportrait.manifest import Manifest
from icportrait.policy import RUNTIMES, ServingPolicy
from icportrait.runtime.flavours import FLAVOURS


class Engine(Protocol):
    """Runs one model of the contract."""

    spec: ModelSpec
    version: str
    """The runtime and its version, for a request's metadata."""

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Run one batch: arrays by the specification's input names in, by its output names out.

        Raises:
            ContractError: an input breaks the specification.
        """
        ...


def load_engine(name: str, directory: Path, manifest: Manifest, policy: ServingPolicy) -> Engine:
    """Load engine ``name`` of an export into the policy's runtime.

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
        try:
            from icportrait.runtime.eager import TorchEngine
        except ImportError as error:
            raise RuntimeNotAvailable(f'runtime torch is not installed ({error}); run "make setup"') from error
        return TorchEngine.from_manifest(name, manifest, policy)
    if policy.is_simulated:
        from icportrait.runtime.simulated import load_simulated

        return load_simulated([name], directory, manifest, policy)[name]
    if policy.uses_plans:
        from icportrait.runtime.loading import load_plans

        rows = pinned_rows(spec, policy)
        pinned = None if rows is None else {name: rows}
        return load_plans([name], directory, manifest, FLAVOURS[policy.runtime], pinned)[name]
    raise RuntimeNotAvailable(f"runtime: {policy.runtime!r}, expected one of {', '.join(RUNTIMES)}")


def compiled_folder(repository: Path, manifest: Manifest, name: str) -> Path:
    """Where what OpenVINO compiled of an engine is kept: beside its repository, which is written anew more often."""
    # The server reads the repository through a link, and it may be one itself.
    place = repository.resolve()
    return place.parent / f"{place.name}.compiled" / f"{name}-{manifest.engines[name].sha256[:12]}"


def keeps_compiled(repository: Path, manifest: Manifest) -> bool:
    """Whether there is a place for what OpenVINO compiles: a repository that was copied may lie without it."""
    return all(os.access(compiled_folder(repository, manifest, name), os.W_OK | os.X_OK) for name in manifest.engines)


def buckets_at_once(spec: ModelSpec, policy: ServingPolicy) -> tuple[int, ...]:
    """The numbers of rows that an engine of OpenVINO's is compiled for: powers of two; in the deterministic mode 1.

    Of the other runtimes' the last is the most that a run computes. ONNX Runtime has no deterministic mode to be in.
    """
    row_by_row = policy.deterministic and policy.runtime != "onnxruntime"
    most = 1 if row_by_row else min(policy.rows_at_once, spec.batch.max)
    return tuple(2**power for power in range(most.bit_length()))


def pinned_rows(spec: ModelSpec, policy: ServingPolicy) -> int | None:
    """How many rows every run of a plan has in the deterministic mode: as many as can ever come at once.

    That is all of its largest batch for the engines that batch across callers, and for those that fill slots no more
    than there are slots. None where the mode is off.
    """
    if not policy.deterministic:
        return None
    return spec.batch.max if spec.name in MODEL_ENGINES else min(policy.slots, spec.batch.max)
