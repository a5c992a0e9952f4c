"""The private tritonserver: the pipeline over Unix sockets, and the control line beside it."""

from __future__ import annotations

import queue
import stat
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from icportrait.deploy.heap import environment
from icportrait.deploy.triton_server import TritonServer
from icportrait.errors import Cancelled, DeadlineMissed, IcPortraitError, Unavailable
from icportrait.presets import DEMO_128
from icportrait.serving.control import VERSION
from tests.e2e.conftest import simulated_repository
from tests.label_slots import BASE
from tests.private_client import Gateway, Line, gateway, metrics

STREAM = replace(BASE, num_inference_steps=10, is_streamed=True)
UNET_MS = 20


@pytest.fixture(scope="module")
def private(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TritonServer]:
    folder = tmp_path_factory.mktemp("private")
    with TritonServer(simulated_repository(folder, {"unet": UNET_MS}), folder / "log") as running:
        yield running


@pytest.fixture
def caller(private: TritonServer) -> Iterator[Gateway]:
    with gateway(private, DEMO_128) as opened:
        yield opened


def until_metric(private: TritonServer, name: str, value: float) -> None:
    while metrics(private).get(f"icportrait_{name}") != value:
        threading.Event().wait(0.05)


def test_nothing_listens_on_a_port_and_nobody_else_may_enter_the_folder(private: TritonServer) -> None:
    pids = {private.pid, *(stub.pid for stub in private.stubs)}
    descriptors = [link for pid in pids for link in Path(f"/proc/{pid}/fd").iterdir()]
    sockets = {str(link.readlink()) for link in descriptors if link.is_symlink()}
    listening = "0A"
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/{private.pid}/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            assert fields[3] != listening or f"socket:[{fields[9]}]" not in sockets
    assert stat.S_IMODE(private.directory.stat().st_mode) == 0o700
    assert {stub.model for stub in private.stubs} == {"denoise", "vae_encoder", "vae_decoder"}


def test_its_processes_give_freed_memory_back(private: TritonServer) -> None:
    for pid in (private.pid, *(stub.pid for stub in private.stubs)):
        variables = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
        assert {f"{name}={value}".encode() for name, value in environment("simulated").items()} <= set(variables)


def test_no_answer_is_kept_once_it_is_sent(private: TritonServer, caller: Gateway) -> None:
    held_kb = []
    for num_portraits in (1, 8):
        request = replace(BASE, num_portraits=num_portraits, num_inference_steps=1)
        with ThreadPoolExecutor(8) as threads:
            list(threads.map(caller.run, [request] * 32))
        status = Path(f"/proc/{private.pid}/status").read_text()
        held_kb.append(int(status.partition("RssAnon:")[2].split()[0]))
    eight_portraits_kb = 8 * 3 * DEMO_128.image_size**2 / 1024
    assert held_kb[1] - held_kb[0] < 8 * eight_portraits_kb


def test_a_portrait_comes_with_its_times(caller: Gateway) -> None:
    portraits, report, steps = caller.run(replace(BASE, num_portraits=2, num_inference_steps=5))
    assert portraits.shape == (2, DEMO_128.image_size, DEMO_128.image_size, 3) and steps == []
    times = [report[name] for name in ("arrived_ns", "joined_ns", "conditioned_ns", "denoised_ns")]
    assert times == sorted(times)
    assert report["rows_shared"] == 2 and report["engine"] == "simulated-test device"
    # All rows were its own: it is charged with the whole of the engines' time.
    assert report["engine_ms"] >= 5 * UNET_MS + report["warp_ms"] - 1
    assert report["engine_ms"] <= (report["denoised_ns"] - report["joined_ns"]) / 1e6


def test_a_stream_hears_every_step_and_its_previews_are_decoded_beside_it(caller: Gateway) -> None:
    shown: dict[int, tuple[int, ...]] = {}
    portraits, _, steps = caller.run(
        replace(STREAM, num_portraits=2, preview_every=3), lambda step, pixels: shown.update({step: pixels.shape})
    )
    assert steps == list(range(1, 10))
    assert shown == dict.fromkeys((3, 6, 9), portraits.shape)


