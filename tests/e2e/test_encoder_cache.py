"""A profile that returns isn't encoded again, through the real server, and nobody can tell by the picture."""

from __future__ import annotations

import http.client
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from icportrait.server import ServerProcess
from icportrait.serving.counters import HITS, MISSES
from tests.conftest import EXAMPLES
from tests.e2e.caller import infer

QUICK = {"num_inference_steps": 1, "guidance_scale": 1.0}


@pytest.fixture
def unseen(pictures: dict[str, bytes]) -> dict[str, Any]:
    """Return the photographs in crops that no other test asks for."""
    return {**pictures, "profile_box": [0.031, 0.0, 0.877, 0.9], "reference_box": [0.053, 0.0, 0.899, 0.9]}


def counts(server: ServerProcess) -> tuple[int, int]:
    """Read hits and misses so far from the metrics endpoint."""
    connection = http.client.HTTPConnection(server.metrics_url, timeout=10)
    connection.request("GET", "/metrics")
    lines = connection.getresponse().read().decode().splitlines()
    connection.close()
    values = dict(line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
    return int(float(values[HITS])), int(float(values[MISSES]))


def since(server: ServerProcess, before: tuple[int, int]) -> tuple[int, int]:
    hits, misses = counts(server)
    return hits - before[0], misses - before[1]


def test_a_returning_profile_is_not_encoded_again(server: ServerProcess, unseen: dict[str, Any]) -> None:
    before = counts(server)
    infer(server.grpc_url, seed=1, **QUICK, **unseen)
    assert since(server, before) == (0, 2)
    # The reference's mask is drawn from the seed: another seed is another reference.
    portraits, _ = infer(server.grpc_url, seed=2, **QUICK, **unseen)
    assert since(server, before) == (1, 3)
    other = {**unseen, "reference": (EXAMPLES / "heads" / "reference.png").read_bytes()}
    others, _ = infer(server.grpc_url, seed=2, **QUICK, **other)
    assert since(server, before) == (2, 4)
    again, _ = infer(server.grpc_url, seed=2, **QUICK, **unseen)
    assert since(server, before) == (4, 4), "all of it has been seen"
    assert again == portraits != others


def test_callers_at_once_share_what_is_known(server: ServerProcess, unseen: dict[str, Any]) -> None:
    seeds = range(100, 106)
    infer(server.grpc_url, seed=99, **QUICK, **unseen)
    before = counts(server)
    with ThreadPoolExecutor(6) as threads:
        calls = [threads.submit(infer, server.grpc_url, seed=seed, **QUICK, **unseen) for seed in seeds]
        portraits = [call.result()[0] for call in calls]
    assert since(server, before) == (6, 6)
    assert infer(server.grpc_url, seed=103, **QUICK, **unseen)[0] == portraits[3]
