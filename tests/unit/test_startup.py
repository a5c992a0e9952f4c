"""Refusals before tritonserver is started. The TensorRT that is asked for its version is a real one."""

from __future__ import annotations

import importlib.util
import os
import re
import socket
import tomllib
from functools import partial
from pathlib import Path
from typing import Any

import pytest

import icportrait.deploy.installation
import icportrait.deploy.preflight
import icportrait.deploy.triton_server
import icportrait.gateway.main
from icportrait.deploy.installation import Installation, find_installation
from icportrait.deploy.preflight import backend_version, check_graphs, check_plans, repository_policy
from icportrait.deploy.repository import assemble
from icportrait.deploy.triton_server import TritonServer
from icportrait.errors import CheckpointError, IcPortraitError, NotEnoughMemory, RuntimeNotAvailable
from icportrait.gateway.access import Access
from icportrait.manifest import Manifest
from icportrait.policy import ServingPolicy
from icportrait.presets import DEMO_128
from icportrait.runtime.cuda import Gpu
from icportrait.runtime.tensorrt.plans import PlanManifest
from icportrait.runtime.tensorrt.products import Flavour
from icportrait.server import HOST, Ports, main
from tests.fake_plans import VERSIONS, write_fake_plans
from tests.trivial_engines import write_trivial_export


