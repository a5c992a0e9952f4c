"""C2PA manifests: what they say, what they keep of inputs, and inputs that are made to hurt."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import io
import json
import random
import socket
import struct
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cryptography.x509 import ObjectIdentifier
from PIL import Image

from icportrait import __version__
from icportrait.errors import IcPortraitError
from icportrait.gateway import c2pa_signing
from icportrait.gateway.c2pa_signing import (
    ASSERTIONS,
    BOXES,
    CLAIM_GENERATOR,
    MANIFEST_BYTES,
    Credentials,
    Ingredient,
    Signed,
    describe,
    encode_and_sign,
    read_credentials,
    read_ingredient,
)
from icportrait.gateway.settings import Settings
from icportrait.pictures.imaging import DIGITAL_SOURCE_TYPE, encode_picture
from tests.certificates import PERSON, PLACE, Chain, captured, make_chain, report

PIXELS = np.random.default_rng(1).integers(0, 255, (32, 32, 3), np.uint8)
BARE = Ingredient("profile"), Ingredient("reference")
FORMATS = pytest.mark.parametrize("output_format", ["png", "jpeg", "webp"])


@pytest.fixture(scope="module")
def chain() -> Chain:
    return make_chain()


@pytest.fixture(scope="module", autouse=True)
def signing(chain: Chain) -> Iterator[None]:
    c2pa_signing.begin(Credentials(chain.certificates, chain.key, "es256", None))
    yield
    c2pa_signing.begin(None)


def read(data: bytes) -> Ingredient:
    return read_ingredient(data, "profile", is_base64=False)


def signed_report(signed: Signed, output_format: str = "png") -> Any:
    """Return a signed portrait's report, which must be valid."""
    found = report(signed.file, f"image/{output_format}")
    assert found["validation_state"] == "Valid"
    assert [status["code"] for status in found["validation_status"]] == ["signingCredential.untrusted"]
    return found


class TestManifests:
    @FORMATS
    def test_says_that_a_model_made_it_and_of_what(self, output_format: str) -> None:
        active = signed_report(encode_and_sign(PIXELS, output_format, BARE), output_format)["active"]
        generator = active["claim_generator_info"][0]
        assert (generator["name"], generator["version"]) == (CLAIM_GENERATOR, __version__)
        [assertion] = active["assertions"]
        [action] = assertion["data"]["actions"]
        assert (action["action"], action["digitalSourceType"]) == ("c2pa.created", DIGITAL_SOURCE_TYPE)
        assert len(action["parameters"]["ingredients"]) == 2
        assert abs(datetime.now(UTC) - datetime.fromisoformat(action["when"])) < timedelta(minutes=1)
        said = [{key: value for key, value in made.items() if key != "label"} for made in active["ingredients"]]
        assert said == [{"title": name, "relationship": "inputTo"} for name in ("profile", "reference")]
        assert "thumbnail" not in active

    @FORMATS
    def test_comes_after_the_bytes_that_a_seed_promises(self, output_format: str) -> None:
        first, second = (encode_and_sign(PIXELS, output_format, BARE) for _ in range(2))
        unsigned = encode_picture(PIXELS, output_format)
        assert first.file != second.file
        assert {first.unsigned_sha256, second.unsigned_sha256} == {hashlib.sha256(unsigned).hexdigest()}
        assert DIGITAL_SOURCE_TYPE.encode() in unsigned
        with Image.open(io.BytesIO(first.file)) as picture, Image.open(io.BytesIO(unsigned)) as expected:
            assert np.array_equal(np.asarray(picture), np.asarray(expected))
            assert picture.info.get("xmp") == expected.info.get("xmp")

    def test_can_be_taken_out_again(self) -> None:
        signed, kept, offset = encode_and_sign(PIXELS, "png", BARE).file, b"\x89PNG\r\n\x1a\n", 8
        while offset < len(signed):
            length, kind = struct.unpack(">I4s", signed[offset : offset + 8])
            kept += signed[offset : offset + 12 + length] if kind != b"caBX" else b""
            offset += 12 + length
        assert kept == encode_picture(PIXELS, "png")

    def test_one_that_was_changed_afterwards_shows_it(self) -> None:
        data = bytearray(encode_and_sign(PIXELS, "jpeg", BARE).file)
        data[-40] ^= 1
        assert report(bytes(data), "image/jpeg")["validation_state"] == "Invalid"


