"""A gRPC door in this process, before a service that makes no portraits, and a caller that speaks bare HTTP/2."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import h2.config
import h2.connection
import h2.events
import h2.settings
from h2.settings import SettingCodes

from icportrait.contract import Array
from icportrait.errors import Cancelled, IcPortraitError, InvalidRequest, Unavailable
from icportrait.gateway.access import Access
from icportrait.gateway.api import Caller, Event, OnEvent, Portraits, ServerLimits, Statistics, Unread
from icportrait.gateway.grpc_door import GrpcDoor, serve_grpc
from icportrait.gateway.kserve import KserveModels
from icportrait.gateway.records import Records
from icportrait.policy import ServingPolicy
from icportrait.request import parse_request

HOST = "127.0.0.1"
PICTURES = {"profile": b"a profile", "reference": b"a reference"}
DEFAULTS = {"num_inference_steps": 3, "guidance_scale": 1.0}
ERRORS = [InvalidRequest("one"), Unavailable("two"), Cancelled("three"), IcPortraitError("four")]
"""Errors that requests with seeds from 1000 on end with."""
BUG, HELD, IMPATIENT = 2000, 3000, 4000
"""Seeds of a request that fails unforeseen, of one that isn't answered until ``release``, and of one that ends while
its first event is on its way."""


class FakeService:
    """Answers with ``image_bytes`` of picture, after the events that were asked for."""

    def __init__(self) -> None:
        self.statistics: dict[str, Statistics] = {"ic_portrait": Statistics(), "ic_portrait_stream": Statistics()}
        self.is_ready = True
        self.refuses: IcPortraitError | None = None
        self.image_bytes = 100
        self.seen: list[tuple[Mapping[str, Array], Caller]] = []
        self.keeps_inputs = True
        self.profiles: list[weakref.ref[Array]] = []
        self.begun = self.cancelled = self.impatient = 0
        self.changed = threading.Condition()
        self._released: set[asyncio.Event] = set()

    def refusal(self) -> IcPortraitError | None:
        return self.refuses

    async def generate(self, inputs: Mapping[str, Array], caller: Caller, on_event: OnEvent | None = None) -> Portraits:
        request, _, _ = parse_request(inputs, DEFAULTS)
        if self.keeps_inputs:
            self.seen.append((inputs, caller))
        self.profiles.append(weakref.ref(inputs["profile"]))
        del inputs
        self._count(begun=1)
        try:
            return await self._run(request, on_event)
        except asyncio.CancelledError:
            self._count(cancelled=1)
            raise

    async def _run(self, request: Any, on_event: OnEvent | None) -> Portraits:
        if request.seed == HELD:
            held = asyncio.Event()
            self._released.add(held)
            await held.wait()
        if request.seed == BUG:
            raise RuntimeError("unforeseen")
        if 1000 <= request.seed < 1000 + len(ERRORS):
            raise ERRORS[request.seed - 1000]
        steps = request.num_inference_steps
        if request.seed == IMPATIENT and on_event:
            telling = asyncio.ensure_future(on_event(Event(1, steps, (bytes(self.image_bytes),))))
            await asyncio.wait([telling], timeout=0.1)
            telling.cancel()
            await asyncio.wait([telling])
            self._count(impatient=telling.cancelled())
            raise Unavailable("too late")
        for step in range(1, steps):
            if on_event:
                is_preview = request.preview_every and step % request.preview_every == 0
                await on_event(Event(step, steps, (bytes(self.image_bytes),) if is_preview else ()))
        counted = self.statistics["ic_portrait_stream" if on_event else "ic_portrait"]
        counted.succeeded += 1
        counted.succeeded_ns += 2_000_000
        counted.queued_ns += 500_000
        metadata = json.dumps(
            {
                "seed": request.seed,
                "steps": steps,
                "scheduler": request.scheduler,
                "guidance_scale": request.guidance_scale,
                "stage_ms": {},
                "versions": {"preset": "demo-128", "precision": "fp32", "model": "none", "engine": "none"},
            }
        ).encode()
        return Portraits((bytes(self.image_bytes),) * request.num_portraits, metadata, steps)

    def release(self) -> None:
        """Let all that is held go on; called on the door's thread."""
        for held in self._released:
            held.set()

    def until(self, **counts: int) -> None:
        """Wait until so many requests have begun, or were cancelled."""
        with self.changed:
            assert self.changed.wait_for(
                lambda: all(getattr(self, name) >= count for name, count in counts.items()), timeout=30
            ), f"{self.begun} begun, {self.cancelled} cancelled"

    def _count(self, begun: int = 0, cancelled: int = 0, impatient: int = 0) -> None:
        with self.changed:
            self.begun += begun
            self.cancelled += cancelled
            self.impatient += impatient
            self.changed.notify_all()


