"""uvicorn in the gateway's own loop, with the limits that uvicorn lacks.

A connection has ``header_timeout_s`` for a request's whole header, however it trickles, and ``HEADER_BYTES``. Over the
limit of connections, the connection that has waited longest for a request makes room, so that idle connections keep no
caller out. A connection that takes none of an answer for ``body_timeout_s`` ends. The application limits the size and
the time of a body.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import ssl
from collections.abc import Callable, Iterator
from functools import partial
from http import HTTPStatus
from socket import socket
from typing import Any

import uvicorn
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from icportrait.gateway.api import ServerLimits
from icportrait.gateway.records import Record, Records
from icportrait.gateway.tls import READ_BYTES, Handshakes

HEADER_BYTES = 64 * 2**10
KEEP_ALIVE_S = 75
"""Seconds that a connection may wait for its next request."""
LINGER_S = 2.0
"""Time for a caller to read its refusal, while the rest of the caller's data is thrown away."""
BACKLOG = 1024
FREE_CHUNKS, CHUNK_BYTES = 1024, 64
"""Chunks that a body may have, and one more for each ``CHUNK_BYTES``."""
_OF_BODIES = (b"content-length", b"transfer-encoding")


class HttpServer(uvicorn.Server):
    """Serves an ASGI application. Whose process it is handles the signals."""

    def __init__(self, app: Any, limits: ServerLimits, records: Records) -> None:
        """Prepare the server. Call ``listen``, then ``serve`` until ``should_exit`` is set.

        Args:
            app: ASGI 3.
            limits: of its connections.
            records: where refused connections are counted.
        """
        # The log has no line a request, and none that a caller can cause.
        logging.getLogger("uvicorn.error").setLevel(logging.ERROR)
        super().__init__(
            uvicorn.Config(
                app,
                http=HttpToolsProtocol,
                ws="none",
                lifespan="off",
                interface="asgi3",
                log_config=None,
                access_log=False,
                server_header=False,
                proxy_headers=False,
                timeout_keep_alive=KEEP_ALIVE_S,
            )
        )
        self.limits, self.records = limits, records
        self.waiting: dict[HttpConnection, None] = {}
        """Connections without a request, the longest waiting first."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Leave the signals alone."""
        yield

    async def listen(self, host: str, port: int, tls: ssl.SSLContext | None) -> int:
        """Take connections, and return the port.

        Raises:
            OSError: the address can't be had.
        """
        # A socket made here would have to name TCP, else asyncio leaves Nagle's algorithm on: 40 ms an answer.
        protocol: Callable[[], asyncio.Protocol] = partial(HttpConnection, self)
        if tls:
            protocol = Handshakes(tls, protocol, self.limits.header_timeout_s, self.limits.connections).protocol
        server = await asyncio.get_running_loop().create_server(protocol, host, port, backlog=BACKLOG)
        self.servers = [server]
        return int(server.sockets[0].getsockname()[1])

    async def startup(self, sockets: list[socket] | None = None) -> None:
        """Mark the server as started; ``listen`` has done the rest."""
        self.started = True

    async def end_connections(self) -> None:
        """End the connections that ``serve`` has left: uvicorn cancels requests, and doesn't wait for them."""
        if self.server_state.tasks:
            await asyncio.wait(self.server_state.tasks, timeout=LINGER_S)
        for connection in list(self.server_state.connections):
            connection.transport.abort()
        # The loop tells connections of their beginning and their end in its next turns.
        for _ in range(4):
            await asyncio.sleep(0)

    def has_room(self) -> bool:
        """Tell whether the newest connection may stay, after the longest idle one has gone for it."""
        connections = self.server_state.connections
        if len(connections) > self.limits.connections and self.waiting:
            next(iter(self.waiting)).leave()
        return len(connections) <= self.limits.connections


