"""C2PA manifests: where a portrait comes from, signed with the operator's certificate.

Signing is the last layer. A file is encoded and marked first (``imaging``), to the bytes that a seed promises. Then the
file gets a manifest, which holds the time and random numbers. Taking the manifest out gives the first bytes back.

The package c2pa-python is optional, and imported only where a certificate is set.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from icportrait import __version__
from icportrait.contract import Array
from icportrait.errors import IcPortraitError, InvalidRequest
from icportrait.gateway.settings import Settings
from icportrait.pictures.imaging import DIGITAL_SOURCE_TYPE, decode_base64, encode_picture, sniff

CLAIM_GENERATOR = "IC-Portrait Server"
MANIFEST_BYTES = 2**20
"""An input's manifests may take so much, read and decompressed,"""
ASSERTIONS = 200
"""and have so many assertions, because c2pa's time goes up with their square: 3,000 take 7 s, 200 take 0.1 s."""
MARK = b"jumb"
"""A file without it has no manifest."""
BOXES = 4 * ASSERTIONS
"""More than so many of ``BOX`` in a file are too many assertions, which is known before c2pa takes its time."""
BOX = b"jumd"
UNREDACTABLE = (b"c2pa.databoxes", b"c2pa.credentials")
"""Parts of older manifests that hold anything, and that C2PA has no way to take out."""
KEPT = (
    "c2pa.actions",
    "c2pa.hash.",
    "c2pa.ingredient",
    "c2pa.soft-binding",
    "c2pa.time-stamp",
    "c2pa.certificate-status",
    "c2pa.training-mining",
    "cawg.training-mining",
)
"""Assertions of an input that stay, by the beginning of their labels: what was done, hashes, watermarks, refusals of
training. The rest is redacted, because thumbnails show the caller's picture, and metadata names places and people."""
_MIME = {"PNG": "image/png", "JPEG": "image/jpeg", "WEBP": "image/webp", "AVIF": "image/avif", "HEIC": "image/heic"}
_SETTINGS = {
    "builder": {"thumbnail": {"enabled": False}, "generate_c2pa_archive": True},
    # An input names the address of a remote manifest; c2pa would fetch it.
    "verify": {"remote_manifest_fetch": False, "ocsp_fetch": False, "verify_after_sign": False},
    "core": {"allowed_network_hosts": [], "max_decompressed_manifest_size_in_mb": 1},
    # Uses of a certificate: to sign claims, documents, e-mail, time stamps.
    "trust": {"trust_config": "1.3.6.1.4.1.62558.2.1\n1.3.6.1.5.5.7.3.36\n1.3.6.1.5.5.7.3.4\n1.3.6.1.5.5.7.3.8\n"},
}


@dataclass(frozen=True)
class Credentials:
    """Certificate and key that manifests are signed with."""

    certificates: bytes = field(repr=False)
    """The chain in PEM, the signer's own first."""
    key: bytes = field(repr=False)
    algorithm: str
    timestamp_url: str | None


@dataclass(frozen=True)
class Ingredient:
    """One of a portrait's inputs, and what is kept of its manifests."""

    name: str
    outcome: str = "no manifest"
    """Text for the caller."""
    archive: bytes = field(default=b"", repr=False)
    """Archive of c2pa's; empty where nothing is kept."""
    redactions: tuple[str, ...] = ()
    """URIs of the assertions that are taken out."""


class Signed(NamedTuple):
    """A portrait's file."""

    file: bytes
    unsigned_sha256: str = ""
    """Hash of the file before it got its manifest; empty where it got none."""
    dropped: str = ""
    """Why inputs' manifests are missing; empty where they are there."""


