"""The way of a message to a server and back: gRPC, or whatever else is injected in its place.

``GrpcTransport`` is the only part of this package that knows gRPC, and the only place where gRPC's errors become ours.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
from collections.abc import AsyncGenerator, AsyncIterator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from icportrait_client import wire
from icportrait_client.errors import InvalidRequest, RequestCancelled, from_status
from icportrait_client.wire import SERVICE

INFER, STREAM_INFER = "ModelInfer", "ModelStreamInfer"
SERVER_READY, MODEL_METADATA = "ServerReady", "ModelMetadata"
SERVER_LIVE, SERVER_METADATA, MODEL_CONFIG = "ServerLive", "ServerMetadata", "ModelConfig"
CALLS_OF_CONNECTION = 100
"""Calls above which a second connection is made. The server lets a connection have 256, and more would wait unseen."""
KEEPALIVE_S = 30.0
"""Seconds of silence after which a connection with calls under way is tested. The gateway never punishes a ping; gRPC's
own servers end a connection at the third within five minutes, unless they are told to permit them."""
KEEPALIVE_TIMEOUT_S = 10.0
PROFILE_HEADER = "x-profile"
"""Header by which a proxy knows requests of the same profile."""
LONGEST_S = 1e6
"""The longest time that gRPC is told: its clock overflows, and takes a very long one for one that has passed."""
_UNLIMITED = -1


class Transport(Protocol):
    """Sends messages to servers. Errors are of ``icportrait_client.errors``; cancelling a call's task cancels the call.

    >>> import icportrait_client
    >>> class Recorded:
    ...     async def unary(self, address, method, message, timeout_s):
    ...         raise icportrait_client.ServerUnavailable(f"{address}: not today")
    ...     def stream(self, address, method, message, timeout_s):
    ...         raise NotImplementedError
    ...     async def close(self):
    ...         pass
    >>> with icportrait_client.PortraitClient("nowhere:1", transport=Recorded(), attempts=1) as client:
    ...     try:
    ...         client.generate(profile=profile, reference=reference)
    ...     except icportrait_client.ServerUnavailable as error:
    ...         print(error)
    nowhere:1: not today
    """

    async def unary(self, address: str, method: str, message: bytes, timeout_s: float) -> bytes:
        """Send a message and return the answer.

        Raises:
            PortraitError: there is none.
        """

    def stream(self, address: str, method: str, message: bytes, timeout_s: float) -> AsyncGenerator[bytes, None]:
        """Send a message and yield the answers as they come; closing the generator cancels the call.

        Raises:
            PortraitError: the answers end with an error.
        """

    async def close(self) -> None:
        """Close all connections and cancel what is under way."""


@dataclass(frozen=True)
class Tls:
    """The certificates of a connection.

    Files are read when a client is made.

    >>> Tls(authority="no/such.pem").read()
    Traceback (most recent call last):
    ...
    icportrait_client.errors.InvalidRequest: tls.authority: 'no/such.pem' can't be read (No such file or directory)
    """

    authority: str | os.PathLike[str] | None = None
    """PEM file of the authority that signed the server's certificate; None for those that gRPC knows."""
    certificate: str | os.PathLike[str] | None = None
    """PEM file of this client's own certificate, where the server asks for one (mutual TLS)."""
    key: str | os.PathLike[str] | None = None
    """PEM file of the certificate's key."""
    server_name: str | None = None
    """Name in the server's certificate, where it isn't the address's."""

    def read(self) -> dict[str, bytes | None]:
        """Read the files.

        Raises:
            InvalidRequest: one can't be read, or a certificate has no key.
        """
        if (self.certificate is None) != (self.key is None):
            raise InvalidRequest("tls: certificate and key belong together, and only one is given")
        return {name: self._read(name) for name in ("authority", "certificate", "key")}

    def _read(self, name: str) -> bytes | None:
        if (path := getattr(self, name)) is None:
            return None
        try:
            return Path(path).read_bytes()
        except OSError as error:
            raise InvalidRequest(f"tls.{name}: {str(path)!r} can't be read ({error.strerror})") from None


@dataclass
class _Connection:
    channel: Any
    calls: int = 0


