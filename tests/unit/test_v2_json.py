"""Requests in KServe's JSON: whole, wrong and damaged."""

from __future__ import annotations

import json
import random
from typing import Any

import numpy as np
import pytest

from icportrait.errors import InvalidRequest
from icportrait.gateway.portraits_form import PortraitsForm
from icportrait.gateway.v2_json import MAX_VALUES, read_generate, read_infer, read_json, write_infer


def tensor(name: str, datatype: str = "BYTES", **more: Any) -> dict[str, Any]:
    return {"name": name, "datatype": datatype, "shape": [1], **more}


def body_of(*inputs: dict[str, Any], behind: bytes = b"", **more: Any) -> tuple[bytes, int]:
    head = json.dumps({"inputs": inputs, **more}).encode()
    return head + behind, len(head)


BINARY = {"parameters": {"binary_data_output": True}}


def test_tensors_lie_behind_the_json_in_their_order() -> None:
    body, length = body_of(
        tensor("profile", parameters={"binary_data_size": 7}),
        tensor("seed", "INT64", data=[5]),
        tensor("reference", parameters={"binary_data_size": 5}),
        behind=b"\3\0\0\0abc\1\0\0\0d",
        id="mine",
        **BINARY,
    )
    call = read_infer(body, length)
    assert {name: array.tolist() for name, array in call.inputs.items()} == {
        "profile": [b"abc"],
        "seed": [5],
        "reference": [b"d"],
    }
    assert call.request_id == "mine"
    assert call.binary == call.wanted == {"image", "metadata", "step", "total_steps"}


@pytest.mark.parametrize(
    ("size", "behind", "text"),
    [
        (-1, b"", "profile: binary_data_size is -1"),
        (8, b"\3\0\0\0abc", "profile: binary_data_size is 8, and 7 follow"),
        (True, b"\3\0\0\0abc", "profile: binary_data_size is True"),
        (2**70, b"", "profile: binary_data_size is 11805916207174113034"),
        (7, b"\4\0\0\0abc", "profile: ends within an element"),
        (7, b"\xff\xff\xff\xffabc", "profile: ends within an element"),
        (7, b"\2\0\0\0abc", "profile: 1 bytes follow its last element"),
        (7, b"\3\0\0\0abc!", "1 bytes follow the last tensor"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(size: Any, behind: bytes, text: str) -> None:
    body, length = body_of(tensor("profile", parameters={"binary_data_size": size}), behind=behind, **BINARY)
    with pytest.raises(InvalidRequest) as refusal:
        read_infer(body, length)
    assert str(refusal.value).startswith(text)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"inputs": 5}, "inputs: expected a list of objects"),
        ({"inputs": [5]}, "inputs: expected a list of objects"),
        ({"inputs": [{"name": 5}]}, "a tensor has no name"),
        ({"inputs": [{"name": "seed", "datatype": ["INT64"]}]}, "a tensor has no datatype"),
        ({"inputs": [{"name": "seed", "datatype": "INT64", "shape": 1}]}, "seed: no shape"),
        ({"inputs": [tensor("seed", "INT64")]}, "a tensor has no data"),
        ({"inputs": [tensor("seed", "INT64", data=[1])] * 2}, "seed: given twice"),
        ({"inputs": [tensor("seed", "INT64", data=[1], parameters=[])]}, "parameters: expected an object"),
        ({"inputs": [tensor("seed", "INT32", data=[1])]}, "seed: type is INT32, expected INT64"),
        ({"inputs": [tensor("priority", "INT32", data=[2**31])]}, "priority: 2147483648, expected 0..9"),
        ({"outputs": [{"name": "flow"}]}, "flow: no such output"),
        ({"outputs": [{"name": "image", "parameters": {"classification": 3}}]}, "image: classification is not offered"),
        ({"id": {}}, "id: expected a text"),
        ({"parameters": 5}, "parameters: expected an object"),
    ],
)
def test_what_is_wrong_is_named(change: dict[str, Any], text: str) -> None:
    with pytest.raises(InvalidRequest) as refusal:
        read_infer(json.dumps({"inputs": [], **BINARY, **change}).encode())
    assert str(refusal.value).startswith(text)


def test_nested_data_is_taken_by_rows() -> None:
    box = {"name": "profile_box", "datatype": "FP32", "shape": [4], "data": [[0, 0.5], [1, 1]]}
    call = read_infer(json.dumps({"inputs": [box], **BINARY}).encode())
    assert call.inputs["profile_box"].tolist() == [0.0, 0.5, 1.0, 1.0]


def test_outputs_come_as_each_was_asked_for() -> None:
    tensors = {"step": np.array([4], np.int32), "image": np.array([b"\x00\xff"], object)}
    parts, length = write_infer("ic_portrait", "", tensors, {"image"})
    assert length == len(parts[0])
    assert parts[1] == b"\2\0\0\0\x00\xff"
    assert json.loads(parts[0])["outputs"] == [
        {"name": "step", "datatype": "INT32", "shape": [1], "data": [4]},
        {"name": "image", "datatype": "BYTES", "shape": [1], "parameters": {"binary_data_size": 6}},
    ]


def test_a_large_picture_is_no_large_number_of_values() -> None:
    picture = "/" + "A" * 62 + "/"
    text = json.dumps({"profile": picture * 2**14}).replace("/", "\\/").encode()
    assert text.count(b"\\") > MAX_VALUES
    assert read_json(text)["profile"] == picture * 2**14


def test_damaged_requests_are_refused_or_read_and_never_anything_else() -> None:
    given = [tensor(name, data=["cA=="]) for name in ("profile", "reference")]
    options = [tensor("encoding", data=["base64"]), tensor("seed", "INT64", parameters={"binary_data_size": 8})]
    outputs = [{"name": "image", "parameters": {"binary_data": True}}]
    whole, length = body_of(*given, *options, behind=(7).to_bytes(8, "little"), outputs=outputs)
    read_infer(whole, length)
    member = json.dumps({"profile": "cA==", "seed": 5, "profile_box": [0, 0, 1, 1], "encoding": "base64"}).encode()
    read_generate(member)
    form = b'--b\r\nContent-Disposition: form-data; name="seed"\r\n\r\n7\r\n--b--\r\n'

    def read_form(data: bytes) -> None:
        parser = PortraitsForm("multipart/form-data; boundary=b")
        for at in range(0, len(data), 7):
            parser.feed(data[at : at + 7])
        parser.inputs()

    read_form(form)
    draw = random.Random(1)
    for _ in range(3000):
        for read, source in (
            (lambda data: read_infer(data, length), whole),
            (read_generate, member),
            (read_form, form),
        ):
            data = bytearray(source)
            for _ in range(draw.randint(1, 4)):
                at = draw.randrange(len(data))
                data[at : at + draw.randint(0, 2)] = draw.choice(
                    (b"", b"[", b'"', b"9" * 30, b"\xff", b"null", b"{}", b"\r\n")
                )
            try:
                read(bytes(data))
            except InvalidRequest as error:
                assert len(str(error)) < 600
