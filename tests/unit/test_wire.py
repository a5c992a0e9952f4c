"""ModelInferRequest from its bytes, whole and as they come."""

from __future__ import annotations

import random
import struct
from typing import Any

import pytest
from google.protobuf.message import DecodeError
from tritonclient.grpc import service_pb2

from icportrait.errors import InvalidRequest
from icportrait.gateway import wire
from icportrait.gateway.wire import (
    MAX_CONTENTS,
    MAX_HEAD_BYTES,
    Element,
    InferRequest,
    read_infer_request,
    receive_infer_request,
)

LARGE = bytes(range(256)) * 6000


class Pieces:
    """A source that has all bytes already."""

    def __init__(self, data: bytes) -> None:
        self._data, self.taken = data, 0

    async def take(self, size: int) -> bytes:
        if self.taken + size > len(self._data):
            raise InvalidRequest("the call's body ends within a message")
        self.taken += size
        return self._data[self.taken - size : self.taken]


def received(data: bytes, monkeypatch: pytest.MonkeyPatch | None = None) -> InferRequest:
    """Read as large messages are."""
    if monkeypatch:
        monkeypatch.setattr(wire, "_WHOLE_BYTES", -1)
    try:
        # The source never waits, so nothing has to run it.
        receive_infer_request(Pieces(data), len(data)).send(None)
    except StopIteration as done:
        request: InferRequest = done.value
        return request
    raise AssertionError("it waits")


def element(data: bytes) -> bytes:
    return struct.pack("<I", len(data)) + data


def request(profile: bytes, reference: bytes = b"r") -> Any:
    made = service_pb2.ModelInferRequest(model_name="ic_portrait", model_version="1", id="an id")
    made.parameters["a"].string_param = "b"
    for name, datatype, data in (
        ("profile", "BYTES", element(profile)),
        ("reference", "BYTES", element(reference)),
        ("seed", "INT64", struct.pack("<q", 2**40)),
    ):
        made.inputs.add(name=name, datatype=datatype, shape=[1])
        made.raw_input_contents.append(data)
    made.outputs.add(name="image")
    return made


def typed(profile: bytes) -> Any:
    made = service_pb2.ModelInferRequest(model_name="ic_portrait")
    for name, datatype, contents in (
        ("profile", "BYTES", {"bytes_contents": [profile]}),
        ("reference", "BYTES", {"bytes_contents": [b"r"]}),
        ("seed", "INT64", {"int64_contents": [2**40]}),
    ):
        made.inputs.add(name=name, datatype=datatype, shape=[1], contents=contents)
    return made


@pytest.mark.parametrize("profile", [b"", b"small", LARGE], ids=["empty", "small", "large"])
@pytest.mark.parametrize("form", [request, typed])
def test_a_request_is_read_as_protobuf_reads_it(form: Any, profile: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    message = form(profile)
    data = message.SerializeToString()
    for found in (read_infer_request(data), received(data, monkeypatch)):
        read = {name: tensor.tolist() for name, tensor in found.inputs().items()}
        assert read == {"profile": [profile], "reference": [b"r"], "seed": [2**40]}
        head = service_pb2.ModelInferRequest()
        head.CopyFrom(message)
        del head.raw_input_contents[:]
        if form is typed and len(profile) > 4096:
            head.inputs[0].contents.bytes_contents.pop()
        assert found.head == head


def test_a_large_picture_is_neither_copied_nor_parsed() -> None:
    data = request(LARGE).SerializeToString()
    whole, streamed = read_infer_request(data), received(data)
    assert isinstance(whole.raw[0], memoryview)
    assert whole.raw[0].obj is data
    assert isinstance(streamed.raw[0], Element)
    assert streamed.inputs()["profile"][0] is streamed.raw[0].data


def test_a_tensor_of_several_elements_is_none_of_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    made = request(b"")
    made.raw_input_contents[0] = element(b"a" * 5000) + element(b"b")
    data = made.SerializeToString()
    for found in (read_infer_request(data), received(data, monkeypatch)):
        with pytest.raises(InvalidRequest, match="profile: 5 bytes follow its last element"):
            found.inputs()


def test_large_contents_of_another_type_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    made = request(b"")
    made.raw_input_contents[2] = element(bytes(5000))
    with pytest.raises(InvalidRequest, match=r"^seed: "):
        received(made.SerializeToString(), monkeypatch).inputs()


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"\x0a", "ends within a"),
        (b"\x0a\x05abc", "ends within a"),
        (b"\x80" * 11, "no ModelInferRequest|ends within a field"),
        (b"\x0b\x0c", "no ModelInferRequest"),
        (b"\x0a\x01\xff", "no ModelInferRequest"),
        (b"\x3a\x00" * (MAX_CONTENTS + 1), "raw_input_contents: more than 64 entries"),
        (b"\x2a\x00" * (MAX_HEAD_BYTES // 2 + 1), "more than 65536 bytes beside"),
        (b"\x0a\x80\x80\x08" + bytes(2**17), "more than 65536 bytes beside"),
    ],
)
def test_what_is_no_request_is_refused(data: bytes, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InvalidRequest, match=message):
        read_infer_request(data)
    with pytest.raises(InvalidRequest, match=message):
        received(data, monkeypatch)


def test_elements_beyond_any_request_are_refused() -> None:
    made = service_pb2.ModelInferRequest()
    made.inputs.add(name="profile").contents.bytes_contents.extend([b"x" * 100] * (MAX_CONTENTS + 1))
    with pytest.raises(InvalidRequest, match="bytes_contents: more than 64 entries"):
        read_infer_request(made.SerializeToString())


def test_damaged_messages_are_refused_or_read_but_never_break(monkeypatch: pytest.MonkeyPatch) -> None:
    """Check that a message that is read whole is read alike as it comes."""
    monkeypatch.setattr(wire, "_WHOLE_BYTES", -1)
    chance = random.Random(1)
    whole = [form(b"p" * size).SerializeToString() for form in (request, typed) for size in (3, 5000)]
    readable = 0
    for _ in range(3000):
        data = bytearray(chance.choice(whole))
        for _ in range(chance.randrange(1, 4)):
            # Where the fields are, not within a picture.
            data[chance.randrange(min(len(data), 150))] = chance.randrange(256)
        del data[chance.choice((len(data), chance.randrange(len(data)))) :]
        outcomes = []
        for read in (lambda: read_infer_request(bytes(data)), lambda: received(bytes(data))):  # noqa: B023
            try:
                outcomes.append({name: tensor.tolist() for name, tensor in read().inputs().items()})
            except InvalidRequest:
                outcomes.append(None)
        assert outcomes[0] == outcomes[1]
        if outcomes[0] is not None:
            readable += 1
            try:
                service_pb2.ModelInferRequest.FromString(bytes(data))
            except DecodeError:
                pytest.fail("protobuf reads no such message")
    assert readable > 100
