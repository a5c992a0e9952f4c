"""A real nginx, which tests give a configuration."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest


def skip_without_nginx() -> None:
    """Skip the test where nginx isn't installed."""
    if shutil.which("nginx") is None:
        pytest.skip("needs nginx, of Debian's package nginx-light")


def run_nginx(folder: Path, *arguments: str) -> None:
    """Run the program nginx once, on a folder's ``nginx.conf``: to start, to check, or to send a signal."""
    command = ["nginx", "-p", str(folder), "-c", str(folder / "nginx.conf"), *arguments]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=30)
    assert ended.returncode == 0, ended.stderr


@contextmanager
def nginx_in(folder: Path, stop: str) -> Iterator[None]:
    """Run nginx in a folder that has its ``nginx.conf``, and end it by ``stop`` or, with its calls, ``quit``."""
    run_nginx(folder)
    try:
        yield
    finally:
        run_nginx(folder, "-s", stop)
