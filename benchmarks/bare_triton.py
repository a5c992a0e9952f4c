"""A tritonserver as others run it: on TCP ports, without this project's gateway."""

from __future__ import annotations

import contextlib
import http.client
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from icportrait.deploy.installation import find_installation
from icportrait.deploy.leftovers import SHM
from icportrait.deploy.preflight import repository_policy
from icportrait.deploy.stub_processes import log_hint
from icportrait.errors import IcPortraitError
from icportrait.policy import LOOP_VARIABLE
from icportrait.server import HOST, Ports


@dataclass(frozen=True)
class BareTriton:
    """The server's addresses and its process."""

    grpc_url: str
    http_url: str
    metrics_url: str
    pid: int


@contextmanager
def bare_triton(repository: Path, log: Path) -> Iterator[BareTriton]:
    """Run a tritonserver on a repository until the block ends.

    Raises:
        IcPortraitError: the server ended before it was ready; the text is its log.
    """
    installation, ports = find_installation(repository_policy(repository).runtime), Ports.free()
    prefix = f"icportrait_bare_{ports.grpc}_"
    environment = {name: value for name, value in installation.environment().items() if name != LOOP_VARIABLE}
    with tempfile.TemporaryDirectory(prefix="icportrait-bare-") as folder, log.open("wb") as output:
        link = Path(folder) / "repository"
        link.symlink_to(repository.resolve(), target_is_directory=True)
        command = [
            str(installation.binary),
            f"--model-repository={link}",
            f"--backend-directory={installation.prepare_backends(Path(folder) / 'backends')}",
            f"--cache-directory={installation.root / 'caches'}",
            f"--backend-config=python,shm-region-prefix-name={prefix}",
            *(f"--{name}-address={HOST}" for name in ("grpc", "http", "metrics")),
            *(f"--{name}-port={port}" for name, port in vars(ports).items()),
            "--disable-auto-complete-config",
            "--log-info=false",
            "--allow-gpu-metrics=false",
            "--pinned-memory-pool-byte-size=0",
        ]
        with subprocess.Popen(command, env=environment, stdout=output, stderr=subprocess.STDOUT) as process:
            try:
                while not _is_ready(ports.http):
                    if process.poll() is not None:
                        raise IcPortraitError(f"tritonserver ended before it was ready{log_hint(log)}")
                    time.sleep(0.1)
                grpc_url, http_url, metrics_url = (f"{HOST}:{port}" for port in vars(ports).values())
                yield BareTriton(grpc_url, http_url, metrics_url, process.pid)
            finally:
                process.terminate()
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(40)
                process.kill()
                for region in SHM.glob(f"{prefix}*"):
                    region.unlink(missing_ok=True)


def _is_ready(port: int) -> bool:
    connection = http.client.HTTPConnection(HOST, port, timeout=2)
    try:
        connection.request("GET", "/v2/health/ready")
        return connection.getresponse().status == http.HTTPStatus.OK
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()