@pytest.fixture
def repository(tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    runtime = getattr(request, "param", "tensorrt")
    write_trivial_export(tmp_path / "export", DEMO_128)
    plans = tmp_path / "plans" if runtime.startswith("tensorrt") else None
    if plans:
        write_fake_plans(plans, Manifest.read(tmp_path / "export"), runtime)
    assemble(tmp_path / "export", tmp_path / "repository", ServingPolicy(runtime=runtime), plans=plans)
    return tmp_path / "repository"


@pytest.fixture
def trivial(tmp_path: Path) -> Path:
    write_trivial_export(tmp_path / "export", DEMO_128)
    assemble(tmp_path / "export", tmp_path / "repository", ServingPolicy())
    return tmp_path / "repository"


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    found = Gpu("NVIDIA Test", "8.9", 8 * 10**9, 8 * 10**9, "13.0")
    monkeypatch.setattr(icportrait.deploy.preflight, "find_gpu", lambda _: found)
    monkeypatch.setattr(Flavour, "version", lambda self: VERSIONS[self.name])


@pytest.fixture
def container(tmp_path: Path) -> Installation:
    """Make a server with a TensorRT backend, beside which lies TensorRT-RTX's library in place of TensorRT's."""
    backend = tmp_path / "opt" / "backends" / "tensorrt"
    backend.mkdir(parents=True)
    (backend / "libtriton_tensorrt.so").touch()
    package = importlib.util.find_spec("tensorrt_rtx_libs")
    assert package and package.submodule_search_locations
    (library,) = Path(package.submodule_search_locations[0]).glob("libtensorrt_rtx.so.*")
    (backend / "libnvinfer.so.1").symlink_to(library)
    return Installation(tmp_path / "opt")


def rewrite(plan: Path, **changes: str) -> None:
    manifest = PlanManifest.read(plan)
    for name, value in changes.items():
        object.__setattr__(manifest, name, value)
    PlanManifest.path(plan).unlink()  # it is a link to the built plan's
    manifest.write(plan)


def refusal(repository: Path, runtime: str, installation: Installation) -> str:
    with pytest.raises(IcPortraitError) as refused:
        check_plans(repository, runtime, installation)
    assert "\n" not in str(refused.value)
    return str(refused.value)


@pytest.mark.parametrize(
    ("repository", "runtime"),
    [(name, name) for name in ("onnxruntime", "torch", "tensorrt", "tensorrt-rtx")],
    indirect=["repository"],
)
def test_a_repository_says_its_policy(repository: Path, runtime: str) -> None:
    assert repository_policy(repository) == ServingPolicy(runtime=runtime)
    config = repository / "denoise" / "config.pbtxt"
    text = config.read_text()
    assert text.count('string_value: "64"') == 1  # max_queued_slots
    config.write_text(text.replace('string_value: "64"', 'string_value: "77"'))
    assert repository_policy(repository) == ServingPolicy(runtime=runtime, max_queued_slots=77)


def test_what_is_no_repository_of_ours_is_tritons_to_refuse(tmp_path: Path) -> None:
    assert repository_policy(tmp_path) == ServingPolicy()
    (tmp_path / "denoise").mkdir()
    for content in (b"no: [ protobuf", b"\xff\xfe"):
        (tmp_path / "denoise" / "config.pbtxt").write_bytes(content)
        assert repository_policy(tmp_path) == ServingPolicy()


@pytest.mark.parametrize(
    ("repository", "runtime"), [(name, name) for name in ("tensorrt", "tensorrt-rtx")], indirect=["repository"]
)
def test_plans_without_a_gpu_are_refused_by_the_server_and_its_command(
    repository: Path, runtime: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_gpu(_: str | None) -> Gpu:
        raise RuntimeNotAvailable("no NVIDIA GPU was found (a test)")

    monkeypatch.setattr(icportrait.deploy.preflight, "find_gpu", no_gpu)
    expected = f"{repository}: was assembled for {runtime}, and no NVIDIA GPU was found (a test)"
    with pytest.raises(RuntimeNotAvailable) as refused:
        TritonServer(repository, tmp_path / "log").start()
    assert str(refused.value) == expected and not (tmp_path / "log").exists()
    ports = [f"--{name}-port={port}" for name, port in vars(Ports.free()).items()]
    assert main(["--repository", str(repository), *ports]) == 1
    assert capsys.readouterr().err == f"error: {expected}\n"


def test_the_embedded_server_is_refused_for_the_want_of_a_backend(gpu: None, repository: Path) -> None:
    text = refusal(repository, "tensorrt", find_installation("tensorrt-rtx"))
    assert "tritonserver has no TensorRT backend" in text
    assert "nvcr.io/nvidia/tritonserver:YY.MM-py3" in text and "TRT_VERSION is 11.4.0" in text


def test_tensorrt_is_asked_for_its_version_without_a_gpu(container: Installation) -> None:
    assert backend_version(container, "0.0.0") == ".".join(VERSIONS["tensorrt-rtx"].split(".")[:3])


def test_another_tensorrt_than_the_plans_is_refused_with_both_versions(
    gpu: None, repository: Path, container: Installation
) -> None:
    text = refusal(repository, "tensorrt", container)
    assert "vae_encoder/1/model.plan: was built by tensorrt 11.4.0.106" in text
    assert f"{container.binary} has 1.7.1; use the container release whose TRT_VERSION is 11.4.0" in text


def test_plans_of_the_servers_tensorrt_are_let_through_until_one_is_changed(
    gpu: None, repository: Path, container: Installation
) -> None:
    for name in ("vae_encoder", "vae_decoder"):
        rewrite(repository / name / "1" / "model.plan", tensorrt_version="1.7.1.999")
    check_plans(repository, "tensorrt", container)
    for plan in (repository / "denoise" / "1" / "unet.plan", repository / "vae_encoder" / "1" / "model.plan"):
        content = plan.read_bytes()
        plan.write_bytes(content + b"!")
        assert f"{plan}: its SHA-256 is" in refusal(repository, "tensorrt", container)
        plan.write_bytes(content)


@pytest.mark.parametrize("repository", ["tensorrt-rtx"], indirect=True)
def test_another_python_package_than_the_plans_is_refused(
    gpu: None, repository: Path, container: Installation, monkeypatch: pytest.MonkeyPatch
) -> None:
    check_plans(repository, "tensorrt-rtx", container)
    monkeypatch.setattr(Flavour, "version", lambda self: "1.8.0.1")
    text = refusal(repository, "tensorrt-rtx", container)
    assert "was built by tensorrt-rtx 1.7.1.116, and the Python package here has 1.8.0.1; install 1.7.1.116" in text


def test_a_tensorrt_that_cannot_be_loaded_is_named(
    gpu: None, repository: Path, container: Installation, monkeypatch: pytest.MonkeyPatch
) -> None:
    library = container.tensorrt_backend / "libnvinfer.so.1"
    library.unlink()
    library.write_bytes(b"no library")
    assert "its TensorRT can't be loaded" in refusal(repository, "tensorrt", container)
    library.unlink()
    monkeypatch.setattr("ctypes.util.find_library", lambda name: None)
    assert "no libnvinfer.so is installed" in refusal(repository, "tensorrt", container)


@pytest.mark.parametrize("repository", ["onnxruntime"], indirect=True)
def test_a_repository_without_plans_needs_none_of_it(repository: Path, tmp_path: Path) -> None:
    check_plans(repository, "onnxruntime", Installation(tmp_path / "nowhere"))


# Which server


@pytest.fixture
def on_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    binary = tmp_path / "container" / "bin" / "tritonserver"
    binary.parent.mkdir(parents=True)
    binary.touch(mode=0o755)
    monkeypatch.setenv("PATH", str(binary.parent))
    return binary


def test_tensorrt_takes_the_server_on_path_and_the_others_the_embedded_one(on_path: Path) -> None:
    container, embedded = find_installation("tensorrt"), find_installation("tensorrt-rtx")
    assert container.binary == on_path and container.libraries is None
    assert container.prepare_backends(on_path.parents[2] / "made") == on_path.parents[1] / "backends"
    assert "nvidia_pytriton.libs" not in container.environment()["LD_LIBRARY_PATH"]
    assert "pytriton" in str(embedded.binary) and embedded == find_installation("onnxruntime")
    assert "nvidia_pytriton.libs" in embedded.environment()["LD_LIBRARY_PATH"]


def test_without_the_wheel_the_server_on_path_serves_all(on_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(icportrait.deploy.installation.importlib.util, "find_spec", lambda name: None)
    assert find_installation("onnxruntime").binary == on_path
    monkeypatch.setenv("PATH", "")
    with pytest.raises(RuntimeNotAvailable, match=r"\(nvidia-pytriton\) is not installed"):
        find_installation("onnxruntime")


@pytest.mark.parametrize("model", ["vae_encoder", "denoise"])
@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"contract_hash": "another"}, "was built for contract another, and this is"),
        ({"flavour": "tensorrt-rtx"}, "was built for product tensorrt-rtx, and this is tensorrt"),
        ({"compute_capabilities": ("9.0",)}, "was built for GPUs of compute capability 9.0, and this one has 8.9"),
    ],
)
def test_a_plan_for_something_else_is_refused_whoever_loads_it(
    gpu: None,
    repository: Path,
    container: Installation,
    model: str,
    changes: dict[str, Any],
    expected: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(icportrait.deploy.preflight, "backend_version", lambda *_: "11.4.0")
    check_plans(repository, "tensorrt", container)
    plan = repository / model / "1" / ("unet.plan" if model == "denoise" else "model.plan")
    rewrite(plan, **changes)
    text = refusal(repository, "tensorrt", container)
    assert text.startswith(f"{plan}: ")
    assert expected in text


@pytest.mark.parametrize("plan", ["vae_decoder/1/model.plan", "denoise/1/warping_network.plan"])
def test_a_plan_that_is_missing_is_refused(
    gpu: None, repository: Path, container: Installation, plan: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(icportrait.deploy.preflight, "backend_version", lambda *_: "11.4.0")
    (repository / plan).unlink()
    assert f"{plan} is missing" in refusal(repository, "tensorrt", container)


@pytest.mark.parametrize(("model", "graph"), [("denoise", "unet"), ("vae_encoder", "vae_encoder")])
def test_a_graph_that_was_damaged_or_is_missing_is_refused_and_read_once_while_it_stays(
    trivial: Path, model: str, graph: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, policy = trivial / model / "1" / f"{graph}.onnx", ServingPolicy()
    check_graphs(trivial, policy)
    whole = path.read_bytes()
    path.unlink()  # a link to the export's
    with pytest.raises(CheckpointError, match=f"{graph}.onnx is missing"):
        check_graphs(trivial, policy)
    for damaged in (whole[:-1], whole[:-1] + bytes([whole[-1] ^ 1])):
        path.write_bytes(damaged)
        with pytest.raises(CheckpointError, match=f"{graph}.onnx: hash is "):
            check_graphs(trivial, policy)
        with pytest.raises(CheckpointError, match=f"{graph}.onnx: hash is "):
            TritonServer(trivial).start()
    path.write_bytes(whole)
    check_graphs(trivial, policy)
    monkeypatch.setattr(Manifest, "check_files", lambda *_: pytest.fail("it was read again"))
    check_graphs(trivial, policy)


def test_the_gpu_is_asked_for_in_a_process_that_ends() -> None:
    """Check that the refusal comes back unchanged, while nothing of CUDA stays in this process."""
    if gpu_here():
        assert icportrait.deploy.preflight.find_gpu().total_bytes > 0
    else:
        with pytest.raises(RuntimeNotAvailable, match="no NVIDIA GPU was found"):
            icportrait.deploy.preflight.find_gpu()


def test_a_device_is_looked_for_in_a_process_that_sees_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(icportrait.runtime.cuda, "find_gpu", partial(os.getenv, "CUDA_VISIBLE_DEVICES"))
    assert str(icportrait.deploy.preflight.find_gpu("GPU-1")) == "GPU-1"


def test_plans_are_compared_with_the_device_that_is_to_run_them(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    asked: list[str | None] = []

    def found(device: str | None) -> Gpu:
        asked.append(device)
        raise RuntimeNotAvailable("no NVIDIA GPU was found (a test)")

    monkeypatch.setattr(icportrait.deploy.preflight, "find_gpu", found)
    write_trivial_export(tmp_path / "export", DEMO_128, "fp16")
    assemble(tmp_path / "export", tmp_path / "repository", ServingPolicy(runtime="torch"))
    for runtime in ("torch", "tensorrt-rtx"):
        with pytest.raises(RuntimeNotAvailable, match="no NVIDIA GPU was found"):
            check_plans(tmp_path / "repository", runtime, Installation(tmp_path), "3")
    assert asked == ["3", "3"]


def gpu_here() -> bool:
    try:
        icportrait.runtime.cuda.find_gpu()
    except RuntimeNotAvailable:
        return False
    return True


# Before anything is started


@pytest.mark.parametrize("door", ["grpc", "http", "metrics"])
def test_a_taken_port_is_named(door: str, trivial: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ports = Ports.free()
    with socket.socket() as taken:
        taken.bind((HOST, getattr(ports, door)))
        taken.listen()
        flags = [f"--{name}-port={port}" for name, port in vars(ports).items()]
        assert main([f"--repository={trivial}", *flags]) == 1
    expected = f"error: {door}_port: {HOST}:{getattr(ports, door)}: Address already in use"
    assert expected in capsys.readouterr().err.splitlines()


@pytest.mark.parametrize(("aborts", "starts", "status"), [(1, 2, 7), (9, 3, -6)])
def test_a_server_that_is_aborted_is_started_again(
    aborts: int, starts: int, status: int, trivial: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    count, installation = tmp_path / "count", Installation(tmp_path / "triton")
    (binary := installation.binary).parent.mkdir(parents=True)
    binary.write_text(f"#!/bin/sh\necho >> {count}\n[ $(wc -l < {count}) -gt {aborts} ] && exit 7\nkill -ABRT $$\n")
    binary.chmod(0o755)
    monkeypatch.setattr(icportrait.deploy.triton_server, "find_installation", lambda _: installation)
    said = list[str]()
    with pytest.raises(IcPortraitError, match=f"ended with status {status} before"):
        TritonServer(trivial, log_file=tmp_path / "log", say=said.append).start()
    assert len(count.read_text().splitlines()) == starts
    assert sum("status -6 before" in line and "started again" in line for line in said) == starts - 1


def test_what_dead_servers_left_goes_before_all_engines_shared_memory_is_looked_at(
    trivial: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    left = ["a region"]

    def check(repository: Path, policy: ServingPolicy, engines: int) -> None:
        raise NotEnoughMemory(f"{engines} engines and {len(left)} left")

    def remove() -> list[str]:
        return [left.pop()]

    monkeypatch.setattr(icportrait.gateway.main, "check_shared_memory", check)
    monkeypatch.setattr(icportrait.deploy.triton_server, "remove_leftovers", remove)
    flags = [f"--{name}-port={port}" for name, port in vars(Ports.free()).items()]
    assert main([f"--repository={trivial}", "--devices=0,1", *flags]) == 1
    out, err = capsys.readouterr()
    assert err.splitlines()[-1] == "error: 2 engines and 0 left"
    assert "removed what a server that was killed has left: a region" in out + err


@pytest.mark.parametrize(("grpc", "http"), [(99999, 8000), (0, 8000), (8000, 8000)])
def test_ports_that_cannot_be_are_refused_by_name(grpc: int, http: int, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--repository=none", f"--grpc-port={grpc}", f"--http-port={http}"]) == 1
    assert re.match(r"error: grpc_port.* expected (1..65535|three different ports)", capsys.readouterr().err)


def test_a_server_without_a_repository_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 1
    assert "repository: missing" in capsys.readouterr().err
    assert main([f"--repository={tmp_path}"]) == 1
    assert "is none, expected a folder assembled by" in capsys.readouterr().err


def test_the_effective_settings_are_printed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config", "--slots=3"]) == 0
    assert tomllib.loads(capsys.readouterr().out)["slots"] == 3


def test_a_key_is_made_that_the_file_of_keys_takes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["key", "studio"]) == 0
    section, told = capsys.readouterr()
    key = told.split()[-1]
    (tmp_path / "keys.toml").write_text(section)
    assert Access(tmp_path / "keys.toml").enter(f"Bearer {key}", "").name == "studio"
    assert key not in section
    assert main(["key"]) == 1


def test_a_process_chooses_no_port_twice() -> None:
    ports = [port for _ in range(60) for port in vars(Ports.free()).values()]
    assert len(set(ports)) == 180
