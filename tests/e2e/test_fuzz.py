"""A short fuzz of a real server; ``make fuzz`` is the long one."""

from __future__ import annotations

import asyncio
from pathlib import Path

from icportrait.presets import DEMO_128
from tests.e2e.caller import settled
from tests.e2e.supervised import Supervised
from tests.fuzz.run import Plan, Run, table
from tests.fuzz.watch import Watched

REQUESTS = 500


def test_each_of_many_requests_gets_a_picture_or_one_clear_refusal(whole: Supervised, tmp_path: Path) -> None:
    plan = Plan(
        seed=0,
        requests=REQUESTS,
        grpc_url=whole.url,
        http_url=f"127.0.0.1:{whole.ports.http}",
        callers=4,
        run_folder=whole.folder,
        findings=tmp_path,
        checks_memory=False,
    )
    outcome = asyncio.run(Run(plan, DEMO_128, Watched(whole.process.pid, whole.folder / "server.log")).all())
    assert not outcome.findings, table(outcome)
    assert sum(outcome.answers.values()) == REQUESTS and outcome.pictures > REQUESTS / 20
    # Right lines reach the parser's end, wrong ones are closed, and neither leaves a lease behind.
    assert outcome.answers["control", "OK"] and outcome.answers["control", "GONE"]
    assert settled(whole.metrics_url)["icportrait_admitted_bytes"] == 0
