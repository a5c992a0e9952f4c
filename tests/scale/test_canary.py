"""A new model version gets a share of the requests, and none when it is rolled back."""

from __future__ import annotations

import tempfile
import time
from collections import Counter
from pathlib import Path

from tests.scale.proxies import haproxy
from tests.scale.replicas import Replica, running
from tests.scale.tables import TABLES
from tests.scale.test_balancing import RATE_PER_S, SETTLE_S, Phases, load_on

SHARE = 0.10
WEIGHT = 33
"""Beside three servers of 100 each: a tenth of all."""
SHARE_S, BACK_S = 15.0, 6.0


def test_a_new_version_gets_its_share_and_is_rolled_back(
    fleet: list[Replica], other_repository: Path, scale_folder: Path, small: dict[str, bytes]
) -> None:
    phases = Phases()
    new = Replica("new", other_repository, scale_folder / "new-version", fleet[0].flags)
    with (
        tempfile.TemporaryDirectory(prefix="ic-") as folder,
        running(new),
        haproxy(Path(folder), [*fleet[:3], new]) as proxy,
        load_on(proxy, small) as load,
    ):
        time.sleep(SETTLE_S)
        with phases.phase("before"):
            time.sleep(SETTLE_S)
        proxy.weigh(new, WEIGHT)
        proxy.add(new)
        with phases.phase(f"weight {WEIGHT} beside three of 100"):
            time.sleep(SHARE_S)
        proxy.weigh(new, 0)
        time.sleep(0.2)
        with phases.phase("weight 0"):
            time.sleep(BACK_S)
    versions = {phase: Counter(each.version for each in load.between(*span)) for phase, span in phases.spans.items()}
    (old,) = versions["before"]
    shares = {phase: 1 - found[old] / found.total() for phase, found in versions.items()}
    TABLES.add(
        "A new version",
        *(
            {"phase": phase, "requests": found.total(), "share of the new version": round(shares[phase], 4)}
            for phase, found in versions.items()
        ),
        note=f"behind HAProxy, {RATE_PER_S:g} requests a second; counted by the answers' model_version",
    )
    first, second, third = shares.values()
    assert (first, third) == (0, 0)
    assert SHARE / 2 < second < 2 * SHARE
    assert not [each.error for each in load.outcomes if each.error][:3]
