"""One gRPC call over grpclib's HTTP/2: its messages, within limits of size and time, and its end.

grpclib's own request handler and buffer aren't used: they join a message out of all its frames at once, have no limit
of size or time, and log a traceback for much that callers can do. ``grpc_connections`` makes the calls.
"""

from __future__ import annotations

import asyncio
import contextlib
import io
import logging
import math
import time
import zlib
from collections import deque
from collections.abc import Awaitable, Callable, Coroutine
from typing import TYPE_CHECKING, Any, TypeVar

from grpclib.const import Status
from grpclib.metadata import decode_timeout, encode_grpc_message
from grpclib.protocol import Stream
from h2.errors import ErrorCodes
from h2.exceptions import H2Error

from icportrait.errors import IcPortraitError, InvalidRequest, TooMuch, Unsupported, to_caller
from icportrait.gateway.records import CURRENT, Record
from icportrait.gateway.wire import PREFIX_BYTES

if TYPE_CHECKING:
    from icportrait.gateway.grpc_connections import Calls

logger = logging.getLogger(__name__)

MAX_CALLS = 8192
"""Calls of a door, idle streams included; each takes some KB."""
SMALL_MESSAGE_BYTES = 64 * 1024
"""Size limit of every call but an inference; a larger message is inflated in a thread."""
PIECE_BYTES = 64 * 1024
"""Bytes of an answer that are sent at once."""
END_TIMEOUT_S = 5.0
"""Time for a call's last frame; a connection that doesn't take the frame is closed."""
STATUS = {"INVALID_ARG": Status.INVALID_ARGUMENT}
"""gRPC's names of the error codes that have another name here."""

Message = TypeVar("Message")
Method = Callable[["Call"], Awaitable[None]]


class CallError(Exception):
    """An end of a call that isn't one of ``icportrait.errors``."""

    def __init__(self, status: Status, message: str) -> None:
        super().__init__(message)
        self.status, self.message = status, message


class Incoming:
    """The received part of a call's body. It takes the place of grpclib's buffer."""

    def __init__(self, ack: Callable[[int], None], hold: Callable[[int], None]) -> None:
        """Begin a call's.

        Args:
            ack: lets the caller send so many bytes more.
            hold: counts bytes that are held, or, below zero, no longer.
        """
        self._ack, self._count = ack, hold
        self._pieces: deque[memoryview] = deque()
        self._unacked = self._held = self._read = 0
        self.taken_bytes = 0
        self._ended = False
        self._changed = asyncio.Event()
        self.waits_until_s: float | None = None
        """The end of any wait for more, by the event loop's clock; None waits for as long as it takes."""

    def add(self, data: bytes, ack_size: int) -> None:
        if data:
            self._pieces.append(memoryview(data))
        self._hold(len(data))
        self._unacked += ack_size
        self._changed.set()

    def eof(self) -> None:
        self._ended = True
        self._changed.set()

    def unacked_size(self) -> int:
        size, self._unacked = self._unacked, 0
        return size

    def release(self) -> None:
        """Count no longer what was read."""
        self._hold(-self._read)
        self._read = 0

    def close(self) -> None:
        """Let go of all that came."""
        self._hold(-self._held)
        self._read = 0
        self._pieces.clear()

    async def take(self, size: int) -> bytes:
        """Take the next ``size`` bytes, as soon as they are there. The buffer of a large message grows as bytes come.

        Raises:
            InvalidRequest: the body ends before.
            TimeoutError: they didn't come by ``waits_until_s``.
        """
        taken = io.BytesIO()
        while left := size - taken.tell():
            if not self._pieces:
                await self._more()
            piece = self._pieces.popleft()
            if len(piece) > left:
                self._pieces.appendleft(piece[left:])
                piece = piece[:left]
            taken.write(piece)
            self._read += len(piece)
            self.taken_bytes += len(piece)
        # Without a copy: the buffer becomes the bytes.
        return taken.getvalue()

    async def has_ended(self) -> bool:
        """Wait for more, and tell whether there is none."""
        while not (self._pieces or self._ended):
            await self._wait()
        return not self._pieces

    async def _more(self) -> None:
        while not self._pieces:
            if self._ended:
                raise InvalidRequest("the call's body ends within a message")
            await self._wait()

    async def _wait(self) -> None:
        """Let the caller send as much again as was taken, and wait for it."""
        if size := self.unacked_size():
            self._ack(size)
        self._changed.clear()
        async with asyncio.timeout_at(self.waits_until_s):
            await self._changed.wait()

    def _hold(self, nbytes: int) -> None:
        self._held += nbytes
        self._count(nbytes)


