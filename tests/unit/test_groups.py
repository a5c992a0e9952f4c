"""The tests that share a server go to one worker, else each worker starts the server; and each test has a name."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

SOURCE = """
import os
from pathlib import Path
import pytest

@pytest.mark.xdist_group("server")
@pytest.mark.parametrize("number", range(6))
def test_shares(number):
    Path(f"{number}").write_text(os.environ["PYTEST_XDIST_WORKER"])
"""


def test_a_group_of_tests_stays_on_one_worker(tmp_path: Path) -> None:
    """Notice pytest 9.2 beside pytest-xdist 3.8, which together spread a group."""
    (tmp_path / "test_shared.py").write_text(SOURCE)
    flags = ["-p", "xdist", "--numprocesses", "2", "--dist", "loadgroup"]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    subprocess.run([sys.executable, "-m", "pytest", *flags], cwd=tmp_path, env=environment, check=True, timeout=120)
    assert len({(tmp_path / str(number)).read_text() for number in range(6)}) == 1


def test_no_test_has_a_long_name(request: pytest.FixtureRequest) -> None:
    """Notice a name made of a long value: pytest puts it into the environment, and no process starts with 128 KiB."""
    assert [item.nodeid[:200] for item in request.session.items if len(item.nodeid) > 1000] == []