class _Signer:
    """c2pa's own objects, of one process."""

    def __init__(self, credentials: Credentials) -> None:
        import c2pa

        self.c2pa = c2pa
        self.context = c2pa.Context.from_dict(_SETTINGS)
        self._signer = c2pa.Signer.from_info(
            c2pa.C2paSignerInfo(
                credentials.algorithm, credentials.certificates, credentials.key, credentials.timestamp_url
            )
        )

    def read(self, data: bytes, mime: str) -> Any:
        """Return c2pa's report on a file as JSON has it."""
        with self.c2pa.Reader(mime, io.BytesIO(data), context=self.context) as reader:
            return json.loads(reader.detailed_json())

    def archive(self, name: str, data: bytes, mime: str) -> bytes:
        """Keep an input's manifests and the result of their validation, for a later ``sign``."""
        archive = io.BytesIO()
        with self.c2pa.Builder(json.dumps({"claim_generator_info": [{"name": CLAIM_GENERATOR}]}), self.context) as it:
            it.add_ingredient(json.dumps(_ingredient(name)), mime, io.BytesIO(data))
            it.write_ingredient_archive(name, archive)
        return archive.getvalue()

    def sign(self, data: bytes, mime: str, ingredients: Iterable[Ingredient]) -> bytes:
        """Return the file with its manifest."""
        ingredients, signed = list(ingredients), io.BytesIO()
        with self.c2pa.Builder(json.dumps(_definition(ingredients)), self.context) as builder:
            for ingredient in ingredients:
                if ingredient.archive:
                    builder.add_ingredient_from_archive(io.BytesIO(ingredient.archive))
            builder.sign(self._signer, mime, io.BytesIO(data), signed)
        return signed.getvalue()


_signer: _Signer | None = None


def begin(credentials: Credentials | None) -> None:
    """Prepare this process to sign, so that no picture waits for it."""
    global _signer
    _signer = _Signer(credentials) if credentials else None


def read_ingredient(data: bytes, name: str, is_base64: bool) -> Ingredient:
    """Look for C2PA manifests in an input.

    Args:
        data: the file, as base64 text where ``is_base64`` says so.
        name: the input that it came in.
        is_base64: see ``data``.
    """
    assert _signer
    if is_base64:
        data = decode_base64(data, name)
    if MARK not in data:
        return Ingredient(name)
    if (boxes := data.count(BOX)) > BOXES:
        return Ingredient(name, f"ignored: {boxes} parts, expected at most {BOXES}")
    try:
        mime = _MIME[sniff(data, name).upper()]
        store = _signer.read(data, mime)["manifests"]
        labels = [(manifest, label) for manifest, content in store.items() for label in content["assertion_store"]]
        if len(labels) > ASSERTIONS:
            return Ingredient(name, f"ignored: {len(labels)} assertions, expected at most {ASSERTIONS}")
        archive = _signer.archive(name, data, mime)
    except (_signer.c2pa.C2paError, InvalidRequest, KeyError, ValueError, MemoryError) as error:
        return Ingredient(name, f"ignored: {' '.join(str(error).split())[:200]}")
    if len(archive) > MANIFEST_BYTES:
        return Ingredient(name, f"ignored: {len(archive):,} bytes, expected at most {MANIFEST_BYTES:,}")
    if found := next((label.decode() for label in UNREDACTABLE if label in archive), None):
        return Ingredient(name, f"ignored: it has {found}, which can't be taken out")
    redactions = tuple(
        f"self#jumbf=/c2pa/{manifest}/c2pa.assertions/{label}"
        for manifest, label in labels
        if not label.startswith(KEPT)
    )
    return Ingredient(name, "kept", archive, redactions)


def encode_and_sign(pixels: Array, output_format: str, ingredients: tuple[Ingredient, ...]) -> Signed:
    """Encode a portrait, mark it and sign it.

    Args:
        pixels: ``[height, width, 3]`` uint8.
        output_format: png, jpeg or webp.
        ingredients: the portrait's inputs.

    Raises:
        RuntimeError: it can't be signed; of c2pa's own errors not all cross processes.
    """
    assert _signer
    file = encode_picture(pixels, output_format)
    digest, mime = hashlib.sha256(file).hexdigest(), _MIME[output_format.upper()]
    has_archive, dropped = any(ingredient.archive for ingredient in ingredients), ""
    if has_archive:
        try:
            return Signed(_signer.sign(file, mime, ingredients), digest)
        except _signer.c2pa.C2paError as error:
            # It may be the inputs' manifests; without them it is the server's own.
            dropped = f"ignored: {' '.join(str(error).split())[:200]}"
    try:
        bare = [Ingredient(ingredient.name) for ingredient in ingredients]
        return Signed(_signer.sign(file, mime, bare), digest, dropped)
    except _signer.c2pa.C2paError as error:
        raise RuntimeError(f"a portrait can't be signed: {error}") from None