def test_requests_at_once_share_steps(caller: Gateway) -> None:
    with ThreadPoolExecutor(8) as threads:
        reports = list(threads.map(lambda seed: caller.run(replace(STREAM, seed=seed))[1], range(8)))
    assert max(report["rows_shared"] for report in reports) > 2
    assert sum(report["engine_ms"] for report in reports) < 8 * 10 * UNET_MS


def test_a_cancelled_request_ends_at_the_next_step(caller: Gateway, private: TritonServer) -> None:
    before = metrics(private)["icportrait_cancellations_total"]
    with ThreadPoolExecutor(1) as thread:
        keys: queue.SimpleQueue[str] = queue.SimpleQueue()
        run = thread.submit(
            caller.run, replace(STREAM, num_inference_steps=150), None, lambda request: keys.put(request.key)
        )
        until_metric(private, "active_slots", 1)
        caller.line.say(op="cancel", key=keys.get(timeout=10))
        with pytest.raises(Cancelled):
            run.result(5)
    until_metric(private, "active_slots", 0)
    until_metric(private, "cancellations_total", before + 1)


def test_a_gateway_that_goes_takes_its_requests_along(private: TritonServer) -> None:
    with gateway(private, DEMO_128) as other, ThreadPoolExecutor(1) as thread:
        run = thread.submit(other.run, replace(STREAM, num_inference_steps=150))
        until_metric(private, "active_slots", 1)
        other.line.close()
        with pytest.raises(Cancelled):
            run.result(5)
    until_metric(private, "active_slots", 0)


def test_a_deadline_keeps_its_code_through_the_ensemble(caller: Gateway, private: TritonServer) -> None:
    caller.run(BASE)
    with pytest.raises((DeadlineMissed, Unavailable), match="deadline_ms"):
        caller.run(replace(STREAM, num_inference_steps=150, deadline_ms=300))
    until_metric(private, "active_slots", 0)


def test_what_has_no_lease_is_not_run(caller: Gateway) -> None:
    for key in ("", "unknown"):
        with pytest.raises(Cancelled):
            caller.client.pipeline(replace(BASE, key=key), caller.profile, caller.reference, caller.visibility)


def test_nan_in_the_visibility_is_refused_and_no_picture_is_made(caller: Gateway) -> None:
    caller.visibility = caller.visibility * np.nan
    with pytest.raises(IcPortraitError, match="visibility has NaN") as refused:
        caller.run(BASE)
    assert refused.value.code == "INTERNAL"


def test_what_is_kept_of_a_picture_is_kept_for_its_partition(caller: Gateway, private: TritonServer) -> None:
    def encoded() -> float:
        return metrics(private)["icportrait_encoder_cache_misses_total"]

    caller.profile, caller.reference = 255 - caller.profile, 255 - caller.reference
    before = encoded()
    for partition, in_all in (("ann", 2), ("ben", 4), ("ann", 4), ("", 6), ("ben", 6)):
        caller.partition = partition
        caller.run(BASE)
        assert encoded() - before == in_all


def test_equal_requests_on_one_machine_have_one_numerics_id(caller: Gateway) -> None:
    ids = {caller.run(replace(BASE, seed=seed))[1]["numerics_id"] for seed in range(2)}
    assert len(ids) == 1 and None not in ids


def test_the_loop_says_whether_it_gets_on(caller: Gateway) -> None:
    assert caller.line.ping(7) == {"op": "pong", "id": 7, "step_age_ms": 0.0, "expected_ms": 0.0, "busy": False}
    with ThreadPoolExecutor(1) as thread:
        run = thread.submit(caller.run, replace(STREAM, num_inference_steps=50))
        while not (busy := caller.line.ping(8))["busy"]:
            assert not run.done()
        run.result(60)
    assert busy["step_age_ms"] > 0
    assert caller.line.ping(9)["step_age_ms"] == 0


def test_a_forged_line_is_closed_and_the_others_stay(caller: Gateway, private: TritonServer) -> None:
    forged = Line(str(private.loop_path))
    forged.say(op="lease", key="a", phases=[[-3, "x"]], priority="x", deadline_ms=None, arrived_s=1e25, nbytes=0)
    assert forged.said.get(timeout=10) == {"op": "hello", "version": VERSION}
    assert forged.said.get(timeout=10) is None
    forged.close()
    assert caller.run(BASE)[0].shape[0] == 1
    assert "isn't what it should be" in private.log_file.read_text()
