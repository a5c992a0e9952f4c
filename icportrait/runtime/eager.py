"""Plain torch modules behind the ``Engine`` protocol: the reference that every other runtime is compared with."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from icportrait.contract import Array, ModelSpec, engine_specs
from icportrait.errors import RuntimeNotAvailable
from icportrait.nn import engine_modules, load_checkpoint, random_checkpoint
from icportrait.runtime.portions import run_in_portions

if TYPE_CHECKING:
    from icportrait.manifest import Manifest
    from icportrait.nn import Checkpoint
    from icportrait.policy import ServingPolicy
    from icportrait.presets import Preset


class TorchEngine:
    """A torch module in eager mode. On a GPU ``torch_device`` runs modules instead."""

    def __init__(
        self,
        module: torch.nn.Module,
        spec: ModelSpec,
        device: str = "cpu",
        row_by_row: bool = False,
        rows_at_once: int = 0,
    ) -> None:
        """Place the module.

        Args:
            module: takes and gives the specification's tensors in their order.
            spec: of the engine.
            device: torch's name.
            row_by_row: run a batch's rows one after the other, so that no row's bits depend on another. Filling up to
                one batch size isn't enough: torch computes the last two rows of six in another way than the first four.
            rows_at_once: of a batch, the most that one run computes; 0 takes the largest batch.
        """
        self.spec = spec
        self._rows = range(1, 1 + (1 if row_by_row else rows_at_once or spec.batch.max))
        self.version = f"torch-{torch.__version__}"
        self._device, self._module = device, module.eval().to(device)

    @classmethod
    def from_manifest(cls, name: str, manifest: Manifest, policy: ServingPolicy) -> TorchEngine:
        """Load the module that the export's engine ``name`` was made from, with the same (fp32) weights.

        Raises:
            RuntimeNotAvailable: the export has another precision, which torch computes on a GPU only.
        """
        if manifest.precision != "fp32":
            raise RuntimeNotAvailable(
                f"the export is {manifest.precision}, and torch finds no GPU here: on a CPU it computes fp32; export "
                "again with --precision fp32"
            )
        if policy.engine_threads:
            torch.set_num_threads(policy.engine_threads)
        return cls(
            source_modules(manifest)[name],
            engine_specs(manifest.preset)[name],
            row_by_row=policy.deterministic,
            rows_at_once=policy.rows_at_once,
        )

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Run one batch; see ``Engine.run``."""
        return run_in_portions(self.spec, inputs, self._rows, self._run)

    @torch.inference_mode()
    def _run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        arrays = (np.ascontiguousarray(inputs[spec.name]) for spec in self.spec.inputs)
        outputs = self._module(*(torch.from_numpy(array).to(self._device) for array in arrays))
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        return {spec.name: output.cpu().numpy() for spec, output in zip(self.spec.outputs, outputs, strict=True)}


def source_modules(manifest: Manifest) -> dict[str, torch.nn.Module]:
    """Return the modules that an export was made from, with fp32 weights, by the engines' names."""
    return engine_modules(_source_checkpoint(json.dumps(manifest.source), manifest.preset))


@lru_cache(maxsize=1)
def _source_checkpoint(source_json: str, preset: Preset) -> Checkpoint:
    """Read the checkpoint of an export again from its directory, or draw it again from its seed.

    Kept, because one process may run several of its engines.
    """
    source = json.loads(source_json)
    if "checkpoint" in source:
        return load_checkpoint(Path(source["checkpoint"]))
    return random_checkpoint(preset, source["random_weights"])
