"""Exports that several tests use: made once, and kept under ``build/test-exports`` from run to run.

``python -m tests.exports`` makes those of ``make test`` on every core, which is quicker than one after another as tests
ask.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, replace
from functools import partial
from importlib import metadata
from multiprocessing import get_context
from pathlib import Path
from unittest.mock import patch

from filelock import FileLock

from icportrait.contract import ENGINES, ModelSpec
from icportrait.errors import CheckpointError
from icportrait.manifest import Manifest, file_sha256
from icportrait.presets import Preset
from tests.tiny import SMALL

ROOT = Path(__file__).parents[1]
KEPT = ROOT / "build" / "test-exports"
DEMO_CHECKPOINT = ROOT / "checkpoints" / "demo-128"
EXPORTER = (
    "export/*.py",
    "export/*.txt",
    "icportrait/nn/*.py",
    "icportrait/contract.py",
    "icportrait/manifest.py",
    "icportrait/presets.py",
    "icportrait/runtime/ort.py",
    "icportrait/runtime/portions.py",
)
"""The files that decide what an export holds,"""
PACKAGES = ("torch", "diffusers", "numpy", "onnx", "onnx-ir", "onnxscript", "onnxruntime")
"""and, each in its version, the packages."""
RENDERER = ("training/*.py",)
"""Code of the pictures that a calibrated export is calibrated on."""


@dataclass(frozen=True)
class SharedExport:
    """Arguments of ``python -m export``, and the engines to export."""

    weights: Path | Preset
    """A checkpoint, or the geometry of random weights from seed 0."""
    precision: str = "fp32"
    opset: int = 20
    calibration_pairs: int = 0
    engines: tuple[str, ...] = ENGINES
    graphs: str = ""
    """Name of the shared export of the same weights whose graphs are quantised; empty where they are exported."""

    def key(self) -> str:
        """Tell this export from every other, one by changed code or of a changed checkpoint included."""
        patterns = EXPORTER + (RENDERER if self.calibration_pairs else ())
        files = [path for pattern in patterns for path in sorted(ROOT.glob(pattern))]
        if isinstance(self.weights, Path):
            files += sorted(path for path in self.weights.rglob("*") if path.is_file())
        versions = [metadata.version(name) for name in PACKAGES]
        return hashlib.sha256(f"{self} {versions} {file_sha256(*files)}".encode()).hexdigest()[:16]

    def make(self, directory: Path) -> None:
        """Export and verify."""
        import export.__main__
        import export.graphs
        from export.calibration import rendered_pairs
        from icportrait.nn import load_checkpoint, random_checkpoint

        source: dict[str, object]
        if isinstance(self.weights, Path):
            checkpoint, source = load_checkpoint(self.weights), {"checkpoint": str(self.weights)}
        else:
            checkpoint, source = random_checkpoint(self.weights), {"random_weights": 0}
        pairs = rendered_pairs(checkpoint.preset, self.calibration_pairs) if self.calibration_pairs else None
        export_graph: Callable[..., list[Path]] = export.graphs.export_graph
        if self.graphs:
            export_graph = partial(self._copy_graph, shared_export(self.graphs))
        with (
            patch.object(export.__main__, "ENGINES", self.engines),
            patch.object(export.graphs, "export_graph", export_graph),
        ):
            export.__main__.export_checkpoint(
                checkpoint, source, self.precision, directory, self.opset, calibration_pairs=pairs
            )

    @staticmethod
    def _copy_graph(graphs: Path, module: object, spec: ModelSpec, directory: Path, opset: int) -> list[Path]:
        """Do what ``export_graph`` does, without a trace of the module."""
        return [Path(shutil.copy(graphs / f"{spec.name}.onnx", directory))]


# fp8 leaves convolutions of fewer than 16 channels alone: TensorRT has no kernels for them.
WIDE = replace(SMALL, unet_channels=(32, 32))
SHARED = {
    "demo": SharedExport(DEMO_CHECKPOINT),
    "wide-fp16": SharedExport(WIDE, "fp16", 23, engines=("unet",)),
    "small-fp16": SharedExport(SMALL, "fp16", 23),
    "small": SharedExport(SMALL),
    "small-bf16": SharedExport(SMALL, "bf16", 23, engines=("unet",)),
    "wide-int8": SharedExport(WIDE, "int8", 23, calibration_pairs=4, engines=("unet",), graphs="wide-fp16"),
    "wide-fp8": SharedExport(WIDE, "fp8", 23, calibration_pairs=4, engines=("unet",), graphs="wide-fp16"),
}
"""Exports by name, in an order in which two processes end together."""
OF_FULL_TESTS = ("wide-fp16", "wide-int8", "wide-fp8")
"""Exports that only ``make test-full`` asks for: one after another, when it does."""


def shared_export(name: str) -> Path:
    """Return the directory of an export of ``SHARED``, which no test may change. Processes may ask for one at once."""
    wanted = SHARED[name]
    directory = KEPT / f"{name}-{wanted.key()}"
    KEPT.mkdir(parents=True, exist_ok=True)
    with FileLock(KEPT / f"{name}.lock"):
        if not _is_whole(directory):
            for stale in KEPT.glob(f"{name}-{'?' * 16}"):
                shutil.rmtree(stale)
            wanted.make(directory)
    return directory


def _is_whole(directory: Path) -> bool:
    """Tell whether an export ended here, and nothing has changed its files since."""
    try:
        manifest = Manifest.read(directory)
        for engine in manifest.engines:
            manifest.check_files(engine, directory)
    except CheckpointError:
        return False
    return True


def main() -> int:
    os.environ["OMP_NUM_THREADS"] = "1"  # of the processes below: each has a core
    began = time.monotonic()
    names = [name for name in SHARED if name not in OF_FULL_TESTS]
    print(f"{len(names)} exports for the tests: minutes the first time, then kept in {KEPT}", flush=True)
    with ProcessPoolExecutor(os.cpu_count(), mp_context=get_context("spawn")) as processes:
        exports = {processes.submit(shared_export, name): name for name in names}
        for done, future in enumerate(as_completed(exports), 1):
            future.result()
            print(f"{time.monotonic() - began:6.1f} s  {done} of {len(names)} exports: {exports[future]}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
