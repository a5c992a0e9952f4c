"""The server's public contract, read from the packaged ``contract.json``, and the checks made before sending.

``contract.json`` is generated from the server's own definition; no name, type, range or choice is written here again.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib import resources
from numbers import Integral, Rational, Real
from typing import Any

from icportrait_client import wire
from icportrait_client.errors import InvalidRequest

NUMBERS = {"INT32": "i", "INT64": "q", "FP32": "f"}
"""Formats of ``struct``, by Triton's names of types."""


@dataclass(frozen=True)
class InputSpec:
    """One input of the served model."""

    name: str
    dtype: str
    """Triton's name of the type: BYTES, FP32, INT32 or INT64."""
    size: int
    required: bool
    default: Any
    """None where the server chooses."""
    minimum: float | None
    maximum: float | None
    choices: tuple[str, ...]
    is_interval: bool = False
    """Two numbers, of which the first isn't above the second."""

    @property
    def expected(self) -> str:
        """Return the accepted values in words, as ``1..150`` or ``one of png, jpeg, webp``; empty without limits."""
        if self.choices:
            return f"one of {', '.join(self.choices)}"
        if self.minimum is None or self.maximum is None:
            return ""
        return f"{self.minimum}..{self.maximum}"

    def elements(self, value: Any) -> list[Any]:
        """Return the tensor's elements for a Python value.

        Args:
            value: a number, a text, bytes, or for a box a sequence of numbers.

        Returns:
            ``size`` elements: Python numbers, or the text or bytes as given.

        Raises:
            InvalidRequest: the type, the number of values, the range or the choice isn't what the server accepts.
        """
        if self.size == 1:
            return [self._element(value)]
        try:
            values = list(value)
        except TypeError:
            raise InvalidRequest(f"{self.name}: {_cut(value)}, expected {self.size} numbers") from None
        if len(values) != self.size:
            raise InvalidRequest(f"{self.name}: {len(values)} values, expected {self.size} numbers")
        elements = [self._element(each) for each in values]
        if self.is_interval and elements[0] > elements[-1]:
            raise InvalidRequest(f"{self.name}: {elements}, expected a begin that isn't after its end")
        return elements

    def read(self, data: bytes | memoryview) -> Any:
        """Read the value that a tensor of this input has: what ``elements`` was given.

        Raises:
            ValueError: the data has another length.
        """
        if self.dtype == "BYTES":
            (value,) = wire.read_bytes_elements(data)
            return value.decode() if self.choices else value
        try:
            values = struct.unpack(f"<{self.size}{NUMBERS[self.dtype]}", data)
        except struct.error as error:
            raise ValueError(str(error)) from None
        return values[0] if self.size == 1 else values

    def _element(self, value: Any) -> Any:
        if self.dtype == "BYTES":
            if self.choices and not (isinstance(value, str) and value in self.choices):
                raise InvalidRequest(f"{self.name}: {_cut(value)}, expected {self.expected}")
            return value
        whole = self.dtype.startswith("INT")
        # bool is an int in Python, but True portraits are a slip.
        if isinstance(value, bool) or not isinstance(value, Integral if whole else Real):
            kind = "a whole number" if whole else "a number"
            raise InvalidRequest(f"{self.name}: {_cut(value)}, expected {kind} of {self.expected}")
        # By way of its text a NumPy float32 becomes the decimal it was written as: 0.98 stays within 0.98.
        number = (
            int(value) if isinstance(value, Integral) else float(value if isinstance(value, Rational) else str(value))
        )
        # Written so that NaN, which compares false with everything, is refused.
        within = (self.minimum is None or number >= self.minimum) and (self.maximum is None or number <= self.maximum)
        if not within:
            raise InvalidRequest(f"{self.name}: {number}, expected {self.expected}")
        return number


@dataclass(frozen=True)
class Contract:
    """The served models' names, and their inputs and outputs by name."""

    model: str
    stream_model: str
    inputs: Mapping[str, InputSpec]
    outputs: Mapping[str, tuple[str, int]]
    """Triton's name of the type, and the size, -1 where it varies."""


@cache
def load_contract() -> Contract:
    """Load the contract this client was built for."""
    data = json.loads(resources.files("icportrait_client").joinpath("contract.json").read_text("utf-8"))
    specs = [InputSpec(**{**fields, "choices": tuple(fields["choices"])}) for fields in data["inputs"]]
    outputs = {each["name"]: (each["dtype"], each["size"]) for each in data["outputs"]}
    return Contract(data["models"]["unary"], data["models"]["stream"], {spec.name: spec for spec in specs}, outputs)


def _cut(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:37]}..."
