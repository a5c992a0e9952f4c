"""The server's life: start, limits, failures, and an end that leaves nothing behind."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper
from PIL import Image
from tritonclient.utils import InferenceServerException

from icportrait.errors import CheckpointError, IcPortraitError
from icportrait.policy import ServingPolicy
from icportrait.presets import DEMO_128
from icportrait.repository import assemble
from icportrait.server import HOST, SHM, Ports, TritonServer
from tests.conftest import EXAMPLES, ROOT
from tests.e2e.caller import infer
from tests.trivial_engines import write_trivial_export

PROC_NET = Path("/proc/net")


@pytest.fixture
def trivial(tmp_path: Path) -> Path:
    """A repository whose engines do next to nothing, in a folder as people name theirs."""
    write_trivial_export(tmp_path / "export", DEMO_128)
    repository = tmp_path / "my portraits" / "repository"
    assemble(tmp_path / "export", repository, ServingPolicy(max_pending_requests=2))
    return repository


def descendants(pid: int) -> list[int]:
    """The process's children and theirs, from /proc."""
    children = []
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        children += [int(child) for child in task.read_text().split()]
    return children + [grandchild for child in children for grandchild in descendants(child)]


def wait_ready(process: subprocess.Popen[str]) -> str:
    """Read the server's lines up to the one that says it is ready, and return that."""
    lines = []
    for line in process.stdout:
        if line.startswith("ready"):
            return line
        lines.append(line)
    raise AssertionError(f"the server ended: {lines}")


def shm_regions() -> set[str]:
    return {path.name for path in SHM.glob("icportrait_*")}


def make_the_unet_fail(repository: Path) -> None:
    """Change its graph so that it still loads, and fails when it runs."""
    path = repository / "denoise" / "1" / "unet.onnx"
    model = onnx.load(path)
    for constant in model.graph.initializer:
        if constant.name == "noise_pred_dims":
            constant.CopyFrom(numpy_helper.from_array(np.array([4, 32, 63]), constant.name))
    for dim in model.graph.output[0].type.tensor_type.shape.dim:
        assert dim.dim_param or dim.dim_value
    path.unlink()
    onnx.save(model, path)


@pytest.fixture
def command(trivial: Path, tmp_path: Path) -> Iterator[tuple[subprocess.Popen[str], Ports]]:
    ports = Ports.free()
    arguments = [f"--{name}-port={port}" for name, port in vars(ports).items()]
    process = subprocess.Popen(
        [sys.executable, "-m", "icportrait.server", f"--repository={trivial}", *arguments],
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env={**os.environ, "TMPDIR": str(tmp_path)},
    )
    yield process, ports
    process.kill()
    process.wait()
    process.stdout.close()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_server_and_leaves_nothing(command, number: signal.Signals) -> None:
    process, ports = command
    assert wait_ready(process).startswith(f"ready: gRPC {HOST}:{ports.grpc}")
    children = descendants(process.pid)
    assert len(children) >= 8, "tritonserver and a stub for each Python model"
    regions = {name for name in shm_regions() if f"_{ports.grpc}_" in name}
    assert regions
    process.send_signal(number)
    assert process.wait(30) == 0
    deadline = time.monotonic() + 10
    while (alive := [pid for pid in children if Path(f"/proc/{pid}").exists()]) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not alive
    assert not regions & shm_regions()


def test_a_signal_while_starting_ends_it_too(command, tmp_path: Path) -> None:
    process, ports = command
    while not descendants(process.pid):
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    assert process.wait(30) == 0
    assert not {name for name in shm_regions() if f"_{ports.grpc}_" in name}
    assert not list(tmp_path.glob("icportrait-server-*"))


def test_the_server_dies_with_its_parent(command) -> None:
    process, _ = command
    wait_ready(process)
    children = descendants(process.pid)
    process.kill()
    process.wait(10)
    deadline = time.monotonic() + 30
    while any(Path(f"/proc/{pid}").exists() for pid in children) and time.monotonic() < deadline:
        time.sleep(0.1)
    alive = [pid for pid in children if Path(f"/proc/{pid}").exists()]
    for pid in alive:
        os.kill(pid, signal.SIGKILL)
    assert not alive


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


def test_a_taken_port_is_named_with_the_way_out(trivial: Path) -> None:
    ports = Ports.free()
    with socket.socket() as taken:
        taken.bind((HOST, ports.http))
        taken.listen()
        with pytest.raises(IcPortraitError, match=rf"port {ports.http} is taken; .* HTTP_PORT=NUMBER"):
            TritonServer(trivial, ports).start()


