"""The line between fronts and the denoising loop, over real sockets and between real processes."""

from __future__ import annotations

import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Client, Connection, Listener
from pathlib import Path
from typing import Any

import pytest

import icportrait.control
from icportrait.control import ControlServer, LoopLine, Message, Peer, address
from icportrait.errors import IcPortraitError, InvalidRequest, Unavailable, to_wire
from tests.stage_front import until

DEMAND = {"rows": 2, "steps": 5, "priority": 1, "deadline_ms": None, "arrived_s": 1.5, "nbytes": 10}
LOOP = """
import pathlib, sys
from icportrait.control import ControlServer

def answer(peer, message):
    if message["op"] == "lease" and not message["key"].startswith("mute"):
        peer.send({"op": "leased", "key": message["key"], "refusal": ""})

server = ControlServer(pathlib.Path(sys.argv[1]), answer, lambda peer: None)
print("ready", flush=True)
sys.stdin.read()
"""
FRONT = """
import pathlib, sys
from icportrait.control import LoopLine

line = LoopLine(pathlib.Path(sys.argv[1]), lambda *step: None, lambda: None)
line.lease("from afar", {"rows": 1}, lambda refusal: print("leased", flush=True))
sys.stdin.read()
"""


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    return tmp_path / "repository"


@contextmanager
def process(code: str, directory: Path) -> Iterator[subprocess.Popen[str]]:
    """Another Python, once it has said that it is ready; it ends at its input's end."""
    with subprocess.Popen(
        [sys.executable, "-c", code, str(directory)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as started:
        assert started.stdout and started.stdout.readline()
        try:
            yield started
        finally:
            started.kill()


class Loop:
    """A server in this process, which notes what it hears and lets everybody in."""

    def __init__(self, repository: Path, refusal: str = "") -> None:
        self.heard: queue.SimpleQueue[Message] = queue.SimpleQueue()
        self.gone: queue.SimpleQueue[Peer] = queue.SimpleQueue()
        self.peers: list[Peer] = []
        self._refusal = refusal
        self._server = ControlServer(repository / "denoise" / "1", self._note, self.gone.put)

    def _note(self, peer: Peer, message: Message) -> None:
        self.peers.append(peer)
        self.heard.put(message)
        if message["op"] == "lease":
            peer.send({"op": "leased", "key": message["key"], "refusal": self._refusal})

    def close(self) -> None:
        self._server.close()


@contextmanager
def loop(repository: Path, refusal: str = "") -> Iterator[Loop]:
    opened = Loop(repository, refusal)
    yield opened
    opened.close()


@contextmanager
def line(
    repository: Path, on_step: Callable[..., object] = lambda *_: None, on_gone: Callable[[], object] = lambda: None
) -> Iterator[LoopLine]:
    opened = LoopLine(repository / "ic_portrait" / "1", on_step, on_gone)
    yield opened
    opened.close()


Reply = IcPortraitError | None


class Asked:
    """A lease that was asked for, and its replies."""

    def __init__(self, front: LoopLine, key: str = "a") -> None:
        self.replies: queue.SimpleQueue[Reply] = queue.SimpleQueue()
        front.lease(key, DEMAND, self.replies.put)

    def reply(self) -> Reply:
        return self.replies.get(timeout=10)

    def unavailable(self) -> str:
        """The refusal's text. It has come by itself: nothing here gives up on leases that aren't answered."""
        refusal = self.reply()
        assert isinstance(refusal, Unavailable)
        return str(refusal)


def test_a_lease_is_asked_for_with_what_the_request_takes_and_granted(repository: Path) -> None:
    with loop(repository) as server, line(repository) as front:
        assert Asked(front).reply() is None
        assert server.heard.get(timeout=10) == {"op": "lease", "key": "a", **DEMAND}


@pytest.mark.parametrize("error", [Unavailable("the queue is full; retry_after_ms: 40"), InvalidRequest("no")])
def test_a_lease_is_refused_with_the_loops_own_code_and_text(repository: Path, error: IcPortraitError) -> None:
    with loop(repository, to_wire(error)) as server, line(repository) as front:
        refusal = Asked(front).reply()
        assert type(refusal) is type(error) and str(refusal) == str(error)
        assert server.heard.get(timeout=10)["op"] == "lease"


def test_all_that_a_front_says_arrives_in_order(repository: Path) -> None:
    with loop(repository) as server, line(repository) as front:
        front.cancel("a")
        front.seen("b")
        front.release("c")
        front.release("d", {"decode": 2.5})
        assert [server.heard.get(timeout=10) for _ in range(4)] == [
            {"op": "cancel", "key": "a"},
            {"op": "seen", "key": "b"},
            {"op": "release", "key": "c", "stage_ms": None},
            {"op": "release", "key": "d", "stage_ms": {"decode": 2.5}},
        ]


def test_steps_reach_the_front_and_its_failure_does_not_end_the_line(repository: Path, caplog: Any) -> None:
    steps: queue.SimpleQueue[tuple[str, int, int]] = queue.SimpleQueue()

    def on_step(*step: Any) -> None:
        if step[1] == 1:
            raise RuntimeError("a front's mistake")
        steps.put(step)

    with loop(repository) as server, line(repository, on_step) as front:
        assert Asked(front).reply() is None
        server.heard.get(timeout=10)
        for step in (1, 2):
            assert server.peers[0].send({"op": "step", "key": "a", "step": step, "total_steps": 9})
        assert steps.get(timeout=10) == ("a", 2, 9)
        assert Asked(front).reply() is None
    assert "a front's mistake" in caplog.text


def test_leases_that_are_asked_for_at_once_get_each_its_own_answer(repository: Path) -> None:
    """The second is answered first."""
    asked: list[str] = []
    refusals = {"a": "", "b": to_wire(Unavailable("b is refused"))}

    def answer(peer: Peer, message: Message) -> None:
        asked.append(message["key"])
        if len(asked) == 2:
            for key in reversed(asked):
                peer.send({"op": "leased", "key": key, "refusal": refusals[key]})

    with serving(repository, answer), line(repository) as front:
        first, second = Asked(front, "a"), Asked(front, "b")
        assert str(second.reply()) == "b is refused"
        assert first.reply() is None


# A loop that isn't there, ends, or doesn't answer


def test_without_a_loop_a_lease_is_refused_at_once(repository: Path) -> None:
    with line(repository) as front:
        assert "the denoising loop has ended" in Asked(front).unavailable()
        front.cancel("a")
        front.release("a")


def test_a_loop_whose_process_is_killed_fails_its_leases_and_a_new_one_takes_over(repository: Path) -> None:
    gone: queue.SimpleQueue[None] = queue.SimpleQueue()
    with line(repository, on_gone=lambda: gone.put(None)) as front:
        with process(LOOP, repository / "denoise" / "1") as first:
            assert Asked(front).reply() is None
            waiting = [Asked(front, key) for key in ("mute", "mute too")]
            assert gone.empty()
            os.kill(first.pid, signal.SIGKILL)
            gone.get(timeout=10)
            for asked in waiting:
                assert "the denoising loop has ended" in asked.unavailable()
        assert "the denoising loop has ended" in Asked(front).unavailable()
        with process(LOOP, repository / "denoise" / "1"):
            assert Asked(front).reply() is None
        gone.get(timeout=10)
        assert all(asked.replies.empty() for asked in waiting)
    assert gone.empty()


def test_a_lease_that_is_not_answered_is_given_up_after_a_while_and_given_back(
    repository: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    heard: queue.SimpleQueue[tuple[Peer, Message]] = queue.SimpleQueue()
    with serving(repository, lambda *asked: heard.put(asked)), line(repository) as front:
        monkeypatch.setattr(icportrait.control, "LEASE_TIMEOUT_S", 0.05)
        late = Asked(front, "late")
        peer, lease = heard.get(timeout=10)
        assert (lease["op"], lease["key"]) == ("lease", "late")
        monkeypatch.setattr(icportrait.control, "LEASE_TIMEOUT_S", 60.0)
        in_time = Asked(front, "in time")
        heard.get(timeout=10)
        time.sleep(0.06)
        front.expire_leases()
        refusal = late.reply()
        assert isinstance(refusal, Unavailable) and "doesn't answer" in str(refusal)
        # Should it be granted still, nobody runs with it.
        assert heard.get(timeout=10)[1] == {"op": "release", "key": "late", "stage_ms": None}
        for key in ("late", "in time"):
            peer.send(granted(key))
        assert in_time.reply() is None
        front.expire_leases()
        assert late.replies.empty() and in_time.replies.empty() and heard.empty()


def test_a_lease_that_is_granted_while_it_is_given_up_is_not_used(
    repository: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was given back may not run; what runs may not be given back."""
    monkeypatch.setattr(icportrait.control, "LEASE_TIMEOUT_S", 0.0)
    granting = threading.Event()

    class Line(LoopLine):
        def release(self, key: str, stage_ms: dict[str, float] | None = None) -> None:
            super().release(key, stage_ms)
            granting.wait(10)
            time.sleep(0.05)  # the loop's answer is on its way

    def answer(peer: Peer, message: Message) -> None:
        if message["op"] == "release":
            peer.send(granted(message["key"]))
            granting.set()

    front = Line(repository / "ic_portrait" / "1", lambda *_: None, lambda: None)
    with serving(repository, answer):
        asked = Asked(front)
        time.sleep(0.01)
        front.expire_leases()
        assert isinstance(asked.reply(), Unavailable)
        assert asked.replies.empty()
        front.close()


def test_a_loop_that_ends_right_after_its_answer_is_noticed(repository: Path) -> None:
    gone: queue.SimpleQueue[None] = queue.SimpleQueue()

    def answer_and_end(listener: Listener) -> None:
        for _ in range(50):
            with listener.accept() as connection:
                connection.recv_bytes()
                Peer(connection).send(granted("a"))

    with Listener(address(repository / "denoise" / "1"), "AF_UNIX") as listener:
        thread = threading.Thread(target=answer_and_end, args=(listener,), daemon=True)
        thread.start()
        with line(repository, on_gone=lambda: gone.put(None)) as front:
            for _ in range(50):
                asked = Asked(front)
                assert asked.reply() is None
                gone.get(timeout=10)
                assert asked.replies.empty()
        thread.join(10)


@contextmanager
def serving(repository: Path, answer: Callable[[Peer, Message], object]) -> Iterator[None]:
    server = ControlServer(repository / "denoise" / "1", answer, lambda _: None)
    yield
    server.close()


def granted(key: str) -> Message:
    return {"op": "leased", "key": key, "refusal": ""}


# Several of each


def test_a_front_whose_process_is_killed_is_reported_and_the_others_stay(repository: Path) -> None:
    with loop(repository) as server, line(repository) as other:
        assert Asked(other, "mine").reply() is None
        with process(FRONT, repository / "ic_portrait_stream" / "1") as front:
            assert [server.heard.get(timeout=10)["key"] for _ in range(2)] == ["mine", "from afar"]
            assert server.gone.empty()
            os.kill(front.pid, signal.SIGKILL)
            assert server.gone.get(timeout=10) is server.peers[1]
        assert server.gone.empty()
        assert not server.peers[1].send({"op": "step"})
        assert Asked(other).reply() is None


def test_servers_of_other_repositories_hear_nothing(tmp_path: Path) -> None:
    with loop(tmp_path / "a") as mine, loop(tmp_path / "b") as others, line(tmp_path / "b") as front:
        assert Asked(front, "key").reply() is None
        assert others.heard.get(timeout=10)["key"] == "key"
        assert mine.heard.empty()


def test_links_to_one_repository_are_different_servers(tmp_path: Path) -> None:
    (tmp_path / "repository").mkdir()
    for name in "ab":
        (tmp_path / name).symlink_to(tmp_path / "repository")
    with loop(tmp_path / "a"), line(tmp_path / "b") as front:
        assert "has ended" in Asked(front).unavailable()
    assert len({address(tmp_path / name / "denoise" / "1") for name in "ab"}) == 2


def test_a_server_that_closed_gives_its_address_back_and_its_fronts_know(repository: Path) -> None:
    gone: queue.SimpleQueue[None] = queue.SimpleQueue()
    with line(repository, on_gone=lambda: gone.put(None)) as front:
        for _ in range(3):
            with loop(repository) as server:
                assert Asked(front).reply() is None
            gone.get(timeout=10)
            assert isinstance(server.gone.get(timeout=10), Peer)


def test_a_line_that_closed_is_no_loop_that_has_ended(repository: Path) -> None:
    gone: list[None] = []
    with loop(repository) as server:
        with line(repository, on_gone=lambda: gone.append(None)) as front:
            assert Asked(front).reply() is None
        server.gone.get(timeout=10)
        assert "has ended" in Asked(front).unavailable()
    assert not gone


def test_another_users_process_is_sent_away(repository: Path, monkeypatch: pytest.MonkeyPatch, caplog: Any) -> None:
    own = os.getuid()
    with loop(repository) as server, line(repository) as front:
        with monkeypatch.context() as patched:
            patched.setattr(os, "getuid", lambda: own + 1)
            assert "has ended" in Asked(front).unavailable()
        assert server.heard.empty() and "another user's process" in caplog.text
        until(lambda: front._peer is None)
        assert Asked(front).reply() is None


def test_a_lease_that_is_asked_for_anew_while_a_line_breaks_does_not_break_with_it(
    repository: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a loop that takes the place of the one that has ended."""
    own, close = os.getuid(), Connection.close
    connections: list[Connection] = []
    anew: list[Asked] = []

    def connect(*arguments: Any) -> Connection:
        connections.append(Client(*arguments))
        return connections[-1]

    def close_and_ask(connection: Connection) -> None:
        if connections[:1] == [connection] and not anew:
            monkeypatch.setattr(os, "getuid", lambda: own)
            anew.append(Asked(front, "anew"))
        close(connection)

    with loop(repository), line(repository) as front:
        monkeypatch.setattr(icportrait.control, "Client", connect)
        monkeypatch.setattr(Connection, "close", close_and_ask)
        monkeypatch.setattr(os, "getuid", lambda: own + 1)
        assert "has ended" in Asked(front).unavailable()
        until(lambda: bool(anew))
        assert anew[0].reply() is None
        monkeypatch.undo()
