"""A request over HTTP and its answer, as the ASGI server has them."""

from __future__ import annotations

import asyncio
import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from urllib.parse import parse_qs

from starlette.types import Receive, Scope, Send

from icportrait.errors import DeadlineMissed, IcPortraitError, InvalidRequest, Unavailable, to_caller
from icportrait.gateway.api import Unread
from icportrait.gateway.records import Record

STATUS = {
    "INVALID_ARG": 400,
    "UNAUTHENTICATED": 401,
    "PERMISSION_DENIED": 403,
    "NOT_FOUND": 404,
    "RESOURCE_EXHAUSTED": 429,
    "CANCELLED": 499,
    "UNIMPLEMENTED": 501,
    "UNAVAILABLE": 503,
}
"""HTTP status by an error's code; any other is the server's fault, 500. 499 is nginx's, for want of a standard one."""
QUERY_FIELDS = 16
PIECE_BYTES = 64 * 2**10
"""Bytes of an answer that the connection takes at once."""
LINGER_S = 2.0
"""The longest time that a refused body is read and thrown away.

A caller that is still sending wouldn't see the answer otherwise.
"""

_RETRY_AFTER = re.compile(r"retry_after_ms: (\d+)")
JSON = (b"content-type", b"application/json")
# nginx would hold events back until some kilobytes have come.
_OF_EVENTS = [(b"content-type", b"text/event-stream"), (b"cache-control", b"no-store"), (b"x-accel-buffering", b"no")]


class CallerGone(Exception):
    """Nobody waits for an answer any more."""


