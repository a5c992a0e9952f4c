"""The messages between the doors and the service behind them. Neither side knows how the other works."""

from __future__ import annotations

import resource
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Protocol

from icportrait.contract import Array
from icportrait.errors import IcPortraitError


@dataclass(frozen=True)
class Caller:
    """The sender of a request, as a door knows it."""

    name: str = ""
    """Name of the API key; empty where the server asks for none. Each name has cached pictures of its own."""
    priorities: frozenset[int] | None = None
    """Classes that the key may ask for; None allows all."""
    deadline_ms: int | None = None
    """Time that the transport gave the call (``grpc-timeout``); the request's own ``deadline_ms`` counts beside it."""


@dataclass(frozen=True)
class Event:
    """Steps that are done, and a preview where there is one, on the way to the portraits."""

    step: int
    total_steps: int
    images: tuple[bytes, ...] = ()


@dataclass(frozen=True)
class Portraits:
    """The end of a request that succeeds."""

    images: tuple[bytes, ...]
    metadata: bytes
    """JSON."""
    total_steps: int
    row_steps: int = 0
    """Rows of the UNet times steps that they took."""


OnEvent = Callable[[Event], Awaitable[None]]
"""Awaited until the caller's connection has taken the event; what happens meanwhile is told together."""


@dataclass
class Statistics:
    """Counts of one public model since the gateway was started, as KServe's statistics have them."""

    succeeded: int = 0
    succeeded_ns: int = 0
    failed: int = 0
    failed_ns: int = 0
    queued_ns: int = 0
    last_ms: int = 0
    """End of the last request, by the wall clock."""


OWN_DESCRIPTORS = 256
"""Descriptors that connections leave to the process itself."""


def descriptors_of_door(has_tls: bool = False) -> int:
    """Count the connections that one of two doors may hold; with TLS, as many handshakes may be under way beside."""
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    parts = 4 if has_tls else 2
    return 2**31 if limit == resource.RLIM_INFINITY else max((limit - OWN_DESCRIPTORS) // parts, 1)


@dataclass(frozen=True)
class ServerLimits:
    """The limits of callers' use of the gateway, beside the queue's."""

    connections: int = 1024
    """Connections of one door."""
    message_bytes: int = 48 * 2**20
    incoming_bytes: int = 256 * 2**20
    """Bytes of messages that are being read, of all calls of one door together."""
    header_timeout_s: float = 10.0
    body_timeout_s: float = 30.0
    unread_bytes_call: int = 16 * 2**20
    """Answers that a call's connection hasn't taken."""
    unread_bytes: int = 256 * 2**20
    """Unread answers of all calls together."""
    connection_age_s: float | None = None
    """Age at which gRPC's callers are asked to make a connection anew; None is never."""


class PortraitService(Protocol):
    """A request's way to portraits."""

    @property
    def statistics(self) -> Mapping[str, Statistics]:
        """Return statistics by public model."""

    @property
    def is_ready(self) -> bool:
        """Tell whether requests are taken now."""

    def refusal(self) -> IcPortraitError | None:
        """Return the error that refuses any request now, or None. A door asks before it reads a body."""

    async def generate(self, inputs: Mapping[str, Array], caller: Caller, on_event: OnEvent | None = None) -> Portraits:
        """Make portraits.

        Cancelling the task that awaits this ends the request: its slots are free at the next step.

        Args:
            inputs: ``request.INPUTS`` by name; of type BYTES as arrays of ``bytes``.
            caller: who asks.
            on_event: for streams.

        Raises:
            IcPortraitError: by its ``code``.
        """


@dataclass
class Unread:
    """Bytes of answers that connections haven't taken, of all doors together."""

    limits: ServerLimits = field(default_factory=ServerLimits)
    nbytes: int = 0
