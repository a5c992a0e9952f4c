"""Two engines behind one gateway: load is shared, and one that ends is started again while the other goes on."""

from __future__ import annotations

import os
import signal
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tests.e2e.caller import series, until_metric
from tests.e2e.conftest import simulated_repository
from tests.e2e.supervised import LINE_TIMEOUT_S, Supervised, children, name, supervised
from tests.e2e.test_restart import outcome

CALLERS = 16


def tritonservers(server: Supervised) -> dict[str, int]:
    """Find each engine's tritonserver by the device that it may see."""
    found = {}
    for pid in children(server.process.pid):
        if name(pid) == "tritonserver":
            variables = Path(f"/proc/{pid}/environ").read_text().split("\0")
            found[next(each for each in variables if each.startswith("CUDA_VISIBLE_DEVICES="))[-1]] = pid
    return found


def of_engine(what: str, device: int) -> str:
    return f'icportrait_{what}{{device="{device}"}}'


def test_one_of_two_engines_ends_under_load_the_other_goes_on_and_the_first_comes_back_alone(
    tmp_path: Path, pictures: dict[str, bytes]
) -> None:
    repository = simulated_repository(tmp_path, {"unet": 10})
    with (
        supervised(repository, tmp_path, flags=("--devices=0,1",)) as server,
        ThreadPoolExecutor(CALLERS) as threads,
    ):
        assert {server.ready[-1], server.next_line("ready")[-1]} == {"0", "1"}
        calls = [threads.submit(outcome, server.url, pictures, 150) for _ in range(CALLERS)]
        for device in (0, 1):
            until_metric(server.metrics_url, of_engine("active_slots", device), CALLERS / 2)
        before = tritonservers(server)
        os.kill(before["1"], signal.SIGKILL)
        until_metric(server.metrics_url, of_engine("gateway_engine_ready", 1), 0)
        assert outcome(server.url, pictures, 1) == "served", "by the other, while the first is started again"
        found = series(server.metrics_url)
        assert found["icportrait_gateway_ready"] == found[of_engine("gateway_engine_ready", 0)] == 1
        # A killed tritonserver takes its models' processes with it, and one of them may be seen to end first.
        part = "(tritonserver|the process of model [a-z_]+)"
        server.next_line(f"device 1: {part} .*; restarting the server, 1 of at most 3 times in 10 minutes$")
        assert {call.result(LINE_TIMEOUT_S) for call in calls} == {"served"}
        assert server.next_line("ready").endswith("device 1")
        found, after = series(server.metrics_url), tritonservers(server)
        assert [found[of_engine("gateway_engine_starts_total", device)] for device in (0, 1)] == [1, 2]
        assert after["0"] == before["0"] and after["1"] != before["1"]
        assert found["icportrait_gateway_replays_total"] == CALLERS / 2
    assert "Traceback" not in server.errors()
