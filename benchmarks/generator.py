"""The generator's own limit: the rate at which it sends in time, to a server that does nothing and answers later.

The server is a process of its own, so that CPU time tells the two apart. On a machine with few cores both share them,
as a generator and a real server on one machine do.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import multiprocessing
import resource
import sys
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import grpc
from icportrait_client.errors import InvalidRequest, PortraitError
from tritonclient.grpc import service_pb2, service_pb2_grpc

from benchmarks.load import run_load
from benchmarks.report import conditions_here, summarise
from benchmarks.settings import GeneratorSettings, LoadSettings

METADATA = b'{"versions": {"engine": "simulated-nothing"}}'
_START_TIMEOUT_S = 60.0


class Nothing(service_pb2_grpc.GRPCInferenceServiceServicer):  # type: ignore[misc]
    """Answers every request with the same bytes after the same time."""

    def __init__(self, latency_ms: float, image_bytes: int) -> None:
        """Take what an answer is like."""
        self._latency_s = latency_ms / 1000
        self._response = service_pb2.ModelInferResponse(model_name="ic_portrait")
        for name, data in (("image", bytes(image_bytes)), ("metadata", METADATA)):
            self._response.outputs.add(name=name, datatype="BYTES", shape=[1])
            self._response.raw_output_contents.append(len(data).to_bytes(4, "little") + data)

    async def ServerLive(self, request: Any, context: Any) -> Any:  # noqa: N802
        """Answer that the server is live."""
        return service_pb2.ServerLiveResponse(live=True)

    async def ModelReady(self, request: Any, context: Any) -> Any:  # noqa: N802
        """Answer that the model is ready."""
        return service_pb2.ModelReadyResponse(ready=True)

    async def ModelInfer(self, request: Any, context: Any) -> Any:  # noqa: N802
        """Answer with nothing, later."""
        await asyncio.sleep(self._latency_s)
        return self._response


def serve(port: Connection, latency_ms: float, image_bytes: int) -> None:
    """Serve until the other end of ``port`` closes; send the port first."""

    async def run() -> None:
        server = grpc.aio.server()
        service_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(Nothing(latency_ms, image_bytes), server)
        port.send(server.add_insecure_port("127.0.0.1:0"))
        await server.start()
        await asyncio.to_thread(_wait_for_end, port)
        await server.stop(None)

    asyncio.run(run())


def _wait_for_end(port: Connection) -> None:
    with contextlib.suppress(EOFError):
        port.recv()


def measure(settings: GeneratorSettings, say: Callable[[str], None] = lambda _: None) -> dict[str, Any]:
    """Send to the server that does nothing, one rate after the other."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    server = context.Process(target=serve, args=(theirs, settings.latency_ms, settings.image_bytes), daemon=True)
    server.start()
    theirs.close()
    try:
        if not ours.poll(_START_TIMEOUT_S):
            raise InvalidRequest("the server that does nothing didn't start")
        url = f"127.0.0.1:{ours.recv()}"
        rows = []
        for rate_per_s in settings.rates_per_s:
            rows.append(_row(url, rate_per_s, settings))
            say(row_line(rows[-1]))
    finally:
        ours.close()
        server.join()
    return {"rates": rows, "conditions": conditions_here(settings)}


def _row(url: str, rate_per_s: float, settings: GeneratorSettings) -> dict[str, Any]:
    load = LoadSettings(
        url=url, rate_per_s=rate_per_s, duration_s=settings.duration_s, warm_up_s=1.0, seed=settings.seed
    )
    before_s = _cpu_s()
    run = run_load(load)
    took_s = _cpu_s() - before_s
    if run.interrupted_s is not None:
        raise KeyboardInterrupt
    report = summarise(run)
    return {
        "rate_per_s": rate_per_s,
        "requests": report["requests"]["sent"],
        "answered": report["outcomes"].get("OK", {"count": 0})["count"],
        "cpu_ms_a_request": round(1000 * took_s / len(run.outcomes), 3),
        "late_ms": {name: report["lateness_ms"][name] for name in ("p50", "p99")},
        "fell_behind": report["fell_behind"],
    }


def _cpu_s() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def row_line(row: dict[str, Any]) -> str:
    """Write one rate's figures as a line."""
    late = row["late_ms"]
    return (
        f"{row['rate_per_s']:>7g}/s  {row['answered']} of {row['requests']} answered,"
        f" {row['cpu_ms_a_request']:.2f} ms of CPU each, late by {late['p50']:.2f} ms median, {late['p99']:.2f} ms p99"
        + (": INVALID" if row["fell_behind"] else "")
    )


def main(argv: list[str] | None = None) -> int:
    """Measure the generator.

    Returns:
        0, 1 after an error. A wrong command line ends the process with 2.
    """
    parser = argparse.ArgumentParser(prog="python -m benchmarks.generator", description=__doc__)
    default = GeneratorSettings()
    parser.add_argument("--rates", dest="rates_per_s", nargs="+", type=float, default=default.rates_per_s, metavar="N")
    for flag, name, kind, meaning in (
        ("--duration", "duration_s", float, "seconds of each rate"),
        ("--latency-ms", "latency_ms", float, "milliseconds that the server takes"),
        ("--image-bytes", "image_bytes", int, "size of an answer's picture"),
    ):
        help_text = f"{meaning} (default: {getattr(default, name):g})"
        parser.add_argument(flag, dest=name, type=kind, default=getattr(default, name), metavar="N", help=help_text)
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the figures as JSON")
    args = vars(parser.parse_args(argv))
    out = args.pop("out")
    try:
        settings = GeneratorSettings(**{**args, "rates_per_s": tuple(args["rates_per_s"])})
    except InvalidRequest as error:
        parser.error(str(error))
    try:
        report = measure(settings, lambda line: print(line, flush=True))
    except PortraitError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    if out is not None:
        out.write_text(json.dumps(report, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
