"""The two public models as KServe's v2 protocol has them: what they are, and their tensors.

Both doors use this; how a message comes and goes is theirs. A tensor's name, type, shape and length are checked against
``request.INPUTS`` before any element is read.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from typing import Any

import numpy as np
from google.protobuf.descriptor import FieldDescriptor
from tritonclient.grpc import model_config_pb2, service_pb2

from icportrait.contract import Array, DType
from icportrait.deploy.triton_config import PUBLIC_MODELS, public_configs
from icportrait.errors import InvalidRequest, NotFound
from icportrait.gateway.api import Event, Portraits, Statistics
from icportrait.policy import ServingPolicy
from icportrait.request import INPUTS, OUTPUTS, RequestInput

MODEL_VERSION = "1"
SERVER_NAME = "icportrait"
EXTENSIONS = ("binary_tensor_data", "model_configuration", "parameters", "statistics")
"""Extensions of the protocol that the doors have. They have no others."""

_INPUTS = {field.name: field for field in INPUTS}
_OUTPUTS = {name: dtype for name, dtype, _ in OUTPUTS}
_NOT_OFFERED = {"classification": "classification", "shared_memory": "shared memory"}
"""Names of the refused features, by the beginning of the tensor parameters that ask for them."""
_INTEGERS = {DType.INT32: (-(2**31), 2**31 - 1), DType.INT64: (-(2**63), 2**63 - 1)}


@dataclass(frozen=True)
class PublicModel:
    """A model that callers name."""

    name: str
    is_stream: bool
    """Tells of steps and previews before the portraits; KServe calls it decoupled."""


MODELS = {name: PublicModel(name, is_decoupled) for name, is_decoupled in PUBLIC_MODELS.items()}


class KserveModels:
    """The public models' configurations and metadata under one policy."""

    def __init__(self, policy: ServingPolicy) -> None:
        self._configs = {model.name: _config(model, policy) for model in MODELS.values()}
        self._metadata = {model.name: _metadata(model) for model in MODELS.values()}

    def find(self, name: str, version: str = "") -> PublicModel:
        """Find the model of that name; an empty version is any.

        Raises:
            NotFound: there is none.
        """
        if name not in MODELS:
            raise NotFound(f"Request for unknown model: {name[:80]!r} is not found")
        if version not in ("", MODEL_VERSION):
            raise NotFound(f"Request for unknown model: {name!r} version {version[:20]} is not found")
        return MODELS[name]

    def config(self, name: str, version: str = "") -> Any:
        """Return a ``ModelConfig`` message.

        Raises:
            NotFound: there is no such model.
        """
        return self._configs[self.find(name, version).name]

    def metadata(self, name: str, version: str = "") -> Any:
        """Return a ``ModelMetadataResponse``.

        Raises:
            NotFound: there is no such model.
        """
        return self._metadata[self.find(name, version).name]

    def server_metadata(self) -> Any:
        """Return a ``ServerMetadataResponse``."""
        return service_pb2.ServerMetadataResponse(
            name=SERVER_NAME, version=metadata.version("icportrait"), extensions=EXTENSIONS
        )

    def statistics(self, counted: Mapping[str, Statistics], name: str = "", version: str = "") -> Any:
        """Return a ``ModelStatisticsResponse``, of every model where no name is given.

        Raises:
            NotFound: there is no such model.
        """
        names = [self.find(name, version).name] if name else list(MODELS)
        answer = service_pb2.ModelStatisticsResponse()
        for each in names:
            _count(answer.model_stats.add(name=each, version=MODEL_VERSION), counted.get(each, Statistics()))
        return answer


def to_json(message: Any) -> dict[str, Any]:
    """Convert a message's fields as Triton does over HTTP: under their own names, defaults too, integers as numbers."""
    return {
        field.name: _field_to_json(field, getattr(message, field.name))
        for field in message.DESCRIPTOR.fields
        if not field.has_presence or message.HasField(field.name)
    }


