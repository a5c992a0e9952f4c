"""Files that a run keeps outside of its process go with it, or at the next start where it was killed."""

from __future__ import annotations

import os
import signal
import socket
import stat
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

import icportrait.deploy.leftovers
from icportrait.deploy.leftovers import FOLDER_BYTES, Run, remove_leftovers
from icportrait.deploy.stub_processes import runs

RUN = """
import pathlib, sys, tempfile
import icportrait.deploy.leftovers

tempfile.tempdir, icportrait.deploy.leftovers.SHM = sys.argv[1], pathlib.Path(sys.argv[2])
icportrait.deploy.leftovers.FOLDER_BYTES = 1000
run = icportrait.deploy.leftovers.Run()
(icportrait.deploy.leftovers.SHM / (run.shm_prefix + "region")).touch()
(run.folder / "loop").touch()
print(run.folder, flush=True)
sys.stdin.read()
"""


@pytest.fixture(autouse=True)
def shm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Make folders of the test's own for temporary files and for shared memory."""
    for name in ("tmp", "shm"):
        (tmp_path / name).mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    monkeypatch.setattr(icportrait.deploy.leftovers, "ENVIRONMENTS", tmp_path / "tmp")
    monkeypatch.setattr(icportrait.deploy.leftovers, "SHM", tmp_path / "shm")
    monkeypatch.setattr(icportrait.deploy.leftovers, "FOLDER_BYTES", 1000)
    return tmp_path / "shm"


def all_files(folder: Path) -> set[str]:
    return {path.name for name in ("tmp", "shm") for path in (folder / name).iterdir()}


@contextmanager
def run_of_another_process(folder: Path) -> Iterator[tuple[subprocess.Popen[str], Path]]:
    command = [sys.executable, "-c", RUN, str(folder / "tmp"), str(folder / "shm")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        yield process, Path(process.stdout.readline().strip())
        process.kill()


def test_a_run_has_a_folder_of_its_own_that_nobody_else_enters_and_removes_all(tmp_path: Path, shm: Path) -> None:
    others = shm / "icportrait_of_another"
    others.touch()
    first, second = Run(), Run()
    assert first.folder != second.folder and first.shm_prefix != second.shm_prefix
    assert stat.S_IMODE(first.folder.stat().st_mode) == 0o700
    (shm / f"{first.shm_prefix}region").touch()
    (first.folder / "folder").mkdir()
    first.remove()
    assert not first.folder.exists() and second.folder.exists()
    assert {path.name for path in shm.iterdir()} == {others.name, f"{second.shm_prefix}lock"}
    second.remove()
    assert all_files(tmp_path) == {others.name}


def test_what_a_killed_run_has_left_goes_and_what_a_living_one_has_stays(tmp_path: Path) -> None:
    with run_of_another_process(tmp_path) as (killed, folder), run_of_another_process(tmp_path) as (_, living):
        both = all_files(tmp_path)
        assert remove_leftovers() == [] and all_files(tmp_path) == both
        os.kill(killed.pid, signal.SIGKILL)
        killed.wait(10)
        assert remove_leftovers() == [f"icportrait_{folder.name[-8:]}_lock", folder.name]
        assert not folder.exists() and living.exists()
        assert {name.split("_")[1] for name in all_files(tmp_path) if "_" in name} == {living.name[-8:]}
        assert remove_leftovers() == []


def test_a_models_process_that_has_outlived_its_run_is_ended_and_a_living_runs_is_not(tmp_path: Path) -> None:
    with run_of_another_process(tmp_path) as (killed, folder), run_of_another_process(tmp_path) as (_, living):
        # Arguments like a stub's, for an interpreter: the third is its program.
        stubs = [
            subprocess.Popen(
                [
                    "/any/triton_python_backend_stub",
                    "-c",
                    f"icportrait_{run.name[-8:]}_1 = print(flush=True); import time; time.sleep(99)",
                ],
                executable=sys.executable,
                stdout=subprocess.PIPE,
            )
            for run in (folder, living)
        ]
        try:
            for stub in stubs:  # a process has its arguments a moment after Popen returns
                assert stub.stdout and stub.stdout.readline()
            os.kill(killed.pid, signal.SIGKILL)
            killed.wait(10)
            assert remove_leftovers() == [f"icportrait_{folder.name[-8:]}_lock", folder.name]
            assert stubs[0].wait(10) == -signal.SIGKILL
            assert stubs[1].poll() is None
        finally:
            for stub in stubs:
                stub.kill()
                stub.communicate()


def test_a_living_runs_folder_stays_where_its_shared_memory_is_another_containers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with run_of_another_process(tmp_path) as (killed, folder):
        (tmp_path / "another").mkdir()
        monkeypatch.setattr(icportrait.deploy.leftovers, "SHM", tmp_path / "another")
        assert remove_leftovers() == [] and (folder / "loop").exists()
        os.kill(killed.pid, signal.SIGKILL)
        killed.wait(10)
        assert remove_leftovers() == [folder.name]
    assert len(list((tmp_path / "shm").iterdir())) == 2


def test_a_folder_that_has_outlived_the_machines_last_start_goes_and_others_stay(tmp_path: Path) -> None:
    names = ("icportrait-server-run-0a1b2c3d", "icportrait-server-abcdefgh", "icportrait-device-1")
    for name in names:
        (tmp_path / "tmp" / name).mkdir()
    assert remove_leftovers() == [names[0]]
    assert all_files(tmp_path) == set(names[1:])


@pytest.mark.parametrize("is_running", [False, True])
@pytest.mark.parametrize("remove", [remove_leftovers, lambda: Run().remove()], ids=["at a start", "at an end"])
def test_empty_folders_of_killed_python_backends_go_and_those_that_may_be_a_running_ones_stay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_running: bool, remove: Callable[[], object]
) -> None:
    names = {"python_env_Ab3dE6", "python_env_another", "python_env_full12"}
    for name in names:
        (tmp_path / "tmp" / name).mkdir()
    (tmp_path / "tmp" / "python_env_full12" / "bin").touch()
    monkeypatch.setattr(icportrait.deploy.leftovers, "runs", lambda program: is_running)
    remove()
    assert all_files(tmp_path) == (names if is_running else {"python_env_another", "python_env_full12"})