@dataclass(frozen=True)
class DoorSettings:
    host: str = HOST
    grpc_port: int = 0
    limits: ServerLimits = field(default_factory=ServerLimits)
    tls_certificate: Path | None = None
    tls_key: Path | None = None
    tls_client_ca: Path | None = None


@dataclass
class Running:
    """An open door and the loop that it runs on."""

    service: FakeService
    door: GrpcDoor
    unread: Unread
    records: Records
    loop: asyncio.AbstractEventLoop
    log: list[str]
    """Messages to the loop's exception handler."""

    @property
    def url(self) -> str:
        return f"{HOST}:{self.door.port}"

    def call(self, function: Any, *args: Any) -> Any:
        """Call a function, or run a coroutine, on the door's thread."""

        async def run() -> Any:
            result = function(*args)
            return await result if asyncio.iscoroutine(result) else result

        return asyncio.run_coroutine_threadsafe(run(), self.loop).result(30)


@contextmanager
def open_door(access: Access | None = None, settings: DoorSettings | None = None) -> Iterator[Running]:
    """Open a door on a thread of its own. At its end nothing of it may be left."""
    settings = settings or DoorSettings()
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    service, unread, log = FakeService(), Unread(settings.limits), list[str]()
    loop.set_exception_handler(lambda _, context: log.append(str(context)))
    models = KserveModels(ServingPolicy())
    try:
        records = Records()
        opened = serve_grpc(service, settings, access or Access(), models, unread, records)
        door = asyncio.run_coroutine_threadsafe(opened, loop).result(30)
        running = Running(service, door, unread, records, loop, log)
        try:
            yield running
        finally:
            running.call(door.close, 0.0)
        assert running.call(lambda: (len(door.calls.calls), door.calls.incoming_bytes, unread.nbytes)) == (0, 0, 0)
        assert not log
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


class BareCaller:
    """A connection that does what no client library does."""

    def __init__(self, url: str, window_bytes: int | None = None) -> None:
        host, _, port = url.rpartition(":")
        self.socket = socket.create_connection((host, int(port)), timeout=30)
        self.h2 = h2.connection.H2Connection(h2.config.H2Configuration(header_encoding="utf-8"))
        if window_bytes is not None:
            sizes = {SettingCodes.INITIAL_WINDOW_SIZE: window_bytes}
            self.h2.local_settings = h2.settings.Settings(client=True, initial_values=sizes)
        self.h2.initiate_connection()
        self.events: list[Any] = []
        self.flush()

    def __enter__(self) -> BareCaller:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.socket.close()

    def begin(self, method: str, *more: tuple[str, str]) -> int:
        """Send a call's headers, and return its stream."""
        stream = self.h2.get_next_available_stream_id()
        headers = [
            (":method", "POST"),
            (":scheme", "http"),
            (":path", f"/inference.GRPCInferenceService/{method}"),
            (":authority", "test"),
            ("te", "trailers"),
            ("content-type", "application/grpc"),
            *more,
        ]
        self.h2.send_headers(stream, headers)
        self.flush()
        return stream

    def send(self, stream: int, data: bytes, end: bool = False) -> None:
        while len(data) > (room := min(self.h2.local_flow_control_window(stream), self.h2.max_outbound_frame_size)):
            if room:
                self.h2.send_data(stream, data[:room])
                data = data[room:]
                self.flush()
            else:
                self.receive()
        self.h2.send_data(stream, data, end_stream=end)
        self.flush()

    def flush(self) -> None:
        self.socket.sendall(self.h2.data_to_send())

    def receive(self) -> list[Any]:
        """Receive the next events without an acknowledgement."""
        data = self.socket.recv(65536)
        if not data:
            raise ConnectionError("closed by the server")
        events = self.h2.receive_data(data)
        self.events += events
        self.flush()
        return events

    def status(self, stream: int) -> tuple[int, str]:
        """Wait for a call's status and message."""
        while True:
            for event in self.events:
                if isinstance(event, h2.events.TrailersReceived | h2.events.ResponseReceived):
                    headers = dict(event.headers)
                    if event.stream_id == stream and "grpc-status" in headers:
                        return int(headers["grpc-status"]), headers.get("grpc-message", "")
            self.receive()


def message(data: bytes) -> bytes:
    """Put the prefix of a gRPC message before ``data``."""
    return b"\0" + len(data).to_bytes(4, "big") + data
