"""A part of the real server ends or hangs: it is started again, not for ever, and all that was let in is served."""

from __future__ import annotations

import dataclasses
import os
import re
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper
from tritonclient.utils import InferenceServerException

from icportrait.deploy.repository import assemble
from icportrait.manifest import Manifest, file_sha256
from icportrait.policy import ServingPolicy
from icportrait.presets import DEMO_128
from tests.e2e.caller import infer, series, settled, until_metric
from tests.e2e.conftest import CACHE_BYTES, simulated_repository
from tests.e2e.supervised import LINE_TIMEOUT_S, STOP_TIMEOUT_S, Supervised, children, name, supervised
from tests.stage_front import until
from tests.trivial_engines import write_trivial_export

ACTIVE, READY, PENDING = "icportrait_active_slots", "icportrait_gateway_ready", "icportrait_gateway_pending_requests"


def outcome(url: str, pictures: dict[str, bytes], steps: int) -> str:
    """Tell how a request ends."""
    try:
        infer(url, num_inference_steps=steps, **pictures)
    except InferenceServerException as error:
        return f"{error.status()}: {error.message()}"
    return "served"


REPLAYS = "icportrait_gateway_replays_total"
Signal = signal.Signals
CALLERS = 16


@pytest.mark.parametrize(
    "parts",
    [
        [("denoise", Signal.SIGKILL), ("vae_encoder", Signal.SIGSTOP), ("tritonserver", Signal.SIGKILL)],
        [("tritonserver", Signal.SIGSTOP), ("vae_decoder", Signal.SIGKILL), ("denoise", Signal.SIGSTOP)],
        [("vae_encoder", Signal.SIGKILL), ("vae_decoder", Signal.SIGSTOP)],
    ],
    ids=lambda parts: "-".join(f"{name}:{number.name}" for name, number in parts),
)
def test_a_part_that_is_killed_or_stopped_costs_those_who_were_let_in_time_and_nothing_else(
    tmp_path: Path, pictures: dict[str, bytes], parts: list[tuple[str, Signal]]
) -> None:
    repository = simulated_repository(tmp_path, {"unet": 10})
    with supervised(repository, tmp_path) as server, ThreadPoolExecutor(CALLERS) as threads:
        for count, (part, number) in enumerate(parts, 1):
            until_metric(server.metrics_url, ACTIVE, 0)  # not what was published before
            calls = [threads.submit(outcome, server.url, pictures, 100) for _ in range(CALLERS)]
            until_metric(server.metrics_url, ACTIVE, CALLERS)
            regions, replays = server.shm_regions(), series(server.metrics_url)[REPLAYS]
            assert regions
            os.kill(server.pid_of(part), number)
            until_metric(server.metrics_url, READY, 0)
            # A part that is stopped is missed a while later. Requests that were past it may have ended by then.
            interrupted = [call for call in calls if not call.done()]
            assert interrupted or number == Signal.SIGSTOP
            asked_s = time.monotonic()
            assert re.search(r"UNAVAILABLE: the engine is being .*retry_after_ms: ", outcome(server.url, pictures, 1))
            assert time.monotonic() - asked_s < 1
            assert re.search(f"; restarting the server, {count} of at most 3", server.next_line(r".*; restarting"))
            assert server.next_line("ready").startswith(f"ready: gRPC {server.url}")
            assert not regions & server.shm_regions()
            assert len(list(tmp_path.glob("icportrait-server-run-*"))) == 1
            assert {call.result(LINE_TIMEOUT_S) for call in calls} == {"served"}, (part, number)
            assert (series(server.metrics_url)[REPLAYS] > replays) == bool(interrupted)
    assert "Traceback" not in server.errors()


def test_a_part_that_ends_or_stops_while_the_engine_is_being_restarted_costs_another_restart_and_nothing_else(
    tmp_path: Path, pictures: dict[str, bytes]
) -> None:
    repository = simulated_repository(tmp_path, {"unet": 10})
    with supervised(repository, tmp_path) as server, ThreadPoolExecutor(CALLERS) as threads:
        calls = [threads.submit(outcome, server.url, pictures, 100) for _ in range(CALLERS)]
        until_metric(server.metrics_url, ACTIVE, CALLERS)
        seen: set[int] = set()

        def new_tritonserver() -> set[int]:
            return {pid for pid in children(server.process.pid) if name(pid) == "tritonserver"} - seen

        for count, (number, text) in enumerate(
            [
                (Signal.SIGKILL, "tritonserver was ended by signal 9"),
                (Signal.SIGKILL, "tritonserver ended with status -9 before it was ready"),
                (Signal.SIGSTOP, "tritonserver was stopped by a signal before the server was ready"),
            ],
            1,
        ):
            until(lambda: bool(new_tritonserver()))
            (pid,) = new_tritonserver()
            seen.add(pid)
            os.kill(pid, number)
            line = server.next_line("tritonserver")
            assert line.startswith(text) and f"; restarting the server, {count} of at most 3 times" in line
        server.next_line("ready")
        assert {call.result(LINE_TIMEOUT_S) for call in calls} == {"served"}
    assert "Traceback" not in server.errors()


