"""Insert Q/DQ into one graph with NVIDIA ModelOpt.

Runs as a script in the quantiser's own environment, which has other versions of onnx and onnxruntime than the project;
``export.quantization`` starts it. So it imports nothing of the project.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
from modelopt.onnx.quantization import fp8, int8
from modelopt.onnx.quantization.calib_utils import CalibrationDataProvider

QUANTIZERS = {"int8": int8.quantize, "fp8": fp8.quantize}
"""One level below ``modelopt.onnx.quantization.quantize``, which forgets the shapes that the exporter noted; without
them nothing behind a GroupNormalization is quantised."""
CALIBRATIONS = {"int8": "entropy", "fp8": "max"}
"""int8 has few levels, and clipping rare values makes the others finer; fp8's levels are as fine anywhere."""

_SessionOptions = onnxruntime.SessionOptions


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--graph", type=Path, required=True)
    parser.add_argument("--precision", choices=QUANTIZERS, required=True)
    parser.add_argument("--calibration", type=Path, required=True, help="inputs by name, .npz, rows along axis 0")
    parser.add_argument("--out", type=Path, required=True, help="where the graph's new files go")
    args = parser.parse_args(argv)
    onnxruntime.SessionOptions = _options_without_spinning
    data_name = f"{args.graph.name}.data"
    has_external_data = args.graph.with_name(data_name).exists()
    with np.load(args.calibration) as kept:
        reader = CalibrationDataProvider(str(args.graph), dict(kept))
    model = QUANTIZERS[args.precision](
        str(args.graph),
        calibration_method=CALIBRATIONS[args.precision],
        calibration_data_reader=reader,
        calibration_eps=["cpu"],
        nodes_to_exclude=[],
        op_types_to_quantize=["Conv", "Gemm", "MatMul"],
        use_external_data_format=has_external_data,
        passes=[],
        # The graph comes in fp16 and with its delicate parts in fp32; nothing is converted.
        high_precision_dtype="fp32",
        # It would leave the linears of the timestep's embedding out, which have one row a picture.
        enable_gemv_detection_for_trt=False,
        log_level="WARNING",
    )
    external = {"save_as_external_data": True, "location": data_name} if has_external_data else {}
    onnx.save(model, str(args.out / args.graph.name), **external)
    return 0


def _options_without_spinning() -> onnxruntime.SessionOptions:
    """Take the place of the class where ModelOpt makes its sessions, because it passes no options on.

    Threads that spin between two operators take other processes' time, and where these keep them waiting, minutes.
    """
    options = _SessionOptions()
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return options


if __name__ == "__main__":
    sys.exit(main())
