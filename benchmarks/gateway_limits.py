"""The gateway's own limits, in requests and in bytes a second: closed loops over engines that take no time.

The callers here take as much of the machine as the gateway does. So each figure has two rates: what was measured, and
what one whole core would do at the CPU time that the gateway's process took for each.
"""

from __future__ import annotations

import asyncio
import json
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import grpc
import numpy as np
from icportrait_client.contract import load_contract

from benchmarks.calls import METHOD, encoded, named
from icportrait.contract import ENGINES
from icportrait.deploy.repository import assemble
from icportrait.errors import IcPortraitError
from icportrait.policy import SIMULATED, ServingPolicy
from icportrait.server import Ports, ServerProcess

CALLERS = 16
CHANNELS = 4
NO_TIME_MS = 0.001
_BYTES = 8 << 20
_WARM_UP_S = 1.0


def gateway_limits(export: Path, folder: Path, files: Mapping[str, bytes], seconds: float) -> dict[str, Any]:
    """Measure portraits, refusals and bytes a second.

    Args:
        export: written by ``python -m export``; its manifest is all that is used.
        folder: for the repository and the log.
        files: picture files by input; all requests have the same.
        seconds: time for each of the three.

    Raises:
        IcPortraitError: a call ended in another way than it should.
    """
    table = folder / "no-time.json"
    table.write_text(json.dumps({"device": "no time", "engines": {name: {"1": NO_TIME_MS} for name in ENGINES}}))
    assemble(export, folder / "no-time", ServingPolicy(runtime=SIMULATED, latency_table=str(table)))
    noise = np.random.default_rng(0).bytes(_BYTES)
    asked: dict[str, tuple[dict[str, Any], grpc.StatusCode]] = {
        "portraits": ({**files, "num_inference_steps": 1, "seed": 1}, grpc.StatusCode.OK),
        "refusals": ({**files, "num_inference_steps": 0}, grpc.StatusCode.INVALID_ARGUMENT),
        "uploads of 8 MiB": ({**files, "profile": noise}, grpc.StatusCode.INVALID_ARGUMENT),
    }
    found = {}
    with ServerProcess(folder / "no-time", Ports.free(), folder / "no-time.log") as server:
        for name, (values, expected) in asked.items():
            request = named(load_contract().model) + encoded(values)
            asyncio.run(_closed_loop(server.grpc_url, request, _WARM_UP_S, expected))
            assert server.process
            before_s = cpu_s(server.process.pid)
            per_s, count = asyncio.run(_closed_loop(server.grpc_url, request, seconds, expected))
            cpu_ms = 1000 * (cpu_s(server.process.pid) - before_s) / count
            size = len(request)
            found[name] = {
                "per_s": round(per_s, 1),
                "gateway_cpu_ms_each": round(cpu_ms, 3),
                "per_s_of_a_core": round(1000 / cpu_ms, 1),
                "megabytes_each": round(size / 1e6, 3),
                "megabytes_per_s": round(per_s * size / 1e6, 1),
                "megabytes_per_s_of_a_core": round(1000 / cpu_ms * size / 1e6, 1),
                "count": count,
            }
    return {"callers": CALLERS, **found}


async def _closed_loop(url: str, request: bytes, seconds: float, expected: grpc.StatusCode) -> tuple[float, int]:
    """Send one request again and again from ``CALLERS`` callers, and return the calls a second and their count."""
    count, until_s = 0, float("inf")

    async def caller(call: Any) -> None:
        nonlocal count
        while time.perf_counter() < until_s:
            try:
                await call(request)
                code, text = grpc.StatusCode.OK, ""
            except grpc.aio.AioRpcError as error:
                code, text = error.code(), error.details()
            if code != expected:
                raise IcPortraitError(f"a call ended with {code.name}, expected {expected.name}: {text}")
            count += 1

    options = [("grpc.max_send_message_length", -1), ("grpc.use_local_subchannel_pool", 1)]
    channels = [grpc.aio.insecure_channel(url, options=options) for _ in range(CHANNELS)]
    calls = [channel.unary_unary(METHOD) for channel in channels]
    await asyncio.gather(*(channel.channel_ready() for channel in channels))
    began_s = time.perf_counter()
    until_s = began_s + seconds
    try:
        await asyncio.gather(*(caller(calls[index % CHANNELS]) for index in range(CALLERS)))
    finally:
        for channel in channels:
            await channel.close()
    return count / (time.perf_counter() - began_s), count


def cpu_s(pid: int) -> float:
    """Return the CPU time that a process has taken; proc_pid_stat(5) describes the file."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