class Exchange:
    """A request and its answer."""

    def __init__(self, scope: Scope, receive: Receive, send: Send, unread: Unread) -> None:
        self._scope, self._receive, self._send, self._unread = scope, receive, send, unread
        self._headers = dict(reversed(scope["headers"]))
        self._has_more = self.header("transfer-encoding") is not None or self.header("content-length") not in (
            None,
            "0",
        )
        self._status_sent = self._is_stream = False
        self.record = Record(
            "http",
            peer=self.peer,
            request_id=self.header("x-request-id") or "",
            traceparent=self.header("traceparent") or "",
        )
        self._writes = asyncio.Lock()
        self.error_event = ""
        """The kind that an error has among events."""

    def header(self, name: str) -> str | None:
        """Return a request's header, by its lower-case name."""
        value = self._headers.get(name.encode())
        return None if value is None else value.decode("latin-1")

    @property
    def peer(self) -> str:
        """Return the caller's address."""
        return str((self._scope.get("client") or ("",))[0])

    @property
    def model(self) -> tuple[str, str]:
        """Return the name and the version in the path, empty where there is none."""
        of = self._scope["path_params"]
        return of.get("model", ""), of.get("version", "")

    @property
    def query(self) -> dict[str, list[str]]:
        """Return the path's parameters."""
        text = self._scope["query_string"].decode("latin-1")
        try:
            return parse_qs(text, keep_blank_values=True, max_num_fields=QUERY_FIELDS)
        except ValueError:
            raise InvalidRequest(f"the path has more than {QUERY_FIELDS} parameters") from None

    async def read(self) -> bytes:
        """Read more of the body; empty once there is none.

        Raises:
            CallerGone: the caller is.
        """
        while self._has_more:
            message = await self._receive()
            if message["type"] == "http.disconnect":
                raise CallerGone
            self._has_more = message.get("more_body", False)
            if message["body"]:
                self.record.received_bytes += len(message["body"])
                return bytes(message["body"])
        return b""

    async def wait_gone(self) -> None:
        """Wait until the caller is gone."""
        while (await self._receive())["type"] != "http.disconnect":
            pass

    async def answer(self, parts: Sequence[bytes], headers: Iterable[tuple[bytes, bytes]] = ()) -> None:
        """Send an answer as fast as the connection takes it.

        Raises:
            Unavailable: too many answers aren't taken.
        """
        length = sum(map(len, parts))
        with self._held(length) as held:
            await self._start(200, [*headers, (b"content-length", str(length).encode())])
            await self._write(parts, held)
            await self._end()

    async def event(self, data: bytes, kind: str = "") -> None:
        """Send an event, and wait until the connection has taken it. It is sent also where the wait is cancelled.

        Raises:
            Unavailable: too many answers aren't taken.
        """
        event = _event(data, kind)
        await asyncio.shield(asyncio.ensure_future(self._send_event(event)))

    async def _send_event(self, event: bytes) -> None:
        async with self._writes:
            with self._held(len(event)) as held:
                if not self._status_sent:
                    self._is_stream = True
                    await self._start(200, _OF_EVENTS)
                await self._write([event], held)
                await self._body(b"")

    async def end_events(self) -> None:
        """End the events."""
        await self._end()

    async def fail(self, error: IcPortraitError) -> None:
        """Answer an error by its code."""
        headers = {}
        status = 504 if isinstance(error, DeadlineMissed) else STATUS.get(error.code, 500)
        if status in (429, 503):
            wait = _RETRY_AFTER.search(str(error))
            headers["retry-after"] = str(max(1, math.ceil(int(wait[1]) / 1000)) if wait else 1)
        if status == 401:
            headers["www-authenticate"] = "Bearer"
        await self.refuse(status, to_caller(error), headers)

    async def refuse(self, status: int, text: str, headers: Mapping[str, str] = {}) -> None:
        """Answer a status and a text. The rest of the body is thrown away."""
        async with self._writes:
            await self._refuse(status, text, headers)

    async def _refuse(self, status: int, text: str, headers: Mapping[str, str]) -> None:
        self.record.code, self.record.error = str(status), text
        body = json.dumps({"error": text}).encode()
        if self._status_sent:
            # Any other answer is left short of its length, so that no caller takes it for a whole one.
            if self._is_stream:
                await self._body(_event(body, self.error_event))
                await self._end()
            return
        pairs = [JSON, *((name.lower().encode(), value.encode()) for name, value in headers.items())]
        await self._start(status, [*pairs, (b"content-length", str(len(body)).encode())])
        await self._body(body)
        if self._has_more:
            await self._throw_away()
        await self._end()

    async def _throw_away(self) -> None:
        thrown = 0
        try:
            async with asyncio.timeout(LINGER_S):
                while thrown <= self._unread.limits.message_bytes and (data := await self.read()):
                    thrown += len(data)
        except (TimeoutError, CallerGone):
            pass

    async def _start(self, status: int, headers: Iterable[tuple[bytes, bytes]]) -> None:
        self._status_sent = True
        record = self.record
        record.code = record.code or str(status)
        sent = [*headers, (b"x-request-id", record.request_id.encode())]
        if record.traceparent:
            sent.append((b"traceparent", record.traceparent.encode()))
        if self._has_more:
            # What follows a body that isn't read is no request.
            sent.append((b"connection", b"close"))
        await self._send({"type": "http.response.start", "status": status, "headers": sent})

    async def _write(self, parts: Iterable[bytes], held: _Held) -> None:
        for part in parts:
            view = memoryview(part)
            for at in range(0, len(view), PIECE_BYTES):
                piece = view[at : at + PIECE_BYTES]
                await self._body(piece)
                held.release(len(piece))

    async def _body(self, data: bytes | memoryview) -> None:
        self.record.sent_bytes += len(data)
        await self._send({"type": "http.response.body", "body": data, "more_body": True})

    async def _end(self) -> None:
        self._is_stream = False
        await self._send({"type": "http.response.body", "body": b"", "more_body": False})

    def _held(self, nbytes: int) -> _Held:
        unread = self._unread
        if unread.nbytes + nbytes > unread.limits.unread_bytes:
            raise Unavailable("too many answers aren't read; retry_after_ms: 1000")
        return _Held(unread, nbytes)


class _Held:
    """Bytes of an answer that the connection hasn't taken, for as long as it is sent."""

    def __init__(self, unread: Unread, nbytes: int) -> None:
        self._unread, self._nbytes = unread, nbytes

    def __enter__(self) -> _Held:
        self._unread.nbytes += self._nbytes
        return self

    def __exit__(self, *_: object) -> None:
        self._unread.nbytes -= self._nbytes

    def release(self, nbytes: int) -> None:
        self._nbytes -= nbytes
        self._unread.nbytes -= nbytes


def _event(data: bytes, kind: str) -> bytes:
    return (b"event: %b\n" % kind.encode() if kind else b"") + b"data: %b\n\n" % data
