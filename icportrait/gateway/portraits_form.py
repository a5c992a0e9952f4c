"""The form of ``POST /v1/portraits``: two files, and options as text fields, in ``multipart/form-data``.

It is parsed as it comes; a file is kept once, as its bytes.
"""

from __future__ import annotations

from typing import Any

from multipart import MultipartError, MultipartSegment, PushMultipartParser, parse_options_header

from icportrait.contract import Array, DType
from icportrait.errors import InvalidRequest
from icportrait.gateway import kserve
from icportrait.request import INPUTS, RequestInput

FIELDS = {field.name: field for field in INPUTS if field.name != "encoding"}
"""Pictures come and go as files, so that their encoding is no matter."""
FILES = tuple(name for name, field in FIELDS.items() if field.dtype is DType.BYTES and not field.choices)
OPTION_BYTES = 256


class PortraitsForm:
    """A form on its way."""

    def __init__(self, content_type: str) -> None:
        """Begin a form.

        Args:
            content_type: the request's header.

        Raises:
            InvalidRequest: it isn't a form's.
        """
        kind, options = parse_options_header(content_type)
        if kind != "multipart/form-data" or not options.get("boundary"):
            raise InvalidRequest(
                f"Content-Type: {content_type[:80]!r}, expected multipart/form-data with a boundary; "
                "curl sends it with -F profile=@me.jpg -F reference=@portrait.jpg"
            )
        try:
            self._parser = PushMultipartParser(options["boundary"], max_segment_count=2 * len(FIELDS))
        except MultipartError as error:
            raise InvalidRequest(f"Content-Type: {error.args[0]}") from None
        self._values: dict[str, bytearray] = {}
        self._name = ""

    def feed(self, data: bytes) -> None:
        """Take more of the body.

        Raises:
            InvalidRequest: it isn't a form's, or has a field that there isn't.
        """
        try:
            for event in self._parser.parse(data) if data else ():
                if isinstance(event, MultipartSegment):
                    self._begin(event)
                elif event is not None:
                    self._add(event)
        except MultipartError as error:
            raise _unreadable(error) from None

    def inputs(self) -> dict[str, Array]:
        """Return the request's inputs, once all parts have come.

        Raises:
            InvalidRequest: it ends too early, or an option isn't of its type.
        """
        try:
            self._parser.close()
        except MultipartError as error:
            raise _unreadable(error) from None
        return {name: _tensor(FIELDS[name], bytes(value)) for name, value in self._values.items()}

    def _begin(self, segment: MultipartSegment) -> None:
        name = segment.name or ""
        if name not in FIELDS:
            raise InvalidRequest(f"{name[:80]}: no such field, expected some of {', '.join(FIELDS)}")
        if name in self._values:
            raise InvalidRequest(f"{name}: given twice")
        self._name = name
        self._values[name] = bytearray()

    def _add(self, data: bytes) -> None:
        value = self._values[self._name]
        value += data
        if self._name not in FILES and len(value) > OPTION_BYTES:
            raise InvalidRequest(f"{self._name}: more than {OPTION_BYTES} bytes")


def _unreadable(error: MultipartError) -> InvalidRequest:
    # What follows the first argument is for programmers, such as the cause.
    return InvalidRequest(f"the form can't be read: {error.args[0]}")


def _tensor(field: RequestInput, value: bytes) -> Array:
    if field.name in FILES:
        values: list[Any] = [value]
    else:
        text = value.decode(errors="replace").strip()
        texts = text.split(",") if field.size > 1 else [text]
        values = [_element(field, each.strip()) for each in texts]
    return kserve.tensor_of_values(field.name, field.dtype.triton, [len(values)], values)


def _element(field: RequestInput, text: str) -> Any:
    if field.dtype is DType.BYTES:
        return text
    try:
        return float(text) if field.dtype is DType.FLOAT32 else int(text)
    except ValueError:
        kind = "a number" if field.dtype is DType.FLOAT32 else "a whole number"
        raise InvalidRequest(f"{field.name}: {text[:40]!r}, expected {kind}") from None
