"""The short runs of ``make chaos`` and ``make soak``: each fault and each kind of request once, states and no times."""

from __future__ import annotations

import random
import subprocess
import sys

from icportrait.server import ServerProcess
from tests.chaos.faults import SHORT
from tests.conftest import ROOT
from tests.e2e.caller import settled
from tests.soak.load import KINDS, Load, by_kind
from tests.soak.readings import growths, read


def test_faults_lose_no_request_and_change_no_portrait() -> None:
    command = [sys.executable, "-m", "tests.chaos", "--short", "--callers", "4"]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=280, check=False)
    assert run.returncode == 0, run.stdout + run.stderr
    assert f"{len(SHORT)} passed, 0 failed" in run.stdout
    assert all(f"  {name}: over in" in run.stderr for name in SHORT)


def test_every_kind_of_the_soaks_load_ends_as_it_must(slow: ServerProcess, pictures: dict[str, bytes]) -> None:
    load = Load(slow.grpc_url, slow.http_url, pictures)
    assert slow.process
    readings = []
    with load.client() as client:
        for kind in KINDS:
            load.call(kind, client, random.Random(kind))
        for _ in range(3):
            settled(slow.metrics_url)
            readings.append(read(slow.process.pid))
    assert not load.unexpected
    assert {kind: ends.total() for kind, ends in by_kind(load.ends).items()} == dict.fromkeys(KINDS, 1)
    processes = {each.process.partition(" ")[0] for each in growths(readings)}
    assert {"gateway", "tritonserver", "denoise", "vae_encoder", "vae_decoder", "pictures"} <= processes
