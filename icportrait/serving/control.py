"""The control line between the gateway and the denoising loop, beside Triton: the loop's end, and the messages.

Triton carries crops to the loop and pixels back. What must be said at another moment goes over a Unix socket that is a
file, in a directory that only the server's user may enter:

    gateway -> loop   hello     the protocol's version; the first message
                      lease     may this request run? answered at once
                      cancel    its caller has gone
                      seen      its last preview has reached the caller
                      release   it has been answered
                      ping      answered with a pong
    loop -> gateway   hello     this side's version, at once
                      leased    the lease, or why not
                      step      so many steps are done
                      preview   likewise, and what the portraits look like
                      pong      whether the loop gets on

A message is a length in four bytes, the highest first, and a JSON object with ``op``. One that isn't what it should be
ends its connection. A connection that breaks tells either side that the other process has ended.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import queue
import socket
import struct
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, BinaryIO, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from icportrait.metrics import STAGES
from icportrait.phases import Phases, most_rows, row_steps

logger = logging.getLogger(__name__)
VERSION = 2
MAX_ASKED_BYTES = 2**16
"""Size limit of a message to the loop."""
MAX_UNREAD_BYTES = 256 * 2**20
"""Size limit of messages that a gateway hasn't read; previews of all requests that can be admitted are smaller."""
ACCEPT_AGAIN_S = 0.1
LENGTH = struct.Struct("!I")

Reply = Mapping[str, Any]
Key = Annotated[str, Field(min_length=1, max_length=64)]
Positive = Annotated[int, Field(ge=1, le=2**16)]
Count = Annotated[int, Field(ge=0, le=2**53)]
Milliseconds = Annotated[float, Field(ge=0.0, allow_inf_nan=False)]


@dataclass(frozen=True)
class Demand:
    """The slots, steps and time that a request will take, as the gateway knows it."""

    phases: Phases
    priority: int
    deadline_ms: int | None
    arrived_s: float
    """The request's arrival at the gateway, by ``time.monotonic``."""
    nbytes: int
    """Bytes of the request's pictures."""

    @property
    def steps(self) -> int:
        return sum(steps for steps, _ in self.phases)

    @property
    def rows(self) -> int:
        """Return the most slots that the request takes at a step."""
        return most_rows(self.phases)

    @property
    def mean_rows(self) -> float:
        return row_steps(self.phases) / self.steps

    @property
    def deadline_s(self) -> float:
        return math.inf if self.deadline_ms is None else self.arrived_s + self.deadline_ms / 1000

    def to_message(self) -> dict[str, Any]:
        """Return ``LeaseAsked``'s fields."""
        return asdict(self)


class _Message(BaseModel):
    model_config = ConfigDict(strict=True, frozen=True, extra="forbid")


class Hello(_Message):
    op: Literal["hello"] = "hello"
    version: int


class LeaseAsked(_Message):
    """``Demand``'s fields; one that is ``replayed`` was granted before this loop began."""

    op: Literal["lease"] = "lease"
    key: Key
    phases: Annotated[tuple[tuple[Positive, Positive], ...], Field(min_length=1, max_length=3)]
    priority: Annotated[int, Field(ge=0, le=2**16)]
    deadline_ms: Annotated[int, Field(ge=0, le=2**31)] | None
    arrived_s: Annotated[float, Field(ge=0.0, le=2.0**40, allow_inf_nan=False)]
    nbytes: Count
    replayed: bool = False

    @property
    def demand(self) -> Demand:
        return Demand(self.phases, self.priority, self.deadline_ms, self.arrived_s, self.nbytes)


class Cancel(_Message):
    op: Literal["cancel"] = "cancel"
    key: Key


class Seen(_Message):
    op: Literal["seen"] = "seen"
    key: Key


class Release(_Message):
    """A request's end; with milliseconds by stage where there was an answer with portraits."""

    op: Literal["release"] = "release"
    key: Key
    stage_ms: dict[Literal[STAGES], Milliseconds] | None = None  # type: ignore[valid-type]


class Ping(_Message):
    op: Literal["ping"] = "ping"
    id: Count


Asked = LeaseAsked | Cancel | Seen | Release | Ping
_to_json = json.JSONEncoder(allow_nan=False).encode
_ASKED: TypeAdapter[Hello | Asked] = TypeAdapter(
    Annotated[Hello | Asked, Field(discriminator="op")],
    config=ConfigDict(cache_strings="keys"),  # else pydantic keeps the keys of 16,384 requests, which never come again
)


def parse(data: bytes) -> Hello | Asked:
    """Parse a message to the loop.

    Raises:
        pydantic.ValidationError: it isn't what it should be.
    """
    return _ASKED.validate_json(data)


def frame(message: Reply | BaseModel) -> bytes:
    """Return a message as it goes over the line."""
    text = message.model_dump_json() if isinstance(message, BaseModel) else _to_json(message)
    data = text.encode()
    return LENGTH.pack(len(data)) + data


def read_exactly(stream: BinaryIO, count: int) -> bytes:
    """Read a number of bytes, and wait for them.

    Raises:
        EOFError: the other side has closed before.
    """
    data = stream.read(count)
    if len(data) < count:
        raise EOFError
    return data


