"""A server under chaos. It is started again when it ends, as a unit of systemd with ``Restart=on-failure`` would be."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from icportrait.deploy.repository import assemble
from icportrait.deploy.stub_processes import dying_with_parent
from icportrait.policy import ServingPolicy
from icportrait.server import HOST, Ports
from tests.chaos import faulty
from tests.conftest import ROOT
from tests.e2e.caller import series
from tests.e2e.supervised import STOP_TIMEOUT_S, Supervised
from tests.exports import shared_export

STARTS, LOST_WORKERS = "icportrait_gateway_engine_starts_total", "icportrait_gateway_picture_workers_lost_total"
READY_TIMEOUT_S = 60.0
RESTART_S = 0.1
"""systemd's own pause before it starts a unit again."""
POLL_S = 0.02
ENGINES = {
    "denoise": ("context.slots()", 'faulty("unet", context.slots(), "wait")'),
    "vae_encoder": ('context.engine("vae_encoder")', 'faulty("vae_encoder", context.engine("vae_encoder"), "run")'),
    "vae_decoder": ('context.engine("vae_decoder")', 'faulty("vae_decoder", context.engine("vae_decoder"), "run")'),
}
"""The place in each model's code where its engine is loaded, and the same with faults to order."""


def make_repository(folder: Path, cache_bytes: int = 0) -> Path:
    """Assemble the tests' small export, with real networks, as a repository whose engines fail on demand.

    Args:
        folder: for the repository.
        cache_bytes: of the encoder's cache; without one, every request runs every engine.
    """
    policy = ServingPolicy(slots=4, engine_threads=1, cache_bytes=cache_bytes)
    assemble(shared_export("small"), folder / "repository", policy)
    for model, (loads, loads_faulty) in ENGINES.items():
        version = folder / "repository" / model / "1"
        code = (version / "model.py").read_text()
        assert loads in code
        shutil.copy(faulty.__file__, version)
        (version / "model.py").write_text(
            "import pathlib, sys\n\nsys.path.insert(0, str(pathlib.Path(__file__).parent))\n"
            f"from faulty import faulty\n{code.replace(loads, loads_faulty)}"
        )
        for graph in version.glob("*.onnx"):  # a link to the export's, which no test may change
            copy = graph.read_bytes()
            graph.unlink()
            graph.write_bytes(copy)
    return folder / "repository"


class Site:
    """The server's process, the next one when it has ended, and what a test reads of it from outside."""

    def __init__(
        self, repository: Path, folder: Path, environment: Mapping[str, str] = {}, flags: tuple[str, ...] = ()
    ) -> None:
        """Prepare; ``start`` starts it.

        Args:
            repository: to be served.
            folder: of this site alone, for its log, its temporary files and the ordered faults.
            environment: of the server, beside this process's own.
            flags: of the server's command, beside its ports.
        """
        self.repository, self.folder, self.ports = repository, folder, Ports.free()
        self.url, self.http_url = f"{HOST}:{self.ports.grpc}", f"{HOST}:{self.ports.http}"
        self.metrics_url = f"{HOST}:{self.ports.metrics}"
        self.faults = folder / "faults"
        self.faults.mkdir(parents=True)
        self.ends: list[int] = []
        """The statuses with which processes have ended before they were to."""
        self._environment = {**os.environ, **environment, "TMPDIR": str(folder), faulty.FOLDER: str(self.faults)}
        self._flags = flags
        self._stopping = threading.Event()
        self._server: Supervised | None = None
        self._keeper = threading.Thread(target=self._keep, name="keeper", daemon=True)

    @property
    def server(self) -> Supervised:
        assert self._server
        return self._server

    def start(self) -> float:
        """Start it, and return the seconds until it was ready."""
        began_s = time.monotonic()
        self._keeper.start()
        self.until(self.is_ready)
        return time.monotonic() - began_s

    def stop(self) -> None:
        """End it."""
        self._stopping.set()
        if self._server:
            self._server.process.terminate()
            self._keeper.join(STOP_TIMEOUT_S)

    def order(self, engine: str, fault: str) -> None:
        """Order a fault of an engine's next run."""
        (self.faults / f".{engine}").write_text(fault)
        (self.faults / f".{engine}").rename(self.faults / engine)

    def is_ready(self) -> bool:
        """Ask over HTTP, as a load balancer does."""
        try:
            with urllib.request.urlopen(f"http://{self.http_url}/v2/health/ready", timeout=2) as answer:
                return bool(answer.status == 200)
        except (OSError, urllib.error.URLError):
            return False

    def metric(self, name: str) -> float:
        """Read a series; NaN while there is no server."""
        try:
            return series(self.metrics_url).get(name, 0.0)
        except OSError:
            return float("nan")

    def until(self, holds: Callable[[], bool], timeout_s: float = READY_TIMEOUT_S) -> None:
        """Wait until something holds."""
        end_s = time.monotonic() + timeout_s
        while not holds():
            if time.monotonic() > end_s:
                raise TimeoutError(f"not within {timeout_s:g} s; the end of the log:\n{self.log()[-2000:]}")
            time.sleep(POLL_S)

    def log(self) -> str:
        """Read the output of all processes by now."""
        return (self.folder / "server.log").read_text(errors="replace")

    def _keep(self) -> None:
        ports = [f"--{name}-port={port}" for name, port in vars(self.ports).items()]
        command = [sys.executable, "-m", "icportrait.server", f"--repository={self.repository}", *ports, *self._flags]
        while not self._stopping.is_set():
            with (self.folder / "server.log").open("a") as log:
                process = subprocess.Popen(
                    dying_with_parent(15, command),  # type: ignore[arg-type]
                    stdout=subprocess.PIPE,
                    stderr=log,
                    text=True,
                    cwd=ROOT,
                    env=self._environment,
                )
            self._server = Supervised(process, self.ports, self.folder)
            status = process.wait()
            if self._stopping.wait(RESTART_S):
                return
            self.ends.append(status)


@contextmanager
def running(site: Site) -> Iterator[float]:
    """Start a site, yield the seconds until it was ready, and stop it."""
    try:
        yield site.start()
    finally:
        site.stop()
