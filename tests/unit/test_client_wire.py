"""The client's own reading and writing of KServe's messages against the classes that protobuf generates."""

from __future__ import annotations

import random
import struct
from typing import Any

import pytest
from icportrait_client import wire
from tritonclient.grpc import service_pb2

TENSORS = [
    wire.Tensor("profile", "BYTES", (1,), wire.bytes_elements([bytes(70_000)])),
    wire.Tensor("seed", "INT64", (1,), struct.pack("<q", 2**63 - 1)),
    wire.Tensor("image", "BYTES", (-1,), wire.bytes_elements([b"", b"one"])),
    wire.Tensor("profile_box", "FP32", (4,), struct.pack("<4f", 0, 0.25, 0.5, 1)),
    wire.Tensor("empty", "BYTES", (0,), b""),
]


def described(tensors: Any, contents: Any) -> list[wire.Tensor]:
    pairs = zip(tensors, contents, strict=True)
    return [wire.Tensor(each.name, each.datatype, tuple(each.shape), data) for each, data in pairs]


def test_protobuf_reads_what_is_written() -> None:
    request = service_pb2.ModelInferRequest.FromString(wire.infer_request("ic_portrait", TENSORS))
    assert request.model_name == "ic_portrait"
    assert described(request.inputs, request.raw_input_contents) == TENSORS
    response = service_pb2.ModelInferResponse.FromString(wire.infer_response("m", TENSORS))
    assert (response.model_name, response.model_version) == ("m", "1")
    assert described(response.outputs, response.raw_output_contents) == TENSORS
    for is_final in (False, True):
        answer = service_pb2.ModelStreamInferResponse.FromString(wire.stream_answer("m", TENSORS, is_final=is_final))
        assert described(answer.infer_response.outputs, answer.infer_response.raw_output_contents) == TENSORS
        assert answer.infer_response.parameters["triton_final_response"].bool_param is is_final
        assert not answer.error_message
    assert service_pb2.ModelStreamInferResponse.FromString(wire.stream_error("ü")).error_message == "ü"
    assert service_pb2.ServerReadyResponse.FromString(wire.flag(True)).ready
    assert not service_pb2.ServerReadyResponse.FromString(wire.flag(False)).ready
    assert service_pb2.ModelMetadataRequest.FromString(wire.named_request("m")).name == "m"
    metadata = service_pb2.ModelMetadataResponse.FromString(
        wire.model_metadata(wire.ModelMetadata("m", tuple(TENSORS[:2]), tuple(TENSORS[2:3])))
    )
    assert [(each.name, each.datatype, list(each.shape)) for each in metadata.inputs] == [
        ("profile", "BYTES", [1]),
        ("seed", "INT64", [1]),
    ]
    assert [(each.name, list(each.shape)) for each in metadata.outputs] == [("image", [-1])]


def test_what_protobuf_writes_is_read() -> None:
    response = service_pb2.ModelInferResponse(model_name="m", model_version="1", id="7")
    response.parameters["triton_final_response"].bool_param = True
    request = service_pb2.ModelInferRequest(model_name="n", id="7")
    request.parameters["a"].string_param = "b"
    for tensor in TENSORS:
        for described_, contents in (
            (response.outputs, response.raw_output_contents),
            (request.inputs, request.raw_input_contents),
        ):
            described_.add(name=tensor.name, datatype=tensor.datatype, shape=tensor.shape)
            contents.append(bytes(tensor.data))
    assert list(wire.read_infer_response(response.SerializeToString()).values()) == TENSORS
    model, inputs = wire.read_infer_request(request.SerializeToString())
    assert (model, list(inputs.values())) == ("n", TENSORS)
    answer = service_pb2.ModelStreamInferResponse(infer_response=response)
    read = wire.read_stream_answer(answer.SerializeToString())
    assert (list(read.tensors.values()), read.error, read.is_final) == (TENSORS, "", True)
    answer = service_pb2.ModelStreamInferResponse(error_message="what happened")
    assert wire.read_stream_answer(answer.SerializeToString()) == wire.StreamAnswer({}, "what happened")
    for ready in (False, True):
        assert wire.read_flag(service_pb2.ServerReadyResponse(ready=ready).SerializeToString()) is ready


@pytest.mark.parametrize("values", [[], [b""], [b"a", b"", bytes(300)]])
def test_elements_come_back(values: list[bytes]) -> None:
    assert wire.read_bytes_elements(wire.bytes_elements(values)) == tuple(values)


@pytest.mark.parametrize("data", [b"\0", b"\1\0\0\0", b"\1\0\0\0a\2\0\0\0a"])
def test_elements_that_are_cut_are_an_error(data: bytes) -> None:
    with pytest.raises(wire.WireError):
        wire.read_bytes_elements(data)


def test_damaged_messages_are_read_or_refused_and_nothing_else() -> None:
    """Change, cut and lengthen messages at random. No other exception leaves a reader, and none hangs."""
    rng = random.Random(0)
    small = [wire.Tensor("image", "BYTES", (1,), wire.bytes_elements([b"abc"])), TENSORS[1]]
    messages = [wire.stream_answer("m", small), wire.infer_response("m", small), wire.stream_error("text")]
    refused = 0
    for _ in range(3000):
        message = bytearray(rng.choice(messages))
        for _ in range(rng.randint(1, 3)):
            message[rng.randrange(len(message))] = rng.randrange(256)
        data = bytes(message[: rng.randint(0, len(message))])
        for read in (wire.read_stream_answer, wire.read_infer_response, wire.read_model_metadata, wire.read_flag):
            try:
                read(data)
            except wire.WireError:
                refused += 1
    assert refused > 1000
