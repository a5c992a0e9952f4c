"""A private tritonserver's start and end, and its words where it can't start."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import pytest

import icportrait.deploy.leftovers
from icportrait.deploy.leftovers import SHM, SHORT
from icportrait.deploy.triton_server import TritonServer
from icportrait.errors import IcPortraitError
from icportrait.presets import DEMO_128
from tests.e2e.conftest import simulated_repository
from tests.e2e.supervised import runs
from tests.label_slots import BASE
from tests.private_client import gateway
from tests.stage_front import until

HOST_PROCESS = """
import pathlib, sys
from icportrait.deploy.triton_server import TritonServer

server = TritonServer(pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[2]))
server.start()
print(server.directory, *(process.pid for process in server.stubs), server.pid, flush=True)
sys.stdin.read()
"""


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return simulated_repository(tmp_path_factory.mktemp("repository"), {"unet": 2})


def test_a_server_that_stopped_or_was_killed_leaves_nothing_and_starts_again(repository: Path, tmp_path: Path) -> None:
    server = TritonServer(repository, tmp_path / "log")
    for end in (server.stop, server.kill):
        server.start()
        assert server._run
        folder, prefix, pids = server.directory, server._run.shm_prefix, [stub.pid for stub in server.stubs]
        with gateway(server, DEMO_128) as caller:
            caller.run(BASE)
        assert list(SHM.glob(f"{prefix}*")) and server.what_ended() is None
        end()
        assert not folder.exists() and not list(SHM.glob(f"{prefix}*"))
        assert not any(map(runs, pids))
    assert "in-flight" not in (tmp_path / "log").read_text()


def test_a_server_whose_starter_is_killed_dies_with_it_and_the_next_start_removes_the_rest(
    repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = [sys.executable, "-c", HOST_PROCESS, str(repository), str(tmp_path / "log")]
    with tempfile.TemporaryDirectory(prefix="ic-") as own:  # else another test's start could remove what is left here
        monkeypatch.setattr(tempfile, "tempdir", own)
        environment = {**os.environ, "TMPDIR": own}
        with subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        ) as host:
            assert host.stdout
            folder, *pids = host.stdout.readline().split()
            assert all(runs(int(pid)) for pid in pids) and len(pids) == 4
            token = Path(folder).name.rpartition("-")[2]
            assert list(SHM.glob(f"icportrait_{token}_*"))
            os.kill(host.pid, signal.SIGKILL)
            until(lambda: not any(runs(int(pid)) for pid in pids))
        assert Path(folder).parent == Path(own) and Path(folder).exists()
        said: list[str] = []
        with TritonServer(repository, tmp_path / "log", say=said.append):
            assert f"removed what a server that was killed has left: {Path(folder).name}" in said
            assert not Path(folder).exists()
            assert not list(SHM.glob(f"icportrait_{token}_*"))


def test_a_temporary_folder_that_takes_no_file_is_named_in_one_line(
    repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Start a server whose own folder has no room, as where the disk is full."""
    shm = tmp_path / "shm"
    shm.mkdir()
    monkeypatch.setattr(icportrait.deploy.leftovers, "SHM", shm)
    monkeypatch.setattr(tempfile, "tempdir", "/gone")
    with pytest.raises(IcPortraitError, match=r"the server can't be started: .*gone.* name another folder with TMPDIR"):
        TritonServer(repository, tmp_path / "log").start()
    assert not list(shm.iterdir())


def test_a_temporary_folder_whose_path_a_shell_would_read_something_into_is_not_used(
    repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with tempfile.TemporaryDirectory(prefix="it's $(of) a ") as odd:
        monkeypatch.setattr(tempfile, "tempdir", odd)
        with TritonServer(repository, tmp_path / "log") as server:
            assert server.directory.parent == SHORT and not list(Path(odd).iterdir())


def test_a_model_that_cannot_be_loaded_ends_the_start_with_the_logs_end(tmp_path: Path) -> None:
    broken = simulated_repository(tmp_path, {})
    (broken / "vae_decoder" / "1" / "model.py").write_text("raise ImportError('nothing here')")
    with pytest.raises(IcPortraitError, match=r"(?s)ended with status -?\d+ before it was ready; .*nothing here"):
        TritonServer(broken, tmp_path / "log").start()


def test_overrides_go_before_the_repositorys_own_policy(repository: Path, tmp_path: Path) -> None:
    few = {"slots": "1", "max_queued_slots": "0"}
    with TritonServer(repository, tmp_path / "log", overrides=few) as server, gateway(server, DEMO_128) as caller:
        caller.run(BASE)
        with pytest.raises(IcPortraitError, match="the queue is full"):
            caller.run(replace(BASE, num_portraits=2))
