"""The example for Node, against the real server."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
from pathlib import Path

import pytest
from filelock import FileLock
from icportrait_client import PortraitClient

from icportrait.server import ServerProcess
from tests.conftest import EXAMPLES
from tests.documents import BLOCKS, ROOT, logical_lines

SOURCE = EXAMPLES / "node"
BUILT = ROOT / "build" / "node"
PROTO = EXAMPLES / "kserve.proto"


@pytest.fixture(scope="module")
def packages() -> Path:
    """Install the example's packages, once for each lock file."""
    for program, package in (("node", "nodejs"), ("npm", "npm")):
        if shutil.which(program) is None:
            pytest.skip(f"{program} isn't here; apt-get install {package}")
    lock = (SOURCE / "package-lock.json").read_bytes()
    folder = BUILT / hashlib.sha256(lock).hexdigest()[:12]
    BUILT.mkdir(parents=True, exist_ok=True)
    with FileLock(BUILT / "lock"):
        if not (folder / "whole").exists():
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            for name in ("package.json", "package-lock.json"):
                shutil.copy(SOURCE / name, folder)
            command = ["npm", "ci", "--ignore-scripts", "--no-audit", "--no-fund", "--no-update-notifier"]
            command += ["--fetch-retries=1", "--fetch-timeout=30000"]
            try:
                subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=240, check=True)
            except subprocess.SubprocessError as error:
                cause = str(getattr(error, "stderr", "") or error).strip()[-300:]
                pytest.skip(f"npm can't install @grpc/grpc-js and @grpc/proto-loader: {cause}")
            (folder / "whole").touch()
    return folder / "node_modules"


@pytest.fixture
def folder(tmp_path: Path, packages: Path) -> Path:
    """Make a folder as the example expects it."""
    shutil.copytree(SOURCE, tmp_path / "examples" / "node", ignore=shutil.ignore_patterns("node_modules"))
    shutil.copy(PROTO, tmp_path / "examples")
    (tmp_path / "examples" / "node" / "node_modules").symlink_to(packages)
    (tmp_path / "me.jpg").symlink_to(EXAMPLES / "hopper.jpg")
    (tmp_path / "portrait.jpg").symlink_to(EXAMPLES / "astronaut.jpg")
    (tmp_path / "text.jpg").write_text("no picture")
    return tmp_path


def run(folder: Path, server: ServerProcess, command: str) -> subprocess.CompletedProcess[str]:
    words = command.replace("localhost:8001", server.grpc_url).split()
    return subprocess.run(words, cwd=folder, capture_output=True, text=True, timeout=120)


def test_nodes_portrait_is_the_python_clients(folder: Path, server: ServerProcess) -> None:
    lines = [line for block in BLOCKS if block.language == "sh" for line in logical_lines(block.text)]
    (command,) = (line for line in lines if line.startswith("node "))
    done = run(folder, server, command)
    assert done.returncode == 0, done.stderr
    assert "denoise" in done.stdout
    with PortraitClient(server.grpc_url) as client:
        portrait = client.generate(profile=folder / "me.jpg", reference=folder / "portrait.jpg", seed=7)
    assert (folder / "out.png").read_bytes() == portrait.bytes


def test_an_error_is_the_servers_sentence(folder: Path, server: ServerProcess) -> None:
    done = run(folder, server, "node examples/node/portrait.js localhost:8001 me.jpg text.jpg out.png")
    assert done.returncode == 1
    assert done.stderr.startswith("INVALID_ARGUMENT: reference: ")
    assert not (folder / "out.png").exists()
