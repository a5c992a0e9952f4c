"""``icportrait-server doctor``: each fault of a machine or a setting is found, and told how to mend it."""

from __future__ import annotations

import json
import shutil
import socket
from collections import namedtuple
from pathlib import Path

import pytest

from icportrait.deploy.repository import assemble
from icportrait.gateway import doctor
from icportrait.gateway.doctor import Finding, Outcome, examine, is_fit
from icportrait.gateway.settings import Settings
from icportrait.policy import ServingPolicy
from icportrait.presets import DEMO_128
from icportrait.runtime.cuda import Gpu
from icportrait.server import Ports, main
from tests.certificates import make_chain
from tests.trivial_engines import write_trivial_export

SLOW = ("libraries", "tritonserver", "gpu")
"""Checks that take a second; ``test_this_machine_is_fit`` runs them."""


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "CHECKS", {name: check for name, check in doctor.CHECKS.items() if name not in SLOW})


def free(**values: object) -> Settings:
    ports = Ports.free()
    of_ports = {"grpc_port": ports.grpc, "http_port": ports.http, "metrics_port": ports.metrics}
    return Settings(**of_ports | values)  # type: ignore[arg-type]


def found(settings: Settings, check: str) -> list[Finding]:
    return [finding for finding in examine(settings) if finding.check == check]


