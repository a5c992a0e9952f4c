"""int8 and fp8: fp16 graphs get QuantizeLinear and DequantizeLinear around their convolutions and linears.

The quantiser, NVIDIA ModelOpt, needs other versions of onnx and onnxruntime, so it works in an environment of its own
(``make quantizer``) on files.
"""

from __future__ import annotations

import subprocess
import tempfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from icportrait.contract import QUANTIZED_PRECISIONS, Array
from icportrait.errors import RuntimeNotAvailable, VerificationError

ROOT = Path(__file__).parents[1]
QUANTIZER = ROOT / ".venv-quantizer" / "bin" / "python"
QUANTIZED_ENGINE = "unet"
"""It does nearly all of a request's arithmetic, and the others lose more quality by it (docs/adr/0007)."""


def engine_precision(precision: str, engine: str) -> str:
    """Return the precision of an engine's convolutions and linears in an export that is asked for in ``precision``."""
    return "fp16" if precision in QUANTIZED_PRECISIONS and engine != QUANTIZED_ENGINE else precision


def check_quantizer() -> None:
    """Raise RuntimeNotAvailable where the quantiser's environment is missing."""
    if not QUANTIZER.exists():
        raise RuntimeNotAvailable(f'{QUANTIZER} is missing: int8 and fp8 need ModelOpt; run "make quantizer"')


def quantize(files: list[Path], precision: str, calibration: Mapping[str, Array]) -> None:
    """Replace a graph's files by quantised ones.

    Args:
        files: the graph in fp16 and, where there is one, its external data.
        precision: int8 or fp8.
        calibration: recorded inputs by name, of the graph's types, rows along axis 0.

    Raises:
        RuntimeNotAvailable: the quantiser isn't installed.
        VerificationError: it failed.
    """
    check_quantizer()
    graph = files[0].resolve()
    with tempfile.TemporaryDirectory(dir=graph.parent) as folder:
        out = Path(folder)
        np.savez(out / "calibration.npz", **calibration)
        command: list[str | Path] = [QUANTIZER, Path(__file__).with_name("modelopt_job.py"), "--graph", graph]
        command += ["--precision", precision, "--calibration", out / "calibration.npz", "--out", out]
        done = subprocess.run(command, capture_output=True, text=True, cwd=out, check=False)
        if done.returncode != 0:
            lines = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
            raise VerificationError(f"{graph}: ModelOpt couldn't quantise it to {precision}: {lines[-1]}")
        for file in files:
            (out / file.name).replace(file)
