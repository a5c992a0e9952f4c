"""The ways to balance calls over replicas: HAProxy and nginx with the committed files, and the client's own."""

from __future__ import annotations

import re
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

import pytest

from icportrait.server import HOST, Ports
from tests.conftest import ROOT
from tests.e2e.supervised import children
from tests.nginx import nginx_in, run_nginx, skip_without_nginx
from tests.scale.replicas import Replica

HAPROXY, NGINX = ROOT / "deploy" / "haproxy", ROOT / "deploy" / "nginx"
BACKENDS = ("grpc", "grpc_sticky", "http")
SERVERS = {"a": 8011, "b": 8021, "c": 8031}
"""gRPC ports of the files' servers; HTTP's is one less."""
OLD_WORKERS_S = 5.0
SPARE = tuple(f"spare{number}" for number in range(1, 6))
"""HAProxy's servers without an address of their own."""


class Balancer(Protocol):
    """A way to balance, to which replicas are added and from which they are taken."""

    name: str
    addresses: Sequence[str]
    """Addresses that a caller is given."""

    def add(self, replica: Replica) -> None:
        """Give a replica that is ready its share."""

    def drain(self, replica: Replica) -> None:
        """Give a replica nothing new; it has time to answer what it has."""


class ByClient:
    """The client asks each server whether it is ready, and needs to be told nothing."""

    name = "the client"

    def __init__(self, replicas: Sequence[Replica]) -> None:
        self.addresses = [replica.url for replica in replicas]

    def add(self, replica: Replica) -> None: ...

    def drain(self, replica: Replica) -> None: ...


class Haproxy:
    """HAProxy with the committed configuration, but for the addresses."""

    name = "HAProxy"

    def __init__(self, folder: Path, replicas: Sequence[Replica]) -> None:
        """Write the configuration.

        Args:
            folder: of its own, with a short path: a socket is in it.
            replicas: up to eight; from the fourth on they get nothing until they are added.
        """
        self.folder, self.ports = folder, Ports.free()
        self.addresses = [f"{HOST}:{self.ports.grpc}"]
        self._names = dict(zip((replica.name for replica in replicas), (*SERVERS, *SPARE), strict=False))
        text = (HAPROXY / "haproxy.cfg").read_text()
        for port, own in ((8001, self.ports.grpc), (8000, self.ports.http)):
            assert f"bind {HOST}:{port}" in text
            text = text.replace(f"bind {HOST}:{port}", f"bind {HOST}:{own}")
        for replica, grpc in zip(replicas, SERVERS.values(), strict=False):
            for port, own in ((grpc, replica.ports.grpc), (grpc - 1, replica.ports.http)):
                text, count = re.subn(rf"({HOST}:| port ){port}\b", rf"\g<1>{own}", text)
                assert count
        (folder / "haproxy.cfg").write_text(text)

    def add(self, replica: Replica) -> None:
        if self._names[replica.name] in SPARE:
            self._give_address(replica)
        self._set(replica, "state ready")

    def drain(self, replica: Replica) -> None:
        self._set(replica, "state drain")

    def weigh(self, replica: Replica, weight: int) -> None:
        """Give a replica another weight than 100, which the others have."""
        self._set(replica, f"weight {weight}")

    def ask(self, command: str) -> str:
        """Send a command to its socket, and return the answer."""
        with socket.socket(socket.AF_UNIX) as connection:
            connection.settimeout(10)
            connection.connect(str(self.folder / "haproxy.sock"))
            connection.sendall(f"{command}\n".encode())
            return b"".join(iter(lambda: connection.recv(65536), b"")).decode().strip()

    def _give_address(self, replica: Replica) -> None:
        for backend in BACKENDS:
            port = replica.ports.http if backend == "http" else replica.ports.grpc
            for what in (f"addr {HOST} port {port}", f"check-port {replica.ports.http}"):
                answer = self.ask(f"set server {backend}/{self._names[replica.name]} {what}")
                assert not answer or "changed" in answer, answer

    def _set(self, replica: Replica, what: str) -> None:
        for backend in BACKENDS:
            answer = self.ask(f"set server {backend}/{self._names[replica.name]} {what}")
            assert not answer, answer


