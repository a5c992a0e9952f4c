"""An engine on a GPU that runs a batch in portions, between which other processes have the GPU."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from icportrait.contract import Array
from icportrait.runtime.cuda import DeviceArray
from icportrait.runtime.engine import Engine
from icportrait.runtime.portions import portions


class PortionedEngine:
    """An engine behind the same protocol. A batch within one portion runs as it is."""

    def __init__(self, engine: Engine, rows: int) -> None:
        """Take the engine.

        Args:
            engine: takes any batch of its specification.
            rows: the most that it runs at once.
        """
        self.spec, self.version = engine.spec, engine.version
        self._engine, self._sizes = engine, range(1, rows + 1)

    def run(self, inputs: Mapping[str, Any]) -> dict[str, Array]:
        """Run one batch; see ``Engine.run``. Inputs may also be arrays in GPU memory."""
        batch = self.spec.check_inputs(inputs)[self.spec.batch.name]
        parts = [
            self._engine.run({name: _rows(array, rows) for name, array in inputs.items()})
            for rows in portions(batch, self._sizes)
        ]
        if len(parts) == 1:
            return parts[0]
        return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def _rows(array: Any, rows: slice) -> Any:
    return array.rows(rows.start, rows.stop - rows.start) if isinstance(array, DeviceArray) else array[rows]
