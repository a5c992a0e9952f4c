"""Throw-away certificates that C2PA manifests are signed with in tests, and pictures of a camera that signs its own."""

from __future__ import annotations

import datetime
import io
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import c2pa
import numpy as np
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID, ObjectIdentifier
from PIL import Image

CLAIM_SIGNING = ObjectIdentifier("1.3.6.1.4.1.62558.2.1")
TRUST = {"trust_config": CLAIM_SIGNING.dotted_string}
CAPTURED = "http://cv.iptc.org/newscodes/digitalsourcetype/digitalCapture"
PLACE, PERSON = "39,21.102N", "Jane Doe"
"""A place and a person that a camera's manifest names."""


@dataclass(frozen=True)
class Chain:
    """PEM: the signer's certificate before its authority's, and the signer's key."""

    certificates: bytes
    key: bytes

    def write(self, folder: Path) -> dict[str, Path]:
        """Write the chain to files, and return the settings that name them."""
        paths = {"c2pa_certificate": folder / "chain.pem", "c2pa_key": folder / "key.pem"}
        for path, data in zip(paths.values(), (self.certificates, self.key), strict=True):
            path.touch(0o600)
            path.write_bytes(data)
        return paths


def make_chain(usage: ObjectIdentifier = CLAIM_SIGNING, valid_days: int = 30) -> Chain:
    """Make an authority and a certificate of its.

    Args:
        usage: what the certificate is for.
        valid_days: for how long it is valid still.
    """
    authority, key = (ec.generate_private_key(ec.SECP256R1()) for _ in range(2))
    pem = serialization.Encoding.PEM
    certificates = [
        _certificate("Signer", key.public_key(), authority, usage, valid_days),
        _certificate("Authority", authority.public_key(), authority, None, valid_days),
    ]
    return Chain(
        b"".join(certificate.public_bytes(pem) for certificate in certificates),
        key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()),
    )


def _certificate(
    name: str, key: Any, authority: ec.EllipticCurvePrivateKey, usage: ObjectIdentifier | None, valid_days: int
) -> x509.Certificate:
    def named(common: str) -> x509.Name:
        organisation = x509.NameAttribute(NameOID.ORGANIZATION_NAME, "Studio")
        return x509.Name([organisation, x509.NameAttribute(NameOID.COMMON_NAME, common)])

    now, is_authority = datetime.datetime.now(datetime.UTC), usage is None
    uses = dict.fromkeys(
        (
            "digital_signature",
            "content_commitment",
            "key_encipherment",
            "data_encipherment",
            "key_agreement",
            "key_cert_sign",
            "crl_sign",
            "encipher_only",
            "decipher_only",
        ),
        False,
    ) | {"key_cert_sign" if is_authority else "digital_signature": True}
    made = (
        x509.CertificateBuilder(named("Authority"), named(name), key, x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=40))
        .not_valid_after(now + datetime.timedelta(days=valid_days))
        .add_extension(x509.BasicConstraints(is_authority, None), critical=True)
        .add_extension(x509.KeyUsage(**uses), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(authority.public_key()), critical=False)
    )
    if usage:
        made = made.add_extension(x509.ExtendedKeyUsage([usage]), critical=False)
    return made.sign(authority, hashes.SHA256())


def captured(
    chain: Chain, assertions: int = 0, thumbnail: bytes = b"a small picture", source: bytes | None = None
) -> bytes:
    """Make a JPEG whose manifest has a thumbnail, a place and a person.

    Args:
        chain: the camera's.
        assertions: so many others.
        thumbnail: any bytes.
        source: another JPEG that it was made of.
    """
    said = [
        ("c2pa.actions.v2", {"actions": [{"action": "c2pa.created", "digitalSourceType": CAPTURED}]}),
        ("stds.exif", {"@context": {"exif": "http://ns.adobe.com/exif/1.0/"}, "exif:GPSLatitude": PLACE}),
        ("com.example.author", {"name": PERSON}),
        *((f"com.example.{number}", {"number": number}) for number in range(assertions)),
    ]
    definition = {
        "claim_generator_info": [{"name": "Camera"}],
        "thumbnail": {"format": "image/jpeg", "identifier": "thumbnail.jpg"},
        "assertions": [{"label": label, "data": data} for label, data in said],
    }
    buffer, signed = io.BytesIO(), io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)).save(buffer, "JPEG")
    signer = c2pa.Signer.from_info(c2pa.C2paSignerInfo("es256", chain.certificates, chain.key, None))
    context = c2pa.Context.from_dict({"builder": {"thumbnail": {"enabled": False}}, "trust": TRUST})
    with c2pa.Builder(json.dumps(definition), context) as builder:
        builder.add_resource("thumbnail.jpg", io.BytesIO(thumbnail))
        if source:
            builder.add_ingredient({"title": "source", "relationship": "inputTo"}, "image/jpeg", io.BytesIO(source))
        builder.sign(signer, "image/jpeg", buffer, signed)
    return signed.getvalue()


def report(data: bytes, mime: str) -> Any:
    """Return c2pa's own report on a signed file, as JSON has it; ``active`` is the manifest that counts."""
    with c2pa.Reader(mime, io.BytesIO(data), context=c2pa.Context.from_dict({"trust": TRUST})) as reader:
        found, detailed = json.loads(reader.json()), json.loads(reader.detailed_json())
    stores = {label: set(manifest["assertion_store"]) for label, manifest in detailed["manifests"].items()}
    return {**found, "active": found["manifests"][found["active_manifest"]], "stores": stores}
