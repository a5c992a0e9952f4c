"""The public request: its inputs, their ranges and defaults, and the typed form the stages pass on.

``INPUTS`` and ``OUTPUTS`` are the serving contract of ``ic_portrait`` and ``ic_portrait_stream``. Their
``config.pbtxt`` and the client's own checks (``client/src/icportrait_client/contract.json``) are generated from them.
"""

from __future__ import annotations

import json
import math
import secrets
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cache
from typing import Any

import numpy as np
from pydantic import ConfigDict, TypeAdapter, ValidationError
from pydantic_core import CoreConfig, SchemaValidator

from icportrait.contract import Array, DType
from icportrait.errors import InvalidRequest
from icportrait.phases import ALL_STEPS, Phases, guided_steps, most_rows, phases_of

MAX_SEED = 2**63 - 1
SCHEDULERS = ("ddim", "euler", "dpmpp_2m")
"""The samplers of ``diffusion.sampling``, by diffusers' names."""


@dataclass(frozen=True)
class RequestInput:
    """One public input: its type and size, and what a server accepts."""

    name: str
    dtype: DType
    size: int = 1
    required: bool = False
    default: Any = None
    minimum: float | None = None
    maximum: float | None = None
    choices: tuple[str, ...] = ()
    is_interval: bool = False
    """Two numbers, of which the first isn't above the second."""

    def parse(self, array: Array) -> Any:
        """Parse the Python value of a Triton tensor.

        Raises:
            InvalidRequest: the type, size, range or choice isn't what this input accepts.
        """
        expected = np.dtype(self.dtype.numpy)
        if array.dtype.kind != expected.kind or (expected.kind != "O" and array.dtype != expected):
            raise InvalidRequest(f"{self.name}: type is {array.dtype}, expected {self.dtype.triton}")
        if array.shape != (self.size,):
            raise InvalidRequest(f"{self.name}: shape is {list(array.shape)}, expected [{self.size}]")
        if self.dtype is DType.BYTES:
            return self._parse_bytes(array[0])
        # A float32 becomes the shortest decimal that names it: 0.98 stays within 0.98, and metadata says 0.8.
        values = [self._in_range(float(str(value)) if expected.kind == "f" else int(value)) for value in array]
        return values[0] if self.size == 1 else self._in_order(tuple(values))

    def _parse_bytes(self, value: bytes | str) -> bytes | str:
        data = value.encode() if isinstance(value, str) else bytes(value)
        if not self.choices:
            return data
        text = data.decode("utf-8", errors="replace")
        if text not in self.choices:
            raise InvalidRequest(f"{self.name}: {text[:40]!r}, expected one of {', '.join(self.choices)}")
        return text

    def to_tensor(self, value: Any) -> Array:
        """Make a tensor of a value that came as JSON: one number or text, or a list of them.

        Raises:
            InvalidRequest: it is of another type, or too large for this input's.
        """
        values = value if isinstance(value, list) else [value]
        dtype = np.dtype(self.dtype.numpy)
        expected = {"O": str, "i": int, "f": int | float}[dtype.kind]
        limit = np.iinfo(dtype).max if dtype.kind == "i" else np.finfo(np.float32).max
        for item in values:
            is_small = isinstance(item, str) or (isinstance(item, int | float) and abs(item) <= limit)
            if not isinstance(item, expected) or isinstance(item, bool) or not is_small:
                raise InvalidRequest(f"{self.name}: {str(item)[:40]}, expected {self.dtype.triton}")
        return np.array([item.encode() if isinstance(item, str) else item for item in values], dtype)

    def check(self, value: Any) -> None:
        """Look at a Python value as at a tensor's; None is absent.

        Raises:
            InvalidRequest: it is out of range, or none of the choices.
        """
        if value is None:
            return
        if self.choices and value not in self.choices:
            raise InvalidRequest(f"{self.name}: {value[:40]!r}, expected one of {', '.join(self.choices)}")
        for number in (value if isinstance(value, tuple) else [value]) if not self.choices else []:
            self._in_range(number)
        if isinstance(value, tuple):
            self._in_order(value)

    def _in_order(self, values: tuple[float, ...]) -> tuple[float, ...]:
        if self.is_interval and values[0] > values[-1]:
            raise InvalidRequest(f"{self.name}: {list(values)}, expected a begin that isn't after its end")
        return values

    def _in_range(self, value: float) -> float:
        below = self.minimum is not None and not value >= self.minimum
        above = self.maximum is not None and not value <= self.maximum
        if below or above:
            raise InvalidRequest(f"{self.name}: {value}, expected {self.minimum}..{self.maximum}")
        return value


