"""Rows of engines and of slots: runs of them, and whether a row depends on the batch that it is in."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from icportrait.contract import Array
from icportrait.runtime import Engine, Slots
from icportrait.runtime.slots import Inputs


def rows_that_differ(engine: Engine, batches: Iterable[int], seed: int = 0) -> list[tuple[int, ...]]:
    """List the rows that were together where one of them isn't, bit for bit, what it is alone.

    Args:
        engine: to be run.
        batches: how many rows at once, drawn anew each time.
        seed: of the inputs and of which rows come in which order.
    """
    batches = list(batches)
    inputs, generator = engine.spec.dummy_inputs(max(batches), seed), np.random.default_rng(seed)

    def run(rows: Iterable[int]) -> list[list[bytes]]:
        """Return every row's outputs."""
        outputs = engine.run({name: array[list(rows)] for name, array in inputs.items()}).values()
        return [[array.tobytes() for array in row] for row in zip(*outputs, strict=True)]

    alone = [run([row])[0] for row in range(max(batches))]
    groups = [tuple(map(int, generator.permutation(max(batches))[:batch])) for batch in batches]
    return [rows for rows in groups if run(rows) != [alone[row] for row in rows]]


def warp(slots: Slots, jobs: Sequence[Inputs], rows: Sequence[Sequence[int]]) -> Array:
    """Run the warping network and wait for it."""
    slots.launch_warping(jobs, rows)
    return slots.wait_warping()


def step(slots: Slots, canvas_latent: Array, timestep: Array) -> Array:
    """Run the UNet and wait for it."""
    slots.launch(canvas_latent, timestep)
    return slots.wait()
