"""Parts that the tests of training share: rendered pairs, kept from run to run, and runs without their pictures."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from filelock import FileLock

from icportrait.manifest import file_sha256
from tests.exports import ROOT
from tests.tiny import TINY
from training import data, trainer
from training.data import RenderedPairs
from training.recipe import Data

PAIRS = 64


@pytest.fixture(scope="session")
def pair_cache() -> Path:
    """Return the folder where tiny rendered pairs are kept for as long as the code that renders them is the same."""
    return ROOT / "build" / "test-pairs" / file_sha256(*sorted(ROOT.glob("training/*.py")))[:16]


@pytest.fixture(scope="session")
def tiny_pairs(pair_cache: Path) -> RenderedPairs:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    pair_cache.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{pair_cache}.lock"):
        pairs = RenderedPairs(Data(pairs=PAIRS, cache=str(pair_cache)), TINY)
    torch.set_num_threads(before)
    return pairs


@pytest.fixture
def few_examples(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let samples show two pairs, because eight take seconds to render."""
    monkeypatch.setattr(data, "EXAMPLES", 2)


@pytest.fixture
def no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let runs draw no loss curves and no samples, which take longer than a few steps do."""
    monkeypatch.setattr(trainer, "_plot", lambda losses, path: None)
    monkeypatch.setattr(trainer.Trainer, "_sample", lambda self: None)
