"""What the tests share: exports, made once and kept, one real server, and rendered pairs.

Nothing heavy is imported here: a run of a few tests starts at once.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from icportrait.policy import ServingPolicy
from tests.exports import DEMO_CHECKPOINT, ROOT, shared_export

if TYPE_CHECKING:
    from icportrait.nn import Checkpoint
    from icportrait.server import TritonServer
    from training.data import RenderedPairs

# Read when torch is imported, here and in what tests start: more threads than that stall beside another process.
os.environ["OMP_NUM_THREADS"] = "1"

# torch's exporter writes a record with a stack trace for every operation; pytest would format and keep them all.
logging.getLogger("torch.__trace").propagate = False

EXAMPLES = ROOT / "examples"


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
def server(tmp_path_factory: pytest.TempPathFactory, demo_export: Path) -> Iterator[TritonServer]:
    from icportrait.repository import assemble
    from icportrait.server import Ports, TritonServer

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
    import torch

    from tests.tiny import TINY
    from training.data import RenderedPairs
    from training.recipe import Data

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    pairs = RenderedPairs(Data(pairs=64, cache=str(pair_cache)), TINY)
    torch.set_num_threads(before)
    return pairs


@pytest.fixture
def one_thread_and_one_seed() -> Iterator[None]:
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)  # on tiny networks, threads cost more than they bring
    torch.manual_seed(0)
    yield
    torch.set_num_threads(before)
