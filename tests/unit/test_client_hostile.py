"""Faults of the client's surroundings: garbage of servers, interrupts, threads that close it, and odd pictures."""

from __future__ import annotations

import asyncio
import gc
import io
import json
import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from icportrait_client import (
    AsyncPortraitClient,
    InvalidRequest,
    PortraitClient,
    PortraitError,
    RequestCancelled,
    ServerError,
    ServerUnavailable,
    wire,
)
from icportrait_client.client import _Loop
from icportrait_client.errors import from_status
from icportrait_client.messages import read_answer
from icportrait_client.pictures import LONGER_SIDE_PX, MAX_FILE_BYTES, picture_bytes
from icportrait_client.servers import Server
from icportrait_client.testing import FakePortraitServer
from PIL import Image

from tests.unit.test_client import PICTURES
from tests.unit.test_client_calls import WAIT_S, until


@pytest.fixture
def fake() -> Iterator[FakePortraitServer]:
    with FakePortraitServer() as fake:
        yield fake


# Streams that end in odd ways.


def test_ctrl_c_within_a_stream_is_a_keyboard_interrupt(fake: FakePortraitServer) -> None:
    fake.delay_s = WAIT_S
    main, begun = threading.main_thread().ident, threading.Event()
    assert main == threading.get_ident()

    async def block() -> None:
        begun.set()
        time.sleep(0.2)

    def interrupt() -> None:
        until(lambda: len(fake.calls) == 1)
        # The client's thread is busy, so that it learns of the interrupt and of the closing at once.
        client._loop.submit(block())
        assert begun.wait(WAIT_S)
        signal.pthread_kill(main, signal.SIGINT)

    with PortraitClient(fake.address) as client, ThreadPoolExecutor(1) as pool:
        events = client.stream(**PICTURES)
        with pytest.raises(KeyboardInterrupt):
            pool.submit(interrupt)
            next(events)
        until(lambda: fake.cancelled == 1)
        fake.delay_s = 0
        assert client.generate(**PICTURES, seed=7).metadata.seed == 7


def test_a_stream_that_is_collected_in_the_clients_own_thread_blocks_nothing(fake: FakePortraitServer) -> None:
    """Leave a stream in a cycle of references, and collect it in the thread that would have to close it."""
    fake.step_s = 0.05

    class Holder:
        stream: Any
        itself: Holder

    async def collect() -> None:
        gc.collect()

    with PortraitClient(fake.address) as client:
        holder = Holder()
        holder.stream, holder.itself = client.stream(**PICTURES), holder
        next(holder.stream)
        gc.disable()
        try:
            del holder
            client._loop.submit(collect()).result(WAIT_S)
        finally:
            gc.enable()
        until(lambda: fake.cancelled == 1)


# Closing while others are at work.


def test_what_is_submitted_to_a_loop_that_ends_is_refused() -> None:
    loop, begun, leaving, go = _Loop(), threading.Event(), threading.Event(), threading.Event()

    async def slow_to_leave() -> None:
        try:
            begun.set()
            await asyncio.sleep(WAIT_S)
        finally:
            leaving.set()
            await asyncio.to_thread(go.wait)

    loop.start()
    loop.submit(slow_to_leave())
    assert begun.wait(WAIT_S)
    with ThreadPoolExecutor(1) as pool:
        stopping = pool.submit(loop.stop)
        try:
            assert leaving.wait(WAIT_S)
            with pytest.raises(RequestCancelled, match=r"^the client was closed$"):
                loop.submit(asyncio.sleep(WAIT_S))
        finally:
            go.set()
        stopping.result()
    with pytest.raises(PortraitError, match=r"^the client is closed"):
        loop.start()


class SlowToClose:
    """A transport whose first close waits for the second, and whose second waits until it is cancelled."""

    def __init__(self) -> None:
        self.closing = 0

    async def unary(self, address: str, method: str, message: bytes, timeout_s: float) -> bytes:
        raise ServerUnavailable("nobody")

    def stream(self, address: str, method: str, message: bytes, timeout_s: float) -> Any:
        raise NotImplementedError

    async def close(self) -> None:
        self.closing += 1
        if self.closing == 2:
            await asyncio.sleep(WAIT_S)
        while self.closing < 2:
            await asyncio.sleep(0.001)


def test_two_threads_may_close_a_client() -> None:
    client = PortraitClient("a:1", transport=SlowToClose(), attempts=1)
    assert not client.is_ready()
    with ThreadPoolExecutor(2) as pool:
        for closing in [pool.submit(client.close) for _ in range(2)]:
            closing.result(WAIT_S)


@pytest.mark.parametrize("option", [{"sticky": True}, {"headers": {"a": "b"}}, {"api_key": "k"}, {"keepalive_s": 2.0}])
def test_what_a_transport_would_not_use_is_refused_beside_it(option: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequest, match=f"^{next(iter(option))}: is for gRPC; leave it out"):
        PortraitClient("a:1", transport=SlowToClose(), **option)


