"""The client's own time: a portrait by ``PortraitClient.generate`` beside the same call by a bare gRPC stub.

The server is the real one, its engines take no time, and it has seen the pictures before: what is left of a request is
the way there and back. Each request is made both ways, one after the other, and which is first changes.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc
from icportrait_client import PortraitClient, PortraitOptions
from icportrait_client.contract import load_contract
from icportrait_client.errors import InvalidRequest

from benchmarks.calls import METHOD, encoded, named
from benchmarks.planning.measured import simulated_server
from benchmarks.planning.question import PROFILES, find_profile
from benchmarks.report import conditions_here
from benchmarks.settings import HEADS, ClientOverheadSettings
from benchmarks.spread import interval_text, spread

PROFILE = "cpu-avx2-demo-128-fp32"
"""A profile of the demo's preset; none of its times is used."""
NO_TIME = 1e-6
WARM_UP = 20


def measure(url: str, settings: ClientOverheadSettings) -> dict[str, Any]:
    """Return the milliseconds of a request both ways, and the difference of each pair.

    Args:
        url: address of the server's gRPC.
        settings: of the requests.
    """
    profile, reference = ((HEADS / f"{name}.png").read_bytes() for name in ("profile", "reference"))
    options: PortraitOptions = {"num_inference_steps": 1, "guidance_scale": 1.0, "seed": settings.seed}
    message = named(load_contract().model) + encoded({"profile": profile, "reference": reference, **options})
    times: dict[str, list[float]] = {"stub": [], "client": []}
    with grpc.insecure_channel(url) as channel, PortraitClient(url) as client:
        call = channel.unary_unary(METHOD)
        ways: dict[str, Callable[[], object]] = {
            "stub": lambda: call(message),
            "client": lambda: client.generate(profile=profile, reference=reference, **options),
        }
        for number in range(WARM_UP + settings.requests):
            for name in ways if number % 2 else reversed(ways):
                began_s = time.perf_counter()
                ways[name]()
                times[name].append(1000 * (time.perf_counter() - began_s))
    stub, ours = (each[WARM_UP:] for each in times.values())
    more = [with_client - bare for bare, with_client in zip(stub, ours, strict=True)]
    return {
        "simulated": True,
        "stub_ms": spread(stub),
        "client_ms": spread(ours),
        "more_ms": spread(more),
        "conditions": conditions_here(settings),
    }


def main(argv: list[str] | None = None) -> int:
    """Measure the client.

    Returns:
        0. A wrong command line ends the process with 2.
    """
    parser = argparse.ArgumentParser(prog="python -m benchmarks.client_overhead", description=__doc__)
    parser.add_argument("--requests", type=int, default=ClientOverheadSettings.requests, metavar="N")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the figures as JSON")
    args = parser.parse_args(argv)
    try:
        settings = ClientOverheadSettings(args.requests)
    except InvalidRequest as error:
        parser.error(str(error))
    with simulated_server(find_profile(PROFILE, PROFILES).scaled(NO_TIME)) as server:
        report = measure(server.grpc_url, settings)
    for name, label in (("stub_ms", "bare stub"), ("client_ms", "generate"), ("more_ms", "difference")):
        print(f"{label:<10} {interval_text(report[name], digits=2)} ms in the median")
    if args.out is not None:
        args.out.write_text(json.dumps(report, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
