"""The gRPC door's connections, within limits: how many, how long they may be silent, and what they may leave unread."""

from __future__ import annotations

import asyncio
import logging
import math
import random
import socket
import time
from collections.abc import Callable, Mapping

import hpack.hpack
from grpclib.config import Configuration
from grpclib.protocol import AbstractHandler, H2Protocol, Stream
from h2.config import DummyLogger, H2Configuration
from h2.errors import ErrorCodes
from h2.events import Event, UnknownFrameReceived
from h2.settings import SettingCodes
from h2.utilities import SizeLimitDict
from hyperframe.frame import DataFrame, Frame, GoAwayFrame, HeadersFrame

from icportrait.errors import TooMuch, Unavailable
from icportrait.gateway.api import ServerLimits, Unread, descriptors_of_door
from icportrait.gateway.grpc_calls import END_TIMEOUT_S, Call, Method, outcome
from icportrait.gateway.records import CURRENT, Records
from icportrait.gateway.tls import READ_BYTES

logger = logging.getLogger(__name__)

STREAMS_OF_CONNECTION = 256
ENDED_STREAMS = STREAMS_OF_CONNECTION
"""Streams of which h2 remembers how they ended, for frames of theirs that come late. Its own 65,536 take 8 MB."""
WINDOW_BYTES = 4 * 2**20
"""Bytes that a connection may send ahead of the reader."""
FRAME_BYTES = 64 * 1024
"""Size of a caller's frames. With HTTP/2's own 16 KB a large picture takes a quarter longer."""
OWN_FRAMES_PER_S = 3000
"""Frames of HTTP/2 itself (pings, settings and the like) that a connection may send over time.

Each takes some 20 us. A call of a few bytes has two or three.
"""
OWN_FRAMES_AT_ONCE = 4000
"""After a pause; ten times as many after many answers."""
SMALL_DATA_BYTES = 256
"""A frame with less of a call's data counts as one of HTTP/2 itself; each time as many of answers allow one more."""
CONTROL_BYTES = 2**20
"""Answers to pings and the like that a connection may leave unread."""
EVERY_STREAM = 2**31 - 1
"""The last stream of a GOAWAY that leaves calls be which are on their way; clients begin the next ones elsewhere."""
AGE_SPREAD = 0.1
"""Share by which connections' ages differ, because those that were made at once shouldn't be made anew at once."""
LOST_AFTER_S = 60
"""A peer that is silent for so long, to the kernel's own questions too, is gone."""


