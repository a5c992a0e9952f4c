"""What the tests share: exports, made once and kept, and one real server.

Nothing heavy is imported here: a run of a few tests starts at once.
"""

from __future__ import annotations

import logging
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from icportrait.policy import ServingPolicy
from tests.exports import DEMO_CHECKPOINT, ROOT, shared_export

if TYPE_CHECKING:
    from icportrait.nn import Checkpoint
    from icportrait.server import ServerProcess

# Read when torch is imported, here and in what tests start: more threads than that stall beside another process.
os.environ["OMP_NUM_THREADS"] = "1"

# torch's exporter writes a record with a stack trace for every operation; pytest would format and keep them all.
logging.getLogger("torch.__trace").propagate = False

EXAMPLES = ROOT / "examples"


def pytest_report_header() -> list[str]:
    """What has to be installed for tests that are skipped otherwise."""
    if "PYTEST_XDIST_WORKER" in os.environ:
        return []
    from benchmarks.perf_analyzer_program import PerfAnalyzerError, find_program

    with tempfile.TemporaryDirectory() as links:
        try:
            find_program(Path(links))
        except PerfAnalyzerError as error:
            return [f"tests with perf_analyzer are skipped: {error}"]
    return []


@pytest.fixture(scope="session")
def demo_checkpoint() -> Checkpoint:
    """The committed one."""
    from icportrait.nn import load_checkpoint

    return load_checkpoint(DEMO_CHECKPOINT)


@pytest.fixture(scope="session")
def demo_export() -> Path:
    return shared_export("demo")


@pytest.fixture(scope="session")
def small_checkpoint() -> Checkpoint:
    from icportrait.nn import random_checkpoint
    from tests.tiny import SMALL

    return random_checkpoint(SMALL)


@pytest.fixture(scope="session")
def small_export() -> Path:
    return shared_export("small")


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory, demo_export: Path) -> Iterator[ServerProcess]:
    from icportrait.repository import assemble
    from icportrait.server import Ports, ServerProcess

    folder = tmp_path_factory.mktemp("server")
    assemble(demo_export, folder / "repository", ServingPolicy())
    with ServerProcess(folder / "repository", Ports.free(), folder / "server.log") as running:
        yield running


@pytest.fixture(scope="session")
def pictures() -> dict[str, bytes]:
    """The example photographs by the public input that they are sent as."""
    return {
        "profile": (EXAMPLES / "hopper.jpg").read_bytes(),
        "reference": (EXAMPLES / "astronaut.jpg").read_bytes(),
    }


@pytest.fixture
def one_thread_and_one_seed() -> Iterator[None]:
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)  # on tiny networks, threads cost more than they bring
    torch.manual_seed(0)
    yield
    torch.set_num_threads(before)
