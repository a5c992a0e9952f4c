"""Restarts of a server, and their end, on a server that is none and a clock that is set."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest.mock import Mock

import pytest

import icportrait.deploy.triton_server
from icportrait.deploy.machine_memory import oom_kills
from icportrait.deploy.stub_processes import STUB, StubProcess, is_stopped, stub_processes
from icportrait.deploy.supervisor import AGAIN_WITHIN_S, MAX_RESTARTS, WITHIN_S, Ending, keep_running
from icportrait.deploy.triton_server import KILL_TAKES_S, TritonServer
from icportrait.errors import IcPortraitError, NotEnoughMemory


class Stopped(BaseException):
    """An end such as a signal's handler raises."""


class FakeServer:
    """Runs for as long as each of ``lives_s`` says, then forever."""

    def __init__(self, *lives_s: float) -> None:
        self.now, self.calls = 0.0, []
        self._lives_s = iter(lives_s)
        self.on_stop: Callable[[], None] = lambda: None
        self.ending = Ending("a part ended")
        self.failures: dict[int, Exception] = {}
        """Errors that the start of a number fails with."""

    def start(self) -> None:
        self.calls.append("start")
        if error := self.failures.get(self.calls.count("start")):
            raise error
        self._ends_at = self.now + next(self._lives_s, float("inf"))

    def stop(self) -> None:
        self.calls.append("stop")
        self.on_stop()

    def what_ended(self) -> Ending | None:
        return self.ending if self.now >= self._ends_at else None

    def sleep(self, seconds: float) -> None:
        self.now += seconds
        if self.now > 10 * WITHIN_S:
            raise Stopped


def run(server: FakeServer) -> list[str]:
    """Keep the server running until it is stopped, and return what was said."""
    said: list[str] = []
    with pytest.raises(Stopped):
        keep_running(server, said.append, "ready", lambda: server.now, server.sleep)
    return said


def test_what_ends_is_named_and_all_of_it_is_started_again() -> None:
    server = FakeServer(1.0)
    assert run(server) == [
        "ready",
        f"a part ended; restarting the server, 1 of at most {MAX_RESTARTS} times in 10 minutes",
        "ready",
    ]
    assert server.calls == ["start", "stop", "start", "stop"]


def test_a_server_that_keeps_ending_stops_with_an_error() -> None:
    server = FakeServer(*[WITHIN_S / (MAX_RESTARTS + 1)] * (MAX_RESTARTS + 1))
    said: list[str] = []
    with pytest.raises(IcPortraitError, match=rf"^a part ended, after {MAX_RESTARTS} restarts in 10 minutes; .*"):
        keep_running(server, said.append, "ready", lambda: server.now, server.sleep)
    assert said.count("ready") == MAX_RESTARTS + 1
    assert server.calls[-2:] == ["stop", "stop"]


def test_what_was_killed_for_memory_is_started_again_once() -> None:
    server = FakeServer(1.0, 10 * WITHIN_S / 2)
    server.ending = Ending("denoise was killed for want of memory", for_memory=True)
    said: list[str] = []
    with pytest.raises(
        IcPortraitError, match=r"^denoise was killed for want of memory, for the second time; end other"
    ):
        keep_running(server, said.append, "ready", lambda: server.now, server.sleep)
    assert said.count("ready") == 2
    assert server.calls == ["start", "stop", "start", "stop"]


def test_a_kill_for_memory_that_lies_far_back_is_not_the_same_again() -> None:
    server = FakeServer(*[AGAIN_WITHIN_S + 1] * 3)
    server.ending = Ending("denoise was killed for want of memory", for_memory=True)

    def sleep(_: float) -> None:
        server.now = server._ends_at
        if server.now == float("inf"):
            raise Stopped

    server.sleep = sleep  # type: ignore[method-assign]
    assert run(server).count("ready") == 4


def test_restarts_that_lie_back_do_not_count() -> None:
    server = FakeServer(*[WITHIN_S / MAX_RESTARTS + 1] * 10)
    assert run(server).count("ready") == 11