INPUTS = (
    RequestInput("profile", DType.BYTES, required=True),
    RequestInput("reference", DType.BYTES, required=True),
    RequestInput("seed", DType.INT64, minimum=0, maximum=MAX_SEED),
    RequestInput("num_portraits", DType.INT32, default=1, minimum=1, maximum=8),
    RequestInput("num_inference_steps", DType.INT32, minimum=1, maximum=150),
    RequestInput("guidance_scale", DType.FLOAT32, minimum=1.0, maximum=20.0),
    RequestInput(
        "guidance_interval",
        DType.FLOAT32,
        size=2,
        default=ALL_STEPS,
        minimum=0.0,
        maximum=1.0,
        is_interval=True,
    ),
    RequestInput("mask_ratio", DType.FLOAT32, default=0.8, minimum=0.0, maximum=0.98),
    RequestInput("scheduler", DType.BYTES, default="dpmpp_2m", choices=SCHEDULERS),
    RequestInput("priority", DType.INT32, default=1, minimum=0, maximum=9),
    RequestInput("deadline_ms", DType.INT32, minimum=1, maximum=3_600_000),
    RequestInput("preview_every", DType.INT32, default=0, minimum=0, maximum=150),
    RequestInput("profile_box", DType.FLOAT32, size=4, minimum=0.0, maximum=1.0),
    RequestInput("reference_box", DType.FLOAT32, size=4, minimum=0.0, maximum=1.0),
    RequestInput("output_format", DType.BYTES, default="png", choices=("png", "jpeg", "webp")),
    RequestInput("encoding", DType.BYTES, default="binary", choices=("binary", "base64")),
)
_BY_NAME = {field.name: field for field in INPUTS}
OUTPUTS = (
    ("image", DType.BYTES, -1),
    ("metadata", DType.BYTES, 1),
    ("step", DType.INT32, 1),
    ("total_steps", DType.INT32, 1),
)
"""A stream's answers before the last have no ``metadata``, and ``image`` only where they are a preview."""


@dataclass(frozen=True)
class PortraitRequest:
    """A checked request without its pictures, as it travels beside the tensors through the ensemble."""

    __pydantic_config__ = ConfigDict(extra="forbid", allow_inf_nan=False)

    seed: int
    num_portraits: int
    num_inference_steps: int
    guidance_scale: float
    mask_ratio: float
    scheduler: str
    output_format: str
    encoding: str
    priority: int = 1
    """Class of the request; 0 goes first."""
    deadline_ms: int | None = None
    """Counted from ``arrived_ns``; None waits for as long as it takes."""
    preview_every: int = 0
    """Steps from one preview to the next on a stream; 0 is without."""
    arrived_ns: int = 0
    """The request's arrival at the gateway, a ``time.monotonic_ns`` reading."""
    key: str = ""
    """Name of the request between the gateway and the denoising loop, beside the ensemble."""
    guidance_interval: tuple[float, float] = ALL_STEPS
    """Begin and end of the steps with guidance, as shares of all steps."""
    is_streamed: bool = False
    """The request's caller is told of every step."""
    profile_box: tuple[float, float, float, float] | None = None
    reference_box: tuple[float, float, float, float] | None = None

    @property
    def guided_steps(self) -> range:
        """Return the steps with guidance, which costs every portrait an unconditional row."""
        return guided_steps(self.guidance_scale, self.guidance_interval, self.num_inference_steps)

    @property
    def phases(self) -> Phases:
        """Return the rows of a UNet batch that this request takes over its steps."""
        return phases_of(self.num_portraits, self.guided_steps, self.num_inference_steps)

    @property
    def rows(self) -> int:
        """Return the most rows of a UNet batch that this request takes at a step."""
        return most_rows(self.phases)

    @property
    def deadline_s(self) -> float:
        """Return the time of the deadline by ``time.monotonic``; infinite without one."""
        return math.inf if self.deadline_ms is None else self.arrived_ns / 1e9 + self.deadline_ms / 1e3

    def to_json(self) -> bytes:
        return json.dumps(vars(self)).encode()

    @classmethod
    def from_json(cls, data: bytes | str) -> PortraitRequest:
        """Read what ``to_json`` wrote, and check every type and range anew.

        Raises:
            InvalidRequest: it isn't a request.
        """
        try:
            request: PortraitRequest = _validator().validate_json(data, strict=True)
        except ValidationError as error:
            first = error.errors(include_url=False, include_input=False)[0]
            where = ".".join(map(str, first["loc"])) or "request"
            raise InvalidRequest(f"{where}: {first['msg']}") from error
        for field in INPUTS:
            field.check(getattr(request, field.name, None))
        if not 0 <= request.arrived_ns <= MAX_SEED:
            raise InvalidRequest(f"arrived_ns: {request.arrived_ns}, expected 0..{MAX_SEED}")
        return request


