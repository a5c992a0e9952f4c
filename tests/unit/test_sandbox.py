"""Rights that the server's processes give up: in real processes, by the system's own answer."""

from __future__ import annotations

import asyncio
import errno
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from icportrait.errors import IcPortraitError
from icportrait.gateway import sandbox
from icportrait.gateway.sandbox import become, can_filter, check_access, filter_wanted
from icportrait.gateway.workers import Workers
from icportrait.pictures.prepare import prepare
from tests.conftest import EXAMPLES, ROOT
from tests.unit.test_workers import now

filtered = pytest.mark.skipif(bool(can_filter()), reason=f"needs libseccomp: {can_filter()}")


def connect(_: bytes) -> None:
    socket.socket(socket.AF_INET, socket.SOCK_STREAM)


def connect_to_a_file(_: bytes) -> None:
    socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)


def start_a_program(_: bytes) -> None:
    subprocess.run(["/bin/true"], check=True)


def write(_: bytes, folder: str) -> None:
    Path(folder, "written").touch()


def append(_: bytes, folder: str) -> None:
    os.open(Path(folder, "there"), os.O_RDWR)


def remove(_: bytes, folder: str) -> None:
    Path(folder, "there").unlink()


def read(_: bytes, folder: str) -> bytes:
    return Path(folder, "there").read_bytes()


def refusal(function: Callable[..., object], data: bytes, *arguments: object) -> int | None:
    """Return the system's error number for what a function does; None where it is allowed."""
    try:
        function(data, *arguments)
    except OSError as error:
        return error.errno
    return None


@filtered
def test_pictures_processes_have_no_network_no_programs_and_write_nothing(tmp_path: Path) -> None:
    (tmp_path / "there").write_bytes(b"there")
    folder = str(tmp_path)
    denied: list[tuple[Callable[..., object], tuple[str, ...]]] = [
        (connect, ()),
        (connect_to_a_file, ()),
        (start_a_program, ()),
        (write, (folder,)),
        (append, (folder,)),
        (remove, (folder,)),
    ]

    async def run(is_filtered: bool) -> list[int | None]:
        workers = Workers(1, 30, 2**30, 60, is_filtered=is_filtered)
        await workers.start()
        try:
            picture = (EXAMPLES / "hopper.jpg").read_bytes()
            _, pixels = await workers.run(now(), prepare, picture, "profile", None, False, 128)
            assert pixels.shape == (128, 128, 3)
            assert await workers.run(now(), read, b"", folder) == b"there"
            asked = [await workers.run(now(), _refusal_of, b"", *each) for each in denied]
            assert workers.lost == 0
            return asked
        finally:
            await workers.stop()

    assert asyncio.run(run(is_filtered=True)) == [errno.EPERM] * len(denied)
    assert asyncio.run(run(is_filtered=False)) == [None] * len(denied)


def _refusal_of(data: bytes, function: Callable[..., object], arguments: tuple[object, ...]) -> int | None:
    return refusal(function, data, *arguments)


def test_a_filter_that_can_not_be_had_is_told_where_it_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyseccomp", None)
    assert not filter_wanted("auto") and not filter_wanted("off")
    with pytest.raises(IcPortraitError, match=r"^picture_sandbox: .*apt-get install libseccomp2"):
        filter_wanted("on")


def test_a_user_that_is_none_is_told() -> None:
    with pytest.raises(IcPortraitError, match=r"^user: 'no-such-user': there is no such user; useradd"):
        become("no-such-user")


def test_only_root_becomes_another_user(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox.os, "geteuid", lambda: 4242)
    with pytest.raises(IcPortraitError, match=r"^user: root: only root can become another user"):
        become("root")


def test_what_the_user_can_not_read_or_write_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    missing = tmp_path / "none"
    check_access("me", [tmp_path], [tmp_path])
    with pytest.raises(IcPortraitError, match=rf"^user: me can't read {missing}; let that user read it"):
        check_access("me", [tmp_path, missing], [])
    with pytest.raises(IcPortraitError, match=rf"^user: me can't write to {missing}; give that user the folder"):
        check_access("me", [tmp_path], [missing])


BECOMING = """
import os, sys
from pathlib import Path
from icportrait.gateway.sandbox import become
from icportrait.errors import IcPortraitError
try:
    become("nobody", [Path(sys.argv[1])])
except IcPortraitError as error:
    print("can't read" in str(error))
become("nobody")
print(os.getresuid(), os.getresgid(), os.getgroups(), os.environ["USER"])
try:
    os.setuid(0)
except PermissionError:
    print("no way back")
try:
    open(sys.argv[1]).read()
except PermissionError:
    print("no longer root's files")
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to become another user")
def test_root_becomes_another_user_for_good(tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("root's")
    (tmp_path / "secret").chmod(0o600)
    command = [sys.executable, "-c", BECOMING, str(tmp_path / "secret")]
    said = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    assert said[0] == "True"
    assert said[1:] == [
        "(65534, 65534, 65534) (65534, 65534, 65534) [65534] nobody",
        "no way back",
        "no longer root's files",
    ]
