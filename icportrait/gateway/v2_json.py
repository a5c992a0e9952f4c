"""KServe's v2 protocol in JSON with its binary extension, and Triton's ``generate``.

``kserve`` and ``mlserver`` have codecs for it; docs/adr/0012 says why neither is used. This module turns a body into
tensors, and ``kserve.py`` checks the tensors.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from icportrait.contract import Array
from icportrait.errors import InvalidRequest
from icportrait.gateway import kserve
from icportrait.request import INPUTS

MAX_VALUES = 10_000
"""Brackets, commas, colons and quotes that a request may have: a list of ten million numbers would take 1 GB."""
TEXT_OUTPUTS = ("metadata",)
"""Outputs of type BYTES that are always UTF-8."""

_INPUTS = {field.name: field for field in INPUTS}


@dataclass(frozen=True)
class InferCall:
    """An ``infer`` request."""

    request_id: str
    inputs: dict[str, Array]
    wanted: frozenset[str]
    """Outputs."""
    binary: frozenset[str]
    """Outputs that come behind the JSON, as bytes."""


def read_json(body: bytes | bytearray | memoryview) -> dict[str, Any]:
    """Read a request's JSON, which is an object.

    Raises:
        InvalidRequest: it is none, or has more than ``MAX_VALUES`` values.
    """
    data = body if isinstance(body, bytes | bytearray) else bytes(body)
    # What a picture in base64 consists of is none of these; some writers put a backslash before its slashes.
    if sum(data.count(sign) for sign in b'[{,:"') > MAX_VALUES or data.count(b"\\") > MAX_VALUES + len(data) // 16:
        raise InvalidRequest(f"the request's JSON has more than {MAX_VALUES} values or signs")
    try:
        value = json.loads(data)
    except RecursionError:
        raise InvalidRequest("the request's JSON is nested too deep") from None
    except ValueError as error:
        raise InvalidRequest(f"the request is no JSON: {str(error)[:120]}") from None
    if not isinstance(value, dict):
        raise InvalidRequest(f"the request's JSON is a {type(value).__name__}, expected an object")
    return value


def read_infer(body: bytes | bytearray | memoryview, json_bytes: int | None = None) -> InferCall:
    """Read the request of ``infer``.

    Args:
        body: JSON, and the tensors' bytes behind it.
        json_bytes: how much of it is JSON, by ``Inference-Header-Content-Length``; None where all of it is.

    Raises:
        InvalidRequest: it isn't one that can be served.
    """
    view = memoryview(body)
    if json_bytes is not None and not 0 <= json_bytes <= len(view):
        raise InvalidRequest(f"Inference-Header-Content-Length: {json_bytes}, and the body has {len(view)} bytes")
    end = len(view) if json_bytes is None else json_bytes
    request = read_json(body if json_bytes is None else view[:end])
    inputs: dict[str, Array] = {}
    for tensor in _objects(request, "inputs"):
        name, datatype, shape = _text(tensor, "name"), _text(tensor, "datatype"), tensor.get("shape")
        parameters = _parameters(tensor)
        if not isinstance(shape, list):
            raise InvalidRequest(f"{name[:80]}: no shape, expected a list of whole numbers")
        if name in inputs:
            raise InvalidRequest(f"{name[:80]}: given twice")
        kserve.refuse_extensions(name, parameters)
        size = parameters.get("binary_data_size")
        if size is None:
            values = _flat(tensor.get("data"))
            inputs[name] = kserve.tensor_of_values(name, datatype, shape, values)
        else:
            if type(size) is not int or not 0 <= size <= len(view) - end:
                raise InvalidRequest(f"{name[:80]}: binary_data_size is {str(size)[:20]}, and {len(view) - end} follow")
            inputs[name] = kserve.tensor_of_raw(name, datatype, shape, view[end : end + size])
            end += size
    if end != len(view):
        raise InvalidRequest(f"{len(view) - end} bytes follow the last tensor")
    parameters, outputs = _parameters(request), _objects(request, "outputs")
    asked = [(_text(output, "name"), _parameters(output)) for output in outputs]
    wanted = kserve.wanted_outputs(asked)
    default = parameters.get("binary_data_output") is True
    are_binary = dict.fromkeys(wanted, default)
    are_binary.update((name, of.get("binary_data", default) is True) for name, of in asked)
    binary = frozenset(name for name, is_binary in are_binary.items() if is_binary)
    refuse_binary_in_json(inputs, wanted - binary)
    return InferCall(_request_id(request), inputs, wanted, binary)


def read_generate(body: bytes | bytearray | memoryview) -> tuple[str, dict[str, Array]]:
    """Read the id and the inputs of a ``generate`` request, an object whose members are inputs.

    Raises:
        InvalidRequest: it isn't one that can be served.
    """
    request = read_json(body)
    request_id = _request_id(request)
    _parameters(request)
    inputs: dict[str, Array] = {}
    for name, value in request.items():
        if name in ("id", "parameters"):
            continue
        values = _flat(value if isinstance(value, list) else [value])
        datatype = _INPUTS[name].dtype.triton if name in _INPUTS else ""
        inputs[name] = kserve.tensor_of_values(name, datatype, [len(values)], values)
    refuse_binary_in_json(inputs, ["image"])
    return request_id, inputs


def write_infer(
    model: str, request_id: str, tensors: Mapping[str, Array], binary: Collection[str]
) -> tuple[list[bytes], int | None]:
    """Write the answer of ``infer``.

    Returns:
        Its parts, and how many bytes of it are JSON; None where all are.
    """
    outputs: list[dict[str, Any]] = []
    raw: list[bytes] = []
    for name, tensor in tensors.items():
        output: dict[str, Any] = {"name": name, "datatype": kserve.output_datatype(name), "shape": list(tensor.shape)}
        if name in binary:
            raw.append(kserve.raw_of(tensor))
            output["parameters"] = {"binary_data_size": len(raw[-1])}
        else:
            output["data"] = _plain(tensor)
        outputs.append(output)
    head = json.dumps(_answer(model, request_id) | {"outputs": outputs}).encode()
    return [head, *raw], len(head) if raw else None


def write_generate(model: str, request_id: str, tensors: Mapping[str, Array]) -> bytes:
    """Write an answer of ``generate``: its members are outputs, a list only where there are more elements than one."""
    values = {name: _plain(tensor) for name, tensor in tensors.items()}
    single = {name: value[0] if len(value) == 1 else value for name, value in values.items()}
    return json.dumps(_answer(model, request_id) | single).encode()


def refuse_binary_in_json(inputs: Mapping[str, Array], in_json: Iterable[str]) -> None:
    """Look whether pictures would have to be written as JSON's text.

    Raises:
        InvalidRequest: they would.
    """
    encoding = inputs["encoding"][0] if "encoding" in inputs else b"binary"
    if "image" in in_json and encoding == b"binary":
        raise InvalidRequest("encoding: 'binary', expected base64 where pictures are part of JSON")


def _answer(model: str, request_id: str) -> dict[str, Any]:
    answer = {"model_name": model, "model_version": kserve.MODEL_VERSION}
    return answer | ({"id": request_id} if request_id else {})


def _plain(tensor: Array) -> list[Any]:
    return [element.decode() if isinstance(element, bytes) else int(element) for element in tensor]


def _flat(data: Any) -> list[Any]:
    """Return a tensor's elements, which may come nested by its axes."""
    if not isinstance(data, list):
        raise InvalidRequest("a tensor has no data, expected a list or binary_data_size")
    elements = data
    while elements and all(isinstance(each, list) for each in elements):
        elements = [element for row in elements for element in row]
    return list(elements)


def _objects(request: Mapping[str, Any], name: str) -> list[dict[str, Any]]:
    objects: Any = request.get(name, [])
    if not isinstance(objects, list) or not all(isinstance(each, dict) for each in objects):
        raise InvalidRequest(f"{name}: expected a list of objects")
    return objects


def _text(tensor: Mapping[str, Any], name: str) -> str:
    text = tensor.get(name)
    if not isinstance(text, str):
        raise InvalidRequest(f"a tensor has no {name}, expected a text")
    return text


def _parameters(of: Mapping[str, Any]) -> dict[str, Any]:
    parameters = of.get("parameters", {})
    if not isinstance(parameters, dict):
        raise InvalidRequest("parameters: expected an object")
    return parameters


def _request_id(request: Mapping[str, Any]) -> str:
    request_id = request.get("id", "")
    if not isinstance(request_id, str | int) or len(str(request_id)) > 1024:
        raise InvalidRequest("id: expected a text of at most 1024 characters")
    return str(request_id)
