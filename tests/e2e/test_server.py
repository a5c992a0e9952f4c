"""The server's life: start, limits, failures, and an end that leaves nothing behind."""

from __future__ import annotations

import contextlib
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
import tritonclient.grpc as grpc_client
from PIL import Image
from tritonclient.utils import InferenceServerException

from icportrait.deploy.repository import assemble
from icportrait.errors import IcPortraitError
from icportrait.policy import ServingPolicy
from icportrait.presets import DEMO_128
from icportrait.server import HOST, Ports, ServerProcess
from tests.conftest import EXAMPLES
from tests.e2e.caller import infer, until_metric
from tests.e2e.conftest import CACHE_BYTES, simulated_repository
from tests.e2e.supervised import STOP_TIMEOUT_S, descendants, runs, supervised
from tests.trivial_engines import write_trivial_export

PROC_NET = Path("/proc/net")


@pytest.fixture(scope="module")
def trivial(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make a repository whose engines do next to nothing, in a folder as people name theirs."""
    folder = tmp_path_factory.mktemp("trivial")
    write_trivial_export(folder / "export", DEMO_128)
    repository = folder / "my portraits" / "repository"
    assemble(folder / "export", repository, ServingPolicy(max_pending_requests=2, cache_bytes=CACHE_BYTES))
    return repository


def until_gone(processes: list[int]) -> list[int]:
    """Wait for processes to end; kill and return the ones that still run after 30 s."""
    end_s = time.monotonic() + 30
    while (alive := [pid for pid in processes if runs(pid)]) and time.monotonic() < end_s:
        time.sleep(0.05)
    for pid in alive:
        os.kill(pid, signal.SIGKILL)
    return alive


def test_ctrl_c_ends_the_server_and_leaves_nothing(trivial: Path, tmp_path: Path) -> None:
    with supervised(trivial, tmp_path) as server:
        assert server.ready.startswith(f"ready: gRPC {HOST}:{server.ports.grpc}")
        processes, regions = descendants(server.process.pid), server.shm_regions()
        assert len(processes) >= 6, "tritonserver, a stub for each Python model, and two for pictures"
        assert regions
        server.process.send_signal(signal.SIGINT)
        assert server.process.wait(STOP_TIMEOUT_S) == 0
        assert until_gone(processes) == []
        assert not regions & server.shm_regions()
    assert not list(tmp_path.glob("icportrait-server-*"))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_server_that_is_told_to_end_answers_what_it_has_let_in_and_refuses_the_rest(
    tmp_path: Path, pictures: dict[str, bytes], number: int
) -> None:
    repository = simulated_repository(tmp_path, {"unet": 20})
    with supervised(repository, tmp_path) as server, ThreadPoolExecutor(3) as threads:
        runs, waits = (
            threads.submit(infer, server.url, num_inference_steps=60, num_portraits=8, guidance_scale=3.0, **pictures)
            for _ in range(2)
        )
        until_metric(server.metrics_url, "icportrait_active_slots", 16)
        until_metric(server.metrics_url, "icportrait_queued_slots", 16)
        processes = descendants(server.process.pid)
        assert server.shm_regions()
        server.process.send_signal(number)
        until_metric(server.metrics_url, "icportrait_gateway_ready", 0)
        with grpc_client.InferenceServerClient(server.url) as client:
            assert client.is_server_live() and not client.is_server_ready()
        with pytest.raises(InferenceServerException, match=r"the server is stopping; .*; retry_after_ms: ") as refusal:
            infer(server.url, num_inference_steps=1, **pictures)
        assert refusal.value.status() == "StatusCode.UNAVAILABLE"
        assert [len(call.result(30)[0]) for call in (runs, waits)] == [8, 8]
        assert server.process.wait(STOP_TIMEOUT_S) == 0
        assert until_gone(processes) == []
        assert not server.shm_regions()


def test_what_takes_longer_than_a_server_may_to_end_is_told_so(tmp_path: Path, pictures: dict[str, bytes]) -> None:
    repository = simulated_repository(tmp_path, {"unet": 20})
    flags = ("--stop-timeout-s=0.2",)
    with supervised(repository, tmp_path, flags=flags) as server, ThreadPoolExecutor(1) as threads:
        call = threads.submit(infer, server.url, num_inference_steps=150, **pictures)
        until_metric(server.metrics_url, "icportrait_active_slots", 1)
        server.process.send_signal(signal.SIGTERM)
        with pytest.raises(InferenceServerException, match="the server has stopped") as refusal:
            call.result(30)
        assert refusal.value.status() == "StatusCode.UNAVAILABLE"
        assert server.process.wait(STOP_TIMEOUT_S) == 0


def test_a_signal_while_starting_ends_it_too(trivial: Path, tmp_path: Path) -> None:
    with supervised(trivial, tmp_path, wait=False) as server:
        while not descendants(server.process.pid) or not server.shm_regions():
            assert server.process.poll() is None
            time.sleep(0.05)
        server.process.send_signal(signal.SIGINT)
        assert server.process.wait(STOP_TIMEOUT_S) == 0
        assert not server.shm_regions()
    assert not list(tmp_path.glob("icportrait-server-*"))


def test_a_server_that_is_killed_takes_all_along_and_what_it_leaves_goes_at_the_next_start(
    trivial: Path, tmp_path: Path
) -> None:
    with supervised(trivial, tmp_path) as server:
        processes, regions = descendants(server.process.pid), server.shm_regions()
        assert regions
        (folder,) = tmp_path.glob("icportrait-server-run-*")
        server.process.kill()
        server.process.wait()
        assert until_gone(processes) == []
    assert folder.exists()
    with supervised(trivial, tmp_path) as server:
        assert not folder.exists()
        assert not [region for region in regions if region.exists()]


def listening() -> dict[str, tuple[int, str]]:
    """List ports and addresses, as the kernel writes them, that this machine's sockets listen on, by inode."""
    found = {}
    for line in (PROC_NET / "tcp").read_text().splitlines() + (PROC_NET / "tcp6").read_text().splitlines():
        _, local, _, state, _, _, _, _, _, inode, *_ = line.split()
        address, _, port = local.partition(":")
        if state == "0A":
            found[f"socket:[{inode}]"] = int(port, 16), address
    return found


def test_the_gateway_alone_listens_and_on_loopback_only(server: ServerProcess) -> None:
    # As the kernel writes 127.0.0.1, and as it writes it for a socket that could also speak IPv6.
    loopback = {"0100007F", "0000000000000000FFFF00000100007F"}
    assert server.process
    sockets, found = listening(), set()
    for pid in (server.process.pid, *descendants(server.process.pid)):
        for path in Path(f"/proc/{pid}/fd").iterdir():
            with contextlib.suppress(OSError):
                if name := sockets.get(str(path.readlink())):
                    found.add((pid, *name))
    assert {address for _, _, address in found} <= loopback
    assert {port for _, port, _ in found} == set(vars(server.ports).values())
    assert {pid for pid, _, _ in found} == {server.process.pid}


def test_a_graph_that_is_missing_ends_the_start_with_the_cause(trivial: Path, tmp_path: Path) -> None:
    shutil.copytree(trivial, tmp_path / "repository")
    (tmp_path / "repository" / "denoise" / "1" / "unet.onnx").unlink()
    with pytest.raises(IcPortraitError, match=r"unet.onnx is missing, but manifest.json names it"):
        ServerProcess(tmp_path / "repository", Ports.free(), tmp_path / "server.log").start()


def test_a_server_at_its_limit_serves_on_and_a_refusal_does_not_cost_its_place(
    trivial: Path, tmp_path: Path, pictures: dict[str, bytes]
) -> None:
    """Send more bad requests, of every kind, than the limit of two. The server serves on."""

    def call(url: str) -> str:
        try:
            infer(url, num_inference_steps=150, **pictures)
        except InferenceServerException as refusal:
            assert "2 requests are pending, which is this server's limit" in refusal.message()
            return str(refusal.status())
        return "served"

    bad = b'{"profile": "a", "reference": "b", "other": "\xff"}'
    with ServerProcess(trivial, Ports.free(), tmp_path / "server.log") as server:
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


def test_the_client_and_its_command_work_on_the_real_server(server: ServerProcess, tmp_path: Path) -> None:
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
