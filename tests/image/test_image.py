"""The CPU image's steps run in a bare Debian, and its server serves there as in a container."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from icportrait.deploy.repository import assemble
from icportrait.policy import ServingPolicy
from icportrait.server import HOST, Ports
from tests.conftest import ROOT
from tests.e2e.test_gateway import form
from tests.image.chroot import Stage, build, debian

BUILD = ROOT / "build" / "image"
READY_S = 120.0
pytestmark = pytest.mark.timeout(1200)


@pytest.fixture(scope="module")
def image() -> Iterator[Stage]:
    """Take the steps of the Dockerfile. The bare Debian stays for the next time."""
    if os.geteuid() or not all(map(shutil.which, ("debootstrap", "unshare"))):
        pytest.skip("needs root, and Debian's packages debootstrap and util-linux")
    stages = BUILD / "stages"
    shutil.rmtree(stages, ignore_errors=True)
    stages.mkdir(parents=True)
    yield build(ROOT / "deploy" / "container" / "Dockerfile.cpu", ROOT, debian(BUILD), stages)
    shutil.rmtree(stages)


@pytest.fixture(scope="module")
def models(demo_export: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make a folder as the init container leaves it."""
    folder = tmp_path_factory.mktemp("models")
    assemble(demo_export, folder / "assembled", ServingPolicy())
    shutil.copytree(folder / "assembled", folder / "models" / "repository")
    subprocess.run(["chmod", "-R", "a+rX", folder / "models"], check=True)
    return folder / "models"


def test_the_image_serves_portraits_without_rights_and_ends_cleanly(
    image: Stage, models: Path, pictures: dict[str, bytes], tmp_path: Path
) -> None:
    ports = Ports.free()
    flags = [f"--{name}-port={port}" for name, port in vars(ports).items()]
    with (tmp_path / "log").open("w+") as log:
        running = image.start(models, [*image.entrypoint, *flags], stdout=log, stderr=log)
        try:
            assert wait_until_ready(running, ports), (tmp_path / "log").read_text()
            body, content_type = form(pictures | {"seed": b"7"})
            request = urllib.request.Request(
                f"http://{HOST}:{ports.http}/v1/portraits", body, {"Content-Type": content_type}
            )
            with urllib.request.urlopen(request, timeout=60) as answer:
                assert answer.read().startswith(b"\x89PNG")
            with urllib.request.urlopen(f"http://{HOST}:{ports.metrics}/metrics", timeout=10) as answer:
                assert b"icportrait_gateway_ready 1" in answer.read()
            assert is_healthy(image, models, ports)
            servers = processes_in(image)
            assert servers and {owner for owner, _ in servers} == {10001}
            assert any("tritonserver" in command for _, command in servers)
        finally:
            for child in children(running.pid):
                os.kill(child, signal.SIGTERM)
            status = running.wait(60)
        text = (tmp_path / "log").read_text()
    assert status == 0 and text.rstrip().endswith("stopped"), text
    assert not processes_in(image)
    assert not is_healthy(image, models, ports)


def test_the_doctor_finds_no_fault_in_the_image(image: Stage, models: Path) -> None:
    flags = [f"--{name}-port={port}" for name, port in vars(Ports.free()).items()]
    with image.start(models, ["icportrait-server", "doctor", "--json", *flags], stdout=subprocess.PIPE) as done:
        told, _ = done.communicate(timeout=120)
    findings = {each["check"]: each for each in json.loads(told)["findings"]}
    assert done.returncode == 0, told
    assert "number 10001" in findings["user"]["text"] and "256 MB" in findings["/dev/shm"]["text"]


def test_the_root_cannot_be_written(image: Stage, models: Path) -> None:
    script = "touch /tmp/a /dev/shm/a /models/.a 2>&1; touch /opt/icportrait/a 2>&1; id -u"
    with image.start(models, ["sh", "-c", script], stdout=subprocess.PIPE) as done:
        told, _ = done.communicate(timeout=60)
    assert "/opt/icportrait/a" in told and "/tmp/a" not in told and "/dev/shm" not in told
    assert told.splitlines()[-1] == "10001"


def test_the_image_has_the_locked_packages_and_no_others(image: Stage, models: Path) -> None:
    with image.start(models, ["python3", "-m", "pip", "list", "--format=freeze"], stdout=subprocess.PIPE) as done:
        told, _ = done.communicate(timeout=60)
    lock = (ROOT / "deploy" / "container" / "requirements-cpu.txt").read_text()
    locked = {line.split()[0].lower().replace("_", "-") for line in lock.splitlines() if "==" in line}
    found = {line.lower().replace("_", "-") for line in told.split() if not line.startswith(("icportrait", "pip"))}
    assert found - locked <= {line for line in found if line.startswith("setuptools")} and locked <= found


def is_healthy(image: Stage, models: Path, ports: Ports) -> bool:
    """Run the image's own health check, with the port of this server."""
    command = [word.replace(":8000/", f":{ports.http}/") for word in image.health]
    assert command != image.health
    return image.start(models, command, stderr=subprocess.DEVNULL).wait(60) == 0


def wait_until_ready(running: subprocess.Popen[str], ports: Ports) -> bool:
    deadline = time.monotonic() + READY_S
    while time.monotonic() < deadline and running.poll() is None:
        try:
            with urllib.request.urlopen(f"http://{HOST}:{ports.http}/v2/health/ready", timeout=5):
                return True
        except OSError:
            time.sleep(0.2)
    return False


def children(process: int) -> list[int]:
    return [int(word) for word in Path(f"/proc/{process}/task/{process}/children").read_text().split()]


def processes_in(image: Stage) -> list[tuple[int, str]]:
    """List the processes whose root is the image's: owner and command."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if (folder / "root").samefile(image.root):
                command = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode()
                found.append((folder.stat().st_uid, command))
        except OSError:
            continue
    return found
