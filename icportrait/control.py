"""The line between the fronts' processes and the denoising loop's, beside Triton.

Triton carries pictures through the ensemble and answers back. What must be said at another moment goes over a socket:

    front -> loop   lease     may this request run? answered at once
                    cancel    its caller has gone
                    seen      its last preview has reached the caller
                    release   it has been answered
    loop -> front   leased    the lease, or why not
                    step      so many steps are done

Messages are JSON objects with ``op`` and the request's ``key``. A connection that breaks tells either side that the
other process has ended. The socket lies in Linux's abstract namespace: it has no file, and goes with its process.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import socket
import struct
import threading
import time
from collections.abc import Callable
from multiprocessing.connection import Client, Connection, Listener
from pathlib import Path
from typing import Any

from icportrait.errors import IcPortraitError, Unavailable, from_wire

logger = logging.getLogger(__name__)
Message = dict[str, Any]
OnReply = Callable[[IcPortraitError | None], None]
LEASE_TIMEOUT_S = 2.0
NO_LOOP = "the denoising loop has ended; the server must be restarted, which make serve does by itself; try again later"
LOOP_IS_BUSY = "the denoising loop doesn't answer; try again later"


def address(directory: Path) -> str:
    """The socket's name, of the server that runs the model in ``directory``.

    Args:
        directory: ``<repository>/<model>/<version>`` as the server names it, links not followed: each server of ours
            serves its repository through a link of its own.
    """
    repository = directory.absolute().parents[1]
    return f"\0icportrait-{hashlib.sha256(os.fsencode(repository)).hexdigest()[:32]}"


class Peer:
    """One end of a connection; any thread may send."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._sending = threading.Lock()

    def send(self, message: Message) -> bool:
        """Send, and say whether the other side was there."""
        try:
            with self._sending:
                self._connection.send_bytes(json.dumps(message).encode())
        except (OSError, ValueError):
            return False
        return True

    def receive(self, on_message: Callable[[Message], None]) -> None:
        """Hand every message over until the connection ends."""
        with contextlib.suppress(EOFError, OSError):
            while True:
                message = json.loads(self._connection.recv_bytes())
                try:
                    on_message(message)
                except Exception:
                    logger.exception("a message could not be handled: %s", message.get("op"))

    def close(self) -> None:
        """End the connection; whoever receives on it returns."""
        # Closing alone would leave a thread that is reading where it is.
        with contextlib.suppress(OSError), _socket(self._connection) as stream:
            stream.shutdown(socket.SHUT_RDWR)


