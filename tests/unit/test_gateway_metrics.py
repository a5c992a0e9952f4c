"""The metrics' door, and what it says."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from icportrait.gateway import metrics
from icportrait.gateway.metrics import MetricsDoor, by_device, to_text, triton_text


def test_samples_are_written_as_prometheus_reads_them() -> None:
    samples = [
        ("requests_total", "counter", "Requests", {"model": "a", "outcome": "failed"}, 2),
        ("requests_total", "counter", "Requests", {"model": "b", "outcome": "failed"}, 3),
        ("ready", "gauge", "Whether", {}, True),
    ]
    assert to_text(samples).splitlines() == [
        "# HELP icportrait_gateway_requests_total Requests",
        "# TYPE icportrait_gateway_requests_total counter",
        'icportrait_gateway_requests_total{model="a",outcome="failed"} 2',
        'icportrait_gateway_requests_total{model="b",outcome="failed"} 3',
        "# HELP icportrait_gateway_ready Whether",
        "# TYPE icportrait_gateway_ready gauge",
        "icportrait_gateway_ready 1",
    ]


def test_samples_of_several_tritons_have_their_device_and_stand_together() -> None:
    text = '# HELP a An a\n# TYPE a counter\na {}\n# HELP b A b\n# TYPE b gauge\nb{{model="m {{",version="1"}} {}\n'
    assert by_device({"0": text.format(1, 2), "GPU-1": text.format(3, 4)}).splitlines() == [
        "# HELP a An a",
        "# TYPE a counter",
        'a{device="0"} 1',
        'a{device="GPU-1"} 3',
        "# HELP b A b",
        "# TYPE b gauge",
        'b{device="0",model="m {",version="1"} 2',
        'b{device="GPU-1",model="m {",version="1"} 4',
    ]
    assert by_device({None: "as it is"}) == "as it is" and by_device({}) == ""


def ask(*requests: bytes, text: Callable[[], Awaitable[str]] | None = None) -> list[bytes]:
    """Ask a door, each time over a connection of its own, and return the answers."""

    async def main() -> list[bytes]:
        async def body() -> str:
            return "all is well\n"

        door = MetricsDoor(text or body)
        await door.start("127.0.0.1", 0)
        assert door._server
        port = door._server.sockets[0].getsockname()[1]

        async def call(request: bytes) -> bytes:
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(request)
            answer = await reader.read()
            writer.close()
            await writer.wait_closed()
            return answer

        answers = [await call(request) for request in requests]
        await door.close()
        return answers

    return asyncio.run(main())


def test_metrics_are_had_by_get_alone() -> None:
    end = b" HTTP/1.1\r\nHost: a\r\n\r\n"
    found, other, posted = ask(b"GET /metrics" + end, b"GET /" + end, b"POST /metrics" + end)
    assert found.startswith(b"HTTP/1.1 200 OK\r\n") and found.endswith(b"\r\n\r\nall is well\n")
    assert b"Content-Length: 12\r\n" in found
    assert other.startswith(b"HTTP/1.1 404 ") and posted.startswith(b"HTTP/1.1 404 ")


@pytest.mark.parametrize("request_", [b"\r\n\r\n", b"x" * 100_000, b"GET"], ids=["empty", "long", "cut off"])
def test_what_is_no_request_ends_its_connection_alone(request_: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics, "HEADER_TIMEOUT_S", 0.05)
    answers = ask(request_, b"GET /metrics HTTP/1.1\r\n\r\n")
    assert answers[0] == b"" and answers[1].startswith(b"HTTP/1.1 200 OK")


def test_connections_that_ask_for_nothing_keep_nobody_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics, "HEADER_TIMEOUT_S", 1000)
    monkeypatch.setattr(metrics, "CONNECTIONS", 2)

    async def main() -> bytes:
        async def text() -> str:
            return "all is well\n"

        door = MetricsDoor(text)
        await door.start("127.0.0.1", 0)
        assert door._server
        address = door._server.sockets[0].getsockname()[:2]
        idle = [await asyncio.open_connection(*address) for _ in range(2)]
        while len(door._open) < 2:
            await asyncio.sleep(0)
        reader, writer = await asyncio.open_connection(*address)
        writer.write(b"GET /metrics HTTP/1.1\r\n\r\n")
        answer = await reader.read()
        with contextlib.suppress(ConnectionResetError):
            assert await idle[0][0].read() == b"", "the longest idle one has made room"
        for _, each in (*idle, (reader, writer)):
            each.close()
        await door.close()
        return answer

    assert asyncio.run(main()).endswith(b"all is well\n")


def test_tritons_own_are_passed_on_and_missed_where_it_does_not_answer(tmp_path: Path) -> None:
    async def main() -> tuple[str, str]:
        is_over = asyncio.Event()

        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            assert await reader.readuntil(b"\r\n\r\n") == b"GET /metrics HTTP/1.0\r\n\r\n"
            writer.write(b"HTTP/1.0 200 OK\r\nContent-Type: text/plain\r\n\r\nnv_a 1\n")
            writer.close()
            await writer.wait_closed()
            is_over.set()

        async with await asyncio.start_unix_server(serve, tmp_path / "m"):
            found = await triton_text(tmp_path / "m")
            await is_over.wait()
        return found, await triton_text(tmp_path / "none")

    assert asyncio.run(main()) == ("nv_a 1\n", "")
