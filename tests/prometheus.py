"""A real Prometheus, which tests give a configuration."""

from __future__ import annotations

import shutil
import socket
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from icportrait.server import HOST


@contextmanager
def run_prometheus(folder: Path) -> Iterator[str]:
    """Run Prometheus in a folder that has its ``prometheus.yml``, and give its address once it answers queries."""
    if shutil.which("prometheus") is None:
        pytest.skip("needs Prometheus, of Debian's package prometheus")
    with socket.create_server((HOST, 0)) as free:
        port = free.getsockname()[1]
    command = ["prometheus", "--config.file=prometheus.yml", "--storage.tsdb.path=data"]
    command += [f"--web.listen-address={HOST}:{port}"]
    with (folder / "prometheus.log").open("w") as log:
        process = subprocess.Popen(command, cwd=folder, stdout=log, stderr=log)
    try:
        _until_ready(f"http://{HOST}:{port}", process, folder / "prometheus.log")
        yield f"http://{HOST}:{port}"
    finally:
        process.terminate()
        process.wait(30)


def _until_ready(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    """Wait until Prometheus has read its storage: before, it answers 503."""
    end_s = time.monotonic() + 60
    while True:
        try:
            with urllib.request.urlopen(f"{url}/-/ready", timeout=10):
                return
        except OSError as error:
            assert process.poll() is None and time.monotonic() < end_s, f"{error}: {log.read_text()}"
        time.sleep(0.2)
