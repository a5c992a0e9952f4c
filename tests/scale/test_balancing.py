"""Three servers behind HAProxy, behind nginx, and balanced by the client: killed, stopped, added and rolled."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from icportrait_client import PortraitClient, ServerUnavailable

from tests.scale.load import OpenLoad, moments, until
from tests.scale.proxies import Balancer, by_client, haproxy, nginx
from tests.scale.replicas import Replica
from tests.scale.tables import TABLES

RATE_PER_S = 70.0
QUIET_S, SETTLE_S = 45.0, 2.0
CALLERS = 4
STEPS = 4
MOST = 1.5
"""p99 while servers are rolled, by the quiet p99."""
TITLE = "Kill, stop, add and roll"


@dataclass
class Phases:
    """The phases of a run by name: begin and end."""

    spans: dict[str, tuple[float, float]] = field(default_factory=dict)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        began_s = time.monotonic()
        yield
        self.spans[name] = began_s, time.monotonic()


def load_on(balancer: Balancer, small: dict[str, bytes], rate_per_s: float = RATE_PER_S) -> OpenLoad:
    """Make a load of callers that all have the same addresses."""
    callers = [(balancer.addresses, {}) for _ in range(CALLERS)]
    fixed: dict[str, Any] = {**small, "num_inference_steps": STEPS, "guidance_scale": 1.0, "output_format": "jpeg"}
    requests = [(number % CALLERS, {**fixed, "seed": number % 8}) for number in range(8 * CALLERS)]
    return OpenLoad(callers, requests, moments(rate_per_s, seed=7))


def kill(replica: Replica) -> None:
    """Kill a server, and start it again."""
    replica.kill()
    time.sleep(SETTLE_S)
    replica.start(in_background=True)
    time.sleep(SETTLE_S)


def stop(balancer: Balancer, replica: Replica) -> None:
    """Stop a server as a node's shutdown does. nginx, which asks nobody, is told before."""
    if balancer.name == "nginx":
        balancer.drain(replica)
    replica.stop()
    time.sleep(SETTLE_S)


def add(balancer: Balancer, replica: Replica) -> float:
    """Start a server and add it. Return the seconds until it has answered ten requests."""
    replica.start(in_background=True)
    if balancer.name == "nginx":
        balancer.add(replica)
    took_s = until(lambda: replica.answered() >= 10)
    time.sleep(SETTLE_S)
    return took_s


def roll(balancer: Balancer, replicas: list[Replica]) -> None:
    """Replace the first three servers, one by one. The fourth is there meanwhile."""
    *old, more = replicas
    more.start(in_background=True)
    balancer.add(more)
    for replica in old:
        balancer.drain(replica)
        replica.stop()
        replica.start(in_background=True)
        balancer.add(replica)
    balancer.drain(more)
    more.stop()


@pytest.mark.parametrize("balance", [haproxy, nginx, by_client])
def test_servers_come_and_go_and_no_request_is_lost(
    balance: Any, fleet: list[Replica], small: dict[str, bytes]
) -> None:
    phases = Phases()
    with tempfile.TemporaryDirectory(prefix="ic-") as folder:
        balanced: AbstractContextManager[Balancer] = balance(Path(folder), fleet)
        with balanced as balancer:
            with load_on(balancer, small) as load:
                time.sleep(SETTLE_S)
                with phases.phase("quiet"):
                    time.sleep(QUIET_S)
                with phases.phase("one killed, and back"):
                    kill(fleet[1])
                with phases.phase("one stopped"):
                    stop(balancer, fleet[2])
                with phases.phase("one added"):
                    found_s = add(balancer, fleet[2])
                with phases.phase("all rolled"):
                    roll(balancer, fleet)
            name = balancer.name
    figures = {phase: load.figures(*span) for phase, span in phases.spans.items()}
    TABLES.add(
        TITLE,
        *(
            {
                "balanced by": name,
                "phase": phase,
                "s": round(phases.spans[phase][1] - phases.spans[phase][0], 1),
                "requests": each.requests,
                "lost": each.lost,
                "attempts a request": round(each.attempts, 4),
                "p50, ms": round(each.p50_ms),
                "p99, ms": round(each.p99_ms),
                "late p99, ms": round(each.late_p99_ms),
            }
            for phase, each in figures.items()
        ),
        note=f"three servers, {RATE_PER_S:g} requests a second, {STEPS} steps of 40 ms",
    )
    TABLES.add(
        "A server that was added",
        {"balanced by": name, "s from ready to its tenth answer": round(found_s, 2)},
        note="it is as busy as the others from then on",
    )
    assert not any(each.lost for each in figures.values()), {name: each.errors for name, each in figures.items()}
    assert len(load.outcomes) == sum(1 for each in load.outcomes if not each.error)
    assert figures["all rolled"].p99_ms <= MOST * figures["quiet"].p99_ms
    assert figures["quiet"].attempts < 1.01


def test_nginx_goes_on_choosing_a_server_that_drains(fleet: list[Replica], small: dict[str, bytes]) -> None:
    quick: dict[str, Any] = {**small, "num_inference_steps": 1, "seed": 1}
    draining = fleet[0]
    assert draining.process
    with (
        tempfile.TemporaryDirectory(prefix="ic-") as folder,
        nginx(Path(folder), fleet[:3]) as balancer,
        PortraitClient(draining.url) as holder,
        PortraitClient(balancer.addresses, attempts=1) as impatient,
        PortraitClient(balancer.addresses) as patient,
    ):
        # It answers this one before it ends.
        held = holder.submit(**{**quick, "num_inference_steps": 150})
        time.sleep(1.0)
        draining.process.terminate()
        time.sleep(0.5)
        refused = 0
        for _ in range(9):
            try:
                impatient.generate(**quick)
            except ServerUnavailable:
                refused += 1
        assert not held.done and 0 < refused < 9
        for _ in range(6):
            patient.generate(**quick)
        held.result()
    assert draining.process.wait(60) == 0
    draining.stop()
    draining.start()
