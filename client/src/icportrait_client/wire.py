"""The messages of KServe's v2 protocol that this client and its test server speak, as bytes.

Nothing here does I/O. A message is built in one join, so that pictures are copied once, and read as views. The field
numbers are those of ``grpc_service.proto``. Generated classes aren't used, because protobuf registers a message's name
once in a process, and tritonclient has registered these (docs/adr/0017).
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

SERVICE = "inference.GRPCInferenceService"
_VARINT, _FIXED64, _LENGTH, _FIXED32 = 0, 1, 2, 5
_FINAL = "triton_final_response"
_PARAMETERS = 14
"""Number of the parameters' field in ``ModelConfig``."""

Data = bytes | memoryview


class WireError(ValueError):
    """Bytes that aren't the message they should be."""


@dataclass(frozen=True)
class Tensor:
    """A named tensor and its elements' bytes."""

    name: str
    datatype: str
    shape: tuple[int, ...]
    data: Data = b""


@dataclass(frozen=True)
class StreamAnswer:
    """One answer of ``ModelStreamInfer``."""

    tensors: Mapping[str, Tensor]
    error: str = ""
    is_final: bool = False


@dataclass(frozen=True)
class ModelMetadata:
    """Inputs and outputs of a model; their tensors have no data."""

    name: str
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]


# Elements.


def bytes_elements(values: Iterable[bytes]) -> bytes:
    """Return a BYTES tensor's elements, each behind its length."""
    return b"".join(part for value in values for part in (struct.pack("<I", len(value)), value))


def read_bytes_elements(data: Data) -> tuple[bytes, ...]:
    """Read a BYTES tensor's elements.

    Raises:
        WireError: the data ends within an element.
    """
    view, at, values = memoryview(data), 0, []
    while at < len(view):
        end = at + 4 + int.from_bytes(view[at : at + 4], "little")
        if at + 4 > len(view) or end > len(view):
            raise WireError("a BYTES tensor ends within an element")
        values.append(bytes(view[at + 4 : end]))
        at = end
    return tuple(values)


def read_int32(data: Data) -> int:
    """Read the only element of an INT32 tensor.

    Raises:
        WireError: the data has another length.
    """
    if len(data) != 4:
        raise WireError(f"an INT32 has {len(data)} bytes, expected 4")
    return int.from_bytes(data, "little", signed=True)


# Requests and answers.


def infer_request(model: str, tensors: Sequence[Tensor]) -> bytes:
    """Build a ``ModelInferRequest``."""
    return b"".join([*_field(1, model.encode()), *_tensors(tensors, inputs=5, raw=7)])


def read_infer_request(message: Data) -> tuple[str, dict[str, Tensor]]:
    """Read the model and the inputs of a ``ModelInferRequest``.

    Raises:
        WireError: the bytes are no such message.
    """
    return _text(message, 1), _read_tensors(message, described=5, raw=7)


def infer_response(model: str, tensors: Sequence[Tensor]) -> bytes:
    """Build a ``ModelInferResponse``."""
    return b"".join([*_field(1, model.encode()), *_field(2, b"1"), *_tensors(tensors, inputs=5, raw=6)])


def read_infer_response(message: Data) -> dict[str, Tensor]:
    """Read the outputs of a ``ModelInferResponse``.

    Raises:
        WireError: the bytes are no such message.
    """
    return _read_tensors(message, described=5, raw=6)


def stream_answer(model: str, tensors: Sequence[Tensor], *, is_final: bool = False) -> bytes:
    """Build a ``ModelStreamInferResponse`` without an error."""
    final = b"".join([*_field(1, _FINAL.encode()), *_field(2, bytes([1 << 3 | _VARINT, is_final]))])
    return b"".join(_field(2, infer_response(model, tensors) + b"".join(_field(4, final))))


def stream_error(text: str) -> bytes:
    """Build a ``ModelStreamInferResponse`` that is an error."""
    return b"".join(_field(1, text.encode()))


def read_stream_answer(message: Data) -> StreamAnswer:
    """Read a ``ModelStreamInferResponse``.

    Raises:
        WireError: the bytes are no such message.
    """
    error, tensors, is_final = _text(message, 1), dict[str, Tensor](), False
    for number, value in _fields(message):
        if number == 2 and not isinstance(value, int):
            tensors |= read_infer_response(value)
            for inner, entry in _fields(value):
                if inner == 4 and not isinstance(entry, int) and _text(entry, 1) == _FINAL:
                    is_final = any(_bool(flag) for key, flag in _fields(entry) if key == 2)
    return StreamAnswer(tensors, error, is_final)


# Health and metadata.


def flag(value: bool) -> bytes:
    """Build a message whose first field is a boolean, such as ``ServerReadyResponse``."""
    return bytes([1 << 3 | _VARINT, 1]) if value else b""


def read_flag(message: Data) -> bool:
    """Read a message whose first field is a boolean.

    Raises:
        WireError: the bytes are no message.
    """
    return any(number == 1 and value == 1 for number, value in _fields(message))


def named_request(name: str) -> bytes:
    """Build a message whose first field is a name, such as ``ModelMetadataRequest``."""
    return b"".join(_field(1, name.encode()))


def read_name(message: Data) -> str:
    """Read a message whose first field is a name.

    Raises:
        WireError: the bytes are no message.
    """
    return _text(message, 1)


def model_metadata(metadata: ModelMetadata) -> bytes:
    """Build a ``ModelMetadataResponse``."""
    parts = [*_field(1, metadata.name.encode()), *_field(2, b"1")]
    for number, tensors in ((4, metadata.inputs), (5, metadata.outputs)):
        for tensor in tensors:
            parts += _field(number, _described(tensor))
    return b"".join(parts)


