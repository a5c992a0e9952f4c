"""A part of the real server ends: callers are told at once, and the supervisor starts it again, but not for ever."""

from __future__ import annotations

import os
import signal
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper
from tritonclient.utils import InferenceServerException

from icportrait.policy import ServingPolicy
from icportrait.presets import DEMO_128
from icportrait.repository import assemble
from tests.e2e.caller import infer, settled, until_metric
from tests.e2e.conftest import simulated_repository
from tests.e2e.supervised import LINE_TIMEOUT_S, STOP_TIMEOUT_S, Supervised, supervised
from tests.trivial_engines import write_trivial_export

ACTIVE = "icportrait_active_slots"


def outcome(url: str, pictures: dict[str, bytes], steps: int) -> str:
    """How a request ends."""
    try:
        infer(url, num_inference_steps=steps, **pictures)
    except InferenceServerException as error:
        return f"{error.status()}: {error.message()}"
    return "served"


def test_parts_that_end_are_started_again_three_times_and_callers_are_told(
    tmp_path: Path, pictures: dict[str, bytes]
) -> None:
    repository = simulated_repository(tmp_path, {"unet": 20})
    with supervised(repository, tmp_path) as server, ThreadPoolExecutor() as threads:
        assert outcome(server.url, pictures, steps=1) == "served"
        for count, model in enumerate(("denoise", "vae_decoder", "ic_portrait"), 1):
            running = threads.submit(outcome, server.url, pictures, 150)
            until_metric(server.metrics_url, ACTIVE, 1)
            regions = server.shm_regions()
            assert regions
            server.kill(model)
            new = threads.submit(outcome, server.url, pictures, 1)
            for call in (running, new):
                answer = call.result(LINE_TIMEOUT_S)
                assert answer.startswith("StatusCode.UNAVAILABLE"), model
                assert model != "denoise" or "the denoising loop has ended" in answer
            assert server.next_line("the process") == (
                f"the process of model {model} was ended by signal 9; "
                f"restarting the server, {count} of at most 3 times in 10 minutes"
            )
            assert server.next_line("ready").startswith(f"ready: gRPC {server.url}")
            assert not regions & server.shm_regions()
            assert len(list(tmp_path.glob("icportrait-server-*"))) == 1
            if count == 1:
                check_a_deadline_that_passes_while_its_request_runs(server, pictures)
            assert outcome(server.url, pictures, steps=1) == "served"

        os.kill(server.tritonserver, signal.SIGKILL)
        assert server.process.wait(STOP_TIMEOUT_S) == 1
        assert outcome(server.url, pictures, steps=1).startswith("StatusCode.UNAVAILABLE")
        assert not server.shm_regions()
    errors = [line for line in server.errors().splitlines() if line.startswith("error:")]
    expected = "error: tritonserver was ended by signal 9, after 3 restarts in 10 minutes; the cause is in its output"
    assert errors == [expected]


def check_a_deadline_that_passes_while_its_request_runs(server: Supervised, pictures: dict[str, bytes]) -> None:
    """A server that has measured nothing yet lets it in. It is dropped and told so, and its slot is free again."""
    with pytest.raises(InferenceServerException, match=r"deadline_ms: passed after \d+ of 150 steps") as dropped:
        infer(server.url, num_inference_steps=150, guidance_scale=1.0, deadline_ms=800, **pictures)
    assert dropped.value.status() == "StatusCode.UNAVAILABLE"
    assert settled(server.metrics_url)["icportrait_deadline_misses_total"] == 1


def test_a_failure_of_ours_is_internal_without_a_traceback_and_an_engine_that_keeps_failing_restarts_the_server(
    tmp_path: Path, pictures: dict[str, bytes]
) -> None:
    """And Ctrl-C while it restarts ends it in order."""
    write_trivial_export(tmp_path / "export", DEMO_128)
    assemble(tmp_path / "export", tmp_path / "repository", ServingPolicy())
    make_the_unet_fail(tmp_path / "repository")
    with supervised(tmp_path / "repository", tmp_path) as server:
        for _ in range(3):
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
