"""``ModelInferRequest`` from its bytes: pictures are found, not parsed, and nothing grows beyond what was sent.

Protobuf parses a message in one piece, and millions of empty fields in a small message become gigabytes of objects. So
the contents of tensors are left out of what protobuf gets, and the rest must be small. To put 38 MB together in one
piece takes 100 ms, in which nothing else is done; so a large message is read field by field, and its pictures grow as
they come.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

from google.protobuf.message import DecodeError
from tritonclient.grpc import service_pb2

from icportrait.contract import Array
from icportrait.errors import InvalidRequest
from icportrait.gateway.kserve import refuse_extensions, tensor_of_raw, tensor_of_values

MAX_HEAD_BYTES = 64 * 1024
"""Size limit of a request beside its tensors' contents."""
MAX_CONTENTS = 64
"""Tensors with raw contents, and elements of a tensor with typed ones; more than any request of ours has."""
PREFIX_BYTES = 5
"""Bytes before a gRPC message: its compression flag and its length."""

_INPUTS, _RAW_CONTENTS = 5, 7
_CONTENTS, _BYTES_CONTENTS = 5, 8
_VARINT, _FIXED64, _LENGTH, _FIXED32 = 0, 1, 2, 5
_WHOLE_BYTES = 2**20
"""A message of no more is read before it is looked at."""
_LARGE_BYTES = 4096
"""Size above which an input is searched for contents; smaller inputs are left to protobuf."""
_TYPED = {"BYTES": "bytes_contents", "FP32": "fp32_contents", "INT32": "int_contents", "INT64": "int64_contents"}


class Source(Protocol):
    """Bytes that come."""

    async def take(self, size: int) -> bytes:
        """Take the next ``size`` bytes, as soon as they are there."""


@dataclass(frozen=True)
class Element:
    """The only element of a tensor with raw contents of type BYTES, without its length."""

    data: bytes


@dataclass(frozen=True)
class InferRequest:
    """A request as it came; views are into its message."""

    head: Any
    """``ModelInferRequest`` without the contents of tensors."""
    raw: tuple[memoryview | Element, ...]
    """In the order of ``head.inputs``; empty where contents are typed."""
    typed: dict[int, tuple[memoryview, ...]]
    """Elements of type BYTES that were left out of ``head.inputs[index].contents``."""

    def inputs(self) -> dict[str, Array]:
        """Return the tensors by name. They don't keep the message in memory.

        Raises:
            InvalidRequest: one is unknown, there twice, or not of its type, shape or length.
        """
        if self.raw and len(self.raw) != len(self.head.inputs):
            raise InvalidRequest(
                f"raw_input_contents: {len(self.raw)} entries, expected one for each of {len(self.head.inputs)} inputs"
            )
        tensors: dict[str, Array] = {}
        for index, tensor in enumerate(self.head.inputs):
            name = tensor.name
            refuse_extensions(name, tensor.parameters)
            if name in tensors:
                raise InvalidRequest(f"{name[:80]}: there twice")
            if self.raw and (tensor.HasField("contents") or self.typed.get(index)):
                raise InvalidRequest(f"{name[:80]}: contents beside raw_input_contents; send one of the two")
            tensors[name] = self._tensor(index, tensor)
        return tensors

    def _tensor(self, index: int, tensor: Any) -> Array:
        if self.raw:
            raw = self.raw[index]
            if isinstance(raw, Element):
                return tensor_of_values(tensor.name, tensor.datatype, tensor.shape, [raw.data])
            return tensor_of_raw(tensor.name, tensor.datatype, tensor.shape, raw)
        field = _TYPED.get(tensor.datatype)
        values = self.typed.get(index) or (list(getattr(tensor.contents, field)) if field else ())
        return tensor_of_values(tensor.name, tensor.datatype, tensor.shape, values)


def read_infer_request(message: bytes | bytearray) -> InferRequest:
    """Find a request's parts.

    Raises:
        InvalidRequest: it is no ``ModelInferRequest``, or larger beside its tensors' contents than any that is served.
    """
    view, head = memoryview(message), bytearray()
    raw: list[memoryview | Element] = []
    typed: dict[int, tuple[memoryview, ...]] = {}
    inputs = 0
    for number, kind, start, value, end in _fields(view):
        if number == _RAW_CONTENTS and kind == _LENGTH:
            _append(raw, view[value:end], "raw_input_contents")
            continue
        if number == _INPUTS and kind == _LENGTH:
            if end - value > _LARGE_BYTES:
                light, typed[inputs] = _without_elements(view[value:end])
                _grow(head, _field(_INPUTS, light))
            else:
                _grow(head, view[start:end])
            inputs += 1
            continue
        _grow(head, view[start:end])
    return InferRequest(_parsed(head), tuple(raw), typed)


