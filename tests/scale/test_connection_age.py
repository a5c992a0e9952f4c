"""Callers behind a balancer of connections, as a Service of Kubernetes is: when does a new server get its share?"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path

import pytest

from icportrait.server import HOST, Ports
from tests.scale.load import OpenLoad, moments, until
from tests.scale.proxies import run_haproxy
from tests.scale.replicas import Replica, running
from tests.scale.tables import TABLES

CALLERS, RATE_PER_S, AGE_S, WATCHED_S = 16, 20.0, 2.0, 10.0
CONNECTIONS = """defaults
    mode tcp
    timeout connect 2s
    timeout client 600s
    timeout server 600s
listen grpc
    bind 127.0.0.1:{port}
    balance roundrobin
    option redispatch 1
    server old {old} check inter 200ms
    server new {new} check inter 200ms
"""


@pytest.mark.parametrize("age_s", [None, AGE_S], ids=["no age", "an age"])
def test_a_new_server_behind_a_balancer_of_connections(
    age_s: float | None, repository: Path, scale_folder: Path, small: dict[str, bytes]
) -> None:
    flags = ("--picture-workers=1", *([f"--connection-age-s={age_s}"] if age_s else []))
    old, new = (Replica(name, repository, scale_folder / f"{name}-{age_s}", flags) for name in ("old", "new"))
    request = {**small, "num_inference_steps": 2, "guidance_scale": 1.0, "seed": 7}
    with tempfile.TemporaryDirectory(prefix="ic-") as folder, running(old):
        port = Ports.free().grpc
        (Path(folder) / "haproxy.cfg").write_text(CONNECTIONS.format(port=port, old=old.url, new=new.url))
        callers = [(f"{HOST}:{port}", {}) for _ in range(CALLERS)]
        requests = [(number, request) for number in range(CALLERS)]
        with (
            run_haproxy(Path(folder)),
            OpenLoad(callers, requests, moments(RATE_PER_S, seed=5)) as load,
        ):
            until(lambda: len(load.outcomes) >= 2 * CALLERS)
            with running(new):
                time.sleep(2 * AGE_S)
                before = old.answered(), new.answered()
                time.sleep(WATCHED_S)
                answered = old.answered() - before[0], new.answered() - before[1]
                load.stop()
    share = answered[1] / sum(answered)
    TABLES.add(
        "A server added behind a balancer of connections",
        {
            "connection_age_s": "none" if age_s is None else age_s,
            "requests": round(sum(answered)),
            "share of the new server of two": round(share, 3),
        },
        note=f"{CALLERS} callers with a connection each, HAProxy in TCP mode; from {2 * AGE_S:g} s after it was ready",
    )
    assert not [each.error for each in load.outcomes if each.error][:3]
    assert 0.25 < share < 0.75 if age_s else share == 0