def test_this_machine_is_fit_and_json_says_so(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    write_trivial_export(tmp_path / "export", DEMO_128)
    assemble(tmp_path / "export", tmp_path / "repository", ServingPolicy())
    flags = [f"--{name}-port={port}" for name, port in vars(Ports.free()).items()]
    status = main(["doctor", "--json", f"--repository={tmp_path / 'repository'}", *flags])
    said = json.loads(capsys.readouterr().out)
    assert (status, said["is_fit"]) == (0, True), said
    by_check = {finding["check"]: finding for finding in said["findings"]}
    assert set(by_check) >= {*SLOW, "python", "/dev/shm", "descriptors", "ports", "user", "memory", "repository"}
    assert "demo-128" in by_check["repository"]["text"] and "onnxruntime" in by_check["libraries"]["text"]


def test_a_port_in_use_is_a_fault_and_the_command_ends_with_1(quick: None, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        flags = [f"--{name}-port={port}" for name, port in (vars(Ports.free()) | {"http": port}).items()]
        assert main(["doctor", *flags]) == 1
    lines = capsys.readouterr().out.splitlines()
    (fault,) = [line for line in lines if line.startswith("fault")]
    assert f"http_port: 127.0.0.1:{port}: Address already in use" in fault
    assert lines[-1].startswith("1 fault, ")


def test_an_address_of_another_machine_is_a_fault(quick: None) -> None:
    assert [finding.outcome for finding in found(free(host="192.0.2.1"), "ports")].count(Outcome.FAULT) == 2


@pytest.mark.parametrize(("days", "outcome"), [(-1, Outcome.FAULT), (10, Outcome.WARNING), (90, Outcome.GOOD)])
def test_a_certificates_last_day_is_told(quick: None, tmp_path: Path, days: int, outcome: Outcome) -> None:
    paths = make_chain(valid_days=days).write(tmp_path)
    settings = free(tls_certificate=paths["c2pa_certificate"], tls_key=paths["c2pa_key"])
    (finding,) = found(settings, "certificates")
    assert finding.outcome is outcome, finding.text
    assert "tls_certificate: " in finding.text and ("get a new one" in finding.text) == (outcome is not Outcome.GOOD)


def test_a_key_of_another_certificate_is_a_fault(quick: None, tmp_path: Path) -> None:
    paths = make_chain(valid_days=90).write(tmp_path)
    paths["c2pa_key"].write_bytes(make_chain().key)
    findings = found(free(tls_certificate=paths["c2pa_certificate"], tls_key=paths["c2pa_key"]), "certificates")
    assert [finding.outcome for finding in findings] == [Outcome.FAULT] and "tls" in findings[0].text


@pytest.mark.parametrize(
    ("values", "check", "text"),
    [
        ({"repository": Path("/none")}, "repository", "expected a folder assembled by"),
        ({"api_keys": Path(__file__)}, "api keys", "test_doctor.py"),
        ({"access_log": "/none/access.log"}, "access log", "/none/access.log can't be written"),
    ],
)
def test_a_wrong_setting_is_a_fault(quick: None, values: dict[str, object], check: str, text: str) -> None:
    (finding,) = found(free(**values), check)
    assert finding.outcome is Outcome.FAULT and text in finding.text
    assert not is_fit([finding])


def test_too_little_shared_memory_is_told(quick: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    write_trivial_export(tmp_path / "export", DEMO_128)
    assemble(tmp_path / "export", tmp_path / "repository", ServingPolicy())
    usage = namedtuple("usage", "total used free")(2**20, 0, 2**20)
    monkeypatch.setattr(shutil, "disk_usage", lambda place: usage)
    (finding,) = found(free(repository=tmp_path / "repository"), "/dev/shm")
    assert finding.outcome is Outcome.FAULT and "--shm-size" in finding.text
    (finding,) = found(free(), "/dev/shm")
    assert finding.outcome is Outcome.WARNING and "--shm-size" in finding.text


def test_few_descriptors_are_a_warning(quick: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("resource.getrlimit", lambda kind: (1024, 1024))
    (finding,) = found(free(), "descriptors")
    assert finding.outcome is Outcome.WARNING and "LimitNOFILE=" in finding.text


def test_a_temporary_folder_with_too_long_a_name_is_a_fault(
    quick: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    folder = tmp_path / ("a" * 120)
    folder.mkdir()
    monkeypatch.setattr("tempfile.gettempdir", lambda: str(folder))
    monkeypatch.setattr("tempfile.tempdir", str(folder))
    (finding,) = found(free(), "temporary folder")
    assert finding.outcome is Outcome.FAULT and "TMPDIR" in finding.text


def test_a_library_that_is_missing_and_a_runtime_without_its_gpu_are_faults(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "LIBRARIES", {"none": "no_such_module"})
    (outcome, text), *_ = doctor._libraries(Settings(), ServingPolicy())
    assert outcome is Outcome.FAULT and "none (No module" in text and "make setup" in text
    monkeypatch.setattr(doctor, "find_gpu", no_gpu)
    ((outcome, text),) = doctor._gpu(Settings(), ServingPolicy(runtime="tensorrt-rtx"))
    assert outcome is Outcome.FAULT and "no NVIDIA GPU" in text
    ((outcome, _),) = doctor._gpu(Settings(), ServingPolicy())
    assert outcome is Outcome.GOOD


def test_each_device_is_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    def gpu(device: str | None) -> Gpu:
        if device == "1":
            no_gpu(device)
        return Gpu("NVIDIA Test", "8.9", 8 * 10**9, 8 * 10**9, "13.0")

    monkeypatch.setattr(doctor, "find_gpu", gpu)
    good, fault = doctor._gpu(Settings(devices="0,1"), ServingPolicy(runtime="tensorrt-rtx"))
    assert good[0] is Outcome.GOOD and good[1].startswith("device 0: NVIDIA Test")
    assert fault[0] is Outcome.FAULT and fault[1].startswith("device 1: no NVIDIA GPU")


def test_a_gpu_that_torch_cannot_have_is_a_warning(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(doctor, "find_gpu", no_gpu)
    monkeypatch.setattr(doctor, "DRIVER", tmp_path / "version")
    ((outcome, _),) = doctor._gpu(Settings(), ServingPolicy(runtime="torch"))
    assert outcome is Outcome.GOOD
    doctor.DRIVER.write_text("NVRM version: NVIDIA 580.1")
    ((outcome, text),) = doctor._gpu(Settings(), ServingPolicy(runtime="torch"))
    assert outcome is Outcome.WARNING and "580.1" in text


def no_gpu(device: str | None) -> None:
    from icportrait.errors import RuntimeNotAvailable

    raise RuntimeNotAvailable("no NVIDIA GPU was found")


def test_a_check_that_fails_itself_is_a_finding(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(settings: Settings, policy: ServingPolicy) -> None:
        raise RuntimeError("unforeseen")

    monkeypatch.setattr(doctor, "CHECKS", {"broken": broken})
    (finding,) = examine(Settings())
    assert finding.outcome is Outcome.FAULT and "unforeseen" in finding.text


@pytest.mark.parametrize(
    ("mode", "has_mps", "runtime", "fits"),
    [
        ("default", False, "torch", True),
        ("exclusive process", False, "torch", False),
        ("exclusive process", False, "tensorrt-rtx", False),
        ("exclusive process", True, "torch", True),
        ("exclusive process", False, "onnxruntime", True),
    ],
)
def test_a_gpu_that_one_process_may_have_is_a_fault(
    mode: str, has_mps: bool, runtime: str, fits: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu = Gpu("NVIDIA Test", "8.9", 8 * 10**9, 8 * 10**9, "13.0", mode, has_mps)
    monkeypatch.setattr(doctor, "find_gpu", lambda _: gpu)
    findings = list(doctor.CHECKS["gpu"](free(), ServingPolicy(runtime=runtime)))
    assert all(outcome is Outcome.GOOD for outcome, _ in findings) == fits
    assert f"compute mode {mode}, MPS {'on' if has_mps else 'off'}" in findings[0][1]
