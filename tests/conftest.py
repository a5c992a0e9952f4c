"""Parts that the tests share: exports, made once and kept, and one real server.

Nothing heavy is imported here: a run of a few tests starts at once.
"""

from __future__ import annotations

import logging
import os
import signal
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

# A shell's background job ignores Ctrl-C, and so would every process that tests start and interrupt.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# torch's exporter writes a record with a stack trace for every operation; pytest would format and keep them all.
logging.getLogger("torch.__trace").propagate = False

EXAMPLES = ROOT / "examples"
MADE_ONCE = ("server", "slow", "whole", "failing", "quick", "bare", "private", "signing", "rendered", "frontal")
"""Servers, and pictures that take seconds to render."""
LONGEST_NAME = 300
"""Characters of a value that may stand in a test's name."""


@pytest.hookimpl(tryfirst=True)  # pytest-xdist reads the groups in its own
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Give the tests that share what is made once to one worker."""
    for item in items:
        for name in MADE_ONCE if item.get_closest_marker("xdist_group") is None else ():
            if isinstance(item, pytest.Function) and name in item.fixturenames:
                item.add_marker(pytest.mark.xdist_group(name))
                break


def pytest_make_parametrize_id(val: object, argname: str) -> str | None:
    """Name a long value by its length, because a test's name is sent between processes and put into the environment."""
    return f"{argname} of {len(val)}" if isinstance(val, bytes | str) and len(val) > LONGEST_NAME else None


def pytest_report_header() -> list[str]:
    """Report what has to be installed for tests that are skipped otherwise."""
    if "PYTEST_XDIST_WORKER" in os.environ:
        return []
    from benchmarks.perf_analyzer_program import PerfAnalyzerError, find_program

    with tempfile.TemporaryDirectory() as links:
        try:
            find_program(Path(links))
        except PerfAnalyzerError as error:
            return [f"tests with perf_analyzer are skipped: {error}"]
    return []


def pytest_unconfigure(config: pytest.Config) -> None:
    """Name what has failed once more, below pytest's last line, because of a long log one may have the end alone."""
    if reporter := config.pluginmanager.get_plugin("terminalreporter"):
        for kind in ("failed", "error"):
            for report in reporter.stats.get(kind, []):
                reporter.write_line(f"{kind}: {report.nodeid} ({getattr(report, 'when', 'collection')})")


@pytest.fixture(scope="session")
def demo_checkpoint() -> Checkpoint:
    """Load the committed checkpoint."""
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
def small_fp16_export() -> Path:
    return shared_export("small-fp16")


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory, demo_export: Path) -> Iterator[ServerProcess]:
    from icportrait.deploy.repository import assemble
    from icportrait.server import Ports, ServerProcess

    folder = tmp_path_factory.mktemp("server")
    assemble(demo_export, folder / "repository", ServingPolicy())
    with ServerProcess(folder / "repository", Ports.free(), folder / "server.log") as running:
        yield running


@pytest.fixture(scope="session")
def pictures() -> dict[str, bytes]:
    """Read the example photographs, by the public input that they are sent as."""
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