def read_model_metadata(message: Data) -> ModelMetadata:
    """Read a ``ModelMetadataResponse``.

    Raises:
        WireError: the bytes are no such message.
    """
    found: dict[int, list[Tensor]] = {4: [], 5: []}
    for number, value in _fields(message):
        if number in found and not isinstance(value, int):
            found[number].append(_read_described(value))
    return ModelMetadata(_text(message, 1), tuple(found[4]), tuple(found[5]))


def server_metadata(name: str, version: str) -> bytes:
    """Build a ``ServerMetadataResponse``."""
    return b"".join([*_field(1, name.encode()), *_field(2, version.encode())])


def read_server_metadata(message: Data) -> tuple[str, str]:
    """Read the name and the version of a ``ServerMetadataResponse``.

    Raises:
        WireError: the bytes are no message.
    """
    return _text(message, 1), _text(message, 2)


def model_config(name: str, parameters: Mapping[str, str]) -> bytes:
    """Build a ``ModelConfigResponse`` that has only a name and parameters."""
    parts = [*_field(1, name.encode())]
    for key, value in parameters.items():
        text = b"".join(_field(1, value.encode()))
        parts += _field(_PARAMETERS, b"".join([*_field(1, key.encode()), *_field(2, text)]))
    return b"".join(_field(1, b"".join(parts)))


def read_model_parameters(message: Data) -> dict[str, str]:
    """Read the parameters of a ``ModelConfigResponse``.

    Raises:
        WireError: the bytes are no such message.
    """
    found = {}
    for number, config in _fields(message):
        if number == 1 and not isinstance(config, int):
            entries = [value for key, value in _fields(config) if key == _PARAMETERS and not isinstance(value, int)]
            for entry in entries:
                texts = [value for key, value in _fields(entry) if key == 2 and not isinstance(value, int)]
                found[_text(entry, 1)] = _text(texts[-1], 1) if texts else ""
    return found


# Protobuf.


def _varint(value: int) -> bytes:
    value &= 2**64 - 1
    parts = bytearray()
    while value > 0x7F:
        parts.append(value & 0x7F | 0x80)
        value >>= 7
    parts.append(value)
    return bytes(parts)


def _field(number: int, data: Data) -> tuple[bytes, Data]:
    return _varint(number << 3 | _LENGTH) + _varint(len(data)), data


def _tensors(tensors: Sequence[Tensor], inputs: int, raw: int) -> Iterator[Data]:
    for tensor in tensors:
        yield from _field(inputs, _described(tensor))
    for tensor in tensors:
        yield from _field(raw, tensor.data)


def _described(tensor: Tensor) -> bytes:
    shape = b"".join(map(_varint, tensor.shape))
    return b"".join([*_field(1, tensor.name.encode()), *_field(2, tensor.datatype.encode()), *_field(3, shape)])


def _read_tensors(message: Data, described: int, raw: int) -> dict[str, Tensor]:
    tensors: list[Tensor] = []
    contents: list[memoryview] = []
    for number, value in _fields(message):
        if number == described and not isinstance(value, int):
            tensors.append(_read_described(value))
        elif number == raw and not isinstance(value, int):
            contents.append(value)
    if len(tensors) != len(contents):
        raise WireError(f"{len(contents)} raw contents for {len(tensors)} tensors")
    pairs = zip(tensors, contents, strict=True)
    return {tensor.name: Tensor(tensor.name, tensor.datatype, tensor.shape, data) for tensor, data in pairs}


def _read_described(message: memoryview) -> Tensor:
    texts, shape = {1: "", 2: ""}, list[int]()
    for number, value in _fields(message):
        if number == 3:
            shape += [value] if isinstance(value, int) else _packed(value)
        elif number in texts and not isinstance(value, int):
            texts[number] = str(value, errors="replace")
    return Tensor(texts[1], texts[2], tuple(each - 2**64 if each >= 2**63 else each for each in shape))


def _text(message: Data, wanted: int) -> str:
    text = b""
    for number, value in _fields(message):
        if number == wanted and not isinstance(value, int):
            text = bytes(value)
    return text.decode(errors="replace")


def _bool(value: int | memoryview) -> bool:
    return not isinstance(value, int) and read_flag(value)


def _packed(data: memoryview) -> list[int]:
    values, at = [], 0
    while at < len(data):
        value, at = _read_varint(data, at)
        values.append(value)
    return values


def _fields(message: Data) -> Iterator[tuple[int, int | memoryview]]:
    """Yield each field's number and its value: a number, or a view of what has a length."""
    view, at = memoryview(message), 0
    while at < len(view):
        key, at = _read_varint(view, at)
        kind = key & 7
        if kind == _VARINT:
            value, at = _read_varint(view, at)
            yield key >> 3, value
            continue
        if kind == _LENGTH:
            size, at = _read_varint(view, at)
        elif kind in (_FIXED64, _FIXED32):
            size = 8 if kind == _FIXED64 else 4
        else:
            raise WireError(f"a field of wire type {kind}")
        if at + size > len(view):
            raise WireError("a message ends within a field")
        yield key >> 3, view[at : at + size]
        at += size


def _read_varint(view: memoryview, at: int) -> tuple[int, int]:
    if at < len(view) and view[at] < 0x80:
        return view[at], at + 1
    value = 0
    for shift in range(0, 70, 7):
        if at >= len(view):
            raise WireError("a message ends within a number")
        byte = view[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
    raise WireError("a number of more than ten bytes")
