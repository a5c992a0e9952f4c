"""``python -m icportrait.server`` as its user starts it."""

from __future__ import annotations

import contextlib
import os
import queue
import re
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from icportrait.deploy.leftovers import SHM
from icportrait.deploy.stub_processes import stub_processes
from icportrait.server import HOST, Ports
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
        self._tokens: set[str] = set()
        self._lines: queue.SimpleQueue[str] = queue.SimpleQueue()
        threading.Thread(target=self._read, daemon=True).start()

    def next_line(self, start: str, timeout_s: float = LINE_TIMEOUT_S) -> str:
        """Return the next line that begins with the pattern ``start``."""
        while not re.match(start, line := self._lines.get(timeout=timeout_s)):
            pass
        return line.strip()

    @property
    def tritonserver(self) -> int:
        (pid,) = [pid for pid in children(self.process.pid) if name(pid) == "tritonserver"]
        return pid

    @property
    def picture_workers(self) -> list[int]:
        """List the processes that decode and encode pictures."""
        return [pid for pid in children(self.process.pid) if b"spawn_main" in arguments(pid)]

    def pid_of(self, part: str) -> int:
        """Find the process of a model, or ``tritonserver``'s."""
        if part == "tritonserver":
            return self.tritonserver
        (pid,) = [stub.pid for stub in stub_processes(self.tritonserver) if stub.model == part]
        return pid

    def kill(self, part: str) -> None:
        os.kill(self.pid_of(part), signal.SIGKILL)

    def shm_regions(self) -> set[Path]:
        """List the shared memory that is there now, of this run and of every run seen at an earlier call."""
        self._tokens |= {path.name.rpartition("-")[2] for path in self.folder.glob("icportrait-server-run-*")}
        return {region for token in self._tokens for region in SHM.glob(f"icportrait_{token}_*")}

    def errors(self) -> str:
        """Read what the server and tritonserver wrote to standard error."""
        return (self.folder / "server.log").read_text(errors="replace")

    def _read(self) -> None:
        for line in self.process.stdout:
            self._lines.put(line)


@contextmanager
def supervised(
    repository: Path,
    folder: Path,
    *,
    wait: bool = True,
    ready_timeout_s: float = LINE_TIMEOUT_S,
    flags: tuple[str, ...] = (),
) -> Iterator[Supervised]:
    """Start a supervised server, and stop the server where the test hasn't.

    Args:
        repository: to be served.
        folder: for its log and its temporary files.
        wait: until it is ready.
        ready_timeout_s: for how long; nothing is said in the meantime.
        flags: of the command, beside its ports.
    """
    ports = Ports.free()
    arguments = [f"--{name}-port={port}" for name, port in vars(ports).items()]
    command = [sys.executable, "-m", "icportrait.server", f"--repository={repository}", *arguments, *flags]
    with (
        temporary_folder(folder) as environment,
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


@contextmanager
def temporary_folder(folder: Path) -> Iterator[dict[str, str]]:
    """Yield the environment of a process that keeps its temporary files in ``folder``.

    The environment names a link, because the folder's own name may be too long for a socket's path.
    """
    with tempfile.TemporaryDirectory(prefix="ic-") as short:
        link = Path(short) / "t"
        link.symlink_to(folder, target_is_directory=True)
        yield {**os.environ, "TMPDIR": str(link)}


def runs(pid: int) -> bool:
    """Tell whether a process runs; a process that its parent hasn't waited for yet has ended."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


def name(pid: int) -> str:
    """Read a process's name from /proc; nothing where the process has ended."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/comm").read_text().strip()
    return ""


def arguments(pid: int) -> bytes:
    """Read a process's command line from /proc; nothing where the process has ended."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    return b""


def children(pid: int) -> list[int]:
    """List the process's own children, from /proc; none where the process has ended."""
    found = []
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        with contextlib.suppress(OSError):  # the thread has just ended
            found += [int(child) for child in task.read_text().split()]
    return found


def descendants(pid: int) -> list[int]:
    """List the process's children and theirs."""
    own = children(pid)
    return own + [grandchild for child in own for grandchild in descendants(child)]


def named_processes(gateway: int) -> dict[int, str]:
    """Name each process of a server by its part; a process that has just ended has no name."""
    named = {gateway: "gateway"}
    models = {stub.pid: stub.model for stub in stub_processes(gateway)}
    for pid in descendants(gateway):
        is_worker, is_tracker = b"spawn_main" in arguments(pid), b"resource_tracker" in arguments(pid)
        named[pid] = models.get(pid) or (is_worker and "pictures") or (is_tracker and "tracker") or name(pid)
    return named


def resident_bytes(pid: int) -> int:
    """Read a process's resident memory."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
