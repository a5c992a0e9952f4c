"""A profile that returns isn't encoded again, through the real server, and nobody can tell by the picture."""

from __future__ import annotations

import http.client
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from icportrait.policy import ServingPolicy
from icportrait.repository import assemble
from icportrait.row_cache import HITS, MISSES
from icportrait.server import Ports, TritonServer
from tests.conftest import EXAMPLES
from tests.e2e.caller import infer

QUICK = {"num_inference_steps": 1, "guidance_scale": 1.0}


def started(demo_export: Path, folder: Path, cache_bytes: int) -> TritonServer:
    assemble(demo_export, folder / "repository", ServingPolicy(cache_bytes=cache_bytes))
    return TritonServer(folder / "repository", Ports.free(), folder / "server.log")


@pytest.fixture(scope="module")
def caching(tmp_path_factory: pytest.TempPathFactory, demo_export: Path) -> Iterator[TritonServer]:
    with started(demo_export, tmp_path_factory.mktemp("caching"), ServingPolicy.cache_bytes) as server:
        yield server


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory, demo_export: Path) -> Iterator[TritonServer]:
    with started(demo_export, tmp_path_factory.mktemp("plain"), 0) as server:
        yield server


def counts(server: TritonServer) -> tuple[int, int]:
    """Hits and misses so far, from the metrics endpoint."""
    connection = http.client.HTTPConnection(server.metrics_url, timeout=10)
    connection.request("GET", "/metrics")
    lines = connection.getresponse().read().decode().splitlines()
    connection.close()
    values = dict(line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
    return int(float(values[HITS])), int(float(values[MISSES]))


def since(server: TritonServer, before: tuple[int, int]) -> tuple[int, int]:
    hits, misses = counts(server)
    return hits - before[0], misses - before[1]


def test_a_returning_profile_is_not_encoded_again(
    caching: TritonServer, plain: TritonServer, pictures: dict[str, bytes]
) -> None:
    before = counts(caching)
    infer(caching.grpc_url, seed=1, **QUICK, **pictures)
    assert since(caching, before) == (0, 2)
    # The reference's mask is drawn from the seed: another seed is another reference.
    portraits, _ = infer(caching.grpc_url, seed=2, **QUICK, **pictures)
    assert since(caching, before) == (1, 3)
    other = {**pictures, "reference": (EXAMPLES / "heads" / "reference.png").read_bytes()}
    others, _ = infer(caching.grpc_url, seed=2, **QUICK, **other)
    assert since(caching, before) == (2, 4)
    again, _ = infer(caching.grpc_url, seed=2, **QUICK, **pictures)
    assert since(caching, before) == (4, 4), "all of it has been seen"
    assert again == portraits
    assert infer(plain.grpc_url, seed=2, **QUICK, **pictures)[0] == portraits
    assert infer(plain.grpc_url, seed=2, **QUICK, **other)[0] == others != portraits


def test_callers_at_once_share_what_is_known(
    caching: TritonServer, plain: TritonServer, pictures: dict[str, bytes]
) -> None:
    seeds = range(100, 106)
    infer(caching.grpc_url, seed=99, **QUICK, **pictures)
    before = counts(caching)
    with ThreadPoolExecutor(6) as threads:
        calls = [threads.submit(infer, caching.grpc_url, seed=seed, **QUICK, **pictures) for seed in seeds]
        portraits = [call.result()[0] for call in calls]
    assert since(caching, before) == (6, 6)
    assert infer(plain.grpc_url, seed=103, **QUICK, **pictures)[0] == portraits[3]


def test_without_a_cache_every_picture_is_encoded(plain: TritonServer, pictures: dict[str, bytes]) -> None:
    for _ in range(2):
        infer(plain.grpc_url, seed=5, **QUICK, **pictures)
    assert counts(plain) == (0, 0)
