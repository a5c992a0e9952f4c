"""Whether an engine's rows depend on the batch that they are in."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from icportrait.runtime import Engine


def rows_that_differ(engine: Engine, batches: Iterable[int], seed: int = 0) -> list[tuple[int, ...]]:
    """Which rows were together where one of them isn't, bit for bit, what it is alone.

    Args:
        engine: to be run.
        batches: how many rows at once, drawn anew each time.
        seed: of the inputs and of which rows come in which order.
    """
    batches = list(batches)
    inputs, generator = engine.spec.dummy_inputs(max(batches), seed), np.random.default_rng(seed)

    def run(rows: Iterable[int]) -> list[list[bytes]]:
        """Every row's outputs."""
        outputs = engine.run({name: array[list(rows)] for name, array in inputs.items()}).values()
        return [[array.tobytes() for array in row] for row in zip(*outputs, strict=True)]

    alone = [run([row])[0] for row in range(max(batches))]
    groups = [tuple(map(int, generator.permutation(max(batches))[:batch])) for batch in batches]
    return [rows for rows in groups if run(rows) != [alone[row] for row in rows]]
