"""A full disk is one sentence with both numbers, from every library that writes gigabytes, and leaves no half."""

from __future__ import annotations

import errno
import os
import shutil
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

import icportrait.disk
import tests.full.__main__
from icportrait.deploy.machine_memory import Room
from icportrait.disk import check_room, free_bytes, room_for
from icportrait.errors import CheckpointError, NotEnoughDisk
from tests.full_disk import full_disk

MB = 10**6
LIMIT = 100_000
WEIGHTS = {"weights": torch.ones(200_000)}
Usage = namedtuple("Usage", "free")


@pytest.fixture
def ten_mb_free(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(10 * MB))


def save_state(path: Path) -> None:
    with path.open("wb") as file:
        torch.save(WEIGHTS, file)


@pytest.mark.usefixtures("ten_mb_free")
def test_what_does_not_fit_is_refused_before_it_is_begun(tmp_path: Path) -> None:
    with (
        pytest.raises(NotEnoughDisk, match=r"out: about 2\.5 GB of disk are needed for the plans, and 10\.0 MB are"),
        room_for("the plans", tmp_path / "new" / "out", 2500 * MB),
    ):
        raise AssertionError("it was begun")
    assert not list(tmp_path.iterdir())
    check_room("the plans", tmp_path / "new" / "out", 10 * MB)


@pytest.mark.usefixtures("ten_mb_free")
def test_files_that_are_replaced_are_room_unless_another_link_keeps_them(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    for name in ("old.plan", "deep/old.plan"):
        (tmp_path / name).write_bytes(bytes(MB))
    check_room("all", tmp_path, 12 * MB, ["*"])
    with pytest.raises(NotEnoughDisk, match=r"11\.0 MB are free"):
        check_room("all", tmp_path, 12 * MB, ["*.plan"])
    os.link(tmp_path / "old.plan", tmp_path / "link.plan")
    with pytest.raises(NotEnoughDisk, match=r"10\.0 MB are free"):
        check_room("all", tmp_path, 12 * MB, ["*.plan"])


@pytest.mark.parametrize(
    "write",
    [
        lambda path: path.write_bytes(bytes(2 * LIMIT)),
        lambda path: save_file(WEIGHTS, path),
        save_state,
        lambda path: shutil.copyfile(Path(torch.__file__).parent / "_tensor_docs.py", path),
    ],
    ids=["bytes", "safetensors", "torch", "copy"],
)
def test_a_disk_that_fills_up_is_one_sentence_and_leaves_nothing(write: Callable[[Path], None], tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(NotEnoughDisk) as refused, full_disk(LIMIT), room_for("the half", out, MB, ["*.half", "folder"]):
        (out / "folder").mkdir(parents=True)
        (out / "folder" / "file").touch()
        write(out / "a.half")
    said = str(refused.value)
    assert said.startswith(f"{out}: File too large while writing the half, about 1.0 MB in all; ")
    assert said.endswith(" are free now; make room, or write it elsewhere") and "\n" not in said
    assert not out.exists()


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "No space left on device"),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), "Disk quota exceeded"),
        (SafetensorError("I/O error: No space left on device (os error 28)"), "No space left on device"),
        (CheckpointError("quantiser: OSError: [Errno 28] No space left on device"), "No space left on device"),
    ],
)
def test_every_way_of_saying_so_is_understood(error: Exception, reason: str, tmp_path: Path) -> None:
    with pytest.raises(NotEnoughDisk, match=f"{reason} while writing the half, "), room_for("the half", tmp_path, 1):
        raise error


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.EACCES, "Permission denied"),
        SafetensorError("I/O error: Permission denied (os error 13)"),
        ValueError("28"),
    ],
)
def test_another_error_stays_as_it_is_and_removes_nothing(error: Exception, tmp_path: Path) -> None:
    with pytest.raises(type(error)) as raised, room_for("the half", tmp_path, 1, ["*"]):
        (tmp_path / "kept").touch()
        raise error
    assert raised.value is error and (tmp_path / "kept").exists()


def test_an_error_of_a_block_within_stays_that_ones(tmp_path: Path) -> None:
    with (
        pytest.raises(NotEnoughDisk, match="writing the inner"),
        room_for("the outer", tmp_path, 1),
        room_for("the inner", tmp_path / "in", 1),
    ):
        raise OSError(errno.ENOSPC, "")


def test_room_is_that_of_the_disk_which_a_path_will_be_on(tmp_path: Path) -> None:
    assert abs(free_bytes(tmp_path / "a" / "b") - shutil.disk_usage(tmp_path).free) < 2**30
    shm = Path("/dev/shm")
    if shm.is_dir():
        (tmp_path / "link").symlink_to(shm)
        assert abs(free_bytes(tmp_path / "link" / "a") - shutil.disk_usage(shm).free) < 2**30


@pytest.mark.parametrize(
    ("disk", "memory", "said"),
    [
        (10**9, 10**12, "of disk are needed for make test-full, and 1.0 GB are free"),
        (10**12, 10**9, "of memory, and this machine has 1.0 GB left"),
        (10**12, 10**12, ""),
    ],
)
def test_the_full_tests_look_for_room_before_they_begin(
    disk: int,
    memory: int,
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(tests.full.__main__, "BUILD", tmp_path)
    monkeypatch.setattr(icportrait.disk, "free_bytes", lambda _: disk)
    monkeypatch.setattr(tests.full.__main__, "room", lambda: Room(memory, "this machine"))
    assert tests.full.__main__.main() == bool(said)
    err = capsys.readouterr().err
    assert said in err and len(err.splitlines()) == bool(said)
