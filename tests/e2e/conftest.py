"""Servers that several of these tests use. ``server``, on the demo checkpoint, is in ``tests/conftest.py``."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from icportrait.contract import ENGINES
from icportrait.deploy.repository import assemble
from icportrait.policy import ServingPolicy
from icportrait.presets import DEMO_128
from icportrait.server import Ports, ServerProcess
from tests.e2e.supervised import Supervised, supervised
from tests.trivial_engines import write_trivial_export

SLOW_STEP_MS = 50
WHOLE_STEP_MS = 10
CACHE_BYTES = 2**20
"""Room for hundreds of the demo's rows. A start takes the memory of the default, 256 MB, in a third of a second."""


def simulated_repository(folder: Path, times_ms: dict[str, float], **policy: object) -> Path:
    """Make a repository with a small cache and engines that take 1 ms where ``times_ms`` doesn't say otherwise."""
    write_trivial_export(folder / "export", DEMO_128)
    engines = {name: {"1": times_ms.get(name, 1.0)} for name in ENGINES}
    (folder / "table.json").write_text(json.dumps({"device": "test device", "engines": engines}))
    policy = {"runtime": "simulated", "latency_table": str(folder / "table.json"), "cache_bytes": CACHE_BYTES, **policy}
    assemble(folder / "export", folder / "repository", ServingPolicy(**policy))
    return folder / "repository"


@pytest.fixture(scope="session")
def slow(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """Start a server with one slot for all, and places for two in the queue."""
    folder = tmp_path_factory.mktemp("slow")
    times_ms = {"unet": SLOW_STEP_MS, "vae_decoder": SLOW_STEP_MS / 5}
    repository = simulated_repository(folder, times_ms, slots=1, max_queued_slots=2)
    with ServerProcess(repository, Ports.free(), folder / "server.log") as running:
        yield running


@pytest.fixture(scope="session")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Supervised]:
    """Start a server that batches whole requests, as ``make serve`` runs it."""
    folder = tmp_path_factory.mktemp("whole")
    repository = simulated_repository(folder, {"unet": WHOLE_STEP_MS}, batching="whole")
    with supervised(repository, folder) as running:
        yield running
