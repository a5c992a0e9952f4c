"""The marks of a picture that say that a model made it: IPTC's Digital Source Type, and a C2PA manifest.

A manifest is found without a package, and validated where c2pa-python is installed. No address that a picture names is
asked.
"""

from __future__ import annotations

import importlib.util
import io
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from icportrait_client.errors import InvalidRequest

GENERATED = frozenset(
    {"trainedAlgorithmicMedia", "compositeWithTrainedAlgorithmicMedia", "compositeSynthetic", "algorithmicMedia"}
)
"""IPTC's terms for media that a program made, wholly or in part."""
NOT_VALIDATED = "not validated"
INVALID = "Invalid"
_TERM = re.compile(rb"DigitalSourceType\b[^<]{0,300}?/digitalsourcetype/(\w{1,80})")
_TERM_URI = "/digitalsourcetype/"
_PNG, _JPEG, _RIFF = b"\x89PNG\r\n\x1a\n", b"\xff\xd8", b"RIFF"
_MIME = {"PNG": "image/png", "JPEG": "image/jpeg", "WEBP": "image/webp", "AVIF": "image/avif"}
_READER = {
    "verify": {"remote_manifest_fetch": False, "ocsp_fetch": False},
    "core": {"allowed_network_hosts": []},
    # Uses of a certificate that may sign: claims, documents, e-mail, time stamps.
    "trust": {"trust_config": "1.3.6.1.4.1.62558.2.1\n1.3.6.1.5.5.7.3.36\n1.3.6.1.5.5.7.3.4\n1.3.6.1.5.5.7.3.8\n"},
}


@dataclass(frozen=True)
class Manifest:
    """A picture's active C2PA manifest."""

    state: str = NOT_VALIDATED
    """``Valid``, ``Trusted`` or ``Invalid``, as c2pa-python says, or ``not validated`` where it isn't installed."""
    problems: tuple[str, ...] = ()
    """Why it is invalid, or can't be read."""
    source_type: str = ""
    """IPTC's term in its actions."""
    generator: str = ""
    """Product and version that made the picture."""
    signer: str = ""
    """Organisation in the signer's certificate."""
    signed_at: str = ""
    ingredients: tuple[str, ...] = ()


@dataclass(frozen=True)
class Marks:
    """The marks of one picture."""

    source_type: str = ""
    """IPTC's term in the picture's XMP."""
    manifest: Manifest | None = None

    @property
    def is_generated(self) -> bool:
        """Tell whether a mark says that a program made the picture, and no manifest is invalid."""
        terms = {self.source_type, self.manifest.source_type if self.manifest else ""}
        return bool(terms & GENERATED) and not self.is_broken

    @property
    def is_broken(self) -> bool:
        """Tell whether there is a manifest that isn't the picture's, or can't be read."""
        return self.manifest is not None and self.manifest.state == INVALID


def read_marks(data: bytes) -> Marks:
    """Read the marks of a picture's file.

    Raises:
        InvalidRequest: it is no picture that can be read here.
    """
    from PIL import Image

    try:
        with Image.open(io.BytesIO(data)) as picture:
            picture.load()  # a PNG's XMP may stand behind its pixels
            file_format, xmp = str(picture.format), picture.info.get("xmp", b"")
    except Exception as error:  # Pillow's decoders raise SyntaxError, zlib.error and others on damaged files
        raise InvalidRequest(f"can't be read as a picture ({error})") from None
    found = _TERM.search(xmp.encode() if isinstance(xmp, str) else xmp)
    manifest = _manifest(data, file_format) if has_manifest(data) else None
    return Marks(found[1].decode() if found else "", manifest)


def has_manifest(data: bytes) -> bool:
    """Tell whether a PNG, JPEG or WebP has a C2PA manifest; of another kind of file, whether it may have one."""
    try:
        if data.startswith(_PNG):
            return any(name == b"caBX" for name, _ in _png_chunks(data))
        if data.startswith(_JPEG):
            return any(marker == 0xEB and b"c2pa" in segment for marker, segment in _jpeg_segments(data))
        if data.startswith(_RIFF):
            return any(name == b"C2PA" for name, _ in _riff_chunks(data))
    except IndexError:
        return False
    return b"jumdc2pa" in data


def _png_chunks(data: bytes) -> Iterator[tuple[bytes, memoryview]]:
    at, view = len(_PNG), memoryview(data)
    while at + 8 <= len(data):
        size = int.from_bytes(data[at : at + 4], "big")
        yield data[at + 4 : at + 8], view[at + 8 : at + 8 + size]
        at += 12 + size


def _jpeg_segments(data: bytes) -> Iterator[tuple[int, bytes]]:
    at = len(_JPEG)
    while at + 4 <= len(data) and data[at] == 0xFF:
        marker, size = data[at + 1], int.from_bytes(data[at + 2 : at + 4], "big")
        if marker == 0xDA:  # the pixels begin
            return
        yield marker, data[at + 4 : at + 2 + size]
        at += 2 + size


def _riff_chunks(data: bytes) -> Iterator[tuple[bytes, memoryview]]:
    at, view = 12, memoryview(data)
    while at + 8 <= len(data):
        size = int.from_bytes(data[at + 4 : at + 8], "little")
        yield data[at : at + 4], view[at + 8 : at + 8 + size]
        at += 8 + size + size % 2


def _manifest(data: bytes, file_format: str) -> Manifest:
    if importlib.util.find_spec("c2pa") is None or file_format not in _MIME:
        return Manifest()
    import c2pa

    try:
        context = c2pa.Context.from_dict(_READER)
        with c2pa.Reader(_MIME[file_format], io.BytesIO(data), context=context) as reader:
            report = json.loads(reader.json())
        return _reported(report)
    except (c2pa.C2paError, KeyError, TypeError, ValueError) as error:
        return Manifest(INVALID, (" ".join(str(error).split())[:300],))


def _reported(report: dict[str, Any]) -> Manifest:
    active = report["manifests"][report["active_manifest"]]
    results = report.get("validation_results", {}).get("activeManifest", {})
    failures = tuple(str(each.get("explanation", each.get("code", ""))) for each in results.get("failure", ()))
    state = report.get("validation_state", NOT_VALIDATED)
    generators = active.get("claim_generator_info") or [{"name": active.get("claim_generator", "")}]
    signature = active.get("signature_info") or {}
    return Manifest(
        state,
        failures if state == INVALID else (),
        next(_source_types(active), ""),
        " ".join(str(generators[0].get(name, "")) for name in ("name", "version")).strip(),
        str(signature.get("issuer") or signature.get("common_name") or ""),
        str(signature.get("time") or ""),
        tuple(str(each.get("title", "")) for each in active.get("ingredients", ())),
    )


def _source_types(manifest: dict[str, Any]) -> Iterator[str]:
    for assertion in manifest.get("assertions", ()):
        if str(assertion.get("label", "")).startswith("c2pa.actions"):
            for action in assertion["data"].get("actions", ()):
                if term := action.get("digitalSourceType"):
                    yield str(term).rpartition(_TERM_URI)[2]
