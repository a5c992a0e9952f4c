"""Run a model repository on a tritonserver: ``python -m icportrait.server``.

The server binary and its Python backend come from the nvidia-pytriton wheel; no container and no root are needed. Only
a repository for runtime ``tensorrt`` takes the tritonserver that is on PATH, which NVIDIA's container brings. The
server listens on loopback only. When a part of it ends, the whole is started again (``supervisor``).
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import http.client
import json
import math
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import FrameType

from icportrait.errors import IcPortraitError
from icportrait.installation import find_installation
from icportrait.machine_memory import oom_kills
from icportrait.memory import threads_a_model
from icportrait.policy import POLICY_VARIABLE
from icportrait.runtime.shared_device import DEVICE_FOLDER
from icportrait.startup import check_plans, fit_memory, repository_policy, simulation_note
from icportrait.stub_processes import StubProcess, describe, stub_processes
from icportrait.supervisor import Ending, keep_running

HOST = "127.0.0.1"
SHM = Path("/dev/shm")
GPU_DEVICE = Path("/dev/nvidiactl")
STOP_GRACE_S = 30
"""How long what runs may take to end when the server stops."""
BROKEN_GRACE_S = 0.5
"""How long answers that are on their way may take once a part has ended."""
KILLED_S = 5
"""How long killed processes may take to let go of a GPU's memory."""
KILL_TAKES_S = 30.0
"""How long after the kernel has counted a kill for want of memory the killed process may still be seen to run."""
NOT_EPHEMERAL = range(16384, 32768)
"""Ports below those that Linux gives to outgoing connections."""


@dataclass(frozen=True)
class Ports:
    """The TCP ports of one server."""

    grpc: int = 8001
    http: int = 8000
    metrics: int = 8002

    @classmethod
    def free(cls) -> Ports:
        """Three ports that nothing listens on now, and that no outgoing connection takes while a server restarts."""
        with contextlib.ExitStack() as stack:
            return cls(*(stack.enter_context(_bound_socket()).getsockname()[1] for _ in range(3)))

    def check_free(self) -> None:
        """Raise IcPortraitError naming a port that can't be used."""
        for name, port in vars(self).items():
            variable = f"{name.upper()}_PORT"
            if not 1 <= port <= 65535 or list(vars(self).values()).count(port) > 1:
                raise IcPortraitError(f"{variable} is {port}, expected 1..65535 and three different ports")
            with socket.socket() as probe:
                if probe.connect_ex((HOST, port)) == 0:
                    raise IcPortraitError(f"port {port} is taken; choose another with {variable}=NUMBER")


def _bound_socket() -> socket.socket:
    while True:
        bound = socket.socket()
        try:
            bound.bind((HOST, random.choice(NOT_EPHEMERAL)))
        except OSError:
            bound.close()
        else:
            return bound