@cache
def _validator() -> SchemaValidator:
    # Without this, pydantic keeps the keys of 16,384 requests. A TypeAdapter of a dataclass takes no settings.
    return SchemaValidator(TypeAdapter(PortraitRequest).core_schema, CoreConfig(cache_strings="keys"))


def parse_request(
    tensors: Mapping[str, Array], defaults: Mapping[str, Any], key: str = "", is_streamed: bool = False
) -> tuple[PortraitRequest, bytes, bytes]:
    """Check the public inputs and fill in what is absent.

    Args:
        tensors: the request's tensors by name.
        defaults: by input, the checkpoint's own: ``Manifest.defaults``.
        key: by which the request is known beside the ensemble.
        is_streamed: its caller is told of every step.

    Returns:
        The request, the profile's bytes and the reference's bytes (base64 text where the encoding says so).

    Raises:
        InvalidRequest: an input is missing, unknown or out of range.
    """
    if unknown := sorted(tensors.keys() - _BY_NAME.keys()):
        raise InvalidRequest(f"{unknown[0]}: no such input, expected some of {', '.join(_BY_NAME)}")
    values: dict[str, Any] = {}
    for name, field in _BY_NAME.items():
        if name in tensors:
            values[name] = field.parse(tensors[name])
        elif field.required:
            raise InvalidRequest(f"{name}: missing, expected a picture's bytes")
        else:
            values[name] = defaults.get(name, field.default)
    if values["seed"] is None:
        values["seed"] = secrets.randbelow(2**31)
    profile, reference = values.pop("profile"), values.pop("reference")
    request = PortraitRequest(**values, arrived_ns=time.monotonic_ns(), key=key, is_streamed=is_streamed)
    return request, profile, reference


def parse_options(data: bytes | str) -> dict[str, Array]:
    """Parse the public inputs that a JSON object names, as tensors, for ``parse_request`` to check.

    Raises:
        InvalidRequest: it isn't an object, or a value has a type or size that its input can't hold.
    """
    try:
        options = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise InvalidRequest("request: no JSON, expected an object of options") from error
    if not isinstance(options, dict):
        raise InvalidRequest(f"request: {type(options).__name__}, expected a JSON object of options")
    if pictures := sorted({"profile", "reference"} & set(options)):
        raise InvalidRequest(f"{pictures[0]}: given as an option, expected a tensor of its own")
    unknown = {name: np.zeros(1) for name in options if name not in _BY_NAME}
    return unknown | {name: _BY_NAME[name].to_tensor(value) for name, value in options.items() if name in _BY_NAME}


def client_contract_text() -> str:
    """Return the public contract as JSON, for clients that don't install this package."""
    contract = {
        "models": {"unary": "ic_portrait", "stream": "ic_portrait_stream"},
        "inputs": [{**asdict(field), "dtype": field.dtype.triton} for field in INPUTS],
        "outputs": [{"name": name, "dtype": dtype.triton, "size": size} for name, dtype, size in OUTPUTS],
    }
    return json.dumps(contract, indent=2) + "\n"


def check_slots(request: PortraitRequest, slots: int) -> None:
    """Raise InvalidRequest where a request needs more rows than a batch ever has."""
    if request.rows > slots:
        raise InvalidRequest(
            f"num_portraits: {request.num_portraits} portraits at guidance_scale {request.guidance_scale:g} need "
            f"{request.rows} slots, this server has {slots}; ask for fewer, or for guidance_scale 1"
        )
