"""The gain of each step from eager torch to batched CUDA graphs, for the engine that runs once per denoising step.

    torch eager -> torch compiled -> TensorRT -> with CUDA graphs -> batched

All rungs get the same rows in GPU memory, and are timed by CUDA events on one stream, each run alone.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import torch

from export.graphs import as_tensor
from icportrait.contract import Array, ModelSpec

if TYPE_CHECKING:
    from icportrait.runtime.cuda import Stream
    from icportrait.runtime.device_engine import DeviceEngine

WARM_UP = 10
REPEATS = 30
EAGER = "torch eager"


@dataclass(frozen=True)
class Rung:
    """One measured way of running a step, or the reason why it wasn't measured."""

    name: str
    batch: int
    ms: float | None
    """Per step of the whole batch: the median of ``REPEATS`` runs after ``WARM_UP``."""
    missing: str = ""

    @property
    def rows_per_s(self) -> float | None:
        """Return the image-steps a second."""
        return None if self.ms is None else 1000 * self.batch / self.ms

    def speedup(self, rungs: list[Rung]) -> float | None:
        """Return the rung's image-steps a second divided by eager torch's."""
        eager = next((rung.rows_per_s for rung in rungs if rung.name == EAGER), None)
        return None if eager is None or self.rows_per_s is None else self.rows_per_s / eager


def climb(engine: DeviceEngine, module: torch.nn.Module, seed: int, name: str = "TensorRT") -> Iterator[Rung]:
    """Measure every rung.

    Args:
        engine: is warm.
        module: what the engine was made from, in the engine's precision; on the GPU where torch has CUDA.
        seed: of the inputs.
        name: of the engine's rungs.
    """
    inputs = engine.spec.dummy_inputs(engine.buckets[-1], seed)
    yield from _torch_rungs(module, engine.spec, {name: array[:1] for name, array in inputs.items()}, engine.stream)
    engine.run({name: array[:1] for name, array in inputs.items()})
    yield Rung(name, 1, median_ms(engine.stream, partial(engine.execute_directly, 1)))
    for bucket in engine.buckets:
        engine.run({name: array[:bucket] for name, array in inputs.items()})
        yield Rung(f"{name} with CUDA graphs", bucket, median_ms(engine.stream, partial(engine.execute, bucket)))


def median_ms(stream: Stream, work: Callable[[], object]) -> float:
    """Return the median of ``REPEATS`` runs after ``WARM_UP``."""
    for _ in range(WARM_UP):
        work()
    stream.synchronize()
    return statistics.median(stream.time_ms(work) for _ in range(REPEATS))


def _torch_rungs(
    module: torch.nn.Module, spec: ModelSpec, inputs: Mapping[str, Array], stream: Stream
) -> Iterator[Rung]:
    compiled = "torch compiled"
    if not torch.cuda.is_available():
        for name in (EAGER, compiled):
            yield Rung(name, 1, None, missing=f"torch {torch.__version__} has no CUDA here")
        return
    tensors = [as_tensor(inputs[tensor.name]).cuda() for tensor in spec.inputs]
    torch.cuda.synchronize()  # the copies are on another stream
    same_stream = torch.cuda.ExternalStream(stream.handle)  # type: ignore[no-untyped-call]
    for name, callee in ((EAGER, module), (compiled, torch.compile(module))):
        ms, missing = None, ""
        try:
            with torch.inference_mode(), torch.cuda.stream(same_stream):
                ms = median_ms(stream, partial(callee, *tensors))
        except Exception as error:  # whatever torch's compiler lacks here, the other rungs are still measured
            missing = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        yield Rung(name, 1, ms, missing)