class Nginx:
    """nginx with the committed configuration, but for the addresses."""

    name = "nginx"

    def __init__(self, folder: Path, replicas: Sequence[Replica]) -> None:
        """Write the configuration, with the first three replicas."""
        self.folder, self.ports = folder, Ports.free()
        self.addresses = [f"{HOST}:{self.ports.grpc}"]
        self._replicas = list(replicas[:3])
        text = (NGINX / "nginx.conf").read_text()
        for port, own in ((8001, self.ports.grpc), (8000, self.ports.http)):
            assert f"listen {HOST}:{port}" in text
            text = text.replace(f"listen {HOST}:{port}", f"listen {HOST}:{own}")
        (folder / "nginx.conf").write_text(text)
        self._write()

    def add(self, replica: Replica) -> None:
        self._replicas.append(replica)
        self._reload()

    def drain(self, replica: Replica) -> None:
        self._replicas.remove(replica)
        self._reload()

    def _reload(self) -> None:
        """Take the servers as they are now. Workers of before answer what they have, and are waited for."""
        before = set(children(int((self.folder / "nginx.pid").read_text())))
        self._write()
        run_nginx(self.folder, "-t")
        run_nginx(self.folder, "-s", "reload")
        end_s = time.monotonic() + OLD_WORKERS_S
        while before & set(children(int((self.folder / "nginx.pid").read_text()))) and time.monotonic() < end_s:
            time.sleep(0.05)

    def _write(self) -> None:
        text = (NGINX / "servers.conf").read_text()
        for digit, port in (("1", "grpc"), ("0", "http")):
            lines = re.compile(rf"(    server {HOST}:80\d{digit} (.*)\n)+")
            assert len(lines.findall(text)) == (2 if port == "grpc" else 1)

            def servers(found: re.Match[str], port: str = port) -> str:
                own = (f"    server {HOST}:{getattr(each.ports, port)} {found[2]}\n" for each in self._replicas)
                return "".join(own)

            text = lines.sub(servers, text)
        (self.folder / "servers.conf").write_text(text)


@contextmanager
def haproxy(folder: Path, replicas: Sequence[Replica]) -> Iterator[Haproxy]:
    """Run HAProxy before replicas."""
    proxy = Haproxy(folder, replicas)
    with run_haproxy(folder):
        until_listening(proxy.ports.grpc)
        yield proxy


@contextmanager
def run_haproxy(folder: Path) -> Iterator[None]:
    """Run HAProxy in a folder that has its configuration."""
    if shutil.which("haproxy") is None:
        pytest.skip("needs HAProxy, of Debian's package haproxy")
    with (folder / "haproxy.log").open("wb") as log:
        process = subprocess.Popen(["haproxy", "-f", "haproxy.cfg"], cwd=folder, stdout=log, stderr=log)
    try:
        yield
        assert process.poll() is None, (folder / "haproxy.log").read_text()
    finally:
        process.terminate()
        process.wait(30)


@contextmanager
def nginx(folder: Path, replicas: Sequence[Replica]) -> Iterator[Nginx]:
    """Run nginx before replicas."""
    skip_without_nginx()
    proxy = Nginx(folder, replicas)
    with nginx_in(folder, "stop"):
        until_listening(proxy.ports.grpc)
        yield proxy


@contextmanager
def by_client(folder: Path, replicas: Sequence[Replica]) -> Iterator[ByClient]:
    """Give callers all replicas' addresses."""
    yield ByClient(replicas)


def until_listening(port: int) -> None:
    end_s = time.monotonic() + 30
    while True:
        try:
            socket.create_connection((HOST, port), timeout=1).close()
            return
        except OSError:
            assert time.monotonic() < end_s
        time.sleep(0.05)
