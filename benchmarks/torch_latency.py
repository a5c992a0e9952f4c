"""Milliseconds of the four engines as torch modules on an NVIDIA GPU, by batch size: a latency table, measured.

    python -m benchmarks.torch_latency --preset sd15-512 --out benchmarks/latency/NAME.json

The modules are the export's, in float16 and channels-last layout, attention by torch's fused kernels, with random
weights. A batch size is recorded as a CUDA graph and replayed; inputs and outputs stay in the GPU's memory. The table
has none of the other times of a served request (copies, the loop, the pictures).
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch

from icportrait.contract import TensorSpec, engine_specs
from icportrait.nn import engine_modules, random_checkpoint
from icportrait.presets import PRESETS

ROWS = (1, 2, 3, 4, 6, 8, 10, 12, 14, 16)
REPLAYS = 20
_WARM_UPS = 3


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.torch_latency", description=__doc__.splitlines()[0])
    parser.add_argument("--preset", choices=PRESETS, default="sd15-512", help="default: %(default)s")
    parser.add_argument("--out", type=Path, required=True, help="the table's file")
    args = parser.parse_args(argv)
    if not torch.cuda.is_available():
        print("error: torch finds no NVIDIA GPU here, and the table is of one", file=sys.stderr)
        return 1
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(measured(args.preset), indent=1) + "\n", encoding="utf-8")
    return 0


@torch.inference_mode()
def measured(preset_name: str) -> dict[str, Any]:
    """Measure the table, and beside it the same without graphs, the spread of the replays and the peak memory."""
    preset = PRESETS[preset_name]
    modules = engine_modules(random_checkpoint(preset, device="cuda"))
    table: dict[str, Any] = {
        "device": torch.cuda.get_device_name(),
        "preset": preset_name,
        "conditions": f"torch {torch.__version__}, CUDA {torch.version.cuda}, {preset_name}, float16, channels-last, "
        f"random weights, CUDA graphs, median of {REPLAYS} replays",
    }
    kinds: dict[str, dict[str, dict[str, float]]] = {"engines": {}, "eager_ms": {}, "p90_ms": {}, "peak_gb": {}}
    for name, spec in engine_specs(preset, "fp16").items():
        module = modules[name].half().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        for kind in kinds.values():
            kind[name] = {}
        for rows in (size for size in ROWS if size <= spec.batch.max):
            inputs = [_drawn(tensor, rows) for tensor in spec.inputs]
            torch.cuda.reset_peak_memory_stats()
            replay, eager = _captured(module, inputs), _timed(lambda: module(*inputs), REPLAYS // 4)  # noqa: B023
            replays = sorted(_timed(replay, REPLAYS))
            kinds["engines"][name][str(rows)] = round(median(replays), 3)
            kinds["eager_ms"][name][str(rows)] = round(median(eager), 3)
            kinds["p90_ms"][name][str(rows)] = round(replays[int(0.9 * len(replays))], 3)
            kinds["peak_gb"][name][str(rows)] = round(torch.cuda.max_memory_allocated() / 1e9, 2)
            print(name, rows, *(kind[name][str(rows)] for kind in kinds.values()), file=sys.stderr, flush=True)
            del replay
    return table | kinds


def _drawn(spec: TensorSpec, rows: int) -> torch.Tensor:
    """Draw numbers like the contract's dummy inputs, in the layout that the networks work in."""
    shape, kind = spec.shape(batch=rows), getattr(torch, spec.dtype.value[0])
    if spec.below is None:
        drawn = torch.randn(shape, device="cuda").to(kind)
    else:
        drawn = torch.randint(spec.below, shape, device="cuda").to(kind)
    return drawn.contiguous(memory_format=torch.channels_last) if drawn.ndim == 4 else drawn


def _captured(module: torch.nn.Module, inputs: list[torch.Tensor]) -> Callable[[], None]:
    """Record the module on these inputs once its kernels are chosen, and return the function that replays it."""
    side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(_WARM_UPS):
            module(*inputs)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        module(*inputs)
    return graph.replay


def _timed(run: Callable[[], object], times: int) -> list[float]:
    run()
    taken = []
    for _ in range(times):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        begin.record()
        run()
        end.record()
        end.synchronize()
        taken.append(begin.elapsed_time(end))
    return taken


if __name__ == "__main__":
    sys.exit(main())