@dataclass
class TritonServer:
    """One tritonserver process with its Python backend, from start to a clean end.

    Use as a context manager: entering starts the process and returns when every model is ready, leaving stops it and
    removes what it kept in shared memory. The process also ends when the thread that started it does.
    """

    repository: Path
    ports: Ports = field(default_factory=Ports)
    log_file: Path | None = None
    """Where the server's own log goes; standard error where None."""
    ready_timeout_s: float = 300.0
    say: Callable[[str], object] = lambda _: None
    """Takes a line on what was chosen for this machine."""
    _process: subprocess.Popen[bytes] | None = None
    _stubs: list[StubProcess] = field(default_factory=list)
    _oom_kills: int = 0
    """The kernel's count when it was last looked at,"""
    _oom_killed_at: float = -math.inf
    """and when it was last seen to rise."""

    def __enter__(self) -> TritonServer:
        self.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.stop()

    @property
    def grpc_url(self) -> str:
        return f"{HOST}:{self.ports.grpc}"

    @property
    def http_url(self) -> str:
        return f"{HOST}:{self.ports.http}"

    @property
    def metrics_url(self) -> str:
        return f"{HOST}:{self.ports.metrics}"

    @property
    def shm_prefix(self) -> str:
        """Names this server's shared-memory regions, so that none of another server's is ever touched."""
        return f"icportrait_{os.getpid()}_{self.ports.grpc}_"

    def start(self) -> None:
        """Start the process and wait until every model is ready.

        Raises:
            RuntimeNotAvailable: no server is installed, this Python has no shared library, or the repository's runtime
                can't run here.
            PlanError: a plan in the repository was changed, or built by another TensorRT.
            NotEnoughMemory: the server would need more than there is.
            IcPortraitError: a port is taken, or the server or a part of it ended or didn't get ready in time.
        """
        self.ports.check_free()
        policy = repository_policy(self.repository)
        installation = find_installation(policy.runtime)
        check_plans(self.repository, policy.runtime, installation)
        fitted, summary = fit_memory(self.repository, policy)
        if summary:
            self.say(summary)
        chosen = {"slots": str(fitted.slots), "rows_at_once": str(fitted.rows_at_once)}
        environment = installation.environment() | {POLICY_VARIABLE: json.dumps(chosen)}
        self._oom_kills, self._oom_killed_at = oom_kills(), -math.inf
        self._folder = tempfile.TemporaryDirectory(prefix="icportrait-server-")
        folder = Path(self._folder.name)
        backends = installation.prepare_backends(folder / "backends")
        (folder / DEVICE_FOLDER).mkdir()
        # The Python backend starts its stubs through a shell, unquoted: it gets a path without spaces.
        (folder / "repository").symlink_to(self.repository.resolve(), target_is_directory=True)
        command = [
            str(installation.binary),
            f"--model-repository={folder / 'repository'}",
            f"--backend-directory={backends}",
            f"--cache-directory={installation.root / 'caches'}",
            f"--backend-config=python,shm-region-prefix-name={self.shm_prefix}",
            f"--backend-config=python,thread-pool-size={threads_a_model(policy)}",
            *(f"--{name}-address={HOST}" for name in ("grpc", "http", "metrics")),
            *(f"--{name}-port={port}" for name, port in vars(self.ports).items()),
            "--exit-on-error=true",
            f"--exit-timeout-secs={STOP_GRACE_S}",
            # The generated configurations are complete, and completing one starts its model's process twice.
            "--disable-auto-complete-config",
            "--log-info=false",
            *([] if GPU_DEVICE.exists() else ["--allow-gpu-metrics=false", "--pinned-memory-pool-byte-size=0"]),
        ]
        log = self.log_file.open("wb") if self.log_file else None
        # A session of its own keeps a terminal's Ctrl-C from the server: it is stopped by stop(), in order.
        self._process = subprocess.Popen(
            command,
            env=environment,
            stdout=log,
            stderr=subprocess.STDOUT if log else None,
            start_new_session=True,
            preexec_fn=_end_with_parent,
        )
        if log:
            log.close()
        try:
            self._wait_ready()
            self._find_stubs()
        except BaseException:
            self.stop()
            raise

    def poll(self) -> int | None:
        """The process's exit status, None while it runs."""
        return self._process.poll() if self._process else 0

    def what_ended(self) -> Ending | None:
        """Which part of the server has ended, and how, though it wasn't stopped; None while all of it runs."""
        self._look_for_oom_kills()
        if (status := self.poll()) is not None:
            return self._ending("tritonserver", describe(status))
        endings = ((stub.model, stub.ending()) for stub in self._stubs)
        return next(
            (self._ending(f"the process of model {model}", ending) for model, ending in endings if ending), None
        )

    def _ending(self, part: str, ending: str) -> Ending:
        for_memory = ending == describe(-signal.SIGKILL) and time.monotonic() - self._oom_killed_at < KILL_TAKES_S
        return Ending(f"{part} {'was killed for want of memory' if for_memory else ending}", for_memory)

    def _look_for_oom_kills(self) -> None:
        if (kills := oom_kills()) > self._oom_kills:
            self._oom_kills, self._oom_killed_at = kills, time.monotonic()

    def stop(self) -> None:
        """Stop the process and everything it started, and remove its shared memory; where that was cut off, go on."""
        if self._process is None:
            return
        if self._process.poll() is None:
            if self.what_ended():
                # Triton would wait for what never ends and answer NOT_FOUND; a connection that breaks is UNAVAILABLE.
                time.sleep(BROKEN_GRACE_S)
            else:
                self._process.terminate()
                with contextlib.suppress(subprocess.TimeoutExpired):
                    self._process.wait(STOP_GRACE_S)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        deadline = time.monotonic() + KILLED_S
        while any(stub.ending() is None for stub in self._stubs) and time.monotonic() < deadline:
            time.sleep(0.01)
        self._folder.cleanup()
        for region in SHM.glob(f"{self.shm_prefix}*"):
            region.unlink(missing_ok=True)
        self._process, self._stubs = None, []

    def _find_stubs(self) -> None:
        """Remember the models' processes; one that has ended since it was loaded makes the start fail."""
        assert self._process is not None
        self._stubs = stub_processes(self._process.pid)
        expected = {path.parents[1].name for path in self.repository.glob("*/*/model.py")}
        if lost := expected - {stub.model for stub in self._stubs}:
            raise IcPortraitError(f"model {min(lost)}: its process ended before the server was ready{self._cause()}")

    def _wait_ready(self) -> None:
        deadline = time.monotonic() + self.ready_timeout_s
        while time.monotonic() < deadline:
            if (status := self.poll()) is not None:
                raise IcPortraitError(f"tritonserver ended with status {status} before it was ready{self._cause()}")
            if self._is_ready():
                return
            time.sleep(0.1)
        raise IcPortraitError(f"tritonserver was not ready after {self.ready_timeout_s:.0f} s{self._log_hint()}")

    def _is_ready(self) -> bool:
        # http.client and not urllib, which would ask a configured proxy for a loopback address.
        connection = http.client.HTTPConnection(HOST, self.ports.http, timeout=2)
        try:
            connection.request("GET", "/v2/health/ready")
            return connection.getresponse().status == http.HTTPStatus.OK
        except (OSError, http.client.HTTPException):
            return False
        finally:
            connection.close()

    def _cause(self) -> str:
        """What a failed start may be due to: where a part was killed, tritonserver ends by itself, with a status."""
        if oom_kills() == self._oom_kills:
            return self._log_hint()
        return (
            "; meanwhile the kernel has killed a process for want of memory: end other programs, allow more memory, or "
            f"serve a smaller preset{self._log_hint()}"
        )

    def _log_hint(self) -> str:
        if self.log_file is None:
            return "; its output above has the cause"
        tail = self.log_file.read_text(errors="replace").splitlines()[-15:]
        return f"; the end of {self.log_file}:\n" + "\n".join(tail)


