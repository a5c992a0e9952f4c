"""Unary calls to a server as cheap as a generator of load needs them.

A request is bytes before the run begins, but for its few numbers: two serialized protobuf messages one after the other
are one message with the fields of both, so that no picture is serialized, or copied more than once, while requests
leave. Of an answer only the metadata is kept.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle
from typing import Any

import grpc
import numpy as np
from icportrait_client.contract import load_contract
from tritonclient.grpc import service_pb2
from tritonclient.utils import triton_to_np_dtype

from benchmarks.schedule import PlannedRequest

OK = "OK"
UNANSWERED = "UNANSWERED"
"""Code of requests that were under way when the run was interrupted; no gRPC code."""
LEFT = "LEFT"
"""Code of requests whose caller left before the answer; no gRPC code."""

METHOD = "/inference.GRPCInferenceService/ModelInfer"


@dataclass(frozen=True)
class Answer:
    """The answer to one request."""

    code: str
    """gRPC's, such as OK or UNAVAILABLE."""
    message: str = ""
    metadata: bytes = b""
    """The server's JSON; read after the run, so that reading it delays no request."""


NO_ANSWER = Answer(UNANSWERED)
Cancel = Callable[[], Any]
Send = Callable[[PlannedRequest, Callable[[Answer], None]], Cancel | None]
"""Sends one request without waiting, and has the second argument called once with its answer, on any thread.

Returns the way to cancel it, None where it has none.
"""


def in_turn(given: Mapping[str, Sequence[Any]]) -> Iterator[list[Any]]:
    """Yield one value of each name for every request. A name with fewer values begins again earlier."""
    return map(list, zip(*map(cycle, given.values()), strict=True))


def sender(
    channel: Any, model: str, timeout_s: float, pictures: Mapping[str, Sequence[bytes]], profiles: Sequence[bytes] = ()
) -> Send:
    """Make the way to send requests over a gRPC channel.

    Args:
        channel: of ``grpc``.
        model: the model's name.
        timeout_s: seconds that a call may take.
        pictures: ``profile`` and ``reference``, taken in turn.
        profiles: pictures that a request's ``profile`` numbers, in place of the profile whose turn it is.
    """
    # Bytes go and come as they are: there is no serializer.
    call = channel.unary_unary(METHOD)
    name = named(model)
    turns = in_turn({key: [encoded({key: data}) for data in each] for key, each in pictures.items()})
    own_profiles = [encoded({"profile": data}) for data in profiles]

    def send(request: PlannedRequest, receive: Callable[[Answer], None]) -> Cancel:
        turn = dict(zip(pictures, next(turns), strict=True))
        if request.profile is not None:
            turn["profile"] = own_profiles[request.profile]
        future = call.future(b"".join((name, *turn.values(), encoded(request.options))), timeout=timeout_s)
        future.add_done_callback(lambda done: receive(_answer(done)))
        return future.cancel  # type: ignore[no-any-return]

    return send


def named(model: str) -> bytes:
    """Encode the part of a request that names the model."""
    written: bytes = service_pb2.ModelInferRequest(model_name=model).SerializeToString()
    return written


def encoded(values: Mapping[str, Any]) -> bytes:
    """Encode a part of a request: inputs by name, each of one element."""
    inputs = load_contract().inputs
    message = service_pb2.ModelInferRequest()
    for name, value in values.items():
        spec = inputs[name]
        message.inputs.add(name=name, datatype=spec.dtype, shape=[spec.size])
        if spec.dtype == "BYTES":
            message.raw_input_contents.append(struct.pack("<I", len(value)) + value)
        else:
            message.raw_input_contents.append(np.array([value], triton_to_np_dtype(spec.dtype)).tobytes())
    written: bytes = message.SerializeToString()
    return written


def _answer(done: Any) -> Answer:
    code = done.code()
    if code is not grpc.StatusCode.OK:
        return Answer(code.name, done.details() or "no reason given")
    response = service_pb2.ModelInferResponse.FromString(done.result())
    index = [output.name for output in response.outputs].index("metadata")
    return Answer(OK, metadata=response.raw_output_contents[index][4:])
