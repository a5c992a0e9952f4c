"""A tritonserver of one's own: nobody but its starter reaches it, over Unix sockets in a folder that nobody may enter.

The server binary and its Python backend come from the nvidia-pytriton wheel; no container and no root are needed. Only
a repository for runtime ``tensorrt`` takes the tritonserver that is on PATH, which NVIDIA's container brings.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from icportrait.deploy import heap
from icportrait.deploy.installation import find_installation
from icportrait.deploy.leftovers import Run, remove_leftovers
from icportrait.deploy.machine_memory import oom_kills
from icportrait.deploy.preflight import check_graphs, check_plans, check_shared_memory, fit_memory, repository_policy
from icportrait.deploy.stub_processes import (
    StubProcess,
    describe,
    dying_with_parent,
    is_stopped,
    log_hint,
    stub_processes,
)
from icportrait.deploy.supervisor import Ending
from icportrait.errors import IcPortraitError, NotEnoughMemory
from icportrait.policy import LOOP_VARIABLE, POLICY_VARIABLE
from icportrait.runtime.cuda import only_visible
from icportrait.runtime.shared_device import DEVICE_FOLDER

GPU_DEVICE = Path("/dev/nvidiactl")
STOP_GRACE_S = 30
"""Time that running requests may take to end when the server is asked to stop."""
KILLED_S = 5
"""Time that killed processes may take to let go of a GPU's memory."""
KILL_TAKES_S = 30.0
"""Time for which a process that the kernel has killed for want of memory may still be seen to run."""
STARTS = 3
"""Starts that may be aborted.

Where four servers started at once on two busy cores, two of ten tritonservers were aborted before they were ready, one
of them by ``boost::interprocess::lock_exception``. The cause isn't known.
"""
LOOK_EVERY_S = 1.0
"""So often a start looks for processes that a signal has stopped."""


class _AbortedError(IcPortraitError):
    """A tritonserver that has ended by SIGABRT before it was ready."""


def clear_leftovers(say: Callable[[str], object]) -> None:
    """Remove what servers that were killed have left, and say what it was."""
    for leftover in remove_leftovers():
        say(f"removed what a server that was killed has left: {leftover}")