def _end_with_parent() -> None:
    """Ask the kernel to end the server when this process dies without having stopped it."""
    pr_set_pdeathsig = 1
    ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGTERM)


class _StopRequested(BaseException):
    """SIGINT or SIGTERM came."""


def _stop_on_signals() -> None:
    """Let the first SIGINT or SIGTERM end the program in order, also where a shell had them ignored."""
    numbers = (signal.SIGINT, signal.SIGTERM)

    def stop(_number: int, _frame: FrameType | None) -> None:
        for number in numbers:
            signal.signal(number, signal.SIG_IGN)
        raise _StopRequested

    for number in numbers:
        signal.signal(number, stop)


def main(argv: list[str] | None = None) -> int:
    ports = Ports()
    parser = argparse.ArgumentParser(prog="python -m icportrait.server", description=__doc__.splitlines()[0])
    parser.add_argument("--repository", type=Path, required=True, help="assembled by python -m icportrait.repository")
    for name, port in vars(ports).items():
        parser.add_argument(f"--{name}-port", type=int, default=port, help="default: %(default)s")
    args = parser.parse_args(argv)
    say = partial(print, flush=True)
    server = TritonServer(args.repository, Ports(args.grpc_port, args.http_port, args.metrics_port), say=say)
    _stop_on_signals()
    say(f"starting tritonserver on {args.repository}")
    if not GPU_DEVICE.exists():
        say("without a GPU, what tritonserver says of CUDA and of pinned memory is no fault")
    try:
        note = simulation_note(args.repository)
        ready = f"ready: gRPC {server.grpc_url}, HTTP {server.http_url}, metrics {server.metrics_url}"
        keep_running(server, say, f"{ready}; {note}" if note else ready)
    except IcPortraitError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except _StopRequested:
        say("stopped")
    return 0


if __name__ == "__main__":
    sys.exit(main())