@dataclass
class GrpcTransport:
    """gRPC by ``grpc.aio``; belongs to the event loop in which it is used first."""

    metadata: Sequence[tuple[str, str]] = ()
    """Headers of every call."""
    sticky: bool = False
    """Send a hash of the profile in ``PROFILE_HEADER``."""
    tls: Tls | None = None
    server_name: str | None = None
    """Host of the address, where a server is reached by a resolved one."""
    use_proxy: bool = False
    keepalive_s: float = KEEPALIVE_S
    _connections: dict[str, list[_Connection]] = field(default_factory=dict)
    _credentials: Any = None
    _is_closed: bool = False

    def __post_init__(self) -> None:
        self._files = self.tls.read() if self.tls else None

    async def unary(self, address: str, method: str, message: bytes, timeout_s: float) -> bytes:
        with self._calling(address, timeout_s) as channel:
            call = channel.unary_unary(f"/{SERVICE}/{method}")
            answer: bytes = await call(
                message, timeout=min(timeout_s, LONGEST_S), metadata=self._headers(method, message)
            )
        return answer

    async def stream(self, address: str, method: str, message: bytes, timeout_s: float) -> AsyncGenerator[bytes, None]:
        with self._calling(address, timeout_s) as channel:
            # One message goes out: on the wire a call with one request and a stream of them are the same. The server
            # then ends a stream that fails with a code.
            start = channel.unary_stream(f"/{SERVICE}/{method}")
            call = start(
                message,
                timeout=min(timeout_s, LONGEST_S),
                metadata=[*self._headers(method, message), ("triton_grpc_error", "true")],
            )
            try:
                answers: AsyncIterator[bytes] = call.__aiter__()
                async for answer in answers:
                    yield answer
            finally:
                call.cancel()

    def _headers(self, method: str, message: bytes) -> Sequence[tuple[str, str]]:
        if not self.sticky or method not in (INFER, STREAM_INFER):
            return self.metadata
        _, inputs = wire.read_infer_request(message)
        return [*self.metadata, (PROFILE_HEADER, hashlib.sha256(inputs["profile"].data).hexdigest())]

    @contextmanager
    def _calling(self, address: str, timeout_s: float) -> Iterator[Any]:
        """Yield a channel for one call, and raise this package's errors for gRPC's."""
        import grpc

        connection = self._connection(address)
        connection.calls += 1
        try:
            yield connection.channel
        except grpc.RpcError as error:
            raise from_status(error.code().name, error.details() or "", address, timeout_s) from error
        except asyncio.CancelledError:
            self._raise_if_closed()
            raise
        finally:
            connection.calls -= 1

    async def close(self) -> None:
        connections = [connection for of_address in self._connections.values() for connection in of_address]
        self._connections.clear()
        self._is_closed = True
        await asyncio.gather(*(connection.channel.close(None) for connection in connections))

    def _raise_if_closed(self) -> None:
        # Closing a channel cancels its calls, and not their tasks. Python 3.10 can't tell the two apart.
        cancelling = getattr(asyncio.current_task(), "cancelling", int)
        if self._is_closed and not cancelling():
            raise RequestCancelled("the client was closed") from None

    def _connection(self, address: str) -> _Connection:
        """Return the connection with the fewest calls; make one where all have many."""
        if self._is_closed:
            # A request that paused before its next attempt comes only now.
            raise RequestCancelled("the client was closed")
        connections = self._connections.setdefault(address, [])
        least = min(connections, key=lambda connection: connection.calls, default=None)
        if least is None or least.calls >= CALLS_OF_CONNECTION:
            least = _Connection(self._channel(address))
            connections.append(least)
        return least

    def _channel(self, address: str) -> Any:
        import grpc

        options = self._options()
        if self._files is None:
            return grpc.aio.insecure_channel(address, options=options)
        if self._credentials is None:
            self._credentials = grpc.ssl_channel_credentials(
                self._files["authority"], self._files["key"], self._files["certificate"]
            )
        assert self.tls
        if name := self.tls.server_name or self.server_name:
            options += [("grpc.ssl_target_name_override", name), ("grpc.default_authority", name)]
        return grpc.aio.secure_channel(address, self._credentials, options=options)

    def _options(self) -> list[tuple[str, Any]]:
        return [
            # Pictures may be large, and the server has its own limit.
            ("grpc.max_send_message_length", _UNLIMITED),
            ("grpc.max_receive_message_length", _UNLIMITED),
            ("grpc.enable_http_proxy", int(self.use_proxy)),
            # This package tries again by itself; both together would multiply.
            ("grpc.enable_retries", 0),
            ("grpc.service_config", "{}"),
            ("grpc.service_config_disable_resolution", 1),
            # Else two channels to one address share a connection, and one that stalls holds up the other's calls.
            ("grpc.use_local_subchannel_pool", 1),
            ("grpc.initial_reconnect_backoff_ms", 100),
            # Also the time that a connection's beginning may take.
            ("grpc.min_reconnect_backoff_ms", 5000),
            ("grpc.max_reconnect_backoff_ms", 1000),
            ("grpc.keepalive_time_ms", int(1000 * min(self.keepalive_s, LONGEST_S))),
            ("grpc.keepalive_timeout_ms", int(1000 * KEEPALIVE_TIMEOUT_S)),
            ("grpc.http2.max_pings_without_data", 0),
        ]
