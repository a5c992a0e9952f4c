"""Serve a model repository: ``python -m icportrait.server``, or ``icportrait-server``.

This process is the gateway (``gateway.main``), which starts a private Triton, and starts it again when a part of it
ends. It listens on loopback where no setting says otherwise. SIGTERM, SIGINT and SIGHUP end it once all that it has let
in is answered. ``icportrait-server config`` prints the settings that a run would have, ``icportrait-server doctor``
looks at the machine, and ``icportrait-server key`` makes an API key.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import queue
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from icportrait.deploy.stub_processes import dying_with_parent, log_hint
from icportrait.errors import IcPortraitError

if TYPE_CHECKING:
    from icportrait.gateway.settings import Settings

HOST = "127.0.0.1"
NOT_EPHEMERAL = range(16384, 32768)
"""Ports below those that Linux gives to outgoing connections."""
PORT_SHARES = 32
"""Shares of these ports, of which a process chooses from one."""
_given = set[int]()
"""Ports that this process has chosen."""
STOP_TIMEOUT_S = 60.0
"""Seconds that a process of ``ServerProcess`` has to end; the server's own limit is shorter."""


@dataclass(frozen=True)
class Ports:
    """The TCP ports of one server."""

    grpc: int = 8001
    http: int = 8000
    metrics: int = 8002

    @classmethod
    def free(cls) -> Ports:
        """Find three ports that nothing listens on, and that no outgoing connection takes while a server restarts."""
        with contextlib.ExitStack() as stack:
            return cls(*(stack.enter_context(_bound_socket()).getsockname()[1] for _ in range(3)))


def _bound_socket() -> socket.socket:
    # Processes that start servers side by side, as tests do, would else now and then choose the same one in between.
    own = NOT_EPHEMERAL[os.getpid() % PORT_SHARES :: PORT_SHARES]
    while True:
        # A server that is given ports may listen on them later, when others have got theirs.
        port = random.choice([each for each in own if each not in _given] or own)
        bound = socket.socket()
        try:
            bound.bind((HOST, port))
        except OSError:
            bound.close()
        else:
            _given.add(port)
            return bound


@dataclass
class ServerProcess:
    """A server in a process of its own, from start to a clean end.

    Use as a context manager: entering starts it and returns when it is ready. It also ends when the thread that started
    it does.
    """

    repository: Path
    ports: Ports = field(default_factory=Ports)
    log_file: Path | None = None
    """File for the logs of the server and of Triton; standard error where None."""
    ready_timeout_s: float = 900.0
    say: Callable[[str], object] = lambda _: None
    """Takes the lines that it says."""
    flags: tuple[str, ...] = ()
    """Others of ``icportrait-server``."""
    process: subprocess.Popen[str] | None = None

    def __enter__(self) -> ServerProcess:
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

    def start(self) -> None:
        """Start the server, and wait until the server is ready.

        Raises:
            IcPortraitError: it has ended before that, with its own words; or it wasn't ready in time.
        """
        ports = [f"--{name}-port={port}" for name, port in vars(self.ports).items()]
        server = [sys.executable, "-m", "icportrait.server", f"--repository={self.repository}", *ports, *self.flags]
        with contextlib.ExitStack() as stack:
            log = stack.enter_context(self.log_file.open("w")) if self.log_file else None
            self.process = subprocess.Popen(
                dying_with_parent(signal.SIGTERM, server),
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                start_new_session=True,
            )
        lines: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        threading.Thread(target=self._read, args=(self.process, lines), daemon=True).start()
        deadline = time.monotonic() + self.ready_timeout_s
        try:
            while not (line := lines.get(timeout=max(0, deadline - time.monotonic())) or "").startswith("ready"):
                if not line:
                    raise IcPortraitError(f"the server has ended before it was ready{log_hint(self.log_file)}")
        except queue.Empty:
            self.stop()
            raise IcPortraitError(
                f"the server was not ready after {self.ready_timeout_s:.0f} s{log_hint(self.log_file)}"
            ) from None
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        """Let the server answer the requests that it has let in, and end."""
        if self.process is None:
            return
        self.process.terminate()
        try:
            self.process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.process = None

    def _read(self, process: subprocess.Popen[str], lines: queue.SimpleQueue[str | None]) -> None:
        assert process.stdout
        with process.stdout:
            for line in process.stdout:
                self.say(line.rstrip("\n"))
                lines.put(line)
        lines.put(None)


def main(argv: list[str] | None = None) -> int:
    from icportrait.gateway.settings import add_flags, read_settings

    parser = argparse.ArgumentParser(prog="icportrait-server", description=__doc__.splitlines()[0])
    parser.add_argument(
        "command",
        nargs="?",
        choices=("serve", "config", "doctor", "key"),
        default="serve",
        help="serve; config prints the settings that a run would have; doctor says what on this machine is in the way "
        "of a run; key makes an API key (default: serve)",
    )
    parser.add_argument("name", nargs="?", help="of the key")
    parser.add_argument("--json", action="store_true", help="of doctor: print JSON")
    add_flags(parser)
    args = parser.parse_args(argv)
    try:
        if args.command == "key":
            return _make_key(args.name)
        settings = read_settings(args)
        if args.command == "config":
            print(settings.to_toml(), end="")
            return 0
        if args.command == "doctor":
            return _examine(settings, args.json)
        if settings.repository is None:
            raise IcPortraitError(
                "repository: missing, expected a folder assembled by python -m icportrait.deploy.repository"
            )
        from icportrait.gateway.main import run

        try:
            run(settings, _say)
        finally:
            _let_go_of_output()
    except IcPortraitError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def _say(line: str) -> None:
    """Write a line for the operator; where it can't be written, the service goes on.

    Several devices' engines may speak at once, each in a thread. What is written as one stays one.
    """
    with contextlib.suppress(OSError):
        print(f"{line}\n", end="", flush=True)


def _let_go_of_output() -> None:
    """Flush the standard streams, and drop output that can't be written, because Python would fail the run for it."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            with Path(os.devnull).open("wb") as nowhere:
                os.dup2(nowhere.fileno(), stream.fileno())


def _examine(settings: Settings, as_json: bool) -> int:
    from icportrait.gateway.doctor import examine, is_fit, to_json, to_table

    findings = examine(settings)
    print(to_json(findings) if as_json else to_table(findings))
    return 0 if is_fit(findings) else 1


def _make_key(name: str | None) -> int:
    from icportrait.gateway.access import new_key

    if not name:
        raise IcPortraitError("key: its name is missing, as in: icportrait-server key studio")
    key, section = new_key(name)
    # So that >> can't put the key itself into a file.
    print(section, end="")
    print(f"the key, for its caller; it is written nowhere: {key}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
