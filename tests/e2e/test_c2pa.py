"""A server that signs its portraits, as its callers see it."""

from __future__ import annotations

import base64
import io
import json
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from icportrait.server import HOST
from tests.certificates import Chain, captured, make_chain, report
from tests.e2e.caller import StreamCall, infer, series
from tests.e2e.conftest import simulated_repository
from tests.e2e.supervised import Supervised, supervised

HEAVY = 3000
"""Assertions, which c2pa takes seconds to read."""


@pytest.fixture(scope="module")
def chain() -> Chain:
    return make_chain()


@pytest.fixture(scope="module")
def signing(tmp_path_factory: pytest.TempPathFactory, chain: Chain) -> Iterator[Supervised]:
    folder = tmp_path_factory.mktemp("signing")
    flags = tuple(f"--{name.replace('_', '-')}={path}" for name, path in chain.write(folder).items())
    with supervised(simulated_repository(folder, {}), folder, flags=flags) as running:
        yield running


def valid(image: bytes, output_format: str = "png") -> Any:
    found = report(image, f"image/{output_format}")
    assert found["validation_state"] == "Valid"
    return found


@pytest.mark.parametrize("output_format", ["png", "jpeg", "webp"])
def test_equal_seeds_promise_the_bytes_before_the_signature(
    signing: Supervised, pictures: dict[str, bytes], output_format: str
) -> None:
    answers = [infer(signing.url, seed=7, num_portraits=2, output_format=output_format, **pictures) for _ in range(2)]
    (first, said), (second, said_again) = answers
    assert said["c2pa"] == said_again["c2pa"]
    assert said["c2pa"]["ingredients"] == {"profile": "no manifest", "reference": "no manifest"}
    assert len(said["c2pa"]["unsigned_sha256"]) == 2
    for one, other in zip(first, second, strict=True):
        assert valid(one, output_format)["active_manifest"] != valid(other, output_format)["active_manifest"]
        assert Image.open(io.BytesIO(one)).tobytes() == Image.open(io.BytesIO(other)).tobytes()


def test_over_http_and_in_streams_pictures_are_signed_too(
    signing: Supervised, pictures: dict[str, bytes], chain: Chain
) -> None:
    body = {name: base64.b64encode(data).decode() for name, data in pictures.items()} | {"encoding": "base64"}
    body["profile"] = base64.b64encode(captured(chain)).decode()
    url = f"http://{HOST}:{signing.ports.http}/v2/models/ic_portrait/generate"
    with urllib.request.urlopen(url, json.dumps(body).encode(), timeout=60) as answer:
        made = json.load(answer)
    assert len(valid(base64.b64decode(made["image"]))["manifests"]) == 2
    assert json.loads(made["metadata"])["c2pa"]["ingredients"] == {"profile": "kept", "reference": "no manifest"}
    with StreamCall(signing.url, num_inference_steps=2, preview_every=1, **pictures) as stream:
        images = [answer["image"][0] for answer in stream if "image" in answer]
    assert len(images) == 2
    assert [valid(image)["validation_state"] for image in images] == ["Valid"] * 2


def test_a_manifest_made_to_hurt_is_ignored(signing: Supervised, pictures: dict[str, bytes], chain: Chain) -> None:
    heavy = captured(chain, assertions=HEAVY)
    images, said = infer(signing.url, profile=heavy, reference=pictures["reference"])
    assert len(valid(images[0])["manifests"]) == 1
    assert said["c2pa"]["ingredients"]["profile"].startswith("ignored: ")
    infer(signing.url, **pictures)
    assert series(signing.metrics_url)["icportrait_gateway_picture_workers_lost_total"] <= 1


def test_a_server_whose_key_is_anothers_does_not_start_and_says_so(tmp_path: Path, chain: Chain) -> None:
    files = Chain(chain.certificates, make_chain().key).write(tmp_path)
    flags = [f"--{name.replace('_', '-')}={path}" for name, path in files.items()]
    repository = simulated_repository(tmp_path, {})
    ended = subprocess.run(
        [sys.executable, "-m", "icportrait.server", f"--repository={repository}", *flags],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert ended.returncode == 1
    assert "error: c2pa_certificate, c2pa_key, c2pa_algorithm: a picture signed with them" in ended.stderr
    assert "PRIVATE KEY" not in ended.stderr + ended.stdout