@pytest.mark.parametrize("number", [Signal.SIGKILL, Signal.SIGSTOP])
def test_picture_processes_that_are_killed_or_stopped_cost_callers_time_and_nothing_else(
    tmp_path: Path, pictures: dict[str, bytes], number: Signal
) -> None:
    """End or stop every process, while callers keep them busy with pictures that come for the first time."""
    repository = simulated_repository(tmp_path, {"unet": 1})
    # Of no meaning to a decoder.
    new = [{name: data + index.to_bytes(2, "big") for name, data in pictures.items()} for index in range(60)]
    with supervised(repository, tmp_path) as server, ThreadPoolExecutor(CALLERS) as threads:
        workers = server.picture_workers
        assert len(workers) >= 2
        calls = [threads.submit(outcome, server.url, each, 1) for each in new]
        until_metric(server.metrics_url, PENDING, CALLERS)
        for pid in workers:
            os.kill(pid, number)
        assert {call.result(LINE_TIMEOUT_S) for call in calls} == {"served"}
        until_metric(server.metrics_url, "icportrait_gateway_picture_workers_lost_total", len(workers))
        assert not set(workers) & set(server.picture_workers)


def test_parts_that_end_too_often_end_the_server_and_callers_are_told(
    tmp_path: Path, pictures: dict[str, bytes]
) -> None:
    repository = simulated_repository(tmp_path, {"unet": 10})
    with supervised(repository, tmp_path) as server, ThreadPoolExecutor() as threads:
        assert outcome(server.url, pictures, steps=1) == "served"
        for count in range(1, 4):
            assert server.shm_regions()
            server.kill("denoise")
            assert server.next_line("the process") == (
                "the process of model denoise was ended by signal 9; "
                f"restarting the server, {count} of at most 3 times in 10 minutes"
            )
            server.next_line("ready")
        check_a_deadline_that_passes_while_its_request_runs(server, pictures)
        running = threads.submit(outcome, server.url, pictures, 150)
        until_metric(server.metrics_url, ACTIVE, 1)
        assert server.shm_regions()
        os.kill(server.tritonserver, signal.SIGKILL)
        assert running.result(LINE_TIMEOUT_S).startswith("StatusCode.UNAVAILABLE")
        assert server.process.wait(STOP_TIMEOUT_S) == 1
        assert outcome(server.url, pictures, steps=1).startswith("StatusCode.UNAVAILABLE")
        assert not server.shm_regions()
    errors = [line for line in server.errors().splitlines() if line.startswith("error:")]
    expected = "error: tritonserver was ended by signal 9, after 3 restarts in 10 minutes; the cause is in its output"
    assert errors == [expected]


def check_a_deadline_that_passes_while_its_request_runs(server: Supervised, pictures: dict[str, bytes]) -> None:
    """Send a request that a server lets in because it has measured nothing yet.

    The request is dropped and told so, and its slot is free again.
    """
    with pytest.raises(InferenceServerException, match=r"deadline_ms: passed after \d+ of 150 steps") as dropped:
        infer(server.url, num_inference_steps=150, guidance_scale=1.0, deadline_ms=800, **pictures)
    assert dropped.value.status() == "StatusCode.UNAVAILABLE"
    assert settled(server.metrics_url)["icportrait_deadline_misses_total"] == 1


def test_a_failure_of_ours_is_internal_without_a_traceback_and_an_engine_that_keeps_failing_restarts_the_server(
    tmp_path: Path, pictures: dict[str, bytes]
) -> None:
    """Send Ctrl-C while the server restarts, too: the server ends in order."""
    write_trivial_export(tmp_path / "export", DEMO_128)
    assemble(tmp_path / "export", tmp_path / "repository", ServingPolicy(cache_bytes=CACHE_BYTES))
    make_the_unet_fail(tmp_path / "repository")
    with supervised(tmp_path / "repository", tmp_path) as server:
        for _ in range(2):  # each is tried twice
            assert server.shm_regions()
            answer = outcome(server.url, pictures, steps=2)
            assert answer.startswith("StatusCode.INTERNAL") and "log has the cause" in answer
            assert "Traceback" not in answer
        assert server.next_line("the process").startswith(
            "the process of model denoise ended with status 70; restarting the server"
        )
        server.process.send_signal(signal.SIGINT)
        assert server.process.wait(STOP_TIMEOUT_S) == 0
        server.next_line("stopped")
        assert not server.shm_regions()
    assert "Traceback" in server.errors()
    assert not list(tmp_path.glob("icportrait-server-*"))


def make_the_unet_fail(repository: Path) -> None:
    """Change its graph so that it still loads, and fails when it runs."""
    path = repository / "denoise" / "1" / "unet.onnx"
    model = onnx.load(path)
    for constant in model.graph.initializer:
        if constant.name == "noise_pred_dims":
            constant.CopyFrom(numpy_helper.from_array(np.array([4, 32, 63]), constant.name))
    path.unlink()
    onnx.save(model, path)
    manifest = Manifest.read(path.parent)
    changed = dataclasses.replace(manifest.engines["unet"], sha256=file_sha256(path))
    dataclasses.replace(manifest, engines={**manifest.engines, "unet": changed}).write(path.parent)
