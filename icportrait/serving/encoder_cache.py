"""The rows that an engine has computed, kept by their inputs' content, so that a row that returns isn't computed again.

The VAE encoder has one: a profile returns with every other reference and seed (ADR 0008).
"""

from __future__ import annotations

import hashlib
import math
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from icportrait.contract import Array
from icportrait.runtime.engine import Engine
from icportrait.runtime.placement import Placed

Count = Callable[[int, int], None]
"""Takes the number of rows of one batch that were found, and the number that weren't."""


class RowCache:
    """An engine's ``run`` that computes each row once, until others that were used since push it out, or it is too old.

    A row's key is the SHA-256 of its input and of the partition it belongs to, so that no caller can make a picture
    that is taken for another, or learn from the time it takes what callers of another partition have sent. Rows that
    are equal within a batch and a partition are computed once. Nothing of a run that failed is kept, and no row with
    NaN or Inf. For one thread.
    """

    def __init__(
        self,
        engine: Engine,
        limit_bytes: int,
        count: Count = lambda *_: None,
        keep_s: float = math.inf,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Take the memory for all the rows that fit: what is kept later lets no server grow.

        Args:
            engine: a row of its outputs depends on no other row.
            limit_bytes: of the outputs that are kept; under a row's, none are.
            count: told of every batch.
            keep_s: for how long a row is kept after it was computed.
            clock: seconds.
        """
        self._engine, self._count, self._keep_s, self._clock = engine, count, keep_s, clock
        outputs = engine.spec.outputs
        self._capacity = max(0, limit_bytes) // sum(tensor.nbytes(1) for tensor in outputs)
        # Zeros that are written take their pages now; np.zeros would when a row comes.
        self._kept = {
            tensor.name: np.full((self._capacity, *tensor.shape(batch=1)[1:]), 0, tensor.dtype.numpy)
            for tensor in outputs
        }
        self._places: OrderedDict[bytes, int] = OrderedDict()
        """The place of each key's row, the least recently used first."""
        self._computed_s: OrderedDict[bytes, float] = OrderedDict()
        """The time at which each key's row was computed, the oldest first."""
        self._used, self._free = 0, list[int]()
        """The number of places that were ever used, and the used places that hold nothing any more."""

    def __call__(self, inputs: Mapping[str, Placed], partitions: Sequence[str] | None = None) -> dict[str, Array]:
        """Return the engine's outputs for the inputs. Where the inputs lie in the GPU's memory, always run the engine.

        Args:
            inputs: by name, [b, ...].
            partitions: the partition of each row; None is one for all.
        """
        batches = {name: batch for name, batch in inputs.items() if isinstance(batch, np.ndarray)}
        if not self._capacity or len(batches) < len(inputs):
            return self._engine.run(inputs)  # type: ignore[arg-type]
        self._drop_old()
        keys = _keys(batches, partitions)
        missing = {key: index for index, key in enumerate(keys) if key not in self._places}
        rows = list(missing.values())
        computed = self._engine.run({name: batch[rows] for name, batch in batches.items()}) if rows else {}
        new = {key: position for position, key in enumerate(missing)}
        outputs = {
            name: np.stack([computed[name][new[key]] if key in new else kept[self._places[key]] for key in keys])
            for name, kept in self._kept.items()
        }
        for key in keys:
            if key in self._places:
                self._places.move_to_end(key)
        for key, position in new.items():
            if not all(np.isfinite(computed[name][position]).all() for name in self._kept):
                continue
            self._places[key] = place = self._free_place()
            self._computed_s[key] = self._clock()
            for name, kept in self._kept.items():
                kept[place] = computed[name][position]
        self._count(len(keys) - len(missing), len(missing))
        return outputs

    def _drop_old(self) -> None:
        until_s = self._clock() - self._keep_s
        while self._computed_s and next(iter(self._computed_s.values())) < until_s:
            key, _ = self._computed_s.popitem(last=False)
            place = self._places.pop(key)
            self._free.append(place)
            for kept in self._kept.values():
                kept[place] = 0

    def _free_place(self) -> int:
        """Return a place that holds nothing, else the place of the row whose last use is longest ago."""
        if self._free:
            return self._free.pop()
        if self._used < self._capacity:
            self._used += 1
            return self._used - 1
        key, place = self._places.popitem(last=False)
        del self._computed_s[key]
        return place


def _keys(batches: Mapping[str, Array], partitions: Sequence[str] | None) -> list[bytes]:
    """Return a key for each row: a hash of its bytes, because the contract fixes a row's shape and type."""
    columns = [np.ascontiguousarray(batches[name]) for name in sorted(batches)]
    keys = []
    for index, row in enumerate(zip(*columns, strict=True)):
        digest = hashlib.sha256()
        for array in row:
            digest.update(array)
        # Behind what has a fixed length, so that nothing of the one passes for the other.
        digest.update(partitions[index].encode() if partitions else b"")
        keys.append(digest.digest())
    return keys
