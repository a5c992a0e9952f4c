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
from icportrait.nn import engine_modules, load_checkpoint, random_checkpoint

if TYPE_CHECKING:
    from icportrait.manifest import Manifest
    from icportrait.nn import Checkpoint
    from icportrait.presets import Preset


class TorchEngine:
    """A torch module in eager mode, on the CPU or on a CUDA device where there is one."""

    def __init__(self, module: torch.nn.Module, spec: ModelSpec, device: str | None = None) -> None:
        self.spec = spec
        self.version = f"torch-{torch.__version__}"
        self._device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        self._module = module.eval().to(self._device)

    @classmethod
    def from_manifest(cls, name: str, manifest: Manifest, threads: int = 0) -> TorchEngine:
        """The module that the export's engine ``name`` was made from, with the same (fp32) weights."""
        if threads:
            torch.set_num_threads(threads)
        return cls(source_modules(manifest)[name], engine_specs(manifest.preset)[name])

    @torch.inference_mode()
    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Run one batch; see ``Engine.run``."""
        self.spec.check_inputs(inputs)
        tensors = [
            torch.from_numpy(np.ascontiguousarray(inputs[spec.name])).to(self._device) for spec in self.spec.inputs
        ]
        outputs = self._module(*tensors)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        return {spec.name: output.cpu().numpy() for spec, output in zip(self.spec.outputs, outputs, strict=True)}


def source_modules(manifest: Manifest) -> dict[str, torch.nn.Module]:
    """The modules that an export was made from, with fp32 weights, by the engines' names."""
    return engine_modules(_source_checkpoint(json.dumps(manifest.source), manifest.preset))


@lru_cache(maxsize=1)
def _source_checkpoint(source_json: str, preset: Preset) -> Checkpoint:
    """The checkpoint an export was made from: read again from its directory, or drawn again from its seed.

    Kept, because one process may run several of its engines.
    """
    source = json.loads(source_json)
    if "checkpoint" in source:
        return load_checkpoint(Path(source["checkpoint"]))
    return random_checkpoint(preset, source["random_weights"])