def tensor_of_raw(name: str, datatype: str, shape: Sequence[int], data: bytes | memoryview) -> Array:
    """Make an input from its bytes on the wire; elements of type BYTES become ``bytes``.

    Raises:
        InvalidRequest: there is no such input, or it isn't of that type, shape or length.
    """
    field = _checked(name, datatype, shape)
    if field.dtype is DType.BYTES:
        return _objects(_elements(name, data, field.size))
    expected = np.dtype(field.dtype.numpy)
    if len(data) != field.size * expected.itemsize:
        raise InvalidRequest(f"{name}: {len(data)} bytes, expected {field.size * expected.itemsize}")
    return np.frombuffer(data, expected).copy()


def tensor_of_values(name: str, datatype: str, shape: Sequence[int], values: Sequence[Any]) -> Array:
    """Make an input from its elements, of JSON or of typed contents; texts of type BYTES become UTF-8.

    Raises:
        InvalidRequest: there is no such input, or it isn't of that type, shape or length.
    """
    field = _checked(name, datatype, shape)
    if len(values) != field.size:
        raise InvalidRequest(f"{name}: {len(values)} elements, expected {field.size}")
    read = [_element(field, value) for value in values]
    if field.dtype is DType.BYTES:
        return _objects(read)
    with np.errstate(over="ignore"):  # infinity is out of range, and refused as such
        return np.array(read, field.dtype.numpy)


def refuse_extensions(name: str, parameters: Iterable[str]) -> None:
    """Refuse a tensor's parameters that ask for an extension. Unknown parameters are ignored.

    Raises:
        InvalidRequest: they ask for what this server doesn't offer.
    """
    for parameter in parameters:
        for start, what in _NOT_OFFERED.items():
            if parameter.startswith(start):
                raise InvalidRequest(f"{name[:80]}: {what} is not offered; leave {parameter[:40]} out")


def wanted_outputs(asked: Iterable[tuple[str, Iterable[str]]]) -> frozenset[str]:
    """Return the outputs that a caller gets.

    Args:
        asked: the name and the parameters' names of each output asked for; with none all are wanted.

    Raises:
        InvalidRequest: there is no such output, or what is asked of it isn't offered.
    """
    wanted = set()
    for name, parameters in asked:
        if name not in _OUTPUTS:
            raise InvalidRequest(f"{name[:80]}: no such output, expected some of {', '.join(_OUTPUTS)}")
        refuse_extensions(name, parameters)
        wanted.add(name)
    return frozenset(wanted or _OUTPUTS)


def answer_tensors(portraits: Portraits, wanted: Collection[str]) -> dict[str, Array]:
    """Return the outputs of a request's last answer."""
    tensors = {"image": _objects(portraits.images), "metadata": _objects([portraits.metadata])}
    return _picked(tensors | _counts(portraits.total_steps, portraits.total_steps), wanted)


def event_tensors(event: Event, wanted: Collection[str]) -> dict[str, Array]:
    """Return the outputs of an answer before the last."""
    tensors = {"image": _objects(event.images)} if event.images else {}
    return _picked(tensors | _counts(event.step, event.total_steps), wanted)


def output_datatype(name: str) -> str:
    """Return KServe's name for an output's type."""
    return _OUTPUTS[name].triton


def raw_of(tensor: Array) -> bytes:
    """Return a tensor's bytes on the wire."""
    if tensor.dtype != object:
        return tensor.tobytes()
    return b"".join(part for element in tensor for part in (struct.pack("<I", len(element)), element))


def _picked(tensors: dict[str, Array], wanted: Collection[str]) -> dict[str, Array]:
    return {name: tensor for name, tensor in tensors.items() if name in wanted}


def _counts(step: int, total_steps: int) -> dict[str, Array]:
    return {"step": np.array([step], np.int32), "total_steps": np.array([total_steps], np.int32)}


def _objects(elements: Sequence[bytes]) -> Array:
    array = np.empty(len(elements), object)
    array[:] = elements
    return array


def _checked(name: str, datatype: str, shape: Sequence[int]) -> RequestInput:
    field = _INPUTS.get(name)
    if field is None:
        raise InvalidRequest(f"{name[:80]}: no such input, expected some of {', '.join(_INPUTS)}")
    if datatype != field.dtype.triton:
        raise InvalidRequest(f"{name}: type is {datatype[:20]}, expected {field.dtype.triton}")
    if list(shape) != [field.size]:
        raise InvalidRequest(f"{name}: shape is {str(list(shape[:8]))[:80]}, expected [{field.size}]")
    return field