def test_a_program_runs_while_a_process_has_its_name(tmp_path: Path) -> None:
    arguments = ["/any/a-program", "-c", "print(flush=True); import time; time.sleep(99)"]
    with subprocess.Popen(arguments, executable=sys.executable, stdout=subprocess.PIPE) as process:
        assert process.stdout and process.stdout.readline()  # a process has its arguments a moment after Popen returns
        assert runs("a-program") and not runs("/any/a-program") and not runs("another-program")
        process.kill()
    assert not runs("a-program")


def test_a_run_that_finds_no_room_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "nowhere"))
    with pytest.raises(OSError, match="nowhere"):
        Run()
    assert all_files(tmp_path) == set()


def test_where_a_sockets_path_would_be_too_long_the_folder_lies_elsewhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()
    monkeypatch.setattr(icportrait.deploy.leftovers, "SHM", tmp_path)
    with tempfile.TemporaryDirectory(prefix="ic-") as short:
        monkeypatch.setattr(icportrait.deploy.leftovers, "SHORT", Path(short))
        room = FOLDER_BYTES - len(f"{short}//icportrait-server-run-01234567")
        for length, expected in ((room, Path(short, room * "x")), (room + 1, Path(short))):
            folder = Path(short, length * "x")
            folder.mkdir()
            monkeypatch.setattr(tempfile, "tempdir", str(folder))
            run = Run()
            assert run.folder.parent == expected
            with socket.socket(socket.AF_UNIX) as bound:
                bound.bind(str(run.folder / "loop"))
            left = run.folder
            run._locks.close()
            assert left.name in remove_leftovers() and not left.exists()


@pytest.mark.parametrize("name", ["a b", "it's", "$(touch x)", "a;b", "é", "a\nb"])
def test_where_a_shell_would_read_something_into_its_path_the_folder_lies_elsewhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    (tmp_path / name).mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / name))
    monkeypatch.setattr(icportrait.deploy.leftovers, "SHORT", tmp_path / "tmp")
    run = Run()
    assert run.folder.parent == tmp_path / "tmp"
    run._locks.close()
    assert run.folder.name in remove_leftovers() and all_files(tmp_path) == set()


def test_a_folder_that_another_server_takes_for_a_leftover_is_followed_by_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Let the other server look between the folder's making and its lock."""
    mkdir, removed = Path.mkdir, []

    def mkdir_and_lose(folder: Path, mode: int) -> None:
        mkdir(folder, mode)
        if not removed:
            removed.extend(remove_leftovers())

    monkeypatch.setattr(Path, "mkdir", mkdir_and_lose)
    run = Run()
    assert len(removed) == 1 and run.folder.exists() and run.folder.name not in removed
    run.remove()


def test_a_leftover_is_locked_while_it_is_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Take the lock during the removal, because nobody may take the folder for a run's own meanwhile."""
    folder = tmp_path / "tmp" / "icportrait-server-run-0a1b2c3d"
    folder.mkdir()
    taken = []
    monkeypatch.setattr(
        icportrait.deploy.leftovers.shutil,
        "rmtree",
        lambda path, **_: taken.append(icportrait.deploy.leftovers._take(path, os.O_DIRECTORY)),
    )
    remove_leftovers()
    assert taken == [None]
