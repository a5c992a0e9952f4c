"""Callers that have gone, from the fronts to the denoising loop.

Triton tells a front that its caller cancelled, and tells nobody of the ensemble behind it. So a front gives every
request a key, and sends the keys of cancelled ones to the process of the denoising loop: a datagram to a socket that
both know by the repository that they serve, and which goes with the process.
"""

from __future__ import annotations

import hashlib
import logging
import os
import socket
import threading
from collections.abc import Callable
from pathlib import Path

logger = logging.getLogger(__name__)
_LARGEST_BYTES = 64


def address(directory: Path) -> str:
    """The socket's name, in Linux's abstract namespace, of the server that runs the model in ``directory``.

    Args:
        directory: ``<repository>/<model>/<version>`` as the server names it, links not followed: each server of ours
            serves its repository through a link of its own.
    """
    repository = directory.absolute().parents[1]
    return f"\0icportrait-cancel-{hashlib.sha256(os.fsencode(repository)).hexdigest()[:32]}"


def send_cancel(directory: Path, key: str) -> None:
    """Tell the denoising loop that a request's caller has gone. Where nobody listens, nothing is left to cancel."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender:
        sender.setblocking(False)
        try:
            sender.sendto(key.encode(), address(directory))
        except OSError as error:
            logger.warning("request %s was cancelled, but the denoising loop can't be told (%s)", key, error)


class CancelListener:
    """Receives the keys on a thread of its own."""

    def __init__(self, directory: Path, on_cancel: Callable[[str], None]) -> None:
        """Start to listen.

        Args:
            directory: of the denoising model; see ``address``.
            on_cancel: called with each key, from the listener's thread.
        """
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._address = address(directory)
        self._socket.bind(self._address)
        self._on_cancel = on_cancel
        self._thread = threading.Thread(target=self._listen, name="cancel", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop, and give the socket back."""
        self._socket.sendto(b"", self._address)
        self._thread.join()
        self._socket.close()

    def _listen(self) -> None:
        while key := self._socket.recv(_LARGEST_BYTES):
            self._on_cancel(key.decode(errors="replace"))
