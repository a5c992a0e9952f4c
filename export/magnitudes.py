"""The distance of fp16 tensors from overflow: ``python -m export.magnitudes``.

ONNX Runtime's CPU keeps float32 between float16 operators, so an overflow wouldn't show there. Here an fp16 export runs
widened to float32 while it makes portraits, and the largest magnitude of every tensor that is float16 in the graph is
noted, of attention scores too, which the graph has no name for.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import sys
import tempfile
import weakref
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper
from tqdm import tqdm

from export.calibration import MANY_STEPS
from export.graph_pipeline import GraphModule, manifest_pipeline
from export.widening import save, widened
from icportrait.contract import ENGINES, Array, ModelSpec, engine_specs
from icportrait.errors import CheckpointError, IcPortraitError
from icportrait.manifest import Manifest
from training.evaluation_pairs import evaluation_pairs

EXTREMES = ("highest", "lowest", "has_nan")
LARGEST = 65504.0
"""float16's largest finite number."""


@dataclass(frozen=True)
class Magnitude:
    """The largest magnitude that one tensor had."""

    engine: str
    tensor: str
    operator: str
    """Kind of the operator that made the tensor."""
    largest: float


class MeasuredEngine:
    """An fp16 graph in float32, which notes the magnitudes of what would be float16."""

    def __init__(self, path: Path, spec: ModelSpec) -> None:
        """Load the graph with an output for each float16 tensor's extremes.

        Args:
            path: an fp16 graph.
            spec: of its fp32 twin.
        """
        self.spec = spec
        self.version = f"onnxruntime-{onnxruntime.__version__}"
        model = onnx.load(path)
        known = {value.name: value.type.tensor_type for value in (*model.graph.value_info, *model.graph.output)}
        self._operators = {
            output: node.op_type
            for node in model.graph.node
            for output in node.output
            if known[output].elem_type == TensorProto.FLOAT16
        }
        widened(model)
        for node in model.graph.node:
            if node.op_type == "Attention":
                scores = f"{node.name}/scores"
                node.output.extend(["", "", scores])  # past keys and values, which it has not; then the scores
                self._operators[scores] = "Attention, inside"
        for name in self._operators:
            _add_extremes(model.graph, name)
        folder = Path(tempfile.mkdtemp(dir=path.parent))
        weakref.finalize(self, shutil.rmtree, folder)
        self._path = folder / path.name
        save(model, self._path)
        is_large = self._path.with_name(f"{path.name}.data").exists()
        # Large graphs are loaded for every run, so that only one of them is in memory.
        self._session = None if is_large else self._load()
        self._largest = dict.fromkeys(self._operators, 0.0)

    def _load(self) -> onnxruntime.InferenceSession:
        options = onnxruntime.SessionOptions()
        options.enable_cpu_mem_arena = False
        options.add_session_config_entry("session.disable_prepacking", "1")  # which keeps the weights twice
        return onnxruntime.InferenceSession(str(self._path), options, providers=["CPUExecutionProvider"])

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Run one batch; see ``Engine.run``."""
        session = self._session or self._load()
        names = [output.name for output in session.get_outputs()]
        outputs = dict(zip(names, session.run(names, dict(inputs)), strict=True))
        for name, largest in self._largest.items():
            highest, lowest, has_nan = (float(outputs.pop(f"{name}/{figure}")) for figure in EXTREMES)
            self._largest[name] = math.nan if has_nan else float(np.max([largest, abs(highest), abs(lowest)]))
        return outputs

    def magnitudes(self) -> list[Magnitude]:
        return [
            Magnitude(self.spec.name, name, self._operators[name], largest) for name, largest in self._largest.items()
        ]


def _add_extremes(graph: onnx.GraphProto, name: str) -> None:
    """Add outputs for a tensor's ``EXTREMES``. One output asks for NaN, because the runtime's reductions lose a NaN."""
    highest, lowest, has_nan = (f"{name}/{figure}" for figure in EXTREMES)
    graph.node.extend(
        [
            helper.make_node("ReduceMax", [name], [highest], keepdims=0),
            helper.make_node("ReduceMin", [name], [lowest], keepdims=0),
            helper.make_node("IsNaN", [name], [f"{name}/is_nan"]),
            helper.make_node("Cast", [f"{name}/is_nan"], [f"{name}/nans"], to=TensorProto.FLOAT),
            helper.make_node("ReduceMax", [f"{name}/nans"], [has_nan], keepdims=0),
        ]
    )
    graph.output.extend(
        helper.make_tensor_value_info(output, TensorProto.FLOAT, []) for output in (highest, lowest, has_nan)
    )


def measure(directory: Path, count: int, steps: int | None = None, seed: int = 0) -> list[Magnitude]:
    """Measure every float16 tensor's largest magnitude over the portraits of rendered heads, largest first.

    Args:
        directory: an fp16 export in opset 23 or later, in which attentions are whole.
        count: number of pairs.
        steps: UNet calls per portrait; None takes the checkpoint's and, for every other one, calibration's
            ``MANY_STEPS``.
        seed: of the pairs.

    Raises:
        CheckpointError: the export isn't fp16, or a graph isn't the one that its manifest names.
    """
    manifest = Manifest.read(directory)
    if manifest.precision != "fp16":
        raise CheckpointError(f"{directory}: is {manifest.precision}, expected fp16")
    for name in ENGINES:
        manifest.check_files(name, directory)
    specs = engine_specs(manifest.preset)
    engines = {name: MeasuredEngine(directory / manifest.engines[name].file, specs[name]) for name in ENGINES}
    pipeline = manifest_pipeline(manifest, {name: GraphModule(engine) for name, engine in engines.items()})
    pairs = evaluation_pairs(manifest.preset, seed, count)
    for index in tqdm(range(count), manifest.preset.name, unit="portrait"):
        profile, reference = (picture[index].permute(1, 2, 0).numpy() for picture in (pairs.profile, pairs.reference))
        own = steps or (MANY_STEPS if index % 2 else pipeline.num_inference_steps)
        pipeline(profile, reference, seed=seed + index, num_inference_steps=own)
    found = [magnitude for engine in engines.values() for magnitude in engine.magnitudes()]
    return sorted(found, key=lambda magnitude: -np.nan_to_num(magnitude.largest, nan=np.inf))


def table(found: list[Magnitude], rows: int) -> str:
    """Write the first ``rows`` as Markdown."""
    lines = ["| engine | tensor | made by | largest | of 65504 |", "| --- | --- | --- | --- | --- |"]
    for row in found[:rows]:
        share = f"{100 * row.largest / LARGEST:.2f} %"
        lines.append(f"| {row.engine} | {row.tensor} | {row.operator} | {row.largest:.4g} | {share} |")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m export.magnitudes", description=__doc__.splitlines()[0])
    parser.add_argument("export", type=Path, help="directory of an fp16 export")
    parser.add_argument("--pairs", type=int, default=8, help="rendered pairs (default: %(default)s)")
    parser.add_argument(
        "--steps", type=int, help=f"UNet calls per portrait (default: the checkpoint's and {MANY_STEPS} in turns)"
    )
    parser.add_argument("--rows", type=int, default=10, help="how many to show (default: %(default)s)")
    parser.add_argument("--json", action="store_true", help="print all of them as JSON")
    args = parser.parse_args(argv)
    for name in ("pairs", "steps"):
        if (given := getattr(args, name)) is not None and given < 1:
            parser.error(f"--{name} is {given}, expected 1 or more")
    try:
        found = measure(args.export, args.pairs, args.steps)
    except (IcPortraitError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    if args.json:
        print(json.dumps([asdict(row) for row in found], indent=2))
    else:
        print(f"{len(found)} float16 tensors; the largest magnitudes of {args.pairs} portraits:\n")
        print(table(found, args.rows))
    return 0 if all(row.largest <= LARGEST for row in found) else 1


if __name__ == "__main__":
    sys.exit(main())
