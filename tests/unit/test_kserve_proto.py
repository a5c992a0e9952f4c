"""The protocol's file for callers in other languages is part of the whole protocol."""

from __future__ import annotations

import re

import pytest
from tritonclient.grpc import service_pb2

from tests.conftest import EXAMPLES
from tests.documents import BLOCKS

TEXT = (EXAMPLES / "kserve.proto").read_text()
FIELD = re.compile(r"^\s+(?:repeated |map<)?([\w., >]+?) (\w+) = (\d+);$", re.MULTILINE)
SCALARS = {"bool": "TYPE_BOOL", "int64": "TYPE_INT64", "string": "TYPE_STRING", "bytes": "TYPE_BYTES"}
MESSAGES = {
    "ServerReadyRequest": service_pb2.ServerReadyRequest,
    "ServerReadyResponse": service_pb2.ServerReadyResponse,
    "InferParameter": service_pb2.InferParameter,
    "InferInputTensor": service_pb2.ModelInferRequest.InferInputTensor,
    "ModelInferRequest": service_pb2.ModelInferRequest,
    "InferOutputTensor": service_pb2.ModelInferResponse.InferOutputTensor,
    "ModelInferResponse": service_pb2.ModelInferResponse,
    "ModelStreamInferResponse": service_pb2.ModelStreamInferResponse,
}


def fields() -> dict[str, list[tuple[str, str, int]]]:
    """Return the type, name and number of the fields of each message in the file."""
    found: dict[str, list[tuple[str, str, int]]] = {}
    open_blocks: list[str] = []
    for line in TEXT.splitlines():
        if match := re.match(r"\s*(message|oneof|service) (\w+) {(})?", line):
            name = match[2] if match[1] == "message" else open_blocks[-1] if open_blocks else ""
            found.setdefault(name, [])
            if not match[3]:
                open_blocks.append(name)
        elif line.strip() == "}":
            open_blocks.pop()
        elif match := FIELD.match(line):
            found[open_blocks[-1]].append((match[1], match[2], int(match[3])))
    return found


def test_every_message_is_compared() -> None:
    assert fields().keys() - {""} == MESSAGES.keys()
    assert sum(map(len, fields().values())) == len(re.findall(r" = \d+;", TEXT))


@pytest.mark.parametrize("name", MESSAGES)
def test_names_numbers_and_types_are_the_protocols(name: str) -> None:
    whole = MESSAGES[name].DESCRIPTOR.fields_by_name
    for kind, field, number in fields()[name]:
        assert whole[field].number == number
        if kind in SCALARS:
            assert whole[field].type == getattr(whole[field], SCALARS[kind])


def test_what_a_document_shows_of_the_example_is_in_it() -> None:
    source = (EXAMPLES / "node" / "portrait.js").read_text()
    shown = [block for block in BLOCKS if block.language == "js"]
    assert shown and all(block.text in source for block in shown)