class Calls:
    """The connections and calls of a door."""

    def __init__(self, methods: Mapping[str, Method], limits: ServerLimits, unread: Unread, records: Records) -> None:
        self.methods, self.limits, self.unread, self.records = methods, limits, unread, records
        self.incoming_bytes = 0
        """Bytes of messages that are being read."""
        self.calls: set[Call] = set()
        self.connections: set[Connection] = set()
        self.most_connections = min(limits.connections, descriptors_of_door())

    def protocol(self) -> Connection:
        """Make the protocol of a new connection."""
        return Connection(self)

    def make_room(self) -> bool:
        """Tell whether another connection may stay; an idle one goes for it, the one that is so for longest first."""
        if len(self.connections) < self.most_connections:
            return True
        idle = [connection for connection in self.connections if connection.is_idle]
        if idle:
            min(idle, key=lambda connection: connection.idle_since_s).abort()
        return bool(idle)

    def end_one_that_gives_way(self) -> bool:
        """End a call for another that needs the room, and tell whether there was one."""
        leaving = next((call for call in self.calls if call.gives_way and not call.failure), None)
        if leaving:
            leaving.fail(Unavailable("others need the room; try again later"))
        return leaving is not None

    def count_incoming(self, nbytes: int) -> None:
        """Count bytes of messages that are being read. Where they are too many, the one that takes longest goes."""
        self.incoming_bytes += nbytes
        if nbytes > 0 and self.incoming_bytes > self.limits.incoming_bytes:
            slowest = min(self._living(), key=lambda call: call.reads_since_s, default=None)
            if slowest and slowest.reads_since_s < math.inf:
                slowest.fail(Unavailable("too much is being sent to this server at once; retry_after_ms: 1000"))

    def take_unread(self, call: Call, nbytes: int) -> None:
        """Count an answer's bytes as unread, or, below zero, as read.

        Raises:
            TooMuch: they are more than a call, or all calls together, may have.
        """
        if nbytes > 0:
            if call.unread_bytes and call.unread_bytes + nbytes > self.limits.unread_bytes_call:
                raise TooMuch(f"{call.unread_bytes} bytes of answers aren't read; a call may have {nbytes} fewer")
            if self.unread.nbytes + nbytes > self.limits.unread_bytes:
                self._drop_slowest(call, nbytes)
        call.unread_bytes += nbytes
        self.unread.nbytes += nbytes

    async def close(self, grace_s: float) -> None:
        """End all calls: calls that wait for messages at once, the others when they are answered or the time is up."""
        for connection in self.connections:
            connection.go_away()
        for call in self.calls:
            call.end_input()
        for wait_s in (grace_s, END_TIMEOUT_S):
            if tasks := [call.task for call in self.calls if call.task]:
                await asyncio.wait(tasks, timeout=wait_s)
            for call in list(self.calls):
                call.fail(Unavailable("the server is stopping; try again later"))
        for connection in list(self.connections):
            connection.abort()

    def _living(self) -> list[Call]:
        return [call for call in self.calls if call.failure is None]

    def _drop_slowest(self, asking: Call, nbytes: int) -> None:
        leaving_bytes = sum(call.unread_bytes for call in self.calls if call.failure)
        if self.unread.nbytes - leaving_bytes + nbytes <= self.limits.unread_bytes:
            return
        slowest = min(self._living(), key=lambda call: call.waits_since_s, default=None)
        if slowest is None or slowest.waits_since_s == math.inf:
            raise TooMuch("too many answers aren't read; try again later")
        error = TooMuch(f"its answers weren't read ({slowest.unread_bytes} bytes), and others need the room")
        if slowest is asking:
            raise error
        slowest.fail(error)


