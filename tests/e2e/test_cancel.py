"""A caller who goes frees the slot, through the real server: one slot for all."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import tritonclient.grpc as grpc_client
from tritonclient.utils import InferenceServerException

from icportrait.server import ServerProcess
from tests.e2e.caller import infer, settled, tensors, until_metric

ACTIVE = "icportrait_active_slots"
STEPS = "icportrait_step_ms_count"


def test_without_a_cancel_the_next_one_waits(slow: ServerProcess, pictures: dict[str, bytes]) -> None:
    """Show what the test below would see if nothing were cancelled."""
    before = settled(slow.metrics_url)[STEPS]
    with grpc_client.InferenceServerClient(slow.grpc_url) as client:
        outcome, done, _ = start(client, pictures, steps=30)
        until_metric(slow.metrics_url, ACTIVE, 1)
        infer(slow.grpc_url, num_inference_steps=1, guidance_scale=1.0, **pictures)
        assert done.wait(30)
    assert outcome == [None]
    assert settled(slow.metrics_url)[STEPS] - before == 31


@pytest.mark.parametrize("runs", [False, True])
def test_a_cancelled_unary_call_frees_its_slot(slow: ServerProcess, pictures: dict[str, bytes], runs: bool) -> None:
    """Cancel a call while it is on its way to the loop, and while it is denoised."""
    before = settled(slow.metrics_url)[STEPS]
    with grpc_client.InferenceServerClient(slow.grpc_url) as client:
        outcome, done, call = start(client, pictures, steps=150)
        if runs:
            until_metric(slow.metrics_url, ACTIVE, 1)
        call.cancel()
        assert done.wait(30)
        assert outcome[0].status() == "StatusCode.CANCELLED"
        infer(slow.grpc_url, num_inference_steps=1, guidance_scale=1.0, **pictures)
    assert settled(slow.metrics_url)[STEPS] - before < 100


def start(client: Any, pictures: dict[str, bytes], steps: int) -> tuple[list[Any], threading.Event, Any]:
    outcome: list[Any] = []
    done = threading.Event()

    def on_done(result: Any, error: InferenceServerException | None) -> None:
        outcome.append(error)
        done.set()

    values = {**pictures, "num_inference_steps": steps, "guidance_scale": 1.0}
    call = client.async_infer("ic_portrait", tensors(values), on_done)
    return outcome, done, call
