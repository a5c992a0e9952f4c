"""Export a checkpoint's four engines to ONNX and verify them: ``python -m export``."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

from icportrait.contract import ENGINES, PRECISIONS, QUANTIZED_PRECISIONS, Array, contract_hash, engine_specs
from icportrait.disk import room_for
from icportrait.errors import CheckpointError, IcPortraitError
from icportrait.policy import cpu_defaults
from icportrait.presets import DEMO_128, PRESETS

if TYPE_CHECKING:
    from export.calibration import Pixels
    from icportrait.manifest import Manifest
    from icportrait.nn import Checkpoint

OPSET = 20
LATEST_OPSET = 23
"""The last that exports are tested with."""
LEAST_OPSETS = {"bf16": 22, "int8": 23, "fp8": 23}
"""Convolutions take bfloat16 from opset 22 on; graphs are quantised as they go to TensorRT, in opset 23."""
SMALL_IMAGE_SIZE = 256
"""Presets up to this picture size are also compared at their largest batch; larger ones would take too long."""


def export_checkpoint(
    checkpoint: Checkpoint,
    source: dict[str, object],
    precision: str,
    directory: Path,
    opset: int = OPSET,
    progress: Callable[[str], None] = lambda _: None,
    calibration_pairs: list[tuple[Pixels, Pixels]] | None = None,
) -> Manifest:
    """Write and verify the four graphs and their manifest.

    Args:
        checkpoint: its modules are brought to ``precision`` in place.
        source: where the checkpoint came from, for the manifest.
        precision: one of ``contract.PRECISIONS``.
        directory: made where it is missing; files of an earlier export are replaced.
        opset: the ONNX operator set, 20 or later.
        progress: called with what is being done now.
        calibration_pairs: for int8 and fp8, see ``calibration``.

    Raises:
        VerificationError: a graph isn't what the contract says or doesn't do what torch does.
        RuntimeNotAvailable: int8 or fp8, and the quantiser isn't installed.
        NotEnoughDisk: there is no room for the graphs; none is left there then.
    """
    import diffusers
    import numpy as np
    import onnx
    import torch

    from export.calibration import record_inputs
    from export.graphs import export_graph
    from export.quantization import check_quantizer, engine_precision, quantize
    from export.verification import WEIGHT_TYPES, cast, verify
    from icportrait.manifest import MANIFEST_NAME, EngineFile, Manifest, file_sha256
    from icportrait.nn import engine_modules

    recorded: dict[str, Array] = {}
    if precision in QUANTIZED_PRECISIONS:
        check_quantizer()
        if not calibration_pairs:
            raise CheckpointError(f"{precision} is calibrated on portraits: give calibration_pairs")
        recorded = record_inputs(checkpoint, calibration_pairs, progress)
    specs = engine_specs(checkpoint.preset, precision)
    modules = engine_modules(checkpoint)
    for module in modules.values():
        cast(module, WEIGHT_TYPES[precision])
    small = checkpoint.preset.image_size <= SMALL_IMAGE_SIZE
    runtime = cpu_defaults(checkpoint.preset, precision)["runtime"]
    graphs = [f"{name}.onnx*" for name in ENGINES]
    with room_for("the export", directory, checkpoint.size_bytes, [*graphs, MANIFEST_NAME]):
        directory.mkdir(parents=True, exist_ok=True)
        # Without a manifest a directory is no export: one that failed half-way is never taken for a good one.
        (directory / MANIFEST_NAME).unlink(missing_ok=True)
        engines = {}
        for name in ENGINES:
            spec, module = specs[name], modules[name]
            for stale in directory.glob(f"{name}.onnx*"):
                stale.unlink()
            final = engine_precision(precision, name)
            is_quantized = final in QUANTIZED_PRECISIONS
            plain = "fp16" if is_quantized else final
            progress(f"{name}: to ONNX, {plain}")
            files = export_graph(module, spec, directory, opset)
            sizes = (1, spec.batch.max) if small else (1,)
            batches = [spec.dummy_inputs(size) for size in sizes]
            verify(files[0], spec, module, plain, opset, batches, progress, runtime)
            if is_quantized:
                inputs = {tensor.name: recorded[tensor.name].astype(tensor.dtype.numpy) for tensor in spec.inputs}
                progress(f"{name}: to {final}, calibrated on {len(inputs[spec.inputs[0].name])} recorded inputs")
                quantize(files, final, inputs)
                batches = [{key: array[:size] for key, array in inputs.items()} for size in sizes]
                verify(files[0], spec, module, final, opset, batches, progress, runtime)
            engines[name] = EngineFile(
                file=files[0].name,
                sha256=file_sha256(*files),
                size_bytes=sum(file.stat().st_size for file in files),
                precision=final,
                external_data=files[1].name if len(files) > 1 else None,
            )
        manifest = Manifest(
            preset=checkpoint.preset,
            precision=precision,
            opset=opset,
            contract_hash=contract_hash(checkpoint.preset, precision),
            engines=engines,
            scheduler_config=checkpoint.scheduler_config,
            defaults={
                "guidance_scale": checkpoint.guidance_scale,
                "num_inference_steps": checkpoint.num_inference_steps,
            },
            source=source,
            versions={
                "torch": torch.__version__,
                "diffusers": diffusers.__version__,
                "onnx": onnx.__version__,
                runtime: version(runtime),
                "numpy": np.__version__,
            },
        )
        manifest.write(directory)
    return manifest


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m export", description=__doc__.splitlines()[0])
    weights = parser.add_mutually_exclusive_group(required=True)
    weights.add_argument("--checkpoint", type=Path, help="a checkpoint directory in diffusers layout")
    weights.add_argument("--random-weights", action="store_true", help="weights drawn from --seed; needs --preset")
    parser.add_argument("--preset", choices=PRESETS, help=f"geometry of random weights (such as {DEMO_128.name})")
    parser.add_argument("--seed", type=int, default=0, help="of the random weights (default: %(default)s)")
    parser.add_argument("--precision", choices=PRECISIONS, default="fp32", help="default: %(default)s")
    parser.add_argument("--opset", type=int, default=OPSET, help="ONNX operator set (default: %(default)s)")
    parser.add_argument("--out", type=Path, required=True, help="directory to write")
    calibration = parser.add_argument_group("int8 and fp8 are calibrated on portraits that the checkpoint makes")
    calibration.add_argument(
        "--calibration-pictures", type=Path, metavar="DIR", help="of these people (default: rendered heads)"
    )
    calibration.add_argument(
        "--calibration-pairs", type=int, default=16, metavar="N", help="how many (default: %(default)s)"
    )
    args = parser.parse_args(argv)
    if args.random_weights and not args.preset:
        parser.error("--random-weights needs --preset")
    if args.opset < (least := LEAST_OPSETS.get(args.precision, OPSET)):
        parser.error(f"--opset is {args.opset}, expected {least} or later for {args.precision}")
    if args.opset > LATEST_OPSET:
        parser.error(f"--opset is {args.opset}, expected {LATEST_OPSET} or earlier")
    if args.calibration_pairs < 2:
        parser.error(f"--calibration-pairs is {args.calibration_pairs}, expected 2 or more")
    try:
        manifest = _run(args)
    except (IcPortraitError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    size_mb = sum(engine.size_bytes for engine in manifest.engines.values()) / 1e6
    print(f"{args.out}: {manifest.preset.name}, {manifest.precision}, {size_mb:.0f} MB, model {manifest.model_version}")
    return 0


def _run(args: argparse.Namespace) -> Manifest:
    print("loading torch and the checkpoint", file=sys.stderr, flush=True)
    from icportrait.nn import load_checkpoint, random_checkpoint

    source: dict[str, object]
    if args.checkpoint:
        checkpoint = load_checkpoint(args.checkpoint)
        if args.preset and checkpoint.preset != PRESETS[args.preset]:
            raise IcPortraitError(
                f"--preset is {args.preset}, but {args.checkpoint} is {checkpoint.preset.name}; leave --preset out"
            )
        source = {"checkpoint": str(args.checkpoint.resolve())}
    else:
        checkpoint = random_checkpoint(PRESETS[args.preset], args.seed)
        source = {"random_weights": args.seed}
    pairs: list[tuple[Pixels, Pixels]] | None = None
    if args.precision in QUANTIZED_PRECISIONS:
        from export.calibration import folder_pairs, rendered_pairs

        if args.calibration_pictures:
            pairs = folder_pairs(checkpoint.preset, args.calibration_pictures, args.calibration_pairs)
        else:
            pairs = rendered_pairs(checkpoint.preset, args.calibration_pairs)
    with _progress() as progress:
        return export_checkpoint(checkpoint, source, args.precision, args.out, args.opset, progress, pairs)


@contextmanager
def _progress() -> Iterator[Callable[[str], None]]:
    """Print a line for each stage, with the time since the start: it reads the same on a terminal and in a log."""
    started = time.monotonic()
    yield lambda text: print(f"{time.monotonic() - started:6.1f} s  {text}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
