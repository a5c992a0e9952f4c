"""Two servers behind HAProxy are replaced under a load that doesn't wait, as ``make scale-test`` does with three."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path

import pytest

from tests.conftest import EXAMPLES
from tests.e2e.conftest import simulated_repository
from tests.full.conftest import say
from tests.scale.conftest import ENGINE_MS
from tests.scale.proxies import haproxy
from tests.scale.replicas import Replica, running
from tests.scale.test_balancing import Phases, load_on, roll

pytestmark = [pytest.mark.full, pytest.mark.xdist_group("balancing")]

RATE_PER_S, QUIET_S = 15.0, 5.0


def test_servers_are_replaced_and_no_request_is_lost() -> None:
    pictures = {name: (EXAMPLES / "heads" / f"{name}.png").read_bytes() for name in ("profile", "reference")}
    with tempfile.TemporaryDirectory(prefix="ic-") as name:
        folder, phases = Path(name), Phases()
        repository = simulated_repository(folder, ENGINE_MS)
        replicas = [Replica(each, repository, folder / each, ("--picture-workers=1",)) for each in "abc"]
        with (
            running(*replicas[:2]),
            haproxy(folder, replicas) as proxy,
            load_on(proxy, pictures, RATE_PER_S) as load,
        ):
            with phases.phase("quiet"):
                time.sleep(QUIET_S)
            with phases.phase("rolled"):
                roll(proxy, replicas)
    figures = {phase: load.figures(*span) for phase, span in phases.spans.items()}
    say(f"{figures}")
    assert not [each.error for each in load.outcomes if each.error]
    assert all(len(replica.start_s) == count for replica, count in zip(replicas, (2, 2, 1), strict=True))
