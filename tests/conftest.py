"""What the tests share: one export of the demo preset and one real server, made once a session."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from export.__main__ import export_checkpoint
from icportrait.nn import Checkpoint, random_checkpoint
from icportrait.policy import ServingPolicy
from icportrait.presets import DEMO_128
from icportrait.repository import assemble
from icportrait.server import Ports, TritonServer
from tests.tiny import SMALL, TINY
from training.data import RenderedPairs
from training.recipe import Data

# torch's exporter writes a record with a stack trace for every operation; pytest would format and keep them all.
logging.getLogger("torch.__trace").propagate = False

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples"


@pytest.fixture(scope="session")
def demo_checkpoint() -> Checkpoint:
    return random_checkpoint(DEMO_128)


@pytest.fixture(scope="session")
def demo_export(tmp_path_factory: pytest.TempPathFactory, demo_checkpoint: Checkpoint) -> Path:
    return exported(demo_checkpoint, tmp_path_factory.mktemp("export"))


@pytest.fixture(scope="session")
def small_checkpoint() -> Checkpoint:
    return random_checkpoint(SMALL)


@pytest.fixture(scope="session")
def small_export(tmp_path_factory: pytest.TempPathFactory, small_checkpoint: Checkpoint) -> Path:
    return exported(small_checkpoint, tmp_path_factory.mktemp("small"))


def exported(checkpoint: Checkpoint, directory: Path) -> Path:
    """Export what ``random_checkpoint`` drew from seed 0."""
    export_checkpoint(checkpoint, {"random_weights": 0}, "fp32", directory)
    return directory


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory, demo_export: Path) -> Iterator[TritonServer]:
    folder = tmp_path_factory.mktemp("server")
    assemble(demo_export, folder / "repository", ServingPolicy())
    with TritonServer(folder / "repository", Ports.free(), folder / "server.log") as running:
        yield running


@pytest.fixture(scope="session")
def pictures() -> dict[str, bytes]:
    """The example photographs by the public input that they are sent as."""
    return {
        "profile": (EXAMPLES / "hopper.jpg").read_bytes(),
        "reference": (EXAMPLES / "astronaut.jpg").read_bytes(),
    }


@pytest.fixture(scope="session")
def pair_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where 64 tiny rendered pairs are kept, once something has asked for them."""
    return tmp_path_factory.mktemp("pairs")


@pytest.fixture(scope="session")
def tiny_pairs(pair_cache: Path) -> RenderedPairs:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    pairs = RenderedPairs(Data(pairs=64, cache=str(pair_cache)), TINY)
    torch.set_num_threads(before)
    return pairs


@pytest.fixture
def one_thread_and_one_seed() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)  # on tiny networks, threads cost more than they bring
    torch.manual_seed(0)
    yield
    torch.set_num_threads(before)