class HttpConnection(HttpToolsProtocol):
    """A connection."""

    def __init__(self, server: HttpServer) -> None:
        super().__init__(server.config, server.server_state, {})
        self._server = server
        self._limits = server.limits
        self._timer: asyncio.TimerHandle | None = None
        self._write_timer: asyncio.TimerHandle | None = None
        self._is_deaf = False
        """Received data is thrown away, and read only to see the connection's end."""
        self._reads_header, self._header_bytes, self._parsed_bytes = True, 0, 0
        self._chunks = self._body_bytes = 0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if hasattr(transport, "max_size"):
            transport.max_size = READ_BYTES
        if self._server.should_exit:
            self.leave()
        elif self._server.has_room():
            self._wait_for_request(self._limits.header_timeout_s)
        else:
            self._refuse(HTTPStatus.SERVICE_UNAVAILABLE, "UNAVAILABLE: too many connections; retry_after_ms: 1000")

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_waiting()
        self.resume_writing()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._is_deaf:
            return
        super().data_received(data)
        if self._reads_header:
            self._header_bytes += len(data)
            if self._header_bytes > HEADER_BYTES:
                self._refuse_header()

    def on_message_begin(self) -> None:
        if self._is_deaf:
            return
        if self.cycle is not None and not self.cycle.response_complete:
            # A request behind one that runs would have to be kept, or keep its caller's hang-up from being seen. HTTP
            # lets a server close instead; the caller sends it again.
            self.cycle.keep_alive = False
            self._is_deaf = True
            return
        self._reads_header, self._header_bytes, self._parsed_bytes = True, 0, 0
        self._chunks = self._body_bytes = 0
        self._wait_for_request(self._limits.header_timeout_s)
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        if self._is_deaf:
            return
        self._reads_header = False
        self._stop_waiting()
        if self._parsed_bytes > HEADER_BYTES:  # its end came with what was read last
            self._refuse_header()
            return
        upgrades = self.parser.should_upgrade()
        if upgrades and any(name in _OF_BODIES and value != b"0" for name, value in self.headers):
            # The parser takes what follows for another protocol's.
            self._refuse(HTTPStatus.BAD_REQUEST, "Upgrade: not offered; leave it out (curl: --http1.1)")
            return
        super().on_headers_complete()
        if upgrades:
            self.cycle.keep_alive = False
            self._is_deaf = True

    def on_header(self, name: bytes, value: bytes) -> None:
        # After the body, a chunked request may have more of them, which are nobody's.
        if self._reads_header and not self._is_deaf:
            self._parsed_bytes += len(name) + len(value)
            super().on_header(name, value)

    def on_url(self, url: bytes) -> None:
        self._parsed_bytes += len(url)
        if not self._is_deaf:
            super().on_url(url)

    def on_chunk_header(self) -> None:
        self._chunks += 1
        if self._chunks > FREE_CHUNKS + self._body_bytes // CHUNK_BYTES:
            raise ValueError("the body's chunks are too small")

    def on_body(self, body: bytes) -> None:
        self._body_bytes += len(body)
        if not self._is_deaf:
            super().on_body(body)

    def on_message_complete(self) -> None:
        if not self._is_deaf:
            super().on_message_complete()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self.transport.is_closing():
            self._end_after(self._limits.body_timeout_s)
        elif not self._is_deaf:
            self._reads_header, self._header_bytes = True, 0
            self._wait_for_request(KEEP_ALIVE_S)

    def shutdown(self) -> None:
        super().shutdown()
        if self.transport.is_closing():
            self._end_after(LINGER_S)

    def pause_writing(self) -> None:
        super().pause_writing()
        self._write_timer = self.loop.call_later(self._limits.body_timeout_s, self.leave)

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._write_timer is not None:
            self._write_timer.cancel()
            self._write_timer = None

    def leave(self) -> None:
        """End the connection at once."""
        self._stop_waiting()
        self.connections.discard(self)
        self._is_deaf = True
        self.transport.abort()

    def send_400_response(self, msg: str) -> None:
        if not self._is_deaf:
            self._refuse(HTTPStatus.BAD_REQUEST, msg)

    def _wait_for_request(self, timeout_s: float) -> None:
        self._stop_waiting()
        self._server.waiting[self] = None
        self._timer = self.loop.call_later(timeout_s, self._timed_out)

    def _stop_waiting(self) -> None:
        self._server.waiting.pop(self, None)
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _timed_out(self) -> None:
        if self._header_bytes:
            text = f"the request's header took longer than {self._limits.header_timeout_s:g} s"
            self._refuse(HTTPStatus.REQUEST_TIMEOUT, text)
        else:
            self.leave()

    def _refuse_header(self) -> None:
        text = f"the request's header has more than {HEADER_BYTES} bytes"
        self._refuse(HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE, text)

    def _refuse(self, status: HTTPStatus, text: str) -> None:
        """Answer and end, without the application."""
        if self.cycle is not None and not self.cycle.response_complete:
            self.cycle.disconnected = True
            self.cycle.message_event.set()
            if self.cycle.response_started:
                self.leave()
                return
        body = json.dumps({"error": text}).encode()
        head = (
            f"HTTP/1.1 {status.value} {status.phrase}\r\ncontent-type: application/json\r\n"
            f"content-length: {len(body)}\r\nconnection: close\r\n"
        )
        if status is HTTPStatus.SERVICE_UNAVAILABLE:
            head += "retry-after: 1\r\n"
        self.transport.write(head.encode() + b"\r\n" + body)
        peer = str((self.transport.get_extra_info("peername") or ("",))[0])
        self._server.records.add(Record("http", peer=peer, code=str(status.value), error=text))
        self._is_deaf = True
        self._end_after(LINGER_S)

    def _end_after(self, time_s: float) -> None:
        self._stop_waiting()
        self._timer = self.loop.call_later(time_s, self.leave)
