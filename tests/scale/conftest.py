"""A fleet that these tests share, and the tables at the run's end."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import EXAMPLES
from tests.e2e.conftest import simulated_repository
from tests.full.test_rollout import other_version
from tests.scale.replicas import Replica, running
from tests.scale.tables import REPORT, TABLES

ENGINE_MS = {"vae_encoder": 10.0, "warping_network": 5.0, "unet": 40.0, "vae_decoder": 5.0}
"""A row's time and a batch's are the same: the engines are no limit, the two cores are."""
NAMES = ("a", "b", "c", "d")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    folder = Path(__file__).parent
    for item in items:
        if item.path.is_relative_to(folder):
            item.add_marker(pytest.mark.scale)
            item.add_marker(pytest.mark.timeout(600))


def pytest_terminal_summary(terminalreporter: Any) -> None:
    if TABLES.tables:
        TABLES.write()
        for line in [*TABLES.lines(), "", str(REPORT)]:
            terminalreporter.write_line(line)


@pytest.fixture(scope="session")
def small() -> dict[str, bytes]:
    """Read pictures that take little of a core."""
    return {name: (EXAMPLES / "heads" / f"{name}.png").read_bytes() for name in ("profile", "reference")}


@pytest.fixture(scope="session")
def scale_folder() -> Iterator[Path]:
    """Make a folder with a short path, because sockets are in it."""
    with tempfile.TemporaryDirectory(prefix="ic-scale-", ignore_cleanup_errors=True) as folder:
        yield Path(folder)


@pytest.fixture(scope="session")
def repository(scale_folder: Path) -> Path:
    """Make a repository whose engines are simulated."""
    (scale_folder / "old").mkdir()
    return simulated_repository(scale_folder / "old", ENGINE_MS)


@pytest.fixture(scope="session")
def other_repository(scale_folder: Path) -> Path:
    """Make the same of another model version."""
    (scale_folder / "new").mkdir()
    made = simulated_repository(scale_folder / "new", ENGINE_MS)
    other_version(made)
    return made


@pytest.fixture(scope="session")
def fleet(scale_folder: Path, repository: Path) -> Iterator[list[Replica]]:
    """Start three servers; a fourth is there to be started."""
    flags = ("--picture-workers=1",)
    replicas = [Replica(name, repository, scale_folder / name, flags) for name in NAMES]
    with running(*replicas[:3]):
        try:
            yield replicas
        finally:
            replicas[3].stop()