class Peer:
    """The loop's end of one connection. Any thread may send, and never waits for the other side."""

    def __init__(self, stream: socket.socket) -> None:
        """Begin to send.

        Args:
            stream: connected; the peer closes it.
        """
        self._stream = stream
        self._unread: queue.SimpleQueue[bytes] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._unread_bytes = 0
        self._closed = False
        self._writer = threading.Thread(target=self._write, name="control-writer", daemon=True)
        self._writer.start()

    def send(self, message: Reply | BaseModel) -> bool:
        """Send soon, and say whether the connection is there still."""
        data = frame(message)
        with self._lock:
            if self._closed:
                return False
            self._unread_bytes += len(data)
            is_read = self._unread_bytes <= MAX_UNREAD_BYTES
        if is_read:
            self._unread.put(data)
        else:
            logger.error("the control line isn't read: %d bytes wait; it is closed", self._unread_bytes)
            self.close()
        return is_read

    def receive(self, on_message: Callable[[Asked], None]) -> None:
        """Hand every message over, until the connection ends, or one comes that isn't what it should be."""
        try:
            with self._stream.makefile("rb") as came:
                self._receive(came, on_message)
        except ValueError as error:  # a ValidationError too
            logger.error("a message on the control line isn't what it should be; it is closed: %s", _in_a_line(error))
        except (EOFError, OSError):
            pass

    def close(self) -> None:
        """End the connection; a thread that receives on it returns."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
        self._unread.put(b"")
        # Closing alone would leave a thread that is reading where it is.
        with contextlib.suppress(OSError):
            self._stream.shutdown(socket.SHUT_RDWR)

    def _receive(self, came: BinaryIO, on_message: Callable[[Asked], None]) -> None:
        greeting = _next(came)
        if not isinstance(greeting, Hello) or greeting.version != VERSION:
            logger.error("a control line began with %r, expected hello of version %d; it is closed", greeting, VERSION)
            return
        while True:
            message = _next(came)
            if isinstance(message, Hello):
                logger.error("a control line said hello twice; it is closed")
                return
            try:
                on_message(message)
            except Exception:
                logger.exception("a message could not be handled: %s", message.op)

    def _write(self) -> None:
        while not self._closed:
            parts = [self._unread.get()]
            while not self._unread.empty():
                parts.append(self._unread.get())
            data = b"".join(parts)
            try:
                self._stream.sendall(data)
            except OSError:
                self.close()
                return
            with self._lock:
                self._unread_bytes -= len(data)


def _in_a_line(error: ValueError) -> str:
    if not isinstance(error, ValidationError):
        return str(error)
    first = error.errors(include_url=False, include_input=False)[0]
    return f"{'.'.join(map(str, first['loc']))}: {first['msg']}"


def _next(came: BinaryIO) -> Hello | Asked:
    (length,) = LENGTH.unpack(read_exactly(came, LENGTH.size))
    if length > MAX_ASKED_BYTES:
        raise ValueError(f"{length} bytes, expected {MAX_ASKED_BYTES} or fewer")
    return parse(read_exactly(came, length))


class ControlServer:
    """The loop's side: a thread that accepts, and two for each gateway."""

    def __init__(self, path: Path, on_message: Callable[[Peer, Asked], None], on_gone: Callable[[Peer], None]) -> None:
        """Start to listen.

        Args:
            path: of the socket; what lies there of an earlier loop is replaced.
            on_message: called with all that comes but greetings, for each connection from a thread of its own.
            on_gone: called when a connection has ended, however it did.
        """
        self._path, self._on_message, self._on_gone = path, on_message, on_gone
        path.unlink(missing_ok=True)
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(path))
        self._listener.listen(16)
        self._peers: set[Peer] = set()
        self._closed = False
        self._thread = threading.Thread(target=self._accept, name="control", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop, and remove the socket."""
        self._closed = True
        self._listener.shutdown(socket.SHUT_RDWR)
        self._thread.join()
        self._listener.close()
        self._path.unlink(missing_ok=True)
        for peer in list(self._peers):
            peer.close()

    def _accept(self) -> None:
        is_failing = False
        while not self._closed:
            try:
                stream, _ = self._listener.accept()
                threading.Thread(target=self._serve, args=(stream,), name="control-peer", daemon=True).start()
                is_failing = False
            except (OSError, RuntimeError) as error:
                # No descriptors or threads left, which may pass. The log needs it once.
                if not is_failing and not self._closed:
                    logger.error("the control line can't be connected to now: %s", error)
                is_failing = True
                time.sleep(0 if self._closed else ACCEPT_AGAIN_S)

    def _serve(self, stream: socket.socket) -> None:
        with stream:
            with contextlib.suppress(OSError):
                stream.sendall(frame(Hello(version=VERSION)))
            peer = Peer(stream)
            self._peers.add(peer)
            peer.receive(lambda message: self._on_message(peer, message))
            self._peers.discard(peer)
            peer.close()
        self._on_gone(peer)
