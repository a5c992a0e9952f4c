"""The loop's end of the control line, over real sockets and between real processes."""

from __future__ import annotations

import json
import os
import queue
import resource
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import icportrait.serving.control
from icportrait.errors import IcPortraitError, InvalidRequest, Unavailable, to_wire
from icportrait.serving.control import (
    LENGTH,
    MAX_ASKED_BYTES,
    VERSION,
    Asked,
    Cancel,
    ControlServer,
    LeaseAsked,
    Peer,
    Ping,
    Release,
    Seen,
    frame,
)
from tests.label_slots import BASE
from tests.private_client import Line
from tests.stage_front import until

HELLO = {"op": "hello", "version": VERSION}
DEMAND = {"phases": [[5, 2]], "priority": 1, "deadline_ms": None, "arrived_s": 1.5, "nbytes": 10}
LEASE = {"op": "lease", "key": "a", **DEMAND}
GATEWAY = """
import socket, sys
from icportrait.serving.control import VERSION, frame

line = socket.socket(socket.AF_UNIX)
line.connect(sys.argv[1])
line.sendall(frame({"op": "hello", "version": VERSION}) + frame({"op": "cancel", "key": "from afar"}))
print("ready", flush=True)
sys.stdin.read()
"""


class Loop:
    """A server in this process, which notes what it hears, lets everybody in and answers pings."""

    def __init__(self, path: Path, refusal: str = "") -> None:
        self.heard: queue.SimpleQueue[Asked] = queue.SimpleQueue()
        self.gone: queue.SimpleQueue[Peer] = queue.SimpleQueue()
        self.peers: list[Peer] = []
        self._refusal = refusal
        self._server = ControlServer(path, self._note, self.gone.put)

    def _note(self, peer: Peer, message: Asked) -> None:
        if peer not in self.peers:
            self.peers.append(peer)
        if isinstance(message, LeaseAsked):
            peer.send({"op": "leased", "key": message.key, "refusal": self._refusal})
        if isinstance(message, Ping):
            peer.send({"op": "pong", "id": message.id})
        if isinstance(message, Cancel) and message.key == "ours":
            raise RuntimeError("the loop's mistake")
        self.heard.put(message)

    def close(self) -> None:
        self._server.close()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "loop"


@contextmanager
def loop(path: Path, refusal: str = "") -> Iterator[Loop]:
    opened = Loop(path, refusal)
    yield opened
    opened.close()


@contextmanager
def line(path: Path, **options: Any) -> Iterator[Line]:
    opened = Line(str(path), **options)
    yield opened
    opened.close()


def ends(gateway: Line) -> None:
    """Wait for the line's end."""
    while gateway.said.get(timeout=10) is not None:
        pass


def test_either_side_says_its_version_first(path: Path) -> None:
    with loop(path) as server, line(path) as gateway:
        assert gateway.said.get(timeout=10) == HELLO
        assert gateway.ping(3) == {"op": "pong", "id": 3}
        assert server.heard.get(timeout=10) == Ping(id=3)


@pytest.mark.parametrize("error", [None, Unavailable("the queue is full; retry_after_ms: 40"), InvalidRequest("no")])
def test_a_lease_is_granted_or_refused_with_the_loops_own_code_and_text(
    path: Path, error: IcPortraitError | None
) -> None:
    with loop(path, to_wire(error) if error else "") as server, line(path) as gateway:
        refusal = gateway.lease(replace(BASE, key="a"), nbytes=7, replayed=True)
        assert type(refusal) is type(error) and str(refusal) == str(error)
        asked = server.heard.get(timeout=10)
        assert isinstance(asked, LeaseAsked) and asked.replayed and asked.demand.nbytes == 7
        assert (asked.demand.rows, asked.demand.steps) == (BASE.rows, BASE.num_inference_steps)


