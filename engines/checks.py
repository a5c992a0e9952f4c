"""The checks that an engine must pass at every bucket before it is used.

    values       every output is near torch's
    written      every output is written whole: none keeps a byte that its buffer was filled with before
    replay       a CUDA graph gives the bytes that direct execution gives
    neighbours   a row's bytes are the same whatever the other rows hold, and in a bucket that isn't full

Bytes are compared between runs of one bucket alone: they have the same shapes, and so the same kernels, of which
torch's are deterministic ones (``runtime.torch_device``). Two buckets may add up in another order.

Every check takes fresh random inputs. Each run writes into buffers that were filled with ``POISON``, which is NaN as
floats. The checks don't know TensorRT.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from engines.polygraphy_setup import prepare_polygraphy
from export.verification import Figure, Tolerance, compare, with_flows_of
from icportrait.contract import Array, ModelSpec, TensorSpec

CHECKS = ("values", "written", "replay", "neighbours")
POISON = 0xFF


class Subject(Protocol):
    """An engine with output buffers of its own, as ``DeviceEngine`` is."""

    spec: ModelSpec

    def fill_outputs(self, byte: int) -> None:
        """Set every byte of the output buffers."""
        ...

    def run(self, inputs: Mapping[str, Any], *, directly: bool = False) -> dict[str, Array]:
        """Run one batch in the smallest bucket that holds it; ``directly`` means without a CUDA graph."""
        ...


Reference = Callable[[Mapping[str, Array], Mapping[str, Array] | None], Mapping[str, Array]]
"""Torch's outputs for inputs and, where they aren't None, known flows; see ``export.verification.torch_outputs``."""


@dataclass(frozen=True)
class Check:
    """The result of one check: its worst figure, or an error that ended it."""

    engine: str
    batch: int | None
    name: str
    figure: Figure | None = None
    error: str = ""

    @property
    def passed(self) -> bool:
        return not self.error and self.figure is not None and self.figure.passed

    @property
    def text(self) -> str:
        return self.error or (f"{self.figure.tensor}: {self.figure}" if self.figure else "")


def check_engine(
    subject: Subject, reference: Reference, tolerance: Tolerance, buckets: Iterable[int], seed: int
) -> Iterator[Check]:
    """Do every check at every bucket. A bucket of 1 has no neighbours.

    Args:
        subject: the engine.
        reference: what it must compute.
        tolerance: how far the two may differ.
        buckets: the subject's batches.
        seed: of the random inputs, every draw of which is another.
    """
    spec, generator, smaller = subject.spec, np.random.default_rng(seed), 0
    for bucket in sorted(buckets):
        inputs, others = (spec.dummy_inputs(bucket, int(generator.integers(2**31))) for _ in range(2))
        found = _run(subject, inputs)
        yield Check(spec.name, bucket, "values", _check_values(spec, found, inputs, reference, tolerance))
        # Over another filling, so that what isn't written differs.
        again = _run(subject, inputs, fill=0)
        yield Check(spec.name, bucket, "written", differing_bytes(again, found))
        # Over other inputs than those that a graph was recorded with.
        replayed, direct = _run(subject, others), _run(subject, others, directly=True)
        yield Check(spec.name, bucket, "replay", differing_bytes(replayed, direct))
        if bucket > 1:
            figures = list(_neighbours(subject, found, inputs, others, smaller + 1))
            yield Check(spec.name, bucket, "neighbours", _worst(figures))
        smaller = bucket


def differing_bytes(found: Mapping[str, Array], expected: Mapping[str, Array]) -> Figure:
    """Find the output with the most bytes that aren't equal. NaNs are compared like all others."""
    counts = {name: int(np.count_nonzero(_bytes(found[name]) != _bytes(array))) for name, array in expected.items()}
    name = max(counts, key=lambda name: counts[name])
    return Figure(name, "differing bytes", counts[name], 0)


def _run(
    subject: Subject, inputs: Mapping[str, Array], *, directly: bool = False, fill: int = POISON
) -> dict[str, Array]:
    subject.fill_outputs(fill)
    return subject.run(inputs, directly=directly)


def _check_values(
    spec: ModelSpec,
    found: Mapping[str, Array],
    inputs: Mapping[str, Array],
    reference: Reference,
    tolerance: Tolerance,
) -> Figure:
    expected = with_flows_of(found, reference(inputs, None), lambda flows: reference(inputs, flows))
    floats = [tensor for tensor in spec.outputs if np.issubdtype(tensor.dtype.numpy, np.floating)]
    figures = _compare_floats(floats, found, expected, tolerance)
    for tensor in spec.outputs:
        if tensor not in floats:
            figures += compare(tensor, found[tensor.name], expected[tensor.name], tolerance)
    return _worst(figures)


def _compare_floats(
    tensors: list[TensorSpec], found: Mapping[str, Array], expected: Mapping[str, Array], tolerance: Tolerance
) -> list[Figure]:
    """Compute relative RMS errors. Polygraphy's L2 norms are absolute, so each limit comes from the expected output."""
    if not tensors:
        return []
    prepare_polygraphy()
    from polygraphy.comparator import Comparator, L2CompareFunc, RunResults

    norms = {tensor.name: max(float(np.linalg.norm(expected[tensor.name])), 1e-12) for tensor in tensors}
    results = RunResults()
    for runner, outputs in (("engine", found), ("torch", expected)):
        results.add([{name: outputs[name].astype(np.float64) for name in norms}], runner_name=runner)
    limits = {name: tolerance.relative_rms * norm for name, norm in norms.items()}
    (compared,) = Comparator.compare_accuracy(results, compare_func=L2CompareFunc(l2_threshold=limits))
    (distances,) = compared["engine", "torch"]
    return [
        Figure(name, "relative RMS error", distances[name].l2_norm / norm, tolerance.relative_rms)
        for name, norm in norms.items()
    ]


def _neighbours(
    subject: Subject,
    whole: Mapping[str, Array],
    inputs: Mapping[str, Array],
    others: Mapping[str, Array],
    fewest: int,
) -> Iterator[Figure]:
    """Compare each row of ``whole`` with the same row among ``others``, and the first ``fewest`` in the same bucket."""
    batch = len(next(iter(inputs.values())))
    for row in range(batch):
        mixed = {name: array.copy() for name, array in others.items()}
        for name, array in mixed.items():
            array[row] = inputs[name][row]
        found = _run(subject, mixed)
        yield differing_bytes(*({name: array[row] for name, array in arrays.items()} for arrays in (found, whole)))
    if fewest < batch:
        found = _run(subject, {name: array[:fewest] for name, array in inputs.items()})
        yield differing_bytes(found, {name: array[:fewest] for name, array in whole.items()})


def _worst(figures: list[Figure]) -> Figure:
    """Find the figure furthest over its limit, or nearest to it. A NaN is worse than all."""

    def badness(figure: Figure) -> float:
        if math.isnan(figure.value):
            return math.inf
        if figure.limit == 0:
            return math.inf if figure.value > 0 else 0.0
        return figure.value / figure.limit

    return max(figures, key=badness)


def _bytes(array: Array) -> Array:
    return np.frombuffer(np.ascontiguousarray(array).tobytes(), np.uint8)