def test_a_request_that_pauses_is_not_sent_after_the_client_was_closed(fake: FakePortraitServer) -> None:
    async def main() -> None:
        fake.fail("UNAVAILABLE", "UNAVAILABLE: the queue is full; retry_after_ms: 50")
        client = AsyncPortraitClient(fake.address)
        task = asyncio.create_task(client.generate(**PICTURES))
        while not client.counts.retries:
            await asyncio.sleep(0.001)
        await client.close()
        with pytest.raises(RequestCancelled, match=r"^the client was closed$"):
            await task

    asyncio.run(main())
    assert len(fake.calls) == 1


def test_the_test_server_answers_each_of_many_requests_at_once(fake: FakePortraitServer) -> None:
    fake.delay_s = 0.02
    with PortraitClient(fake.address) as client:
        handles = [client.submit(**PICTURES, num_inference_steps=1) for _ in range(1500)]
        assert {handle.result().metadata.steps for handle in handles} == {1}


# Numbers and names beyond reason.


@pytest.mark.parametrize(
    "report",
    [
        '{"queue_ms": 1' + "0" * 400 + "}",
        '{"steps": 1' + "0" * 400 + "}",
        '{"stage_ms": {"denoise": 1' + "0" * 400 + "}}",
        "[" * 100_000,
    ],
    ids=["time", "steps", "stage", "depth"],
)
def test_metadata_beyond_reason_is_an_error_of_the_server(report: str) -> None:
    tensors = [
        wire.Tensor("image", "BYTES", (1,), wire.bytes_elements([b"picture"])),
        wire.Tensor("metadata", "BYTES", (1,), wire.bytes_elements([report.encode()])),
    ]
    with pytest.raises(ServerError, match=r"^a:1: the answer"):
        Server("a:1").said(read_answer(wire.infer_response("m", tensors), "a:1").metadata, 0.0)


@pytest.mark.parametrize("digits", [20, 400, 5000])
def test_a_hint_beyond_reason_is_no_hint(digits: int) -> None:
    text = f"UNAVAILABLE: the queue is full; retry_after_ms: {'9' * digits}"
    error = from_status("UNAVAILABLE", text, "a:1", 1.0)
    assert isinstance(error, ServerUnavailable)
    assert error.has_answered
    assert error.retry_after_ms is None


@pytest.mark.parametrize("options", [{"timeout_s": 1e10}, {"timeout_s": 1e300}, {"keepalive_s": 1e9}], ids=json.dumps)
def test_a_time_without_end_is_long_and_not_over(fake: FakePortraitServer, options: Any) -> None:
    with PortraitClient(fake.address, **options) as client:
        assert client.generate(**PICTURES, seed=7).metadata.seed == 7
        events = list(client.stream(**PICTURES, num_inference_steps=2))
        assert len(events) == 3


def test_thousands_of_attempts_have_a_longest_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("icportrait_client.attempts.MOST_PAUSE_S", 0.0)

    class Full(SlowToClose):
        async def unary(self, address: str, method: str, message: bytes, timeout_s: float) -> bytes:
            raise ServerUnavailable("full", retry_after_ms=0, has_answered=True)

        async def close(self) -> None:
            pass

    with PortraitClient("a:1", transport=Full(), attempts=1100) as client:
        with pytest.raises(ServerUnavailable, match=r"^full$"):
            client.generate(**PICTURES)
        assert client.counts.attempts == 1100


@pytest.mark.parametrize("host", ["a..b", "a" * 70])
def test_a_name_that_no_name_service_takes_is_not_known(host: str) -> None:
    with (
        PortraitClient(f"dns:///{host}:8001", attempts=1) as client,
        pytest.raises(ServerUnavailable, match=rf"^{host}:8001: no such name"),
    ):
        client.generate(**PICTURES)


@pytest.mark.parametrize("servers", [None, b"localhost:8001", [None]])
def test_servers_of_another_type_are_named(servers: Any) -> None:
    with pytest.raises(InvalidRequest, match=r"^servers: "):
        PortraitClient(servers)


# Pictures.


def test_pixels_that_make_too_large_a_file_without_loss_go_with_little() -> None:
    """Send noise of 7.3 megapixels; a photo of 12 is as large."""
    noise = np.random.default_rng(0).integers(0, 256, (2700, 2700, 3), dtype=np.uint8)
    sent = picture_bytes(noise, "profile")
    assert len(sent) <= MAX_FILE_BYTES
    with Image.open(io.BytesIO(sent)) as opened:
        assert (opened.format, opened.size) == ("JPEG", (2700, 2700))
    with pytest.raises(InvalidRequest, match=r"^profile: 2\d,\d{3},\d{3} bytes, expected at most 20,000,000"):
        picture_bytes(noise, "profile", shrink=False)


def test_a_strip_is_no_longer_than_a_jpeg_may_be() -> None:
    with Image.open(io.BytesIO(picture_bytes(np.zeros((120_000, 360), np.uint8), "profile"))) as opened:
        assert opened.height == LONGER_SIDE_PX


def test_a_path_may_be_of_bytes(tmp_path: Path) -> None:
    class BytesPath:
        def __fspath__(self) -> bytes:
            return bytes(tmp_path / "ä.jpg")

    (tmp_path / "ä.jpg").write_bytes(b"\xff\xd8\xff")
    assert picture_bytes(BytesPath(), "profile") == b"\xff\xd8\xff"  # type: ignore[arg-type]
