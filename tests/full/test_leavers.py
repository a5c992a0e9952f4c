"""Thousands of callers who leave early, send what is wrong, or are in a hurry: the server is as it was before."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import pytest
from tritonclient.grpc import service_pb2, service_pb2_grpc

from icportrait.deploy.stub_processes import descendants
from tests.e2e.caller import infer, series, settled, tensors, until_metric
from tests.e2e.conftest import simulated_repository
from tests.e2e.supervised import Supervised, resident_bytes, supervised
from tests.full.conftest import say
from tests.fuzz.watch import REST_S

pytestmark = [pytest.mark.full, pytest.mark.timeout(1200)]

CALLERS = 12
LEAVERS, ROUNDS, ROUND = 1000, 5, 1000
STOP_S = 6.0
"""Longest stop; for an inference that nobody ends Triton waits for 30 s."""
GROWTH = 1.02
IN_FLIGHT = "nv_inference_pending_request_count"


def request(model: str, values: dict[str, Any]) -> Any:
    made = service_pb2.ModelInferRequest(model_name=model)
    for tensor in tensors(values):
        made.inputs.append(tensor._get_tensor())
        made.raw_input_contents.append(tensor._get_content())
    return made


def leave(stub: Any, values: dict[str, Any], rng: random.Random) -> str:
    """Hang up in the middle: a stream after its first answers, another call after some milliseconds."""
    if rng.random() < 0.5:
        stream = stub.ModelStreamInfer(iter([request("ic_portrait_stream", {**values, "preview_every": 1})]))
        for _ in range(rng.randint(1, 3)):
            next(stream, None)  # a late caller's previews are skipped
        stream.cancel()
    else:
        call = stub.ModelInfer.future(request("ic_portrait", values))
        time.sleep(rng.uniform(0, 0.1))
        call.cancel()
    return "LEFT"


def call(stub: Any, kind: str, pictures: dict[str, bytes], number: int) -> str:
    """Send a request of a kind, and return how it ended."""
    rng = random.Random(number)
    values: dict[str, Any] = {**pictures, "seed": number, "num_inference_steps": rng.randint(1, 8)}
    if kind == "deadline":
        values |= {"deadline_ms": rng.randint(1, 60), "num_inference_steps": 40}
    elif kind == "wrong option":
        values["num_inference_steps"] = 100_000
    elif kind == "no picture":
        values["profile"] = rng.randbytes(1000)
    for _ in range(1000):
        try:
            if kind == "leaver":
                return leave(stub, {**values, "num_inference_steps": 40}, rng)
            stub.ModelInfer(request("ic_portrait", values), timeout=60)
            return "OK"
        except grpc.RpcError as error:
            if "is full" not in error.details() and "pending" not in error.details():
                return str(error.code().name)
            time.sleep(0.05)
    return "never let in"


def calls(server: Supervised, kinds: list[str], pictures: dict[str, bytes]) -> Counter[tuple[str, str]]:
    with contextlib.ExitStack() as stack:
        channels = [
            stack.enter_context(grpc.insecure_channel(server.url, [("grpc.use_local_subchannel_pool", 1)]))
            for _ in range(CALLERS)
        ]
        stubs = [service_pb2_grpc.GRPCInferenceServiceStub(channel) for channel in channels]
        with ThreadPoolExecutor(CALLERS) as threads:
            ends = threads.map(
                lambda number: call(stubs[number % CALLERS], kinds[number], pictures, number), range(len(kinds))
            )
            return Counter(zip(kinds, ends, strict=True))


def memory(server: Supervised) -> dict[int, int]:
    """Read each process's resident bytes, once the processes have given back what is free."""
    time.sleep(REST_S)
    return {pid: resident_bytes(pid) for pid in (server.process.pid, *descendants(server.process.pid))}


def stops_within_s(server: Supervised) -> float:
    """Measure tritonserver's stop, which waits for requests in flight."""
    pid, began_s = server.tritonserver, time.monotonic()
    os.kill(pid, signal.SIGTERM)
    while Path(f"/proc/{pid}/stat").exists() and ") Z " not in Path(f"/proc/{pid}/stat").read_text():
        assert time.monotonic() < began_s + 60
        time.sleep(0.01)
    return time.monotonic() - began_s


def test_a_thousand_who_leave_early_leave_nothing_in_flight(tmp_path: Path, pictures: dict[str, bytes]) -> None:
    with supervised(simulated_repository(tmp_path, {"unet": 5}), tmp_path) as server:
        assert calls(server, LEAVERS * ["leaver"], pictures) == {("leaver", "LEFT"): LEAVERS}
        settled(server.metrics_url)
        assert sum(series(server.metrics_url, IN_FLIGHT).values()) == 0
        took_s = stops_within_s(server)
        say(f"tritonserver stopped in {took_s:.1f} s after {LEAVERS} early leavers")
        assert took_s < STOP_S


def test_thousands_of_mixed_calls_cost_no_process_and_no_memory(tmp_path: Path, pictures: dict[str, bytes]) -> None:
    rng = random.Random(0)
    shares = {"plain": 45, "leaver": 30, "deadline": 10, "wrong option": 8, "no picture": 7}
    kinds = rng.choices(list(shares), list(shares.values()), k=ROUND)
    with supervised(simulated_repository(tmp_path, {"unet": 2}), tmp_path) as server:
        first, *_ = infer(server.url, **pictures, seed=1, num_inference_steps=3)
        ends: Counter[tuple[str, str]] = Counter()
        readings = []
        for _ in range(ROUNDS):
            ends += calls(server, kinds, pictures)
            settled(server.metrics_url)
            readings.append(memory(server))
        say("\n".join(f"{count:6} {kind}: {end}" for (kind, end), count in sorted(ends.items())))
        total = [sum(reading.values()) for reading in readings]
        say(f"resident MB, after each {ROUND}: {', '.join(str(size >> 20) for size in total)}")
        assert set(ends) - {("deadline", "OK"), ("deadline", "DEADLINE_EXCEEDED"), ("deadline", "UNAVAILABLE")} == {
            ("plain", "OK"),
            ("leaver", "LEFT"),
            ("wrong option", "INVALID_ARGUMENT"),
            ("no picture", "INVALID_ARGUMENT"),
        }
        assert all(reading.keys() == readings[0].keys() for reading in readings), "a process has ended"
        # Caches fill in the first rounds; a leak is in every round.
        assert min(total[-2:]) < GROWTH * max(total[:2])
        assert infer(server.url, **pictures, seed=1, num_inference_steps=3)[0] == first
        until_metric(server.metrics_url, "icportrait_gateway_engine_starts_total", 1)
        assert stops_within_s(server) < STOP_S