def test_a_model_that_fails_to_load_ends_the_start_with_the_cause(trivial: Path, tmp_path: Path) -> None:
    (trivial / "denoise" / "1" / "unet.onnx").unlink()
    with pytest.raises(IcPortraitError, match=r"tritonserver ended with status 1[\s\S]*unet.onnx is missing"):
        TritonServer(trivial, Ports.free(), tmp_path / "server.log").start()


def test_more_requests_than_the_limit_are_unavailable_and_the_others_served(
    trivial: Path, tmp_path: Path, pictures: dict[str, bytes]
) -> None:
    def call(url: str) -> str:
        try:
            infer(url, num_inference_steps=150, **pictures)
        except InferenceServerException as refusal:
            assert "2 requests are pending, which is this server's limit" in refusal.message()
            return str(refusal.status())
        return "served"

    with TritonServer(trivial, Ports.free(), tmp_path / "server.log") as server:
        with ThreadPoolExecutor(12) as threads:
            outcomes = list(threads.map(call, [server.grpc_url] * 12))
        assert set(outcomes) == {"served", "StatusCode.UNAVAILABLE"}
        assert call(server.grpc_url) == "served"


def test_a_failure_of_ours_is_internal_without_a_traceback(
    tmp_path: Path, trivial: Path, pictures: dict[str, bytes]
) -> None:
    make_the_unet_fail(trivial)
    log = tmp_path / "server.log"
    with TritonServer(trivial, Ports.free(), log) as server:
        for _ in range(2):
            with pytest.raises(InferenceServerException, match="log has the cause") as failure:
                infer(server.grpc_url, num_inference_steps=2, **pictures)
            assert failure.value.status() == "StatusCode.INTERNAL"
            assert "Traceback" not in failure.value.message()
    assert "Traceback" in log.read_text()


def test_requests_that_run_when_the_server_stops_are_told_so_and_do_not_hold_it(
    command, pictures: dict[str, bytes]
) -> None:
    process, ports = command
    wait_ready(process)

    def call(_: int) -> str:
        try:
            infer(f"{HOST}:{ports.grpc}", num_inference_steps=150, num_portraits=8, **pictures)
        except InferenceServerException as refusal:
            return str(refusal.status())
        return "served"

    with ThreadPoolExecutor(2) as threads:
        outcomes = [threads.submit(call, index) for index in range(2)]
        time.sleep(1)
        process.send_signal(signal.SIGTERM)
        assert process.wait(40) == 0
        found = {outcome.result(10) for outcome in outcomes}
    assert found <= {"served", "StatusCode.UNAVAILABLE", "StatusCode.CANCELLED"}


def test_a_refusal_does_not_cost_its_place(trivial: Path, tmp_path: Path, pictures: dict[str, bytes]) -> None:
    """Bad requests of every kind, more of them than the server has places, leave it serving."""
    bad = b'{"profile": "a", "reference": "b", "other": "\xff"}'
    with TritonServer(trivial, Ports.free(), tmp_path / "server.log") as server:
        for _ in range(4):
            request = urllib.request.Request(f"http://{server.http_url}/v2/models/ic_portrait/generate", bad)
            with pytest.raises(urllib.error.HTTPError) as refusal:
                urllib.request.urlopen(request, timeout=30)
            with refusal.value as answer:
                assert b".py" not in answer.read()
            assert refusal.value.code == 400
            with pytest.raises(InferenceServerException, match="seed"):
                infer(server.grpc_url, **pictures, seed=-1)
        assert infer(server.grpc_url, **pictures)[0]


def test_an_export_of_another_kind_of_folder_is_left_alone(tmp_path: Path) -> None:
    write_trivial_export(tmp_path / "export", DEMO_128)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("work of years")
    with pytest.raises(IcPortraitError, match="isn't empty and no model repository"):
        assemble(tmp_path / "export", tmp_path / "mine", ServingPolicy())
    assert (tmp_path / "mine" / "thesis.txt").exists()
    for _ in range(2):
        assemble(tmp_path / "export", tmp_path / "repository", ServingPolicy())


@pytest.mark.parametrize(("grpc", "http"), [(99999, 8000), (0, 8000), (8000, 8000)])
def test_ports_that_cannot_be_are_refused_by_name(trivial: Path, grpc: int, http: int) -> None:
    with pytest.raises(IcPortraitError, match=r"GRPC_PORT is .*, expected 1..65535 and three different ports"):
        TritonServer(trivial, Ports(grpc=grpc, http=http)).start()


def test_a_changed_graph_is_not_assembled(tmp_path: Path) -> None:
    export = tmp_path / "export"
    write_trivial_export(export, DEMO_128)
    with (export / "unet.onnx").open("ab") as file:
        file.write(b"\0")
    with pytest.raises(CheckpointError, match=r"unet.onnx: hash is .*, manifest.json says .*; export again"):
        assemble(export, tmp_path / "repository", ServingPolicy())


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
