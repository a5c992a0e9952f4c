"""Servers that several of these tests use. ``server``, on the demo checkpoint, is in ``tests/conftest.py``."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from icportrait.contract import ENGINES
from icportrait.policy import ServingPolicy
from icportrait.presets import DEMO_128
from icportrait.repository import assemble
from icportrait.server import Ports, ServerProcess
from tests.e2e.supervised import Supervised, supervised
from tests.trivial_engines import write_trivial_export

SLOW_STEP_MS = 50
WHOLE_STEP_MS = 10


SHARED_SERVERS = ("server", "slow", "whole")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Give all tests of a shared server to one worker, so that it is started once; of the others, those of a file."""
    for item in items:
        if item.path.parent == Path(__file__).parent and isinstance(item, pytest.Function):
            shared = next((name for name in SHARED_SERVERS if name in item.fixturenames), item.path.name)
            item.add_marker(pytest.mark.xdist_group(shared))


def simulated_repository(folder: Path, times_ms: dict[str, float], **policy: object) -> Path:
    """A repository with engines that take 1 ms where ``times_ms`` doesn't say otherwise."""
    write_trivial_export(folder / "export", DEMO_128)
    engines = {name: {"1": times_ms.get(name, 1.0)} for name in ENGINES}
    (folder / "table.json").write_text(json.dumps({"device": "test device", "engines": engines}))
    settings = ServingPolicy(runtime="simulated", latency_table=str(folder / "table.json"), **policy)
    assemble(folder / "export", folder / "repository", settings)
    return folder / "repository"


@pytest.fixture(scope="session")
def slow(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """One slot for all, and places for two in the queue."""
    folder = tmp_path_factory.mktemp("slow")
    times_ms = {"unet": SLOW_STEP_MS, "vae_decoder": SLOW_STEP_MS / 5}
    repository = simulated_repository(folder, times_ms, slots=1, max_queued_slots=2)
    with ServerProcess(repository, Ports.free(), folder / "server.log") as running:
        yield running


@pytest.fixture(scope="session")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Supervised]:
    """A server that batches whole requests, as ``make serve`` runs it."""
    folder = tmp_path_factory.mktemp("whole")
    repository = simulated_repository(folder, {"unet": WHOLE_STEP_MS}, batching="whole")
    with supervised(repository, folder) as running:
        yield running
