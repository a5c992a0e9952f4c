"""A batch in several runs, for engines that compute fewer rows at once."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping

import numpy as np

from icportrait.contract import Array, ModelSpec


def run_in_portions(
    spec: ModelSpec,
    inputs: Mapping[str, Array],
    sizes: Collection[int],
    run: Callable[[Mapping[str, Array]], Mapping[str, Array]],
) -> dict[str, Array]:
    """Check a batch, run all of it, and join what comes out.

    Args:
        spec: of the engine.
        inputs: see ``Engine.run``.
        sizes: the numbers of rows that ``run`` takes; 1 is among them.
        run: computes so many rows.

    Raises:
        ContractError: an input breaks the specification.
    """
    batch = spec.check_inputs(inputs)[spec.batch.name]
    if batch in sizes:
        return dict(run(inputs))
    outputs = {tensor.name: np.empty(tensor.shape(batch=batch), tensor.dtype.numpy) for tensor in spec.outputs}
    for rows in portions(batch, sizes):
        for name, part in run({name: array[rows] for name, array in inputs.items()}).items():
            outputs[name][rows] = part
    return outputs


def portions(batch: int, sizes: Collection[int]) -> Iterator[slice]:
    """Yield rows 0 to ``batch`` in whole sizes, the largest first, because a filling row costs a CPU a row's time.

    Args:
        batch: how many rows there are.
        sizes: numbers of rows; 1 is among them.
    """
    first = 0
    while first < batch:
        rows = max(size for size in sizes if size <= batch - first)
        yield slice(first, first + rows)
        first += rows