async def receive_infer_request(source: Source, size: int) -> InferRequest:
    """Find a request's parts as they come.

    Args:
        source: has the message's bytes next.
        size: of the message.

    Raises:
        InvalidRequest: see ``read_infer_request``.
    """
    if size <= _WHOLE_BYTES:
        return read_infer_request(await source.take(size))
    head = bytearray()
    raw: list[memoryview | Element] = []
    typed: dict[int, tuple[memoryview, ...]] = {}
    inputs = 0
    while size:
        tag, start = await _take_varint(source)
        number, kind = tag >> 3, tag & 7
        length = {_VARINT: 0, _FIXED64: 8, _FIXED32: 4}.get(kind, -1)
        if kind == _LENGTH:
            length, more = await _take_varint(source)
            start += more
        elif kind == _VARINT:
            start += (await _take_varint(source))[1]
        size -= len(start) + length
        if length < 0:
            raise InvalidRequest("the message is no ModelInferRequest")
        if size < 0:
            raise InvalidRequest("the message ends within a field")
        if number == _RAW_CONTENTS and kind == _LENGTH:
            _append(raw, await _take_contents(source, length), "raw_input_contents")
        elif number == _INPUTS and kind == _LENGTH:
            if length > _LARGE_BYTES:
                light, typed[inputs] = _without_elements(memoryview(await source.take(length)))
                _grow(head, _field(_INPUTS, light))
            else:
                _grow(head, start + await source.take(length))
            inputs += 1
        else:
            _grow(head, start, length)
            head += await source.take(length)
    return InferRequest(_parsed(head), tuple(raw), typed)


async def _take_contents(source: Source, length: int) -> memoryview | Element:
    if length <= _LARGE_BYTES:
        return memoryview(await source.take(length))
    prefix = await source.take(4)
    data = await source.take(length - 4)
    return Element(data) if int.from_bytes(prefix, "little") == len(data) else memoryview(prefix + data)


async def _take_varint(source: Source) -> tuple[int, bytes]:
    """Take an integer, and return its value and its bytes."""
    written = b""
    while not written or written[-1] >= 0x80:
        if len(written) == 10:
            raise InvalidRequest("the message is no ModelInferRequest")
        written += await source.take(1)
    return _varint(memoryview(written), 0)[0], written


def _parsed(head: bytearray) -> Any:
    try:
        return service_pb2.ModelInferRequest.FromString(bytes(head))
    except DecodeError:
        raise InvalidRequest("the message is no ModelInferRequest") from None


def _without_elements(tensor: memoryview) -> tuple[bytearray, tuple[memoryview, ...]]:
    """Separate an input from its elements of type BYTES, and return both."""
    light, elements = bytearray(), list[memoryview]()
    for number, kind, start, value, end in _fields(tensor):
        if number != _CONTENTS or kind != _LENGTH:
            _grow(light, tensor[start:end])
            continue
        contents, rest = tensor[value:end], bytearray()
        for inner, inner_kind, inner_start, inner_value, inner_end in _fields(contents):
            if inner == _BYTES_CONTENTS and inner_kind == _LENGTH:
                _append(elements, contents[inner_value:inner_end], "bytes_contents")
            else:
                _grow(rest, contents[inner_start:inner_end])
        _grow(light, _field(_CONTENTS, rest))
    return light, tuple(elements)


def _fields(view: memoryview) -> Iterator[tuple[int, int, int, int, int]]:
    """Yield each field's number and wire type, and where the field, its value and the next field begin."""
    at, length = 0, len(view)
    while at < length:
        start = at
        tag, at = _varint(view, at)
        kind = tag & 7
        value = at
        if kind == _LENGTH:
            size, value = _varint(view, at)
            at = value + size
        elif kind == _VARINT:
            _, at = _varint(view, at)
        elif kind == _FIXED64:
            at += 8
        elif kind == _FIXED32:
            at += 4
        else:
            raise InvalidRequest("the message is no ModelInferRequest")
        if at > length:
            raise InvalidRequest("the message ends within a field")
        yield tag >> 3, kind, start, value, at


def _varint(view: memoryview, at: int) -> tuple[int, int]:
    if at < len(view) and view[at] < 0x80:  # as nearly all are
        return view[at], at + 1
    result = shift = 0
    for index in range(at, min(at + 10, len(view))):
        byte = view[index]
        result |= (byte & 0x7F) << shift
        if byte < 0x80:
            return result, index + 1
        shift += 7
    raise InvalidRequest("the message ends within a field")


def _field(number: int, value: bytearray) -> bytes:
    """Write a field of wire type LENGTH."""
    head, size = bytearray([number << 3 | _LENGTH]), len(value)
    while size >= 0x80:
        head.append(size & 0x7F | 0x80)
        size >>= 7
    head.append(size)
    return bytes(head + value)


def _append(parts: list[Any], part: memoryview | Element, name: str) -> None:
    if len(parts) == MAX_CONTENTS:
        raise InvalidRequest(f"{name}: more than {MAX_CONTENTS} entries")
    parts.append(part)


def _grow(head: bytearray, part: bytes | memoryview, more_bytes: int = 0) -> None:
    if len(head) + len(part) + more_bytes > MAX_HEAD_BYTES:
        raise InvalidRequest(f"the request takes more than {MAX_HEAD_BYTES} bytes beside its tensors' contents")
    head += part
