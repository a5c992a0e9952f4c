"""Plain torch modules behind the ``Engine`` protocol: the reference that every other runtime is compared with."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
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

    def __init__(
        self, module: torch.nn.Module, spec: ModelSpec, device: str | None = None, row_by_row: bool = False
    ) -> None:
        """Place the module.

        Args:
            module: takes and gives the specification's tensors in their order.
            spec: of the engine.
            device: torch's name; a CUDA device where there is one, by default.
            row_by_row: run a batch's rows one after the other, so that no row's bits depend on another. Filling up to
                one batch size isn't enough: torch computes the last two rows of six in another way than the first four.
        """
        self.spec, self._row_by_row = spec, row_by_row
        self.version = f"torch-{torch.__version__}"
        self._device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        self._module = module.eval().to(self._device)
        if row_by_row:
            torch.backends.cudnn.deterministic = True  # else some of its convolutions add up in any order

    @classmethod
    def from_manifest(cls, name: str, manifest: Manifest, threads: int = 0, row_by_row: bool = False) -> TorchEngine:
        """The module that the export's engine ``name`` was made from, with the same (fp32) weights."""
        if threads:
            torch.set_num_threads(threads)
        return cls(source_modules(manifest)[name], engine_specs(manifest.preset)[name], row_by_row=row_by_row)

    @torch.inference_mode()
    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Run one batch; see ``Engine.run``."""
        batch = self.spec.check_inputs(inputs)[self.spec.batch.name]
        tensors = [
            torch.from_numpy(np.ascontiguousarray(inputs[spec.name])).to(self._device) for spec in self.spec.inputs
        ]
        if not self._row_by_row:
            return self._arrays(self._run(tensors))
        rows = [self._run([tensor[row : row + 1] for tensor in tensors]) for row in range(batch)]
        return self._arrays([torch.cat(parts) for parts in zip(*rows, strict=True)])

    def _run(self, tensors: Sequence[torch.Tensor]) -> Sequence[torch.Tensor]:
        outputs = self._module(*tensors)
        return outputs if isinstance(outputs, tuple) else (outputs,)

    def _arrays(self, outputs: Sequence[torch.Tensor]) -> dict[str, Array]:
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
