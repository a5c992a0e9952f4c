"""A part of the real server ends: callers are told at once, and the supervisor starts it again, but not for ever."""

from __future__ import annotations

import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest
from tritonclient.utils import InferenceServerException

from icportrait.contract import ENGINES
from icportrait.policy import ServingPolicy
from icportrait.presets import DEMO_128
from icportrait.repository import assemble
from icportrait.server import HOST, SHM, Ports
from icportrait.stub_processes import stub_processes
from tests.conftest import ROOT
from tests.e2e.caller import infer
from tests.e2e.test_server import make_the_unet_fail
from tests.trivial_engines import write_trivial_export

LINE_TIMEOUT_S = 60
STEP_MS = 20


class Supervised:
    """``python -m icportrait.server``, with what it says and the processes below it."""

    def __init__(self, process: subprocess.Popen[str], ports: Ports, error: Path) -> None:
        self.process, self.ports, self.error = process, ports, error
        self.url = f"{HOST}:{ports.grpc}"
        self._lines: queue.SimpleQueue[str] = queue.SimpleQueue()
        threading.Thread(target=self._read, daemon=True).start()

    def next_line(self, start: str) -> str:
        """The next line that begins so."""
        while not (line := self._lines.get(timeout=LINE_TIMEOUT_S)).startswith(start):
            pass
        return line.strip()

    @property
    def tritonserver(self) -> int:
        (pid,) = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        return int(pid)

    def kill(self, model: str) -> None:
        """Kill the process of a model."""
        (pid,) = [stub.pid for stub in stub_processes(self.tritonserver) if stub.model == model]
        os.kill(pid, signal.SIGKILL)

    def shm_regions(self) -> list[Path]:
        return list(SHM.glob(f"icportrait_{self.process.pid}_{self.ports.grpc}_*"))

    def _read(self) -> None:
        for line in self.process.stdout:
            self._lines.put(line)


@contextmanager
def supervised(repository: Path, folder: Path) -> Iterator[Supervised]:
    ports = Ports.free()
    arguments = [f"--{name}-port={port}" for name, port in vars(ports).items()]
    command = [sys.executable, "-m", "icportrait.server", f"--repository={repository}", *arguments]
    environment = {**os.environ, "TMPDIR": str(folder)}
    with (
        (folder / "server.log").open("w") as log,
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True, cwd=ROOT, env=environment) as process,
    ):
        try:
            server = Supervised(process, ports, folder / "server.log")
            server.next_line("ready")
            yield server
        finally:
            process.terminate()
            process.wait(40)


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Simulated engines, of which the UNet takes its time."""
    folder = tmp_path_factory.mktemp("restart")
    write_trivial_export(folder / "export", DEMO_128)
    times_ms = dict.fromkeys(ENGINES, 1) | {"unet": STEP_MS}
    table = {"device": "test device", "engines": {name: {"1": ms} for name, ms in times_ms.items()}}
    (folder / "table.json").write_text(json.dumps(table))
    policy = ServingPolicy(runtime="simulated", latency_table=str(folder / "table.json"))
    assemble(folder / "export", folder / "repository", policy)
    return folder / "repository"


def outcome(url: str, pictures: dict[str, bytes], steps: int) -> tuple[str, float]:
    """How a request ends, and when by ``time.monotonic``."""
    try:
        infer(url, num_inference_steps=steps, **pictures)
    except InferenceServerException as error:
        return f"{error.status()}: {error.message()}", time.monotonic()
    return "served", time.monotonic()


def test_a_part_that_ends_is_said_to_callers_at_once_and_the_server_restarts(
    repository: Path, tmp_path: Path, pictures: dict[str, bytes]
) -> None:
    with supervised(repository, tmp_path) as server, ThreadPoolExecutor() as threads:
        assert outcome(server.url, pictures, steps=1)[0] == "served"
        for count, (model, told_s) in enumerate({"denoise": 1.0, "vae_decoder": 3.0, "ic_portrait": 3.0}.items(), 1):
            running = threads.submit(outcome, server.url, pictures, 150)
            time.sleep(0.5)
            regions = server.shm_regions()
            assert regions and not running.done()
            server.kill(model)
            killed = time.monotonic()
            new = threads.submit(outcome, server.url, pictures, 1)
            for call in (running, new):
                answer, ended = call.result(LINE_TIMEOUT_S)
                assert answer.startswith("StatusCode.UNAVAILABLE"), model
                assert ended - killed < told_s, model
                assert model != "denoise" or "the denoising loop has ended" in answer
            assert server.next_line("the process") == (
                f"the process of model {model} was ended by signal 9; "
                f"restarting the server, {count} of at most 3 times in 10 minutes"
            )
            assert server.next_line("ready").startswith(f"ready: gRPC {server.url}")
            assert outcome(server.url, pictures, steps=1)[0] == "served"
            assert not set(regions) & set(server.shm_regions())
            assert len(list(tmp_path.glob("icportrait-server-*"))) == 1
        server.process.send_signal(signal.SIGINT)
        assert server.process.wait(40) == 0
        assert not server.shm_regions()


def test_an_engine_that_keeps_failing_restarts_the_server(tmp_path: Path, pictures: dict[str, bytes]) -> None:
    """And Ctrl-C while it restarts ends it in order."""
    write_trivial_export(tmp_path / "export", DEMO_128)
    assemble(tmp_path / "export", tmp_path / "repository", ServingPolicy())
    make_the_unet_fail(tmp_path / "repository")
    with supervised(tmp_path / "repository", tmp_path) as server:
        for _ in range(2):
            for _ in range(3):
                answer, _ = outcome(server.url, pictures, steps=2)
                assert answer.startswith("StatusCode.INTERNAL") and "log has the cause" in answer
            line = server.next_line("the process")
            assert line.startswith("the process of model denoise ended with status 70; restarting the server")
            if "1 of" in line:
                server.next_line("ready")
        time.sleep(2)
        server.process.send_signal(signal.SIGINT)
        assert server.process.wait(40) == 0
        server.next_line("stopped")
        assert not server.shm_regions()
        assert not list(tmp_path.glob("icportrait-server-*"))


def test_a_server_that_keeps_ending_is_not_restarted_for_ever(
    repository: Path, tmp_path: Path, pictures: dict[str, bytes]
) -> None:
    with supervised(repository, tmp_path) as server:
        for _ in range(3):
            os.kill(server.tritonserver, signal.SIGKILL)
            server.next_line("tritonserver was ended by signal 9; restarting the server")
            server.next_line("ready")
        os.kill(server.tritonserver, signal.SIGKILL)
        assert server.process.wait(30) == 1
        assert outcome(server.url, pictures, steps=1)[0].startswith("StatusCode.UNAVAILABLE")
        assert not server.shm_regions()
    errors = [line for line in server.error.read_text(errors="replace").splitlines() if line.startswith("error:")]
    expected = "error: tritonserver was ended by signal 9, after 3 restarts in 10 minutes; the cause is in its output"
    assert errors == [expected]
    assert "Traceback" not in server.error.read_text(errors="replace")
