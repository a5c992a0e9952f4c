"""A record of each answer: counted by its code and its key, and written as a line of the access log.

A door begins a record when a request comes, and adds it to ``Records`` when its answer has gone, or when its caller
has. The service notes the parts of a request's way in the same record, because a record belongs to a task's context.
A refusal is an answer too: of a request without a valid key, of one that is too large, of a connection too many.
"""

from __future__ import annotations

import json
import re
import secrets
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from icportrait.gateway.api import Portraits
from icportrait.gateway.metrics import Sample

REQUEST_ID = re.compile(r"[!-~]{1,128}")
TRACEPARENT = re.compile(r"[0-9a-f]{2}-[0-9a-f]{32}-[0-9a-f]{16}-[0-9a-f]{2}(-[!-~]{0,64})?")
ERROR_CHARACTERS = 300
DELIVERED = ("OK", "200")
"""Codes of portraits that have reached their caller; others aren't charged for."""
COMMON_CODES = {
    "grpc": ("OK", "INVALID_ARGUMENT", "UNAUTHENTICATED", "RESOURCE_EXHAUSTED", "UNAVAILABLE", "INTERNAL"),
    "http": ("200", "400", "401", "429", "503", "500"),
}
"""Codes that are counted from the start, so that Prometheus sees the first answer of each as a rise."""
OF_METADATA = ("seed", "steps", "queue_ms", "encode_ms", "warp_ms", "engine_ms", "rows_shared", "stage_ms")
"""Members of an answer's metadata that its line has too."""


@dataclass(eq=False)
class Record:
    """One request and its answer."""

    door: str
    """``grpc`` or ``http``."""
    method: str = ""
    """Name of the call, or verb and path of the route; empty where there is none such."""
    makes_portraits: bool = False
    peer: str = ""
    request_id: str = ""
    """The caller's ``x-request-id``, or one that is made here."""
    traceparent: str = ""
    trace_id: str = ""
    key: str = ""
    """Name of the API key; never the key."""
    code: str = ""
    """gRPC's name of the status, or HTTP's number. Empty until the answer is known."""
    error: str = ""
    received_bytes: int = 0
    sent_bytes: int = 0
    portraits: int = 0
    row_steps: int = 0
    """Rows of the UNet times steps that the portraits took: what a caller is charged for."""
    metadata: bytes = b""
    began_ns: int = field(default_factory=time.monotonic_ns)
    ended_ns: int = 0
    phases: list[tuple[str, int, int]] = field(default_factory=list)
    """Name, beginning and end of each part of the request's way that has ended, by ``time.monotonic_ns``."""

    def __post_init__(self) -> None:
        if not REQUEST_ID.fullmatch(self.request_id):
            self.request_id = secrets.token_hex(8)
        if not TRACEPARENT.fullmatch(self.traceparent):
            self.traceparent = ""
        self.trace_id = self.traceparent[3:35]

    def note(self, portraits: Portraits) -> None:
        """Note what the request was answered with."""
        self.portraits, self.row_steps = len(portraits.images), portraits.row_steps
        self.metadata = portraits.metadata

    @property
    def duration_ms(self) -> float:
        return (self.ended_ns - self.began_ns) / 1e6


CURRENT: ContextVar[Record | None] = ContextVar("record", default=None)
"""Record of the request that a task works on."""


@contextmanager
def phase(name: str) -> Iterator[None]:
    """Note the time of a block as a part of the current request's way, also where the block fails."""
    began_ns = time.monotonic_ns()
    try:
        yield
    finally:
        if record := CURRENT.get():
            record.phases.append((name, began_ns, time.monotonic_ns()))


@dataclass
class Usage:
    """Use of the server by one API key."""

    portraits: int = 0
    row_steps: int = 0
    received_bytes: int = 0
    sent_bytes: int = 0
    answers: Counter[str] = field(default_factory=Counter)
    """Requests for portraits by code."""


class Records:
    """Counts of all answers since the gateway was started."""

    def __init__(self, *listeners: Callable[[Record], object]) -> None:
        """Begin with none.

        Args:
            listeners: take each record that is added.
        """
        self.counts: Counter[tuple[str, str, str]] = Counter()
        self.usage: dict[str, Usage] = {}
        self._listeners = listeners

    def add(self, record: Record) -> None:
        """Count an answer that has gone."""
        record.ended_ns = time.monotonic_ns()
        if record.code not in DELIVERED:
            record.portraits = record.row_steps = 0
        kind = "portraits" if record.makes_portraits else "other"
        self.counts[record.door, kind, record.code] += 1
        if record.makes_portraits:
            usage = self.usage.setdefault(record.key, Usage())
            usage.answers[record.code] += 1
            usage.portraits += record.portraits
            usage.row_steps += record.row_steps
            usage.received_bytes += record.received_bytes
            usage.sent_bytes += record.sent_bytes
        for listener in self._listeners:
            listener(record)

    def samples(self) -> Iterable[Sample]:
        """Return the counts as metrics of the gateway."""
        known = {(door, "portraits", code): 0 for door, codes in COMMON_CODES.items() for code in codes}
        for (door, kind, code), count in sorted((known | self.counts).items()):
            labels = {"door": door, "kind": kind, "code": code}
            yield "answers_total", "counter", "Answers of the doors, refusals among them", labels, count
        usage = sorted(self.usage.items())
        for key, used in usage:
            for code, count in sorted(used.answers.items()):
                labels = {"key": key, "code": code}
                yield "key_answers_total", "counter", "Answers to requests for portraits, by key", labels, count
        for key, used in usage:
            yield "key_portraits_total", "counter", "Portraits that were sent", {"key": key}, used.portraits
        for key, used in usage:
            yield "key_row_steps_total", "counter", "UNet rows times steps of them", {"key": key}, used.row_steps
        for key, used in usage:
            for way, count in (("received", used.received_bytes), ("sent", used.sent_bytes)):
                labels = {"key": key, "way": way}
                yield "key_bytes_total", "counter", "Bytes of requests for portraits and their answers", labels, count


def access_line(record: Record) -> str:
    """Write a record as a line of JSON: all but the pictures and the API key itself."""
    line: dict[str, Any] = {
        "time": datetime.now(UTC).isoformat(timespec="milliseconds"),
        "door": record.door,
        "method": record.method,
        "code": record.code,
        "request_id": record.request_id,
        "key": record.key,
        "peer": record.peer,
        "duration_ms": round(record.duration_ms, 3),
        "received_bytes": record.received_bytes,
        "sent_bytes": record.sent_bytes,
    }
    if record.trace_id:
        line["trace_id"] = record.trace_id
    if record.error:
        line["error"] = record.error[:ERROR_CHARACTERS]
    if record.makes_portraits:
        line |= {"portraits": record.portraits, "row_steps": record.row_steps}
        line["phases_ms"] = {name: round((ended - began) / 1e6, 3) for name, began, ended in record.phases}
    if record.metadata:
        metadata = json.loads(record.metadata)
        line |= {name: metadata[name] for name in OF_METADATA if name in metadata}
    return json.dumps(line)