def _elements(name: str, data: bytes | memoryview, count: int) -> list[bytes]:
    """Read ``count`` elements, each behind its length."""
    elements, at, view = [], 0, memoryview(data)
    for _ in range(count):
        start = at + 4
        length = int.from_bytes(view[at:start], "little")
        at = start + length
        if start > len(view) or at > len(view):
            raise InvalidRequest(f"{name}: ends within an element")
        elements.append(bytes(view[start:at]))
    if at != len(view):
        raise InvalidRequest(f"{name}: {len(view) - at} bytes follow its last element")
    return elements


def _element(field: RequestInput, value: Any) -> Any:
    if field.dtype is DType.BYTES:
        if isinstance(value, str):
            # What JSON lets through as half a character is no text of a caller's.
            return value.encode(errors="replace")
        if isinstance(value, bytes | memoryview):
            return bytes(value)
    elif field.dtype in _INTEGERS:
        low, high = _INTEGERS[field.dtype]
        if type(value) is int:
            if low <= value <= high:
                return value
            raise InvalidRequest(f"{field.name}: {_short(value)}, expected {field.minimum}..{field.maximum}")
    elif type(value) in (int, float):
        try:
            return float(value)
        except OverflowError:
            return math.inf
    raise InvalidRequest(f"{field.name}: {_short(value)}, expected elements of type {field.dtype.triton}")


def _short(value: Any) -> str:
    if isinstance(value, int) and value.bit_length() > 100:
        return "a number of more than 30 digits"
    if isinstance(value, dict | list):
        return f"a {type(value).__name__}"
    return repr(value[:40] if isinstance(value, str | bytes) else value)[:60]


def _config(model: PublicModel, policy: ServingPolicy) -> Any:
    """Build a public model's configuration with the fields that Triton would add, because clients read them."""
    config = public_configs()[model.name]
    config.platform = config.backend = SERVER_NAME
    config.version_policy.latest.num_versions = 1
    config.instance_group.add(name=model.name, count=1, kind=model_config_pb2.ModelInstanceGroup.KIND_CPU)
    for key, value in policy.to_parameters().items():
        config.parameters[key].string_value = value
    return config


def _metadata(model: PublicModel) -> Any:
    answer = service_pb2.ModelMetadataResponse(name=model.name, versions=[MODEL_VERSION], platform=SERVER_NAME)
    for field in INPUTS:
        answer.inputs.add(name=field.name, datatype=field.dtype.triton, shape=[field.size])
    for output, dtype, size in OUTPUTS:
        answer.outputs.add(name=output, datatype=dtype.triton, shape=[size])
    return answer


def _count(answer: Any, counted: Statistics) -> None:
    """Fill in a model's counts. Requests aren't batched here, so an execution is a request.

    All time that isn't queueing is computing.
    """
    computed_ns = max(counted.succeeded_ns - counted.queued_ns, 0)
    answer.last_inference = counted.last_ms
    answer.inference_count = answer.execution_count = counted.succeeded
    durations = answer.inference_stats
    for duration, count, total_ns in (
        (durations.success, counted.succeeded, counted.succeeded_ns),
        (durations.fail, counted.failed, counted.failed_ns),
        (durations.queue, counted.succeeded, counted.queued_ns),
        (durations.compute_input, counted.succeeded, 0),
        (durations.compute_infer, counted.succeeded, computed_ns),
        (durations.compute_output, counted.succeeded, 0),
    ):
        duration.count, duration.ns = count, total_ns


def _field_to_json(field: Any, value: Any) -> Any:
    if field.message_type is not None and field.message_type.GetOptions().map_entry:
        of = field.message_type.fields_by_name["value"]
        return {str(key): _one_to_json(of, value[key]) for key in value}
    if field.is_repeated:
        return [_one_to_json(field, each) for each in value]
    return _one_to_json(field, value)


def _one_to_json(field: Any, value: Any) -> Any:
    if field.type == FieldDescriptor.TYPE_MESSAGE:
        return to_json(value)
    if field.type == FieldDescriptor.TYPE_ENUM:
        return field.enum_type.values_by_number[value].name
    return value