class Call:
    """One gRPC call: its messages and its end."""

    def __init__(self, stream: Stream, headers: list[tuple[str, str]], owner: Calls) -> None:
        self._stream, self._owner = stream, owner
        self.headers = dict(headers)
        self.path = self.headers.get(":path", "")
        self.peer = str((stream._transport.get_extra_info("peername") or ("unix",))[0])
        self.deadline_s = self._deadline()
        self.record = self.new_record()
        self.task: asyncio.Task[None] | None = None
        self.failure: IcPortraitError | CallError | None = None
        self.answers_many = False
        """Each of its requests has a record of its own."""
        self.is_counted = False
        """The answer that ends it was counted as its request's."""
        self.gives_way = False
        """It needs no key, and it, or its connection, may be ended where others need the room."""
        self.unread_bytes = 0
        self.waits_since_s = math.inf
        """Since when its connection takes nothing of an answer, by ``time.monotonic``."""
        self.reads_since_s = math.inf
        """Since when it reads a message, by ``time.monotonic``."""
        self._incoming = Incoming(stream.buffer._ack_callback, owner.count_incoming)
        stream.buffer = self._incoming  # type: ignore[assignment]
        self._sending = asyncio.Lock()
        self._writing: set[asyncio.Task[None]] = set()
        self._has_room = asyncio.Event()
        self._has_room.set()
        self._has_headers = False

    @property
    def received_bytes(self) -> int:
        """Return the bytes of all messages that were received."""
        return self._incoming.taken_bytes

    def new_record(self) -> Record:
        """Begin the record of a request that comes in this call."""
        return Record(
            "grpc",
            method=self.path.rpartition("/")[2] if self.path in self._owner.methods else "",
            peer=self.peer,
            request_id=self.headers.get("x-request-id", ""),
            traceparent=self.headers.get("traceparent", ""),
        )

    @property
    def deadline_ms(self) -> int | None:
        """Return the time left of the call's own limit; None where the call has no limit."""
        if self.deadline_s == math.inf:
            return None
        return min(max(int((self.deadline_s - time.monotonic()) * 1000), 1), 2**31 - 1)

    def fail(self, error: IcPortraitError | CallError) -> None:
        """End the call with an error from outside its task."""
        if self.task and self.failure is None:
            self.failure = error
            self.task.cancel()
            self._incoming.close()

    def end_input(self) -> None:
        """Take no more messages than have come."""
        self._incoming.eof()

    async def read(self) -> bytes:
        """Read the only message, a small one; empty where none was sent.

        Raises:
            TooMuch: it is too large; none of it was read.
            InvalidRequest: the body ends within it.
            CallError: it didn't come in time.
        """
        return await self.receive(SMALL_MESSAGE_BYTES, Incoming.take, lambda message: message) or b""

    async def receive(
        self,
        limit_bytes: int,
        take: Callable[[Incoming, int], Awaitable[Message]],
        parse: Callable[[bytes], Message],
        waits: bool = False,
    ) -> Message | None:
        """Receive the next message. Return None where the caller has sent all.

        Args:
            limit_bytes: of the message, also once it is inflated.
            take: takes a message of so many bytes.
            parse: makes the same of one that was compressed.
            waits: for its first bytes without a limit of time.

        Raises:
            TooMuch: it is too large; none of it was read.
            InvalidRequest: the body ends within it, or what ``take`` and ``parse`` raise.
            CallError: it didn't come in time.
        """
        incoming, timeout_s, clock = self._incoming, self._owner.limits.body_timeout_s, asyncio.get_running_loop().time
        try:
            # Not a timer around it all, because most messages are there.
            incoming.waits_until_s = None if waits else clock() + timeout_s
            if await incoming.has_ended():
                return None
            incoming.waits_until_s = clock() + timeout_s
            self.reads_since_s = time.monotonic()
            prefix = await incoming.take(PREFIX_BYTES)
            if (size := int.from_bytes(prefix[1:], "big")) > limit_bytes:
                raise TooMuch(f"a message of {size} bytes; this server takes {limit_bytes}")
            if not prefix[0]:
                return await take(incoming, size)
            message = await incoming.take(size)
        except TimeoutError:
            raise CallError(Status.DEADLINE_EXCEEDED, f"the message wasn't sent within {timeout_s:g} s") from None
        finally:
            self.reads_since_s = math.inf
            incoming.release()
        return parse(await self._inflated(message, limit_bytes))

    async def send(self, message: bytes) -> None:
        """Send an answer after all earlier answers of the call; return when the connection has taken it.

        Raises:
            TooMuch: the call's answers, or those of all calls, aren't read, or none of them for too long.
        """
        self._owner.take_unread(self, len(message))
        (CURRENT.get() or self.record).sent_bytes += len(message)
        if asyncio.current_task() is self.task:
            try:
                await self._write(message)
            finally:
                self._count_read(len(message))
            return

        def end(task: asyncio.Task[None]) -> None:
            self._writing.discard(task)
            self._count_read(len(message))

        # One of many requests may be cancelled within a message; the others' messages need its end.
        writing = asyncio.create_task(self._write(message))
        self._writing.add(writing)
        writing.add_done_callback(end)
        await asyncio.shield(writing)

    async def has_room(self) -> None:
        """Wait while answers aren't read."""
        if self.unread_bytes > SMALL_MESSAGE_BYTES:
            self._has_room.clear()
        await self._has_room.wait()

    async def end(self, status: Status, message: str = "") -> None:
        """Send the call's status; a connection that doesn't take it is closed."""
        trailers = [("grpc-status", str(status.value))]
        if message:
            trailers.append(("grpc-message", encode_grpc_message(message[:1000])))
        if not self._has_headers:
            trailers = [*self._first_headers(), *trailers]
        try:
            sending = self._stream.send_headers(trailers, end_stream=True)
            if self._stream.connection.write_ready.is_set():
                await sending  # which waits for nothing
            else:
                async with asyncio.timeout(END_TIMEOUT_S):
                    await sending
            if self._stream.closable:
                # What the caller still sends isn't read.
                self._stream.reset_nowait()
        except TimeoutError:
            self.abort_connection()
        except (H2Error, OSError, AttributeError):
            logger.debug("%s: the caller has gone", self.path)

    def abort_connection(self) -> None:
        self._stream._transport.abort()

    def close(self) -> None:
        """Count nothing of the call any longer. Where its end couldn't be told, tell that there is none."""
        self._incoming.close()
        for writing in self._writing:
            writing.cancel()
        with contextlib.suppress(H2Error, OSError, AttributeError):
            if self._stream.closable:
                self._stream.reset_nowait(ErrorCodes.CANCEL)

    async def _write(self, message: bytes) -> None:
        try:
            async with self._sending:
                self.waits_since_s = time.monotonic()
                if not self._has_headers:
                    self._has_headers = True
                    await self._taken(self._stream.send_headers(self._first_headers()))
                data, before = b"\0" + len(message).to_bytes(4, "big") + message, self._stream.data_sent
                while (at := self._stream.data_sent - before) < len(data):
                    await self._taken(self._stream.send_data(data[at : at + PIECE_BYTES]))
        except (H2Error, OSError):
            # The caller has gone, and nobody needs to be told.
            if self.task:
                self.task.cancel()
            raise asyncio.CancelledError from None
        finally:
            self.waits_since_s = math.inf

    async def _taken(self, sending: Coroutine[Any, Any, None]) -> None:
        """Wait until the connection has taken what is sent, or, where that takes long, a part of it.

        Raises:
            TooMuch: it took nothing within the time that is set.
        """
        timeout_s, before = self._owner.limits.body_timeout_s, self._stream.data_sent
        try:
            async with asyncio.timeout(timeout_s):
                await sending
        except TimeoutError:
            if self._stream.data_sent > before:
                return
            if not self._stream.connection.write_ready.is_set():
                # It takes nothing at all, the call's end neither.
                self.abort_connection()
            raise TooMuch(f"its answers weren't read for {timeout_s:g} s") from None

    def _count_read(self, nbytes: int) -> None:
        self._owner.take_unread(self, -nbytes)
        if self.unread_bytes <= SMALL_MESSAGE_BYTES:
            self._has_room.set()

    def _deadline(self) -> float:
        text = self.headers.get("grpc-timeout")
        try:
            return math.inf if text is None else time.monotonic() + decode_timeout(text)
        except (ValueError, OverflowError):
            return math.inf

    def _first_headers(self) -> list[tuple[str, str]]:
        headers = [(":status", "200"), ("content-type", "application/grpc"), ("grpc-accept-encoding", "gzip,deflate")]
        headers.append(("x-request-id", self.record.request_id))
        if self.record.traceparent:
            headers.append(("traceparent", self.record.traceparent))
        return headers

    async def _inflated(self, message: bytes, limit_bytes: int) -> bytes:
        encoding = self.headers.get("grpc-encoding", "identity")
        if encoding not in ("gzip", "deflate"):
            raise Unsupported(f"grpc-encoding: {encoding[:20]!r}, expected gzip, deflate or identity")
        if len(message) > SMALL_MESSAGE_BYTES:
            return await asyncio.to_thread(_inflate, message, limit_bytes)
        return _inflate(message, limit_bytes)


