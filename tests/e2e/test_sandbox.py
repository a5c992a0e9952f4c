"""A server that root starts and that goes on as another user."""

from __future__ import annotations

import os
import pwd
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.e2e.caller import infer
from tests.e2e.conftest import simulated_repository
from tests.e2e.supervised import descendants, supervised

USER = "nobody"


def ids(pid: int) -> set[int]:
    """Read the users of a process: real, effective, saved and of files."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    (line,) = [line for line in lines if line.startswith("Uid:")]
    return set(map(int, line.split()[1:]))


def python_of(folder: Path) -> Path | None:
    """Make an environment with this one's packages that another user may run, of this Python or of the system's."""
    packages = [sysconfig.get_path("purelib"), str(ROOT), str(ROOT / "client" / "src")]
    made = folder / "venv" / "bin" / "python"
    check = "import os, sys; from icportrait.gateway.sandbox import become; become(sys.argv[1]); import pytriton, numpy"
    for base in (os.path.realpath(sys.executable), f"/usr/bin/python3.{sys.version_info.minor}"):
        if Path(base).exists():
            subprocess.run([base, "-m", "venv", "--clear", "--without-pip", folder / "venv"], check=True)
            (place,) = (folder / "venv" / "lib").glob("*/site-packages")
            (place / "packages.pth").write_text("\n".join(packages))
            if subprocess.run([made, "-c", check, USER], capture_output=True).returncode == 0:
                return made
    return None


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to become another user")
def test_a_server_that_root_starts_serves_as_another_user(
    pictures: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    with tempfile.TemporaryDirectory(dir="/tmp") as name:
        folder = Path(name)
        folder.chmod(0o755)
        python = python_of(folder)
        if python is None:
            pytest.skip(f"user {USER} may run no Python {sys.version_info.major}.{sys.version_info.minor} here")
        monkeypatch.setattr(sys, "executable", str(python))
        repository = simulated_repository(folder, {"unet": 1})
        for path in repository.rglob("*"):
            path.chmod(0o755)
        # For the server's temporary files.
        folder.chmod(0o777)
        with supervised(repository, folder, flags=(f"--user={USER}",)) as server:
            assert len(infer(server.url, num_inference_steps=1, **pictures)[0]) == 1
            number = pwd.getpwnam(USER).pw_uid
            pids = [server.process.pid, *descendants(server.process.pid)]
            assert len(pids) > 5 and {user for pid in pids for user in ids(pid)} == {number}