@pytest.mark.parametrize("error", [IcPortraitError("it doesn't start"), OSError("it doesn't start")])
def test_a_restart_that_fails_is_one_of_them_and_is_followed_by_another(error: Exception) -> None:
    server = FakeServer(1.0)
    server.failures = {2: error, 3: error}
    assert run(server) == [
        "ready",
        f"a part ended; restarting the server, 1 of at most {MAX_RESTARTS} times in 10 minutes",
        f"it doesn't start; restarting the server, 2 of at most {MAX_RESTARTS} times in 10 minutes",
        f"it doesn't start; restarting the server, 3 of at most {MAX_RESTARTS} times in 10 minutes",
        "ready",
    ]
    assert server.calls == ["start", "stop"] * 4


def test_restarts_that_fail_too_often_end_with_what_the_last_one_failed_with() -> None:
    server = FakeServer(1.0)
    server.failures = dict.fromkeys(range(2, 6), IcPortraitError("it doesn't start"))
    said: list[str] = []
    with pytest.raises(IcPortraitError, match=rf"^it doesn't start; that was after {MAX_RESTARTS} restarts in 10 min"):
        keep_running(server, said.append, "ready", lambda: server.now, server.sleep)
    assert server.calls.count("start") == MAX_RESTARTS + 1 and server.calls[-2:] == ["stop", "stop"]


def test_the_first_start_of_all_has_no_second_try() -> None:
    server = FakeServer()
    server.failures = {1: IcPortraitError("it doesn't start")}
    with pytest.raises(IcPortraitError, match=r"^it doesn't start$"):
        run(server)
    assert server.calls == ["start", "stop"]


def test_a_restart_for_which_there_is_no_memory_is_tried_again_once() -> None:
    server = FakeServer(1.0)
    server.failures = dict.fromkeys(range(2, 6), NotEnoughMemory("too little memory"))
    with pytest.raises(NotEnoughMemory, match=r"^too little memory$"):
        run(server)
    assert server.calls.count("start") == 3


def test_a_signal_while_the_broken_server_stops_stops_it_all_the_same() -> None:
    server = FakeServer(1.0)

    def interrupt() -> None:
        server.on_stop = lambda: None
        raise Stopped

    server.on_stop = interrupt
    assert run(server)[-1].startswith("a part ended")
    assert server.calls == ["start", "stop", "stop"]


@pytest.fixture
def stub(tmp_path: Path) -> Iterator[subprocess.Popen[bytes]]:
    """Start a process that looks like a model's, and ends with the status that it reads."""
    (tmp_path / STUB).symlink_to("/bin/sh")
    model = tmp_path / "repository" / "denoise" / "1" / "model.py"
    model.parent.mkdir(parents=True)
    model.write_text('echo && read status && exit "$status"')
    with subprocess.Popen(
        [tmp_path / STUB, model], stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0
    ) as process:
        assert process.stdout and process.stdout.readline()  # a process has its arguments a moment after Popen returns
        yield process
        process.kill()


def test_a_process_that_is_just_being_started_is_no_models_yet(tmp_path: Path) -> None:
    (tmp_path / STUB).symlink_to("/bin/sh")
    with subprocess.Popen([tmp_path / STUB, "-s", "region"], stdin=subprocess.PIPE) as process:
        assert process.pid not in [stub.pid for stub in stub_processes(os.getpid())]
        process.kill()


@pytest.mark.parametrize(
    ("end", "ending"),
    [
        (lambda process: process.stdin.write(b"70\n"), "ended with status 70"),
        (lambda process: process.send_signal(signal.SIGKILL), "was ended by signal 9"),
    ],
)
def test_a_models_process_is_found_and_its_end_told(
    stub: subprocess.Popen[bytes], end: Callable[[subprocess.Popen[bytes]], object], ending: str
) -> None:
    (found,) = (process for process in stub_processes(os.getpid()) if process.pid == stub.pid)
    assert (found.model, found.pid, found.ending()) == ("denoise", stub.pid, None)
    end(stub)
    os.waitid(os.P_PID, stub.pid, os.WEXITED | os.WNOWAIT)
    assert found.ending() == ending
    stub.wait()
    assert found.ending() == "ended"