def test_all_that_a_gateway_says_arrives_in_order(path: Path) -> None:
    with loop(path) as server, line(path) as gateway:
        for message in (
            {"op": "cancel", "key": "a"},
            {"op": "seen", "key": "b"},
            {"op": "release", "key": "c"},
            {"op": "release", "key": "d", "stage_ms": {"decode": 2.5}},
        ):
            gateway.say(**message)
        assert [server.heard.get(timeout=10) for _ in range(4)] == [
            Cancel(key="a"),
            Seen(key="b"),
            Release(key="c"),
            Release(key="d", stage_ms={"decode": 2.5}),
        ]


def test_what_the_loop_says_arrives_in_order_and_tells_when_nobody_hears_it(path: Path) -> None:
    with loop(path) as server, line(path) as gateway:
        gateway.ping()
        events = gateway.events("a")
        for step in range(100):
            assert server.peers[0].send({"op": "step", "key": "a", "step": step, "total_steps": 100})
        assert [(events.get(timeout=10) or {})["step"] for _ in range(100)] == list(range(100))
        gateway.close()
        assert server.gone.get(timeout=10) is server.peers[0]
        assert not server.peers[0].send({"op": "step"})


# What should not come


@pytest.mark.parametrize(
    "data",
    [
        frame({**LEASE, "phases": [[5, -2]]}),
        frame({**LEASE, "phases": [[5, 0]]}),
        frame({**LEASE, "phases": [["5", 2]]}),
        frame({**LEASE, "phases": [[5, 2, 1]]}),
        frame({**LEASE, "phases": []}),
        frame({**LEASE, "phases": 4 * [[5, 2]]}),
        frame({**LEASE, "phases": 5}),
        frame({**LEASE, "priority": "x"}),
        frame({**LEASE, "arrived_s": 1e25}),
        LENGTH.pack(len(text := b'{"op":"cancel","key":NaN}')) + text,
        frame({**LEASE, "key": ""}),
        frame({**LEASE, "key": 65 * "k"}),
        frame({**LEASE, "more": 1}),
        frame({"op": "lease", "key": "a"}),
        frame({"op": "release", "key": "a", "stage_ms": {"decode": "x"}}),
        frame({"op": "release", "key": "a", "stage_ms": {"no stage": 1}}),
        frame({"op": "release", "key": "a", "stage_ms": {"decode": -1e300}}),
        frame({"op": "ping", "id": -1}),
        frame({"op": "ping", "id": None}),
        frame({"op": "unknown", "key": "a"}),
        frame({"key": "a"}),
        frame(HELLO),
        LENGTH.pack(4) + b"[1]]",
        LENGTH.pack(4) + b"\xff\xfe\xfd\xfc",
        LENGTH.pack(20_000) + 20_000 * b"[",
        LENGTH.pack(0),
        LENGTH.pack(MAX_ASKED_BYTES + 1),
    ],
)
def test_a_message_that_is_not_what_it_should_be_ends_its_line_which_is_told_and_no_other(
    path: Path, data: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    with loop(path) as server, line(path) as other, line(path) as forged:
        other.ping()
        forged.ping()
        forged.send(data)
        ends(forged)
        assert server.gone.get(timeout=10) is server.peers[1]
        other.ping()
        assert server.gone.empty()
        assert all(isinstance(server.heard.get(timeout=10), Ping) for _ in range(3)) and server.heard.empty()
    assert [record.levelname for record in caplog.records] == ["ERROR"] and "it is closed" in caplog.text


@pytest.mark.parametrize("first", [{"op": "hello", "version": VERSION + 1}, LEASE, {"op": "hello"}])
def test_a_line_that_does_not_begin_with_this_version_is_closed_unheard(path: Path, first: dict[str, Any]) -> None:
    with loop(path) as server, socket.socket(socket.AF_UNIX) as gateway:
        gateway.connect(str(path))
        gateway.sendall(frame(first) + frame(LEASE))
        data = b""
        with suppress(ConnectionResetError):  # it didn't read all that was sent
            while part := gateway.recv(1000):
                data += part
        assert data[: LENGTH.size] and json.loads(data[LENGTH.size :]) == HELLO
        server.gone.get(timeout=10)
        assert server.heard.empty()


def test_the_loops_own_mistake_is_logged_and_the_line_goes_on(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with loop(path), line(path) as gateway:
        gateway.say(op="cancel", key="ours")
        assert gateway.ping() == {"op": "pong", "id": 1}
    assert "the loop's mistake" in caplog.text


def test_a_line_that_is_not_read_keeps_nobody_waiting_and_is_closed_in_the_end(
    path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(icportrait.serving.control, "MAX_UNREAD_BYTES", 4 * 2**20)
    latent = {"op": "preview", "latent": "x" * 2**20}
    with loop(path) as server, line(path) as other, socket.socket(socket.AF_UNIX) as deaf:
        other.ping()
        deaf.connect(str(path))
        deaf.sendall(frame(HELLO) + frame({"op": "cancel", "key": "deaf"}))
        until(lambda: len(server.peers) == 2)
        sent = [server.peers[1].send(latent) for _ in range(9)]
        # What the kernel holds for the reader is no megabyte.
        assert sent[:3] == [True] * 3 and not sent[-1]
        assert server.gone.get(timeout=10) is server.peers[1]
        other.ping()
    assert "isn't read" in caplog.text


def test_a_line_that_is_read_takes_more_in_all_than_may_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(icportrait.serving.control, "MAX_UNREAD_BYTES", 2**20)
    ours, theirs = socket.socketpair()
    message = {"op": "preview", "latent": "x" * 2**18}
    size = len(frame(message))
    with ours, theirs.makefile("rb") as read:
        peer = Peer(ours)
        for _ in range(12):
            assert peer.send(message) and len(read.read(size)) == size
            until(lambda: peer._unread_bytes == 0)
        peer.close()
    theirs.close()


def test_a_process_without_descriptors_takes_lines_again_once_it_has_some(
    path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    with loop(path) as server, socket.socket(socket.AF_UNIX) as waiting:
        free = os.dup(0)
        os.close(free)
        resource.setrlimit(resource.RLIMIT_NOFILE, (free, limits[1]))
        try:
            waiting.connect(str(path))
            waiting.sendall(frame(HELLO) + frame({"op": "seen", "key": "a"}))
            until(lambda: "can't be connected to now" in caplog.text)
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, limits)
        assert server.heard.get(timeout=10) == Seen(key="a")
        with line(path) as gateway:
            gateway.ping()
    assert caplog.text.count("can't be connected to now") == 1


# Several, and ends


def test_a_gateway_whose_process_is_killed_is_reported_and_the_others_stay(path: Path) -> None:
    with (
        loop(path) as server,
        line(path) as other,
        subprocess.Popen(
            [sys.executable, "-c", GATEWAY, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        ) as gateway,
    ):
        other.ping()
        server.heard.get(timeout=10)
        assert server.heard.get(timeout=10) == Cancel(key="from afar")
        assert server.gone.empty()
        os.kill(gateway.pid, signal.SIGKILL)
        assert server.gone.get(timeout=10) is server.peers[1]
        other.ping()
        assert server.gone.empty()


def test_a_loop_that_is_started_where_one_was_killed_takes_its_place(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as killed:
        killed.bind(str(path))
    assert path.is_socket()
    for _ in range(3):
        with loop(path) as server, line(path) as gateway:
            gateway.ping()
        assert isinstance(server.gone.get(timeout=10), Peer) and not path.exists()


def test_a_loop_that_closes_ends_its_lines_and_threads(path: Path) -> None:
    before = set(threading.enumerate())
    server = Loop(path)
    with line(path) as gateway:
        gateway.ping()
        server.close()
        ends(gateway)
    until(lambda: not {thread for thread in threading.enumerate() if "control" in thread.name} - before)
