"""The server's life: start, limits, failures, and an end that leaves nothing behind."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from PIL import Image
from tritonclient.utils import InferenceServerException

from icportrait.errors import IcPortraitError
from icportrait.policy import ServingPolicy
from icportrait.presets import DEMO_128
from icportrait.repository import assemble
from icportrait.server import HOST, Ports, TritonServer
from tests.conftest import EXAMPLES
from tests.e2e.caller import infer, until_metric
from tests.e2e.conftest import simulated_repository
from tests.e2e.supervised import STOP_TIMEOUT_S, descendants, supervised
from tests.trivial_engines import write_trivial_export

PROC_NET = Path("/proc/net")


@pytest.fixture(scope="module")
def trivial(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A repository whose engines do next to nothing, in a folder as people name theirs."""
    folder = tmp_path_factory.mktemp("trivial")
    write_trivial_export(folder / "export", DEMO_128)
    repository = folder / "my portraits" / "repository"
    assemble(folder / "export", repository, ServingPolicy(max_pending_requests=2))
    return repository


def until_gone(processes: list[int]) -> list[int]:
    """Those that are still there after a while; they are killed."""
    end_s = time.monotonic() + 30
    while (alive := [pid for pid in processes if Path(f"/proc/{pid}").exists()]) and time.monotonic() < end_s:
        time.sleep(0.05)
    for pid in alive:
        os.kill(pid, signal.SIGKILL)
    return alive


def test_ctrl_c_ends_the_server_and_leaves_nothing(trivial: Path, tmp_path: Path) -> None:
    with supervised(trivial, tmp_path) as server:
        assert server.ready.startswith(f"ready: gRPC {HOST}:{server.ports.grpc}")
        processes, regions = descendants(server.process.pid), server.shm_regions()
        assert len(processes) >= 8, "tritonserver and a stub for each Python model"
        assert regions
        server.process.send_signal(signal.SIGINT)
        assert server.process.wait(STOP_TIMEOUT_S) == 0
        assert until_gone(processes) == []
        assert not regions & server.shm_regions()
    assert not list(tmp_path.glob("icportrait-server-*"))


def test_requests_that_run_when_the_server_is_told_to_end_are_told_so_and_do_not_hold_it(
    tmp_path: Path, pictures: dict[str, bytes]
) -> None:
    repository = simulated_repository(tmp_path, {"unet": 20})
    with supervised(repository, tmp_path) as server, ThreadPoolExecutor(2) as threads:

        def call(_: int) -> str:
            with pytest.raises(InferenceServerException) as refusal:
                infer(server.url, num_inference_steps=150, num_portraits=8, **pictures)
            return str(refusal.value.status())

        outcomes = [threads.submit(call, index) for index in range(2)]
        until_metric(server.metrics_url, "icportrait_active_slots", 16)
        processes = descendants(server.process.pid)
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(STOP_TIMEOUT_S) == 0
        assert {outcome.result(30) for outcome in outcomes} <= {"StatusCode.UNAVAILABLE", "StatusCode.CANCELLED"}
        assert until_gone(processes) == []
        assert not server.shm_regions()


def test_a_signal_while_starting_ends_it_too(trivial: Path, tmp_path: Path) -> None:
    with supervised(trivial, tmp_path, wait=False) as server:
        while not descendants(server.process.pid):
            assert server.process.poll() is None
            time.sleep(0.05)
        server.process.send_signal(signal.SIGINT)
        assert server.process.wait(STOP_TIMEOUT_S) == 0
        assert not server.shm_regions()
    assert not list(tmp_path.glob("icportrait-server-*"))


def test_the_server_dies_with_its_parent(trivial: Path, tmp_path: Path) -> None:
    with supervised(trivial, tmp_path) as server:
        processes = descendants(server.process.pid)
        server.process.kill()
        server.process.wait()
        assert until_gone(processes) == []


def test_the_server_listens_on_loopback_only(server: TritonServer) -> None:
    # As the kernel writes 127.0.0.1, and as it writes it for a socket that could also speak IPv6.
    loopback = {"0100007F", "0000000000000000FFFF00000100007F"}
    found = {}
    for line in (PROC_NET / "tcp").read_text().splitlines() + (PROC_NET / "tcp6").read_text().splitlines():
        _, local, _, state, *_ = line.split()
        address, _, port = local.partition(":")
        if state == "0A":
            found[int(port, 16)] = address
    for port in vars(server.ports).values():
        assert found[port] in loopback


def test_a_model_that_fails_to_load_ends_the_start_with_the_cause(trivial: Path, tmp_path: Path) -> None:
    shutil.copytree(trivial, tmp_path / "repository")
    (tmp_path / "repository" / "denoise" / "1" / "unet.onnx").unlink()
    with pytest.raises(IcPortraitError, match=r"tritonserver ended with status 1[\s\S]*unet.onnx is missing"):
        TritonServer(tmp_path / "repository", Ports.free(), tmp_path / "server.log").start()


def test_a_server_at_its_limit_serves_on_and_a_refusal_does_not_cost_its_place(
    trivial: Path, tmp_path: Path, pictures: dict[str, bytes]
) -> None:
    """The limit is two; bad requests of every kind, more of them than that, leave it serving."""

    def call(url: str) -> str:
        try:
            infer(url, num_inference_steps=150, **pictures)
        except InferenceServerException as refusal:
            assert "2 requests are pending, which is this server's limit" in refusal.message()
            return str(refusal.status())
        return "served"

    bad = b'{"profile": "a", "reference": "b", "other": "\xff"}'
    with TritonServer(trivial, Ports.free(), tmp_path / "server.log") as server:
        with ThreadPoolExecutor(12) as threads:
            outcomes = list(threads.map(call, [server.grpc_url] * 12))
        assert set(outcomes) == {"served", "StatusCode.UNAVAILABLE"}
        for _ in range(4):
            request = urllib.request.Request(f"http://{server.http_url}/v2/models/ic_portrait/generate", bad)
            with pytest.raises(urllib.error.HTTPError) as refusal:
                urllib.request.urlopen(request, timeout=30)
            with refusal.value as answer:
                assert b".py" not in answer.read()
            assert refusal.value.code == 400
            with pytest.raises(InferenceServerException, match="seed"):
                infer(server.grpc_url, **pictures, seed=-1)
        assert call(server.grpc_url) == "served"


def test_the_client_and_its_command_work_on_the_real_server(server: TritonServer, tmp_path: Path) -> None:
    out = tmp_path / "portrait.webp"
    command = [Path(sys.executable).with_name("icportrait"), "generate", "--url", server.grpc_url, "-o", out]
    sources = ["--profile", EXAMPLES / "hopper.jpg", "--reference", EXAMPLES / "astronaut.jpg"]
    done = subprocess.run([*command, *sources, "--steps", "2"], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "denoise" in done.stdout
    with Image.open(out) as picture:
        assert (picture.format, picture.size) == ("WEBP", (128, 128))
    refused = subprocess.run(
        [*command, *sources, "--profile-box", "0.5", "0.5", "0.5", "0.6"], capture_output=True, text=True
    )
    assert refused.returncode == 1
    assert refused.stderr.startswith("error: profile_box")
