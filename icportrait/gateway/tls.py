"""TLS for the doors: the server's certificate, and callers' where the server asks for them."""

from __future__ import annotations

import ssl
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from icportrait.errors import IcPortraitError


class TlsSettings(Protocol):
    """Paths of PEM files; without a certificate a door speaks no TLS."""

    @property
    def tls_certificate(self) -> Path | None:
        """With the chain up to the authority, the server's own first."""

    @property
    def tls_key(self) -> Path | None:
        """Of the certificate, without a password."""

    @property
    def tls_client_ca(self) -> Path | None:
        """Callers must show a certificate that it signed."""


def server_context(settings: TlsSettings, protocols: Sequence[str]) -> ssl.SSLContext | None:
    """A context for TLS 1.2 and later, None where no certificate is set.

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
    """Called where the key has one; else OpenSSL would ask for it at the terminal."""
    raise IcPortraitError("tls_key: it has a password; expected a key without")