class Connection(H2Protocol):
    """A connection, which may hold many calls."""

    def __init__(self, owner: Calls) -> None:
        super().__init__(_Handler(self), _CONFIG, _H2_CONFIG)
        self.owner = owner
        self.calls: set[Call] = set()
        self.idle_since_s = time.monotonic()
        self._transport: asyncio.Transport | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._age_timer: asyncio.TimerHandle | None = None
        self._unparsed_bytes = 0
        self._unparsed_since_s = time.monotonic()
        self._own_frames_left: float = OWN_FRAMES_AT_ONCE
        self._counted_at_s = time.monotonic()
        self._counted_sent_bytes = 0

    @property
    def is_idle(self) -> bool:
        """Tell whether every call of the connection gives way, or there is none."""
        return all(call.gives_way for call in self.calls)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        if hasattr(transport, "max_size"):
            transport.max_size = READ_BYTES
        super().connection_made(_Gathering(transport))
        self._h2 = self.connection._connection
        self._h2._closed_streams = SizeLimitDict(size_limit=ENDED_STREAMS)
        self._take_frame = self._h2._receive_frame
        self._h2._receive_frame = self._receive_frame  # type: ignore[method-assign]
        if not self.owner.make_room():
            transport.abort()
            return
        self.owner.connections.add(self)
        _notice_lost_peers(transport.get_extra_info("socket"))
        self._h2.update_settings(
            {SettingCodes.MAX_CONCURRENT_STREAMS: STREAMS_OF_CONNECTION, SettingCodes.MAX_FRAME_SIZE: FRAME_BYTES}
        )
        # At once: until the peer acknowledges them, h2 would end the connection at its 101st call, and at a large frame
        # that comes in one piece with the acknowledgement.
        self._h2._local_settings_acked()
        self.connection.flush()
        self.processor.processors[UnknownFrameReceived] = lambda event: None
        if age_s := self.owner.limits.connection_age_s:
            age_s *= random.uniform(1 - AGE_SPREAD, 1 + AGE_SPREAD)
            self._age_timer = asyncio.get_running_loop().call_later(age_s, self.retire)
        self._look_again()

    def data_received(self, data: bytes) -> None:
        assert self._transport is not None
        try:
            super().data_received(data)
        except Exception:
            # h2 and grpclib raise errors of many kinds at what isn't HTTP/2 as they expect it.
            logger.debug("a connection that doesn't speak HTTP/2, or too much of it, is closed", exc_info=True)
            self._transport.abort()
            return
        before, self._unparsed_bytes = self._unparsed_bytes, len(self._h2.incoming_buffer._data)
        if self._unparsed_bytes == 0 or self._unparsed_bytes < before + len(data):
            self._unparsed_since_s = time.monotonic()
        # h2 looks at a frame's length when all of it is there, and answers pings whether or not they are read.
        is_too_long = self._unparsed_bytes > 2 * self._h2.max_inbound_frame_size
        if is_too_long or self._transport.get_write_buffer_size() > CONTROL_BYTES:
            self._transport.abort()

    def connection_lost(self, exc: BaseException | None) -> None:
        self.owner.connections.discard(self)
        for timer in (self._timer, self._age_timer):
            if timer:
                timer.cancel()
        super().connection_lost(exc)

    def abort(self) -> None:
        """Close the connection without waiting for data that the peer hasn't taken."""
        self.owner.connections.discard(self)
        if self._transport:
            self._transport.abort()

    def retire(self) -> None:
        """Ask the peer to make another connection for its next calls; it closes this one after the last answer.

        A balancer of connections then chooses a server anew.
        """
        self.go_away(last=EVERY_STREAM)

    def go_away(self, code: ErrorCodes = ErrorCodes.NO_ERROR, last: int | None = None) -> None:
        """Tell the peer to begin no calls here; running calls go on.

        Args:
            code: the reason.
            last: stream up to which calls are served; None is the last one that has come.
        """
        if self._transport and not self._transport.is_closing():
            # h2 takes its own GOAWAY for the connection's end.
            last = self._h2.highest_inbound_stream_id if last is None else last
            self._transport.write(GoAwayFrame(stream_id=0, last_stream_id=last, error_code=code).serialize())

    def _receive_frame(self, frame: Frame) -> list[Event]:
        """Count a frame before h2 takes it.

        Raises:
            TooMuch: they are too many; the connection was told so, and the rest of what came isn't looked at.
        """
        carries_much = isinstance(frame, DataFrame) and len(frame.data) >= SMALL_DATA_BYTES
        if not (carries_much or isinstance(frame, HeadersFrame)):
            self._count_own_frame()
        return self._take_frame(frame)

    def _count_own_frame(self) -> None:
        now_s, sent_bytes = time.monotonic(), self.connection.data_sent
        # A peer that reads answers sends frames to say so; a peer that reads none has no reason to send many.
        allowed = (sent_bytes - self._counted_sent_bytes) / SMALL_DATA_BYTES
        self._own_frames_left = min(self._own_frames_left + allowed, 10 * OWN_FRAMES_AT_ONCE)
        if self._own_frames_left < OWN_FRAMES_AT_ONCE:
            came = (now_s - self._counted_at_s) * OWN_FRAMES_PER_S
            self._own_frames_left = min(self._own_frames_left + came, OWN_FRAMES_AT_ONCE)
        self._counted_at_s, self._counted_sent_bytes = now_s, sent_bytes
        self._own_frames_left -= 1
        if self._own_frames_left < 0:
            self.go_away(ErrorCodes.ENHANCE_YOUR_CALM)
            raise TooMuch("a connection sends too many frames that carry nothing")

    def _look_again(self) -> None:
        """Close a connection that hasn't begun with what HTTP/2 begins with, or that leaves a frame unfinished."""
        timeout_s = wait_s = self.owner.limits.header_timeout_s
        if self._h2.incoming_buffer._preamble_len or self._unparsed_bytes:
            wait_s = self._unparsed_since_s + timeout_s - time.monotonic()
        if wait_s <= 0:
            self.abort()
        else:
            self._timer = asyncio.get_running_loop().call_later(wait_s, self._look_again)