@dataclass
class TritonServer:
    """One tritonserver process with its Python backend, from start to a clean end; it can be started again.

    Use as a context manager: entering starts the process and returns when every model is ready, leaving stops it and
    removes what it kept. The process is also killed when the thread that started it ends.
    """

    repository: Path
    log_file: Path | None = None
    """File for the server's own log; None is standard error."""
    ready_timeout_s: float = 900.0
    say: Callable[[str], object] = lambda _: None
    """Takes a line on what was chosen for this machine."""
    overrides: Mapping[str, str] = field(default_factory=dict)
    """Parameters of the policy that go before the repository's own."""
    device: str | None = None
    """The only GPU that it sees, by number or UUID; None shows it all."""
    _process: subprocess.Popen[bytes] | None = None
    _run: Run | None = None
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
    def directory(self) -> Path:
        """Return the sockets' directory; each start has another."""
        assert self._run is not None
        return self._run.folder

    @property
    def grpc_address(self) -> str:
        """Return the address for gRPC clients."""
        return f"unix:{self.directory / 't:1'}"

    @property
    def metrics_path(self) -> Path:
        """Return the socket that serves HTTP's ``/metrics``."""
        return self.directory / "m"

    @property
    def loop_path(self) -> Path:
        """Return the control line's socket."""
        return self.directory / "loop"

    @property
    def pid(self) -> int:
        """Return the server's process id."""
        assert self._process is not None
        return self._process.pid

    @property
    def stubs(self) -> list[StubProcess]:
        """Return the models' processes."""
        return list(self._stubs)

    def start(self) -> None:
        """Start the process and wait until every model is ready; start it again where it is aborted before.

        Raises:
            RuntimeNotAvailable: no server is installed, this Python has no shared library, or the repository's runtime
                can't run here.
            CheckpointError: a graph in the repository is missing or was changed.
            PlanError: a plan in the repository was changed, or built by another TensorRT.
            NotEnoughMemory: the server would need more than there is.
            IcPortraitError: there is no room for its files, or the server or a part of it ended, was stopped by a
                signal, or didn't get ready in time.
        """
        deadline = time.monotonic() + self.ready_timeout_s
        for left in reversed(range(STARTS)):
            try:
                return self._start(deadline)
            except _AbortedError as error:
                if not left:
                    raise
                self.say(f"tritonserver is started again: {error}")

    def _start(self, deadline: float) -> None:
        policy = repository_policy(self.repository, self.overrides)
        installation = find_installation(policy.runtime)
        check_plans(self.repository, policy.runtime, installation, self.device)
        check_graphs(self.repository, policy)
        fitted, summary = fit_memory(self.repository, policy)
        if summary:
            self.say(summary)
        clear_leftovers(self.say)
        check_shared_memory(self.repository, fitted)
        chosen = {**self.overrides, "slots": str(fitted.slots), "rows_at_once": str(fitted.rows_at_once)}
        self._oom_kills, self._oom_killed_at = oom_kills(), -math.inf
        try:
            self._run = Run()
            folder = self.directory
            environment = heap.environment(policy.runtime) | installation.environment()
            environment |= only_visible(self.device)
            environment |= {POLICY_VARIABLE: json.dumps(chosen), LOOP_VARIABLE: str(self.loop_path)}
            backends = installation.prepare_backends(folder / "backends")
            (folder / DEVICE_FOLDER).mkdir()
            # The Python backend starts its stubs through a shell, unquoted: it gets a path without spaces.
            (folder / "repository").symlink_to(self.repository.resolve(), target_is_directory=True)
            command = [
                str(installation.binary),
                f"--model-repository={folder / 'repository'}",
                f"--backend-directory={backends}",
                f"--cache-directory={installation.root / 'caches'}",
                f"--backend-config=python,shm-region-prefix-name={self._run.shm_prefix}",
                "--allow-http=false",
                # Its file is called t:1, and the metrics' m.
                f"--grpc-address=unix:{folder / 't'}",
                "--grpc-port=1",
                # Else each of its two handlers of gRPC keeps the messages of eight calls, to use their memory again:
                # after requests for eight portraits of 512 px, 16 times 8 MB.
                "--grpc-infer-allocation-pool-size=0",
                f"--metrics-address=unix:{folder / 'm'}",
                "--metrics-port=1",
                "--exit-on-error=true",
                f"--exit-timeout-secs={STOP_GRACE_S}",
                # The generated configurations are complete, and completing one starts its model's process twice.
                "--disable-auto-complete-config",
                "--log-info=false",
                *([] if GPU_DEVICE.exists() else ["--allow-gpu-metrics=false", "--pinned-memory-pool-byte-size=0"]),
            ]
            with contextlib.ExitStack() as stack:
                log = stack.enter_context(self.log_file.open("wb")) if self.log_file else None
                # A session of its own keeps a terminal's Ctrl-C from the server: it is stopped by stop(), in order.
                self._process = subprocess.Popen(
                    dying_with_parent(signal.SIGKILL, command),
                    env=environment,
                    stdout=log,
                    stderr=subprocess.STDOUT if log else None,
                    start_new_session=True,
                )
            self._wait_ready(deadline)
            self._find_stubs()
        except OSError as error:
            self.kill()
            raise IcPortraitError(
                f"the server can't be started: {error}; make room in {tempfile.gettempdir()}, or name another folder "
                "with TMPDIR"
            ) from error
        except BaseException:
            self.kill()
            raise

    def poll(self) -> int | None:
        """Return the process's exit status, None while the process runs."""
        return self._process.poll() if self._process else 0

    def what_ended(self) -> Ending | None:
        """Return the part of the server that has ended though it wasn't stopped, and how; None while all parts run."""
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
        """Ask the process to end, and ``kill`` what is left; where a part of it has ended, ``kill`` it at once."""
        # Triton would wait for what never ends.
        if self._process and not self.what_ended():
            self._process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(STOP_GRACE_S)
        self.kill()

    def interrupt(self) -> None:
        """Let a start that another thread waits for fail soon."""
        if process := self._process:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)

    def kill(self) -> None:
        """End the process and everything it started, and remove what it kept; where that was cut off, go on."""
        if self._process:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
            deadline = time.monotonic() + KILLED_S
            while any(stub.ending() is None for stub in self._stubs) and time.monotonic() < deadline:
                time.sleep(0.01)
        if self._run:
            self._run.remove()
        self._process, self._run, self._stubs = None, None, []

    def _find_stubs(self) -> None:
        """Remember the models' processes; one that has ended since it was loaded makes the start fail."""
        self._stubs = stub_processes(self.pid)
        expected = {path.parents[1].name for path in self.repository.glob("*/*/model.py")}
        if lost := expected - {stub.model for stub in self._stubs}:
            raise self._failed(f"model {min(lost)}: its process ended before the server was ready")

    def _wait_ready(self, deadline: float) -> None:
        look_at = time.monotonic()
        while time.monotonic() < deadline:
            if (status := self.poll()) is not None:
                error = self._failed(f"tritonserver ended with status {status} before it was ready")
                is_abort = status == -signal.SIGABRT and not isinstance(error, NotEnoughMemory)
                raise _AbortedError(str(error)) if is_abort else error
            if self._is_ready():
                return
            if time.monotonic() >= look_at:
                look_at = time.monotonic() + LOOK_EVERY_S
                if stopped := self._stopped_part():
                    raise IcPortraitError(f"{stopped} was stopped by a signal before the server was ready")
            time.sleep(0.05)
        raise IcPortraitError(f"tritonserver was not ready after {self.ready_timeout_s:.0f} s{log_hint(self.log_file)}")

    def _stopped_part(self) -> str | None:
        parts = [(self.pid, "tritonserver")]
        with contextlib.suppress(OSError):  # too many open files: there is no telling now
            parts += [(stub.pid, f"the process of model {stub.model}") for stub in stub_processes(self.pid)]
        return next((part for pid, part in parts if is_stopped(pid)), None)

    def _is_ready(self) -> bool:
        if not Path(self.grpc_address.removeprefix("unix:")).is_socket():
            return False
        import grpc
        from tritonclient.grpc import service_pb2, service_pb2_grpc

        with grpc.insecure_channel(self.grpc_address) as channel:
            stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
            try:
                return bool(stub.ServerReady(service_pb2.ServerReadyRequest(), timeout=2).ready)
            except grpc.RpcError:
                return False

    def _failed(self, text: str) -> IcPortraitError:
        """Return the error of a failed start: where a part was killed, tritonserver ends by itself, with a status."""
        if oom_kills() <= self._oom_kills:
            return IcPortraitError(f"{text}{log_hint(self.log_file)}")
        return NotEnoughMemory(
            f"{text}; meanwhile the kernel has killed a process for want of memory: end other programs, allow more "
            f"memory, or serve a smaller preset{log_hint(self.log_file)}"
        )
