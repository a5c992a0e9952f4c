"""TLS for the doors: the server's certificate, and callers' where the server asks for them."""

from __future__ import annotations

import asyncio
import ssl
from asyncio import sslproto
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

from icportrait.errors import IcPortraitError

READ_BYTES = 64 * 2**10
"""Taken from a connection at once, and held for each: asyncio's own 256 KB keep the loop for long."""
sslproto.SSLProtocol.max_size = READ_BYTES


class TlsSettings(Protocol):
    """Paths of PEM files; without a certificate a door speaks no TLS."""

    @property
    def tls_certificate(self) -> Path | None:
        """Return the file of certificates: the server's own first, then the chain up to the authority."""

    @property
    def tls_key(self) -> Path | None:
        """Return the private key's file, without a password."""

    @property
    def tls_client_ca(self) -> Path | None:
        """Return the file of the authority that must have signed callers' certificates."""


def server_context(settings: TlsSettings, protocols: Sequence[str]) -> ssl.SSLContext | None:
    """Make a context for TLS 1.2 and later. Return None where no certificate is set.

    Args:
        settings: the server's.
        protocols: of ALPN, the preferred first: ``h2``, ``http/1.1``.

    Raises:
        IcPortraitError: a file is missing, can't be read or isn't what it should be; names the setting.
    """
    files = {name: getattr(settings, name) for name in ("tls_certificate", "tls_key", "tls_client_ca")}
    if not any(files.values()):
        return None
    for name in ("tls_certificate", "tls_key"):
        if files[name] is None:
            raise IcPortraitError(f"{name}: missing; TLS needs a certificate and its key")
    for name, path in files.items():
        if path is not None and not path.is_file():
            raise IcPortraitError(f"{name}: {path}: no such file")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.set_alpn_protocols(list(protocols))
    certificate, key, client_ca = files.values()
    try:
        context.load_cert_chain(certificate, key, password=_no_password)
    except OSError as error:
        raise IcPortraitError(f"tls_certificate, tls_key: {certificate}, {key}: {error}") from error
    if client_ca is not None:
        try:
            context.load_verify_locations(client_ca)
        except OSError as error:
            raise IcPortraitError(f"tls_client_ca: {client_ca}: {error}") from error
        context.verify_mode = ssl.CERT_REQUIRED
    return context


def _no_password() -> str:
    """Refuse a key with a password, because OpenSSL would ask for the password at the terminal."""
    raise IcPortraitError("tls_key: it has a password; expected a key without")


class Handshakes:
    """Makes TLS connections of plain ones, within limits; where there are too many, the oldest makes room."""

    def __init__(
        self, context: ssl.SSLContext, protocol: Callable[[], asyncio.Protocol], timeout_s: float, most: int
    ) -> None:
        """Prepare.

        Args:
            context: the server's.
            protocol: makes what takes a connection once it is there; asyncio's own way counts none before that.
            timeout_s: for a handshake.
            most: under way at once. One takes milliseconds; a connection that begins none is there meanwhile.
        """
        self.context, self.connected, self.timeout_s, self._most = context, protocol, timeout_s, most
        self._under_way: dict[_Handshake, asyncio.Transport] = {}

    def protocol(self) -> asyncio.Protocol:
        """Make the protocol of a new plain connection."""
        return _Handshake(self)

    def begin(self, handshake: _Handshake, transport: asyncio.Transport) -> None:
        self._under_way[handshake] = transport
        if len(self._under_way) > self._most:
            self._under_way.pop(next(iter(self._under_way))).abort()

    def end(self, handshake: _Handshake) -> None:
        self._under_way.pop(handshake, None)


class _Handshake(asyncio.Protocol):
    """A connection until it has TLS."""

    def __init__(self, owner: Handshakes) -> None:
        self._owner = owner
        self._early = bytearray()
        self._task: asyncio.Task[None] | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._owner.begin(self, transport)
        self._task = asyncio.get_running_loop().create_task(self._run(transport))

    def data_received(self, data: bytes) -> None:
        self._early += data

    async def _run(self, transport: asyncio.Transport) -> None:
        if transport.is_closing():  # TLS on it would wait for its end, which has been told
            self._owner.end(self)
            return
        try:
            secured = await asyncio.get_running_loop().start_tls(
                transport, self, self._owner.context, server_side=True, ssl_handshake_timeout=self._owner.timeout_s
            )
        except OSError:
            return  # asyncio has closed it
        finally:
            self._owner.end(self)
        if secured is None or secured.is_closing():
            return
        protocol = self._owner.connected()
        secured.set_protocol(protocol)
        protocol.connection_made(secured)
        if self._early and not secured.is_closing():
            protocol.data_received(bytes(self._early))