async def outcome(call: Call, owner: Calls) -> tuple[Status, str]:
    """Run a call's method.

    Returns:
        The status and the message that it ends with.

    Raises:
        CancelledError: the caller has gone.
    """
    try:
        if not call.headers.get("content-type", "").startswith("application/grpc"):
            raise CallError(Status.INVALID_ARGUMENT, "content-type: expected application/grpc")
        method = owner.methods.get(call.path)
        if method is None:
            raise Unsupported(f"{call.path[:100]}: this server has no such method")
        if len(owner.calls) > MAX_CALLS and not owner.end_one_that_gives_way():
            raise TooMuch(f"{MAX_CALLS} calls are under way; try again later")
        left_s = call.deadline_s - time.monotonic()
        async with asyncio.timeout(left_s if math.isfinite(left_s) else None) as time_limit:
            await method(call)
            if call.failure:
                # The cancel that goes with it comes here where the method didn't wait for anything after it.
                await asyncio.sleep(0)
    except asyncio.CancelledError:
        if call.failure is None or call.task is None:
            raise
        call.task.uncancel()
        return end_of(call.failure)
    except (IcPortraitError, CallError) as error:
        return end_of(error)
    except Exception as error:
        if isinstance(error, TimeoutError) and time_limit.expired():
            return Status.DEADLINE_EXCEEDED, "Deadline Exceeded"
        logger.exception("%s failed", call.path)
        return Status.INTERNAL, "INTERNAL: the server failed; its log says how"
    return Status.OK, ""


def end_of(error: IcPortraitError | CallError) -> tuple[Status, str]:
    """Return the status and the message that an error ends a call with."""
    if isinstance(error, CallError):
        return error.status, error.message
    return STATUS.get(error.code) or Status[error.code], to_caller(error)


def _inflate(message: bytes, limit_bytes: int) -> bytes:
    """Inflate a message that gzip or deflate made smaller.

    Raises:
        InvalidRequest: it is neither.
        TooMuch: it would be larger than ``limit_bytes``.
    """
    inflater = zlib.decompressobj(wbits=zlib.MAX_WBITS | 32)
    try:
        inflated = inflater.decompress(message, limit_bytes + 1)
    except zlib.error as error:
        raise InvalidRequest(f"the message isn't compressed as it says ({error})") from None
    if len(inflated) > limit_bytes:
        raise TooMuch(f"a message of more than {limit_bytes} bytes once it is inflated; this server takes as many")
    if not inflater.eof:
        raise InvalidRequest("the compressed message ends too early")
    return inflated