def read_credentials(settings: Settings) -> Credentials | None:
    """Read the operator's credentials, and try them on a small picture. Return None where no certificate is set.

    Raises:
        IcPortraitError: a setting isn't what it should be; names it, and says how to mend it.
    """
    if settings.c2pa_certificate is None or settings.c2pa_key is None:
        return None
    if settings.c2pa_key.stat().st_mode & 0o007:
        raise IcPortraitError(f"c2pa_key: {settings.c2pa_key}: every user may read it; chmod o= {settings.c2pa_key}")
    files = {}
    for name in ("c2pa_certificate", "c2pa_key"):
        path: Path = getattr(settings, name)
        try:
            files[name] = path.read_bytes()
        except OSError as error:
            raise IcPortraitError(f"{name}: {path}: {error.strerror}") from error
    for name, what in (("c2pa_certificate", "BEGIN CERTIFICATE"), ("c2pa_key", "BEGIN PRIVATE KEY")):
        if what.encode() not in files[name]:
            mend = "; openssl pkcs8 -topk8 -nocrypt makes it of another form" if name == "c2pa_key" else ""
            raise IcPortraitError(f'{name}: {getattr(settings, name)}: no "{what}" in it, expected PEM{mend}')
    credentials = Credentials(
        files["c2pa_certificate"], files["c2pa_key"], settings.c2pa_algorithm, settings.c2pa_timestamp_url
    )
    try:
        _check(credentials)
    except ModuleNotFoundError as error:
        raise IcPortraitError(
            "c2pa_certificate: needs the package c2pa-python; pip install 'icportrait[c2pa]'"
        ) from error
    return credentials


def describe(credentials: Credentials) -> str:
    """Return a line for the operator: the signer's name, and how long the certificate is valid."""
    from cryptography.x509 import load_pem_x509_certificates

    certificate = load_pem_x509_certificates(credentials.certificates)[0]
    return (
        f"pictures are signed (C2PA) by {certificate.subject.rfc4514_string()}, "
        f"valid until {certificate.not_valid_after_utc:%Y-%m-%d}"
    )


def _check(credentials: Credentials) -> None:
    """Sign a small picture and read its manifest."""
    import c2pa

    names = "c2pa_certificate, c2pa_key, c2pa_algorithm" + (", c2pa_timestamp_url" if credentials.timestamp_url else "")
    try:
        signer = _Signer(credentials)
        signed = signer.sign(encode_picture(np.zeros((16, 16, 3), np.uint8), "png"), "image/png", [])
        report = signer.read(signed, "image/png")
    except c2pa.C2paError as error:
        raise IcPortraitError(
            f"{names}: a picture can't be signed ({error}); expected a certificate for signing claims, documents or "
            "e-mail that is valid now and stands before those that it is signed by, its key, and the key's algorithm"
        ) from None
    if report["validation_state"] == "Invalid":
        failures = report["validation_results"]["activeManifest"]["failure"]
        reasons = ", ".join(failure["explanation"] for failure in failures)
        raise IcPortraitError(
            f"{names}: a picture signed with them doesn't validate ({reasons}); expected the first certificate's key"
        )


def _ingredient(name: str) -> dict[str, str]:
    return {"title": name, "label": name, "relationship": "inputTo"}


def _definition(ingredients: list[Ingredient]) -> dict[str, Any]:
    """Write a manifest, as c2pa takes it. An input without manifests is named, and the manifest says no more of it."""
    generator = {"name": CLAIM_GENERATOR, "version": __version__}
    created = {
        "action": "c2pa.created",
        "when": datetime.now(UTC).isoformat(timespec="seconds"),
        "digitalSourceType": DIGITAL_SOURCE_TYPE,
        "softwareAgent": generator,
        "parameters": {"ingredientIds": [ingredient.name for ingredient in ingredients]},
    }
    # Both inputs may be one file.
    redactions = list(dict.fromkeys(uri for ingredient in ingredients for uri in ingredient.redactions))
    redacted = [
        {"action": "c2pa.redacted", "reason": "c2pa.PII.present", "parameters": {"redacted": uri}} for uri in redactions
    ]
    return {
        "claim_generator_info": [generator],
        "ingredients": [_ingredient(ingredient.name) for ingredient in ingredients if not ingredient.archive],
        "redactions": redactions,
        "assertions": [{"label": "c2pa.actions.v2", "data": {"actions": [created, *redacted]}}],
    }
