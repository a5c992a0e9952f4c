"""The one interface through which everything above runs an engine."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from icportrait.contract import Array, ModelSpec


class Engine(Protocol):
    """Runs one model of the contract."""

    spec: ModelSpec
    version: str
    """The runtime and its version, for a request's metadata."""

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Run one batch: arrays by the specification's input names in, by its output names out.

        Raises:
            ContractError: an input breaks the specification.
        """
        ...
