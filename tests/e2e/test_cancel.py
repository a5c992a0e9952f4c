"""A caller who goes frees the slot, through the real server: engines of 50 ms a step, and one slot for all."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tritonclient.grpc as grpc_client
from tritonclient.utils import InferenceServerException

from icportrait.policy import ServingPolicy
from icportrait.repository import assemble
from icportrait.server import Ports, TritonServer
from tests.e2e.caller import infer, tensors, until_metric

STEP_MS = 50
ACTIVE = "icportrait_active_slots"


@pytest.fixture(scope="module")
def slow_server(tmp_path_factory: pytest.TempPathFactory, demo_export: Path) -> Iterator[TritonServer]:
    folder = tmp_path_factory.mktemp("slow")
    table = folder / "table.json"
    times_ms = {"vae_encoder": 1, "warping_network": 1, "unet": STEP_MS, "vae_decoder": 1}
    table.write_text(json.dumps({"device": "slow", "engines": {name: {"1": ms} for name, ms in times_ms.items()}}))
    policy = ServingPolicy(runtime="simulated", latency_table=str(table), slots=1)
    assemble(demo_export, folder / "repository", policy)
    with TritonServer(folder / "repository", Ports.free(), folder / "server.log") as running:
        yield running


def test_without_a_cancel_the_next_one_waits(slow_server: TritonServer, pictures: dict[str, bytes]) -> None:
    """What the test below would see if nothing were cancelled."""
    with grpc_client.InferenceServerClient(slow_server.grpc_url) as client:
        until_metric(slow_server.metrics_url, ACTIVE, 0)
        start(client, pictures, steps=60)
        until_metric(slow_server.metrics_url, ACTIVE, 1)
        assert seconds_until_answer(slow_server, pictures) > 1.2


@pytest.mark.parametrize("runs", [False, True])
def test_a_cancelled_unary_call_frees_its_slot(
    slow_server: TritonServer, pictures: dict[str, bytes], runs: bool
) -> None:
    """While it is on its way to the loop, and while it is denoised: it would have taken 7.5 s."""
    with grpc_client.InferenceServerClient(slow_server.grpc_url) as client:
        until_metric(slow_server.metrics_url, ACTIVE, 0)
        outcome, done, call = start(client, pictures, steps=150)
        if runs:
            until_metric(slow_server.metrics_url, ACTIVE, 1)
        call.cancel()
        assert done.wait(10)
        assert outcome[0].status() == "StatusCode.CANCELLED"
        assert seconds_until_answer(slow_server, pictures) < 3


def start(client: Any, pictures: dict[str, bytes], steps: int) -> tuple[list[Any], threading.Event, Any]:
    outcome: list[Any] = []
    done = threading.Event()

    def on_done(result: Any, error: InferenceServerException | None) -> None:
        outcome.append(error)
        done.set()

    values = {**pictures, "num_inference_steps": steps, "guidance_scale": 1.0}
    call = client.async_infer("ic_portrait", tensors(values), on_done)
    return outcome, done, call


def seconds_until_answer(server: TritonServer, pictures: dict[str, bytes]) -> float:
    started = time.monotonic()
    infer(server.grpc_url, num_inference_steps=1, guidance_scale=1.0, **pictures)
    return time.monotonic() - started
