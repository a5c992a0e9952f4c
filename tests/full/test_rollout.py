"""Two versions side by side behind nginx: a share of the requests, all, and the way back. No request is dropped."""

from __future__ import annotations

import json
import threading
import time
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import tritonclient.grpc as grpc_client

from icportrait.server import HOST, Ports
from tests.conftest import ROOT
from tests.e2e.caller import tensors, until_metric
from tests.e2e.conftest import simulated_repository
from tests.e2e.supervised import Supervised, supervised
from tests.e2e.test_gateway import PENDING, form
from tests.nginx import nginx_in, run_nginx, skip_without_nginx

pytestmark = [pytest.mark.full, pytest.mark.xdist_group("rollout")]

ROLLOUT = ROOT / "deploy" / "rollout"
CALLERS = 6
ENOUGH = 12
"""Answers after which a share is seen."""


class Nginx:
    """nginx with the committed configuration, but for its ports."""

    def __init__(self, folder: Path, old: Ports, new: Ports) -> None:
        self.folder, self.ports = folder, Ports.free()
        text = (ROLLOUT / "nginx.conf").read_text()
        for port, own in {
            8011: old.grpc,
            8021: new.grpc,
            8010: old.http,
            8020: new.http,
            8001: self.ports.grpc,
            8000: self.ports.http,
        }.items():
            assert f":{port}" in text
            text = text.replace(f":{port}", f":{own}")
        (folder / "nginx.conf").write_text(text)
        self.set_share(0)

    def set_share(self, percent: int) -> None:
        text, lines = (ROLLOUT / "share.conf").read_text(), "    5%  new;\n    *   old;\n"
        assert lines in text
        own = {0: "* old;", 100: "* new;"}.get(percent, f"{percent}% new; * old;")
        (self.folder / "share.conf").write_text(text.replace(lines, own))

    def give(self, percent: int) -> None:
        """Give the new version a share of the requests."""
        self.set_share(percent)
        run_nginx(self.folder, "-t")
        run_nginx(self.folder, "-s", "reload")


@contextmanager
def nginx(folder: Path, old: Ports, new: Ports) -> Iterator[Nginx]:
    skip_without_nginx()
    folder.mkdir()
    running = Nginx(folder, old, new)
    with nginx_in(folder, "quit"):
        yield running


class Callers:
    """Callers that never stop and never try again: gRPC over one connection each, and HTTP."""

    def __init__(self, ports: Ports, pictures: dict[str, bytes]) -> None:
        self.ports, self.pictures = ports, pictures
        self.answers: Counter[str] = Counter()
        self.failures: list[BaseException] = []
        self._stopped = threading.Event()
        self._threads = [threading.Thread(target=self._call, args=(number,)) for number in range(CALLERS)]

    def __enter__(self) -> Callers:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._stopped.set()
        for thread in self._threads:
            thread.join()

    def until(self, holds: Callable[[Counter[str]], bool]) -> Counter[str]:
        """Wait until the versions that answered since now are as they should be."""
        before, end_s = self.answers.copy(), time.monotonic() + 60
        while not holds(self.answers - before):
            assert not self.failures, self.failures
            assert time.monotonic() < end_s, self.answers - before
            time.sleep(0.02)
        return self.answers - before

    def _call(self, number: int) -> None:
        asking = self._over_http if number % 3 == 2 else self._over_grpc
        try:
            with grpc_client.InferenceServerClient(f"{HOST}:{self.ports.grpc}") as client:
                while not self._stopped.is_set():
                    self.answers[asking(client)["versions"]["model_version"]] += 1
        except BaseException as error:
            self.failures.append(error)

    def _over_grpc(self, client: Any) -> dict[str, Any]:
        result = client.infer("ic_portrait", tensors({**self.pictures, "num_inference_steps": 4}), client_timeout=60)
        found: dict[str, Any] = json.loads(result.as_numpy("metadata")[0])
        return found

    def _over_http(self, client: Any) -> dict[str, Any]:
        body, kind = form({**self.pictures, "num_inference_steps": b"4"})
        request = urllib.request.Request(f"http://{HOST}:{self.ports.http}/v1/portraits", body, {"Content-Type": kind})
        with urllib.request.urlopen(request, timeout=60) as answer:
            answer.read()
            found: dict[str, Any] = json.loads(answer.headers["icportrait-metadata"])
        return found


def other_version(repository: Path) -> str:
    """Make a repository another model's, and return the model's version."""
    from icportrait.manifest import Manifest

    folder = repository / "denoise" / "1"
    for path in repository.glob("*/1/manifest.json"):
        manifest = json.loads(path.read_text())
        for engine in manifest["engines"].values():
            engine["sha256"] = engine["sha256"][::-1]
        path.write_text(json.dumps(manifest))
    return Manifest.read(folder).model_version


def test_a_new_version_is_rolled_out_and_back_and_out_without_a_lost_request(
    tmp_path: Path, pictures: dict[str, bytes]
) -> None:
    folders = {name: tmp_path / name for name in ("old", "new")}
    repositories = {name: simulated_repository(folder, {"unet": 5}) for name, folder in folders.items()}
    new = other_version(repositories["new"])

    def server(name: str) -> Any:
        return supervised(repositories[name], folders[name])

    def only(version: str) -> Callable[[Counter[str]], bool]:
        return lambda answers: answers[version] >= ENOUGH

    with (
        server("old") as first,
        server("new") as second,
        nginx(tmp_path / "nginx", first.ports, second.ports) as proxy,
        Callers(proxy.ports, pictures) as callers,
    ):
        (old,) = callers.until(lambda answers: answers.total() >= ENOUGH)
        assert old != new
        proxy.give(25)
        callers.until(lambda answers: answers[new] >= ENOUGH and answers[old] >= ENOUGH)
        # Something is wrong with it, let us say.
        proxy.give(0)
        callers.until(only(old))
        until_metric(second.metrics_url, PENDING, 0)
        proxy.give(100)
        callers.until(only(new))
        until_metric(first.metrics_url, PENDING, 0)
        stop(first)
        shares = callers.until(only(new))
        assert shares.total() == shares[new], shares
    assert not callers.failures, callers.failures


def stop(server: Supervised) -> None:
    """Let a server answer what it has admitted, and end."""
    server.process.terminate()
    assert server.process.wait(60) == 0
