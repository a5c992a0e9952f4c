"""The last days of the certificates that a server uses."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path

from cryptography.x509 import load_pem_x509_certificates

from icportrait.errors import IcPortraitError
from icportrait.gateway.settings import Settings

SETTINGS = ("tls_certificate", "tls_client_ca", "c2pa_certificate")


def valid_until(path: Path) -> datetime:
    """Return the end of the certificate in a PEM file that ends first, in UTC.

    Raises:
        IcPortraitError: the file can't be read, or has no certificate.
    """
    try:
        certificates = load_pem_x509_certificates(path.read_bytes())
    except (OSError, ValueError) as error:
        raise IcPortraitError(f"{path}: no certificate can be read ({error}), expected PEM") from error
    return min(certificate.not_valid_after_utc for certificate in certificates)


def ends_of_certificates(settings: Settings) -> dict[str, datetime]:
    """Return the last moment of each certificate that is set, by its setting.

    Raises:
        IcPortraitError: a file can't be read; names its setting.
    """
    found = {}
    for name in SETTINGS:
        if path := getattr(settings, name):
            try:
                found[name] = valid_until(path)
            except IcPortraitError as error:
                raise IcPortraitError(f"{name}: {error}") from error
    return found


def days_left(end: datetime) -> float:
    """Return the days until ``end``, below zero where it has passed."""
    return (end - datetime.now(UTC)).total_seconds() / 86_400
