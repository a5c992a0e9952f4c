"""A request as it is sent, and what comes back, without any I/O: both clients share this."""

from __future__ import annotations

import json
import secrets
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from icportrait_client import wire
from icportrait_client.contract import NUMBERS, InputSpec, load_contract
from icportrait_client.errors import ContractMismatch, InvalidRequest, PortraitError, ServerError, from_status
from icportrait_client.options import PortraitOptions
from icportrait_client.portraits import Metadata, Portrait, Preview, Progress

DRAWN_SEEDS = 2**31
"""Seeds are drawn below this, as by the server."""
Event = Progress | Portrait

_OPTIONS = frozenset(PortraitOptions.__annotations__)
_CODES = ("UNAVAILABLE", "CANCELLED", "RESOURCE_EXHAUSTED", "UNAUTHENTICATED", "PERMISSION_DENIED", "INTERNAL")
_IS_THIS_ONE = "is this an IC-Portrait Server?"


@dataclass(frozen=True)
class Request:
    """A checked request. It has a seed, so that a second attempt gives the same picture."""

    tensors: tuple[wire.Tensor, ...]
    """Inputs but for ``deadline_ms`` and ``preview_every``."""
    deadline_ms: int | None
    preview_every: int | None

    def message(self, deadline_ms: int | None, is_stream: bool) -> bytes:
        """Build the message of one attempt.

        Args:
            deadline_ms: what is left of it.
            is_stream: ask the model that tells of steps.
        """
        contract, tensors = load_contract(), list(self.tensors)
        if deadline_ms is not None:
            tensors.append(_tensor(contract.inputs["deadline_ms"], deadline_ms))
        if is_stream and self.preview_every is not None:
            tensors.append(_tensor(contract.inputs["preview_every"], self.preview_every))
        return wire.infer_request(contract.stream_model if is_stream else contract.model, tensors)


def build_request(
    profile: bytes, reference: bytes, options: Mapping[str, Any], preview_every: int | None = None
) -> Request:
    """Check a request's options and draw a seed where none is given.

    Args:
        profile: the encoded picture.
        reference: the encoded picture.
        options: what ``PortraitOptions`` has; None counts as left out.
        preview_every: of a stream.

    Raises:
        InvalidRequest: an option is out of its range.
        TypeError: there is no such option.
    """
    if unknown := options.keys() - _OPTIONS:
        raise TypeError(f"got an unexpected keyword argument {min(unknown)!r}")
    contract = load_contract()
    values = {name: value for name, value in options.items() if value is not None}
    values.setdefault("seed", secrets.randbelow(DRAWN_SEEDS))
    deadline_ms = values.pop("deadline_ms", None)
    for name, value in (("deadline_ms", deadline_ms), ("preview_every", preview_every)):
        if value is not None:
            contract.inputs[name].elements(value)
    pictures = {"profile": profile, "reference": reference}
    tensors = tuple(_tensor(contract.inputs[name], value) for name, value in {**pictures, **values}.items())
    return Request(tensors, None if deadline_ms is None else int(deadline_ms), preview_every)


def read_answer(message: bytes, address: str) -> Portrait:
    """Read the answer of ``ModelInfer``.

    Raises:
        ServerError: it is none of an IC-Portrait Server.
    """
    try:
        return _portrait(wire.read_infer_response(message), address)
    except wire.WireError as error:
        raise ServerError(f"{address}: the answer can't be read ({error}); {_IS_THIS_ONE}") from None


def read_event(message: bytes, address: str) -> list[Event]:
    """Read an answer of ``ModelStreamInfer``: a step, and with the last one the portrait.

    Raises:
        PortraitError: the answer is an error.
        ServerError: it is none of an IC-Portrait Server.
    """
    try:
        answer = wire.read_stream_answer(message)
        if answer.error:
            # Codes were asked for. A text that has none isn't taken for the caller's mistake.
            code = answer.error.partition(": ")[0]
            raise from_status(code if code in _CODES else "UNKNOWN", answer.error, address, 0.0)
        tensors = answer.tensors
        if not tensors:
            return []
        if "step" not in tensors or "total_steps" not in tensors:
            raise ServerError(f"{address}: an answer has no step; {_IS_THIS_ONE}")
        step, total_steps = (wire.read_int32(tensors[name].data) for name in ("step", "total_steps"))
        if "metadata" in tensors:
            return [Progress(step, total_steps), _portrait(tensors, address)]
        if "image" in tensors:
            return [Preview(step, total_steps, wire.read_bytes_elements(tensors["image"].data))]
    except wire.WireError as error:
        raise ServerError(f"{address}: an answer can't be read ({error}); {_IS_THIS_ONE}") from None
    return [Progress(step, total_steps)]


def check_contract(message: bytes, address: str) -> None:
    """Compare a server's model with the contract that this client was built for. The server may have more.

    Raises:
        ContractMismatch: an input or an output is missing or of another type.
    """
    contract = load_contract()
    try:
        served = wire.read_model_metadata(message)
    except wire.WireError as error:
        raise ContractMismatch(f"{address}: the model can't be read ({error}); {_IS_THIS_ONE}") from None
    inputs = {tensor.name: (tensor.datatype, tensor.shape) for tensor in served.inputs}
    outputs = {tensor.name: (tensor.datatype, tensor.shape) for tensor in served.outputs}
    if served.name != contract.model or not inputs:
        raise ContractMismatch(f"{address}: it serves no {contract.model}; {_IS_THIS_ONE}")
    expected = [("input", spec.name, spec.dtype, spec.size, inputs) for spec in contract.inputs.values()]
    expected += [("output", name, dtype, size, outputs) for name, (dtype, size) in contract.outputs.items()]
    for kind, name, dtype, size, found in expected:
        if name not in found:
            raise ContractMismatch(
                f"{address}: the server has no {kind} {name}; install the client of the server's version"
            )
        if found[name] != (dtype, (size,)):
            came = f"{found[name][0]} {list(found[name][1])}"
            raise ContractMismatch(
                f"{address}: {kind} {name} is {came} there, expected {dtype} [{size}]; "
                "install the client of the server's version"
            )


def no_contract(address: str, error: PortraitError) -> ContractMismatch:
    """Return the error for a server that doesn't know the models that this client asks for."""
    return ContractMismatch(f"{error}; {_IS_THIS_ONE}" if str(error).startswith(address) else f"{address}: {error}")


def _portrait(tensors: Mapping[str, wire.Tensor], address: str) -> Portrait:
    try:
        files = wire.read_bytes_elements(tensors["image"].data)
        (report,) = wire.read_bytes_elements(tensors["metadata"].data)
        raw = json.loads(report)
        if not files or not isinstance(raw, dict):
            raise ValueError
    except (KeyError, ValueError, RecursionError):
        raise ServerError(f"{address}: the answer has no portraits; {_IS_THIS_ONE}") from None
    try:
        return Portrait(files, Metadata.read(raw))
    except ServerError as error:
        raise ServerError(f"{address}: {error}") from None


def _tensor(spec: InputSpec, value: Any) -> wire.Tensor:
    elements = spec.elements(value)
    if spec.dtype == "BYTES":
        data = wire.bytes_elements(each.encode() if isinstance(each, str) else each for each in elements)
    else:
        try:
            data = struct.pack(f"<{spec.size}{NUMBERS[spec.dtype]}", *elements)
        except (struct.error, OverflowError):
            raise InvalidRequest(f"{spec.name}: {value!r}, expected {spec.dtype}") from None
    return wire.Tensor(spec.name, spec.dtype, (spec.size,), data)