class TestIngredients:
    def test_a_file_without_a_manifest_is_only_named(self) -> None:
        assert read(encode_picture(PIXELS, "png")) == BARE[0]

    def test_an_inputs_manifest_is_kept_without_what_it_shows_and_names(self, chain: Chain) -> None:
        data = captured(chain)
        assert all(text.encode() in data for text in (PLACE, PERSON, "a small picture"))
        ingredient = read(data)
        assert ingredient.outcome == "kept"
        signed = encode_and_sign(PIXELS, "png", (ingredient, BARE[1]))
        found = signed_report(signed)
        assert not any(text.encode() in signed.file for text in (PLACE, PERSON, "a small picture"))
        [kept] = (made for made in found["active"]["ingredients"] if "active_manifest" in made)
        assert (kept["title"], kept["relationship"]) == ("profile", "inputTo")
        assert found["stores"][kept["active_manifest"]] == {"c2pa.actions.v2", "c2pa.hash.data"}
        assert "c2pa.assertions/c2pa.thumbnail.claim" in json.dumps(found["active"]["assertions"])
        assert signed.dropped == ""

    def test_one_in_base64_is_read_too(self, chain: Chain) -> None:
        ingredient = read_ingredient(base64.b64encode(captured(chain)), "reference", is_base64=True)
        assert (ingredient.name, ingredient.outcome) == ("reference", "kept")

    def test_both_inputs_may_be_one_file(self, chain: Chain) -> None:
        data = captured(chain)
        both = tuple(read_ingredient(data, name, is_base64=False) for name in ("profile", "reference"))
        active = signed_report(encode_and_sign(PIXELS, "png", both))["active"]
        assert [made["title"] for made in active["ingredients"]] == ["profile", "reference"]

    def test_a_portrait_may_be_an_input(self, chain: Chain) -> None:
        first = encode_and_sign(PIXELS, "webp", (read(captured(chain)), BARE[1])).file
        second = signed_report(encode_and_sign(PIXELS, "png", (read(first), BARE[1])))
        assert len(second["manifests"]) == 3

    def test_what_inputs_of_an_input_show_is_taken_out_too(self, chain: Chain) -> None:
        edited = read(captured(chain, source=captured(chain, thumbnail=b"the first picture")))
        signed = encode_and_sign(PIXELS, "png", (edited, BARE[1]))
        assert len(signed_report(signed)["manifests"]) == 3
        assert not any(text in signed.file for text in (b"the first picture", b"a small picture", PERSON.encode()))

    def test_a_picture_that_was_changed_after_its_signing_is_kept_as_such(self, chain: Chain) -> None:
        data = bytearray(captured(chain))
        data[-40] ^= 1
        ingredient = read(bytes(data))
        assert ingredient.outcome == "kept"
        active = signed_report(encode_and_sign(PIXELS, "png", (ingredient, BARE[1])))["active"]
        [kept] = (made for made in active["ingredients"] if "active_manifest" in made)
        failures = [status["code"] for status in kept["validation_results"]["activeManifest"]["failure"]]
        assert "assertion.dataHash.mismatch" in failures