@pytest.mark.parametrize(
    ("sent", "kills", "ending"),
    [
        (signal.SIGKILL, 1, Ending("the process of model denoise was killed for want of memory", for_memory=True)),
        (signal.SIGKILL, 0, Ending("the process of model denoise was ended by signal 9")),
        (signal.SIGSEGV, 1, Ending("the process of model denoise was ended by signal 11")),
    ],
)
def test_what_the_kernel_killed_for_memory_is_named_as_that(
    stub: subprocess.Popen[bytes], sent: signal.Signals, kills: int, ending: Ending, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = oom_kills()
    with subprocess.Popen(["cat"], stdin=subprocess.PIPE) as triton:
        server = TritonServer(
            Path("repository"), _process=triton, _stubs=stub_processes(os.getpid()), _oom_kills=before
        )
        assert server.what_ended() is None
        stub.send_signal(sent)
        os.waitid(os.P_PID, stub.pid, os.WEXITED | os.WNOWAIT)
        monkeypatch.setattr(icportrait.deploy.triton_server, "oom_kills", lambda: before + kills)
        assert server.what_ended() == ending
        triton.communicate()


def test_a_kill_long_after_another_process_was_killed_for_memory_is_a_kill(
    stub: subprocess.Popen[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    before, now = oom_kills(), [0.0]
    monkeypatch.setattr(icportrait.deploy.triton_server.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(icportrait.deploy.triton_server, "oom_kills", lambda: before + 1)
    with subprocess.Popen(["cat"], stdin=subprocess.PIPE) as triton:
        server = TritonServer(
            Path("repository"), _process=triton, _stubs=stub_processes(os.getpid()), _oom_kills=before
        )
        assert server.what_ended() is None
        now[0] = KILL_TAKES_S + 1
        stub.kill()
        os.waitid(os.P_PID, stub.pid, os.WEXITED | os.WNOWAIT)
        assert server.what_ended() == Ending("the process of model denoise was ended by signal 9")
        triton.communicate()


def test_a_start_during_which_the_kernel_killed_for_memory_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    before = oom_kills()
    monkeypatch.setattr(icportrait.deploy.triton_server, "oom_kills", lambda: before + 1)
    with subprocess.Popen(["false"]) as triton:
        triton.wait()
        server = TritonServer(Path("repository"), _process=triton, _oom_kills=before)
        with pytest.raises(IcPortraitError, match="status 1 before it was ready; meanwhile the kernel has killed"):
            server._wait_ready(time.monotonic() + 5)


def test_a_process_that_got_the_number_later_is_another_one() -> None:
    assert StubProcess("denoise", os.getpid(), started="1").ending() == "ended"


def test_a_process_that_cannot_be_looked_at_has_not_ended(
    stub: subprocess.Popen[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Let every read fail, as where there are too many open files."""
    with subprocess.Popen(["cat"], stdin=subprocess.PIPE) as triton:
        server = TritonServer(Path("repository"), _process=triton, _stubs=stub_processes(os.getpid()))
        with monkeypatch.context() as patch:
            patch.setattr(Path, "read_text", too_many_open_files)
            assert server.what_ended() is None and not is_stopped(stub.pid)
        stub.kill()
        os.waitid(os.P_PID, stub.pid, os.WEXITED | os.WNOWAIT)
        assert server.what_ended() == Ending("the process of model denoise was ended by signal 9")
        triton.communicate()


def too_many_open_files(*_: object) -> None:
    raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))


def test_a_start_during_which_a_part_is_stopped_by_a_signal_says_so(tmp_path: Path) -> None:
    server = TritonServer(Path("repository"), _run=Mock(folder=tmp_path))
    with subprocess.Popen(["sleep", "1000"]) as triton:
        server._process = triton
        triton.send_signal(signal.SIGSTOP)
        try:
            with pytest.raises(IcPortraitError, match=r"^tritonserver was stopped by a signal before the server was"):
                server._wait_ready(time.monotonic() + 5)
        finally:
            triton.kill()


def test_a_start_during_which_a_models_process_is_stopped_by_a_signal_says_so(
    stub: subprocess.Popen[bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(icportrait.deploy.triton_server, "stub_processes", lambda _: stub_processes(os.getpid()))
    server = TritonServer(Path("repository"), _run=Mock(folder=tmp_path))
    with subprocess.Popen(["cat"], stdin=subprocess.PIPE) as server._process:
        stub.send_signal(signal.SIGSTOP)
        with pytest.raises(IcPortraitError, match=r"^the process of model denoise was stopped by a signal before"):
            server._wait_ready(time.monotonic() + 5)
        server._process.communicate()
