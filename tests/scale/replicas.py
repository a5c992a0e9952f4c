"""Servers of a fleet, each with the ports that it keeps over its restarts."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from icportrait.deploy.stub_processes import dying_with_parent
from icportrait.server import HOST, Ports
from tests.conftest import ROOT
from tests.e2e.caller import series
from tests.e2e.supervised import descendants, temporary_folder

READY_TIMEOUT_S = 120.0
POLL_S = 0.05
STARTING = 19
"""Niceness of a server that starts, because all servers share the cores; a machine of its own would take nobody's."""


@dataclass(eq=False)
class Replica:
    """A server's process, and its successors."""

    name: str
    repository: Path
    folder: Path
    """Folder of this replica alone; made here."""
    flags: tuple[str, ...] = ()
    ports: Ports = field(default_factory=Ports.free)
    process: subprocess.Popen[bytes] | None = None
    start_s: list[float] = field(default_factory=list)
    """Seconds from each start until it was ready."""

    @property
    def url(self) -> str:
        return f"{HOST}:{self.ports.grpc}"

    @property
    def metrics_url(self) -> str:
        return f"{HOST}:{self.ports.metrics}"

    def begin(self, in_background: bool = False) -> float:
        """Start the process, and return the moment; it is ready later.

        Args:
            in_background: let other processes go before it until it is ready, where the system allows that (to root).
        """
        assert self.process is None
        self.folder.mkdir(exist_ok=True)
        ports = [f"--{name}-port={port}" for name, port in vars(self.ports).items()]
        command = [sys.executable, "-m", "icportrait.server", f"--repository={self.repository}", *ports, *self.flags]
        nice = ["nice", f"-n{STARTING}"] if in_background and os.geteuid() == 0 else []
        self._stack = contextlib.ExitStack()
        environment = self._stack.enter_context(temporary_folder(self.folder))
        log = self._stack.enter_context((self.folder / "server.log").open("ab"))
        self.process = subprocess.Popen(
            [*nice, *dying_with_parent(signal.SIGTERM, command)], stdout=log, stderr=log, cwd=ROOT, env=environment
        )
        return time.monotonic()

    def start(self, in_background: bool = False) -> None:
        """Start the process, and wait until it is ready."""
        self.until_ready(self.begin(in_background))

    def until_ready(self, began_s: float) -> None:
        """Wait until it is ready, and note the time that it took."""
        assert self.process
        while not self.is_ready():
            assert self.process.poll() is None, f"it has ended: {self.log()[-2000:]}"
            assert time.monotonic() < began_s + READY_TIMEOUT_S, f"it isn't ready: {self.log()[-2000:]}"
            time.sleep(POLL_S)
        self.start_s.append(time.monotonic() - began_s)
        if os.geteuid() == 0:
            for pid in (self.process.pid, *descendants(self.process.pid)):
                for thread in Path(f"/proc/{pid}/task").glob("*"):
                    with contextlib.suppress(ProcessLookupError):
                        os.setpriority(os.PRIO_PROCESS, int(thread.name), 0)

    def is_ready(self) -> bool:
        """Ask over HTTP, as a balancer does."""
        try:
            with urllib.request.urlopen(f"http://{HOST}:{self.ports.http}/v2/health/ready", timeout=2) as answer:
                return bool(answer.status == 200)
        except (OSError, urllib.error.URLError):
            return False

    def answered(self) -> float:
        """Read how many requests it has answered with portraits since its start."""
        return series(self.metrics_url).get("icportrait_answers_total", 0.0)

    def kill(self) -> None:
        """End it in the midst of its work."""
        assert self.process
        self.process.kill()
        self._ended()

    def stop(self) -> None:
        """Let it answer what it has admitted, and end."""
        if self.process:
            self.process.terminate()
            assert self._ended() == 0, self.log()[-2000:]

    def log(self) -> str:
        return (self.folder / "server.log").read_text(errors="replace")

    def _ended(self) -> int:
        assert self.process
        status = self.process.wait(60)
        self.process = None
        self._stack.close()
        return status


@contextmanager
def running(*replicas: Replica) -> Iterator[None]:
    """Start replicas side by side; stop those that run at the end."""
    try:
        for replica, began_s in [(replica, replica.begin()) for replica in replicas]:
            replica.until_ready(began_s)
        yield
    finally:
        for replica in replicas:
            if replica.process:
                replica.kill() if sys.exc_info()[0] else replica.stop()