class ControlServer:
    """The loop's side: a thread that accepts, and one for each front."""

    def __init__(
        self, directory: Path, on_message: Callable[[Peer, Message], None], on_gone: Callable[[Peer], None]
    ) -> None:
        """Start to listen.

        Args:
            directory: of the denoising model; see ``address``.
            on_message: called with what comes, for each front from a thread of its own.
            on_gone: called when a front's connection has ended.
        """
        self._address, self._on_message, self._on_gone = address(directory), on_message, on_gone
        self._listener = Listener(self._address, "AF_UNIX", backlog=16)
        self._peers: set[Peer] = set()
        self._closed = False
        self._thread = threading.Thread(target=self._accept, name="control", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop, and give the address back."""
        self._closed = True
        Client(self._address, "AF_UNIX").close()
        self._thread.join()
        self._listener.close()
        for peer in list(self._peers):
            peer.close()

    def _accept(self) -> None:
        while True:
            connection = self._listener.accept()
            if self._closed:
                connection.close()
                return
            if not _is_own_user(connection):
                logger.warning("another user's process asked for the denoising loop; it was sent away")
                connection.close()
                continue
            peer = Peer(connection)
            self._peers.add(peer)
            threading.Thread(target=self._serve, args=(peer, connection), name="control-peer", daemon=True).start()

    def _serve(self, peer: Peer, connection: Connection) -> None:
        peer.receive(lambda message: self._on_message(peer, message))
        self._peers.discard(peer)
        connection.close()
        self._on_gone(peer)


class LoopLine:
    """A front's side. Connects when it is first needed, and again where the loop has been restarted."""

    def __init__(self, directory: Path, on_step: Callable[[str, int, int], None], on_gone: Callable[[], None]) -> None:
        """Prepare the line.

        Args:
            directory: of the front's model; see ``address``.
            on_step: called with a request's key, the number of steps that are done and of all its steps.
            on_gone: called when the loop's process has ended.
        """
        self._address, self._on_step, self._on_gone = address(directory), on_step, on_gone
        self._peer: Peer | None = None
        self._closed = False
        self._connecting = threading.Lock()
        self._leases: dict[str, tuple[OnReply, float, Peer | None]] = {}
        """What waits for a reply, until when, and from whom."""

    def lease(self, key: str, demand: Message, on_reply: OnReply) -> None:
        """Ask whether a request may run; returns at once.

        Args:
            key: the request's.
            demand: ``admission.Demand``'s fields.
            on_reply: called once, from any thread: with None, or with ``Unavailable`` where it may not run, or the loop
                has ended or doesn't answer.
        """
        peer = self._connect()
        self._leases[key] = on_reply, time.monotonic() + LEASE_TIMEOUT_S, peer
        if peer is None or not peer.send({"op": "lease", "key": key, **demand}):
            self._reply(key, Unavailable(NO_LOOP))

    def expire_leases(self) -> None:
        """Give up those that the loop has left unanswered for long; to be called now and then."""
        now = time.monotonic()
        for key, (_, until_s, _) in list(self._leases.items()):
            if now > until_s and self._reply(key, Unavailable(LOOP_IS_BUSY)):
                self.release(key)

    def cancel(self, key: str) -> None:
        """Say that a request's caller has gone."""
        self._send({"op": "cancel", "key": key})

    def seen(self, key: str) -> None:
        """Say that a request's last preview has been sent on."""
        self._send({"op": "seen", "key": key})

    def release(self, key: str, stage_ms: dict[str, float] | None = None) -> None:
        """Give a lease back.

        Args:
            key: the request's.
            stage_ms: milliseconds by stage where there was an answer with portraits.
        """
        self._send({"op": "release", "key": key, "stage_ms": stage_ms})

    def close(self) -> None:
        """End the connection."""
        self._closed = True
        if self._peer:
            self._peer.close()

    def _send(self, message: Message) -> bool:
        peer = self._connect()
        return peer is not None and peer.send(message)

    def _connect(self) -> Peer | None:
        with self._connecting:
            if self._peer is None and not self._closed:
                try:
                    connection = Client(self._address, "AF_UNIX")
                except OSError:
                    return None
                self._peer = Peer(connection)
                threading.Thread(
                    target=self._receive, args=(self._peer, connection), name="control", daemon=True
                ).start()
            return self._peer

    def _receive(self, peer: Peer, connection: Connection) -> None:
        peer.receive(self._handle)
        self._peer = None
        connection.close()
        for key, (*_, asked) in list(self._leases.items()):
            if asked is peer:  # a loop that was started since may have been asked already
                self._reply(key, Unavailable(NO_LOOP))
        if not self._closed:
            self._on_gone()

    def _handle(self, message: Message) -> None:
        if message["op"] == "step":
            self._on_step(message["key"], message["step"], message["total_steps"])
        else:
            refusal = message["refusal"]
            self._reply(message["key"], (from_wire(refusal) or Unavailable(refusal)) if refusal else None)

    def _reply(self, key: str, refusal: IcPortraitError | None) -> bool:
        """Whether this was the lease's reply: there is one."""
        on_reply, *_ = self._leases.pop(key, (None, 0.0, None))
        if on_reply:
            on_reply(refusal)
        return on_reply is not None


def _socket(connection: Connection) -> socket.socket:
    return socket.fromfd(connection.fileno(), socket.AF_UNIX, socket.SOCK_STREAM)


def _is_own_user(connection: Connection) -> bool:
    """Whether the process at the other end is this user's: an abstract socket has no permissions."""
    with _socket(connection) as stream:
        credentials = stream.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    _, user, _ = struct.unpack("3i", credentials)
    return bool(user == os.getuid())