class TestInputsThatHurt:
    def test_a_broken_manifest_is_ignored_and_that_is_said(self, chain: Chain) -> None:
        data = captured(chain)
        at = data.index(b"jumb") + 10
        ingredient = read(data[:at] + bytes(400) + data[at + 400 :])
        assert ingredient.outcome.startswith("ignored: ")
        assert not ingredient.archive

    def test_whatever_is_broken_a_portrait_can_be_signed(self, chain: Chain) -> None:
        data, drawn = captured(chain), random.Random(0)
        begins, ends = data.index(b"jumb"), data.rindex(b"\xff\xdb")
        outcomes = set()
        for _ in range(150):
            changed = bytearray(data)
            for _ in range(drawn.choice((1, 4, 32))):
                changed[drawn.randrange(begins, ends)] = drawn.choice((0, 255, drawn.randrange(256)))
            ingredient = read(bytes(changed))
            outcomes.add(ingredient.outcome.partition(":")[0])
            signed = encode_and_sign(PIXELS[:16, :16], "png", (ingredient, BARE[1]))
            assert report(signed.file, "image/png")["validation_state"] == "Valid"
        assert outcomes == {"kept", "ignored"}

    def test_too_many_assertions_are_ignored(self, chain: Chain) -> None:
        assert read(captured(chain, assertions=ASSERTIONS - 10)).outcome == "kept"
        expected = f"ignored: {ASSERTIONS + 5} assertions, expected at most {ASSERTIONS}"
        assert read(captured(chain, assertions=ASSERTIONS)).outcome == expected

    def test_a_file_of_very_many_parts_is_not_even_parsed(self, chain: Chain, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(c2pa_signing._Signer, "read", None)
        assert read(captured(chain) + b"jumd" * BOXES).outcome.endswith(f"parts, expected at most {BOXES}")

    def test_a_manifest_with_parts_that_cannot_be_taken_out_is_ignored(self, chain: Chain) -> None:
        outcome = read(captured(chain, thumbnail=b"c2pa.databoxes")).outcome
        assert outcome == "ignored: it has c2pa.databoxes, which can't be taken out"

    def test_a_large_manifest_is_ignored(self, chain: Chain) -> None:
        noise = np.random.default_rng(2).bytes(MANIFEST_BYTES)
        assert read(captured(chain, thumbnail=noise)).outcome.endswith(f"bytes, expected at most {MANIFEST_BYTES:,}")

    def test_manifests_with_which_nothing_can_be_signed_are_dropped_and_that_is_said(self) -> None:
        signed = encode_and_sign(PIXELS, "png", (Ingredient("profile", "kept", b"no archive"), BARE[1]))
        assert signed.dropped.startswith("ignored: ")
        assert len(signed_report(signed)["manifests"]) == 1

    def test_an_address_in_an_input_is_never_asked(self) -> None:
        with socket.create_server(("127.0.0.1", 0)) as server:
            asked: list[object] = []
            server.settimeout(0.5)

            def accept() -> None:
                with contextlib.suppress(TimeoutError):
                    asked.append(server.accept())

            waiting = threading.Thread(target=accept)
            waiting.start()
            address = f"http://127.0.0.1:{server.getsockname()[1]}/jumb.c2pa"
            xmp = (
                '<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">'
                '<rdf:Description rdf:about="" xmlns:dcterms="http://purl.org/dc/terms/" '
                f'dcterms:provenance="{address}"/></rdf:RDF></x:xmpmeta>'
            )
            buffer = io.BytesIO()
            Image.fromarray(PIXELS).save(buffer, "JPEG", xmp=xmp.encode())
            ingredient = read(buffer.getvalue())
            waiting.join()
        assert (ingredient.outcome[:8], asked) == ("ignored:", [])


class TestCredentials:
    def settings(self, folder: Path, chain: Chain, **others: Any) -> Settings:
        return Settings(**chain.write(folder), **others)  # type: ignore[arg-type]

    def test_good_ones_are_taken_and_not_shown(self, tmp_path: Path, chain: Chain) -> None:
        credentials = read_credentials(self.settings(tmp_path, chain))
        assert credentials == Credentials(chain.certificates, chain.key, "es256", None)
        assert "PRIVATE" not in repr(credentials)
        until = datetime.now(UTC) + timedelta(days=30)
        assert (
            describe(credentials) == f"pictures are signed (C2PA) by CN=Signer,O=Studio, valid until {until:%Y-%m-%d}"
        )
        assert read_credentials(Settings()) is None

    @pytest.mark.parametrize("usage", ["1.3.6.1.5.5.7.3.36", "1.3.6.1.5.5.7.3.4"])
    def test_a_certificate_for_documents_or_e_mail_is_taken(self, tmp_path: Path, usage: str) -> None:
        assert read_credentials(self.settings(tmp_path, make_chain(ObjectIdentifier(usage))))

    def test_another_certificates_key_is_refused(self, tmp_path: Path, chain: Chain) -> None:
        settings = self.settings(tmp_path, replace(chain, key=make_chain().key))
        with pytest.raises(
            IcPortraitError, match=r"c2pa_key.*doesn't validate .*; expected the first certificate's key"
        ):
            read_credentials(settings)

    def test_an_expired_certificate_is_refused(self, tmp_path: Path) -> None:
        with pytest.raises(IcPortraitError, match=r"c2pa_certificate, c2pa_key.*not valid at time of signing"):
            read_credentials(self.settings(tmp_path, make_chain(valid_days=-1)))

    def test_another_algorithm_is_refused(self, tmp_path: Path, chain: Chain) -> None:
        with pytest.raises(IcPortraitError, match=r"c2pa_algorithm: a picture can't be signed .*the key's algorithm"):
            read_credentials(self.settings(tmp_path, chain, c2pa_algorithm="ps256"))

    def test_a_time_stamp_authority_that_is_not_there_is_told(self, tmp_path: Path, chain: Chain) -> None:
        url = "http://127.0.0.1:1/"
        with pytest.raises(
            IcPortraitError, match=r"c2pa_timestamp_url: a picture can't be signed .*http://127\.0\.0\.1"
        ):
            read_credentials(self.settings(tmp_path, chain, c2pa_timestamp_url=url))

    def test_a_key_that_every_user_may_read_is_refused(self, tmp_path: Path, chain: Chain) -> None:
        settings = self.settings(tmp_path, chain)
        (tmp_path / "key.pem").chmod(0o644)
        with pytest.raises(IcPortraitError, match=r"^c2pa_key: .*every user may read it; chmod o= "):
            read_credentials(settings)

    def test_a_key_of_another_form_is_refused(self, tmp_path: Path, chain: Chain) -> None:
        key = chain.key.replace(b"BEGIN PRIVATE", b"BEGIN EC PRIVATE")
        with pytest.raises(IcPortraitError, match=r'^c2pa_key: .*no "BEGIN PRIVATE KEY".*openssl pkcs8'):
            read_credentials(self.settings(tmp_path, replace(chain, key=key)))

    def test_without_its_package_the_error_says_how_to_get_it(
        self, tmp_path: Path, chain: Chain, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setitem(sys.modules, "c2pa", None)
        with pytest.raises(IcPortraitError, match=r"needs the package c2pa-python; pip install 'icportrait\[c2pa\]'"):
            read_credentials(self.settings(tmp_path, chain))
