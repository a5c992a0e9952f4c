"""Values that requests of a load draw from, with their weights. Nothing heavy is imported."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from icportrait_client.errors import InvalidRequest

Number = TypeVar("Number", int, float)


@dataclass(frozen=True)
class Mix(Generic[Number]):
    """Two or more values, and how often each is drawn."""

    values: tuple[Number, ...]
    weights: tuple[float, ...]

    @property
    def shares(self) -> tuple[float, ...]:
        """Return the weights as shares of 1."""
        whole = sum(self.weights)
        return tuple(weight / whole for weight in self.weights)

    def __str__(self) -> str:
        """Write the mix as the command line takes it."""
        return " ".join(f"{value:g}:{weight:g}" for value, weight in zip(self.values, self.weights, strict=True))


def weighted(kind: type[Number], word: str) -> tuple[Number, float]:
    """Read ``VALUE`` or ``VALUE:WEIGHT``.

    Raises:
        ValueError: it is neither, or the weight isn't above 0.
    """
    value, colon, weight = word.partition(":")
    found = float(weight) if colon else 1.0
    if not (math.isfinite(found) and found > 0):
        raise ValueError(word)
    return kind(value), found


def mixed(name: str, pairs: Sequence[tuple[Number, float]]) -> Number | Mix[Number]:
    """Make a mix of values with weights; one value stays a number.

    Raises:
        InvalidRequest: a value is there twice.
    """
    values, weights = zip(*pairs, strict=True)
    if len(set(values)) < len(values):
        raise InvalidRequest(f"{name}: {' '.join(map('{:g}'.format, values))}, expected each once")
    return values[0] if len(values) == 1 else Mix(values, weights)


def values_of(setting: Number | Mix[Number] | None) -> tuple[Number, ...]:
    """List the values that a setting draws from; none of None."""
    if setting is None:
        return ()
    return setting.values if isinstance(setting, Mix) else (setting,)
