"""Profiles that return: with and without a balancer that knows them, how many meet their latents, and the gain."""

from __future__ import annotations

import io
import random
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from icportrait_client import PortraitClient
from PIL import Image

from benchmarks.pictures import new_pictures
from tests.e2e.caller import series
from tests.scale.load import OpenLoad, moments
from tests.scale.proxies import haproxy, nginx
from tests.scale.replicas import Replica
from tests.scale.tables import TABLES

PROFILES, REQUESTS, RATE_PER_S, CALLERS = 100, 600, 30.0, 8
COUNTERS = "icportrait_encoder_cache_"


def encoded(fleet: list[Replica]) -> float:
    """Count the pictures that the servers had to encode."""
    return sum(series(replica.metrics_url)[f"{COUNTERS}misses_total"] for replica in fleet)


@pytest.mark.parametrize("balance", [haproxy])
@pytest.mark.parametrize("is_sticky", [False, True], ids=["any server", "their server"])
def test_profiles_that_return(balance: Any, is_sticky: bool, fleet: list[Replica], small: dict[str, bytes]) -> None:
    drawn = random.Random(f"{balance.__name__} {is_sticky}")
    profiles = new_pictures(small["profile"], PROFILES, drawn.randrange(2**31))
    fixed: dict[str, Any] = {"reference": reference(), "num_inference_steps": 4, "guidance_scale": 1.0, "seed": 7}
    chosen = [drawn.randrange(PROFILES) for _ in range(REQUESTS)]
    requests = [(turn % CALLERS, {**fixed, "profile": profiles[number]}) for turn, number in enumerate(chosen)]
    servers = fleet[:3]
    with tempfile.TemporaryDirectory(prefix="ic-") as folder, balance(Path(folder), servers) as balancer:
        callers = [(balancer.addresses, {"sticky": is_sticky})] * CALLERS
        times = moments(RATE_PER_S, seed=3)
        before = encoded(servers)
        with OpenLoad(callers, requests, [next(times) for _ in requests]) as load:
            load.wait()
        time.sleep(1.0)  # counters are published four times a second
        misses = encoded(servers) - before
    assert not [each.error for each in load.outcomes if each.error][:3]
    # The reference is encoded once a server.
    missed_returns = max(0.0, misses - len(servers) - len(set(chosen)))
    returned = REQUESTS - len(set(chosen))
    figures = load.figures(0, float("inf"))
    stages = {
        stage: float(np.median([each.stage_ms[stage] for each in load.outcomes]))
        for stage in ("preprocess", "conditioning")
    }
    met = 1 - missed_returns / returned
    TABLES.add(
        "Profiles that return",
        {
            "balanced by": balancer.name,
            "sent to": "their server" if is_sticky else "any server",
            "returned": returned,
            "met their latents": round(met, 3),
            "p50, ms": round(figures.p50_ms),
            "p99, ms": round(figures.p99_ms),
            **{f"{stage}, ms": round(median_ms, 1) for stage, median_ms in stages.items()},
        },
        note=f"{PROFILES} profiles, {REQUESTS} requests at {RATE_PER_S:g} a second, three servers",
    )
    assert met > 0.8 if is_sticky else met < 0.8


@pytest.mark.parametrize("balance", [haproxy, nginx])
def test_requests_of_one_profile_reach_one_server(balance: Any, fleet: list[Replica], small: dict[str, bytes]) -> None:
    servers, reached = fleet[:3], set()
    with tempfile.TemporaryDirectory(prefix="ic-") as folder, balance(Path(folder), servers) as balancer:
        for profile in new_pictures(small["profile"], 6, seed=5):
            before = [replica.answered() for replica in servers]
            # Each has a connection of its own.
            for seed in range(4):
                with PortraitClient(balancer.addresses, sticky=True) as client:
                    client.generate(profile=profile, reference=small["reference"], num_inference_steps=1, seed=seed)
            time.sleep(0.5)  # counters are published four times a second
            counts = [replica.answered() - count for replica, count in zip(servers, before, strict=True)]
            assert sorted(counts) == [0, 0, 4]
            reached.add(counts.index(4))
    assert len(reached) > 1


def reference() -> bytes:
    """Make a small picture that the servers haven't seen."""
    file = io.BytesIO()
    noise = np.random.default_rng(time.monotonic_ns()).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(file, "JPEG")
    return file.getvalue()
