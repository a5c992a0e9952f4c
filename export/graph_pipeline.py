"""Exported graphs in the reference pipeline: portraits by the very graphs that engines are built from."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor, nn

from export.graphs import as_tensor
from icportrait.contract import ENGINES, engine_specs
from icportrait.manifest import Manifest
from icportrait.nn.pipeline import ReferencePipeline
from icportrait.runtime import Engine
from icportrait.runtime.ort import OrtEngine


class GraphModule(nn.Module):
    """An engine with the arguments and results of the torch module that it was made from."""

    def __init__(self, engine: Engine) -> None:
        super().__init__()
        self.engine = engine

    def forward(self, *tensors: Tensor) -> Tensor | tuple[Tensor, ...]:
        """Run the engine on its inputs in the specification's order, each cast to its type."""
        spec = self.engine.spec
        inputs = {
            tensor.name: argument.numpy().astype(tensor.dtype.numpy)
            for tensor, argument in zip(spec.inputs, tensors, strict=True)
        }
        outputs = self.engine.run(inputs)
        found = tuple(as_tensor(outputs[tensor.name]) for tensor in spec.outputs)
        return found if len(found) > 1 else found[0]


def load_graphs(manifest: Manifest, directory: Path) -> dict[str, Engine]:
    """Load an export's engines in ONNX Runtime on the CPU."""
    specs = engine_specs(manifest.preset, manifest.precision)
    return {name: OrtEngine(directory / manifest.engines[name].file, specs[name]) for name in ENGINES}


def manifest_pipeline(manifest: Manifest, modules: Mapping[str, nn.Module]) -> ReferencePipeline:
    """Make the pipeline of an export's checkpoint over ``modules``, with the checkpoint's defaults."""
    return ReferencePipeline(
        manifest.preset,
        manifest.scheduler_config,
        modules,
        guidance_scale=manifest.defaults["guidance_scale"],
        num_inference_steps=manifest.defaults["num_inference_steps"],
    )