class _Gathering(asyncio.Transport):
    """Sends what one turn of the loop has written at once: in one system call, not in one for each frame."""

    def __init__(self, transport: asyncio.Transport) -> None:
        super().__init__()
        self._transport = transport
        self._parts: list[bytes] = []
        self._nbytes = 0

    def write(self, data: bytes | bytearray | memoryview) -> None:
        if not self._parts:
            asyncio.get_running_loop().call_soon(self._send)
        self._parts.append(bytes(data))
        self._nbytes += len(data)
        if self._nbytes >= FRAME_BYTES:
            self._send()

    def close(self) -> None:
        self._send()
        self._transport.close()

    def abort(self) -> None:
        self._transport.abort()

    def is_closing(self) -> bool:
        return self._transport.is_closing()

    def get_extra_info(self, name: str, default: object = None) -> object:
        return self._transport.get_extra_info(name, default)

    def _send(self) -> None:
        if self._parts and not self._transport.is_closing():
            self._transport.write(b"".join(self._parts))
        self._parts.clear()
        self._nbytes = 0


class _Handler(AbstractHandler):
    """Makes a task of each call."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._by_stream: dict[Stream, Call] = {}

    def accept(self, stream: Stream, headers: list[tuple[str, str]], release_stream: Callable[[], None]) -> None:
        call = Call(stream, headers, self._connection.owner)
        self._by_stream[stream] = call
        for calls in (self._connection.calls, self._connection.owner.calls):
            calls.add(call)

        def end(task: asyncio.Task[None]) -> None:
            # Not in the task itself, because one that is cancelled before it has begun runs nothing.
            if not task.cancelled() and (error := task.exception()):
                logger.error("%s failed", call.path, exc_info=error)
            record = call.record
            # The requests of a stream were counted one by one, unless the stream itself was refused or failed.
            if not call.answers_many or (record.code not in ("", "OK") and not call.is_counted):
                record.code, record.received_bytes = record.code or "CANCELLED", call.received_bytes
                self._connection.owner.records.add(record)
            call.close()
            del self._by_stream[stream]
            for calls in (self._connection.calls, self._connection.owner.calls):
                calls.discard(call)
            self._connection.idle_since_s = time.monotonic()
            release_stream()

        call.task = asyncio.get_running_loop().create_task(self._serve(call))
        call.task.add_done_callback(end)

    def cancel(self, stream: Stream) -> None:
        if (call := self._by_stream.get(stream)) and call.task:
            call.task.cancel()

    def close(self) -> None:
        for call in self._by_stream.values():
            if call.task:
                call.task.cancel()

    async def _serve(self, call: Call) -> None:
        owner = self._connection.owner
        CURRENT.set(call.record)
        status, text = await outcome(call, owner)
        call.record.code, call.record.error = status.name, text
        await call.end(status, text)


def _notice_lost_peers(sock: socket.socket | None) -> None:
    if sock is None or sock.family not in (socket.AF_INET, socket.AF_INET6):
        return
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in (
        ("TCP_KEEPIDLE", LOST_AFTER_S // 2),
        ("TCP_KEEPINTVL", LOST_AFTER_S // 6),
        ("TCP_KEEPCNT", 3),
        ("TCP_USER_TIMEOUT", LOST_AFTER_S * 1000),
    ):
        if hasattr(socket, option):
            sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)


# Because h2 makes a text of every frame, and hpack a record of every header, for logs that are never read.
Frame.__repr__ = object.__repr__  # type: ignore[method-assign]
hpack.hpack.log = DummyLogger("hpack")  # type: ignore[assignment]
_CONFIG = Configuration(
    http2_connection_window_size=WINDOW_BYTES, http2_stream_window_size=WINDOW_BYTES
).__for_server__()
_H2_CONFIG = H2Configuration(
    client_side=False,
    header_encoding="ascii",
    validate_inbound_headers=False,
    validate_outbound_headers=False,
    normalize_inbound_headers=False,
    normalize_outbound_headers=False,
)
