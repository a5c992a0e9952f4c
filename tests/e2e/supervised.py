"""``python -m icportrait.server`` as its user starts it."""

from __future__ import annotations

import os
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from icportrait.server import HOST, SHM, Ports
from icportrait.stub_processes import stub_processes
from tests.conftest import ROOT

LINE_TIMEOUT_S = 60
STOP_TIMEOUT_S = 60


class Supervised:
    """The process, what it says, and the processes below it."""

    def __init__(self, process: subprocess.Popen[str], ports: Ports, folder: Path) -> None:
        self.process, self.ports, self.folder = process, ports, folder
        self.url, self.metrics_url = f"{HOST}:{ports.grpc}", f"{HOST}:{ports.metrics}"
        self.ready = ""
        """The line that said so first."""
        self._lines: queue.SimpleQueue[str] = queue.SimpleQueue()
        threading.Thread(target=self._read, daemon=True).start()

    def next_line(self, start: str, timeout_s: float = LINE_TIMEOUT_S) -> str:
        """The next line that begins so."""
        while not (line := self._lines.get(timeout=timeout_s)).startswith(start):
            pass
        return line.strip()

    @property
    def tritonserver(self) -> int:
        (pid,) = children(self.process.pid)
        return pid

    def kill(self, model: str) -> None:
        """Kill the process of a model."""
        (pid,) = [stub.pid for stub in stub_processes(self.tritonserver) if stub.model == model]
        os.kill(pid, signal.SIGKILL)

    def shm_regions(self) -> set[Path]:
        return set(SHM.glob(f"icportrait_{self.process.pid}_{self.ports.grpc}_*"))

    def errors(self) -> str:
        """What it and tritonserver wrote to standard error."""
        return (self.folder / "server.log").read_text(errors="replace")

    def _read(self) -> None:
        for line in self.process.stdout:
            self._lines.put(line)


@contextmanager
def supervised(
    repository: Path, folder: Path, *, wait: bool = True, ready_timeout_s: float = LINE_TIMEOUT_S
) -> Iterator[Supervised]:
    """Start it, and stop it where the test hasn't.

    Args:
        repository: to be served.
        folder: for its log and its temporary files.
        wait: until it is ready.
        ready_timeout_s: for how long; nothing is said in the meantime.
    """
    ports = Ports.free()
    arguments = [f"--{name}-port={port}" for name, port in vars(ports).items()]
    command = [sys.executable, "-m", "icportrait.server", f"--repository={repository}", *arguments]
    environment = {**os.environ, "TMPDIR": str(folder)}
    with (
        (folder / "server.log").open("w") as log,
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True, cwd=ROOT, env=environment) as process,
    ):
        try:
            server = Supervised(process, ports, folder)
            if wait:
                server.ready = server.next_line("ready", ready_timeout_s)
            yield server
        finally:
            process.terminate()
            process.wait(STOP_TIMEOUT_S)


def children(pid: int) -> list[int]:
    """The process's own children, from /proc."""
    tasks = Path(f"/proc/{pid}/task").glob("*/children")
    return [int(child) for task in tasks for child in task.read_text().split()]


def descendants(pid: int) -> list[int]:
    """The process's children and theirs."""
    own = children(pid)
    return own + [grandchild for child in own for grandchild in descendants(child)]
