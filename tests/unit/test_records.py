"""Records of answers: counted by code and key, as metrics and as lines of the access log."""

from __future__ import annotations

import json

import pytest

from icportrait.gateway.api import Portraits
from icportrait.gateway.metrics import to_text
from icportrait.gateway.records import CURRENT, ERROR_CHARACTERS, Record, Records, access_line, phase

TRACE = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


def answered(**values: object) -> Record:
    record = Record("grpc", method="ModelInfer", makes_portraits=True, **values)  # type: ignore[arg-type]
    record.ended_ns = record.began_ns + 2_000_000
    return record


def test_answers_are_counted_by_door_kind_and_code_and_use_by_key() -> None:
    records = Records()
    for code, key in (("OK", "studio"), ("OK", "studio"), ("UNAUTHENTICATED", ""), ("RESOURCE_EXHAUSTED", "studio")):
        record = answered(code=code, key=key, received_bytes=10, sent_bytes=100)
        if code == "OK":
            record.note(Portraits((b"1", b"2"), b"{}", 4, 8))
        records.add(record)
    records.add(Record("http", code="404"))
    lines = to_text(records.samples()).splitlines()
    for line in (
        'answers_total{door="grpc",kind="portraits",code="OK"} 2',
        'answers_total{door="grpc",kind="portraits",code="UNAUTHENTICATED"} 1',
        'answers_total{door="http",kind="other",code="404"} 1',
        'key_answers_total{key="studio",code="RESOURCE_EXHAUSTED"} 1',
        'key_portraits_total{key="studio"} 4',
        'key_row_steps_total{key="studio"} 16',
        'key_bytes_total{key="studio",way="received"} 30',
        'key_bytes_total{key="studio",way="sent"} 300',
    ):
        assert f"icportrait_gateway_{line}" in lines


def test_portraits_that_did_not_reach_their_caller_are_not_charged_for() -> None:
    records = Records()
    for code in ("CANCELLED", "RESOURCE_EXHAUSTED", "499", "503"):
        record = answered(code=code, key="studio")
        record.note(Portraits((b"1",), b"{}", 4, 8))
        records.add(record)
        assert json.loads(access_line(record))["row_steps"] == 0
    assert (records.usage["studio"].portraits, records.usage["studio"].row_steps) == (0, 0)


def test_a_keys_name_may_have_any_character_and_a_count_all_its_digits() -> None:
    records = Records()
    records.add(answered(code="OK", key='a "b\\c"\nd', received_bytes=12_345_678_901))
    text = to_text(records.samples())
    assert 'key="a \\"b\\\\c\\"\\nd",way="received"} 12345678901\n' in text
    assert 'code="OK"} 1\n' in text


def test_a_line_says_what_an_operator_asks_for() -> None:
    record = answered(code="OK", key="studio", request_id="mine", traceparent=TRACE, peer="10.0.0.1")
    token = CURRENT.set(record)
    with pytest.raises(ValueError), phase("pipeline"):
        raise ValueError
    CURRENT.reset(token)
    metadata = {"seed": 7, "queue_ms": 1.5, "stage_ms": {"decode": 2.0}, "crops": {}}
    record.note(Portraits((b"secret picture",), json.dumps(metadata).encode(), 4, 4))
    line = json.loads(access_line(record))
    assert line["phases_ms"]["pipeline"] >= 0, "noted though it failed"
    assert {name: line[name] for name in ("request_id", "trace_id", "key", "peer", "code", "row_steps", "seed")} == {
        "request_id": "mine",
        "trace_id": TRACE.split("-")[1],
        "key": "studio",
        "peer": "10.0.0.1",
        "code": "OK",
        "row_steps": 4,
        "seed": 7,
    }
    assert line["queue_ms"] == 1.5 and line["stage_ms"] == {"decode": 2.0}
    assert line["duration_ms"] == 2.0
    assert "crops" not in line and "secret" not in access_line(record)


def test_a_line_stays_one_line_and_short_whatever_a_caller_sends() -> None:
    line = access_line(answered(code="INVALID_ARGUMENT", error="a\n" * 10_000, request_id="a\nb", traceparent="x"))
    assert "\n" not in line and len(line) < 3 * ERROR_CHARACTERS
    found = json.loads(line)
    assert "trace_id" not in found and len(found["request_id"]) == 16


def test_a_phase_outside_of_a_request_is_nobodys() -> None:
    with phase("lease"):
        assert CURRENT.get() is None
