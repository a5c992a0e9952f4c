"""The way of a cancelled request's key from a front's process to the loop's."""

from __future__ import annotations

import logging
import queue
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from icportrait.cancellation import CancelListener, address, send_cancel


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    return tmp_path / "repository"


@pytest.fixture
def keys(repository: Path) -> Iterator[queue.SimpleQueue[str]]:
    received: queue.SimpleQueue[str] = queue.SimpleQueue()
    listener = CancelListener(repository / "denoise" / "1", received.put)
    yield received
    listener.close()


def test_a_key_arrives_from_another_model_and_process(repository: Path, keys: queue.SimpleQueue[str]) -> None:
    front = repository / "ic_portrait" / "1"
    send_cancel(front, "first")
    code = "import sys, pathlib; from icportrait.cancellation import send_cancel; "
    code += "send_cancel(pathlib.Path(sys.argv[1]), 'b')"
    subprocess.run([sys.executable, "-c", code, str(front)], check=True)
    assert [keys.get(timeout=10) for _ in range(2)] == ["first", "b"]


def test_servers_of_other_repositories_hear_nothing(tmp_path: Path, keys: queue.SimpleQueue[str]) -> None:
    other: queue.SimpleQueue[str] = queue.SimpleQueue()
    listener = CancelListener(tmp_path / "other" / "denoise" / "1", other.put)
    send_cancel(tmp_path / "other" / "ic_portrait" / "1", "key")
    assert other.get(timeout=10) == "key"
    assert keys.empty()
    listener.close()


def test_links_to_one_repository_are_different_servers(tmp_path: Path) -> None:
    (tmp_path / "repository").mkdir()
    for name in "ab":
        (tmp_path / name).symlink_to(tmp_path / "repository")
    assert len({address(tmp_path / name / "denoise" / "1") for name in "ab"}) == 2


def test_nobody_who_listens_is_a_warning(repository: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        send_cancel(repository / "ic_portrait" / "1", "key")
    assert "request key was cancelled, but the denoising loop can't be told" in caplog.text


def test_a_listener_that_closed_gives_its_address_back(repository: Path) -> None:
    for _ in range(2):
        CancelListener(repository / "denoise" / "1", lambda _: None).close()
