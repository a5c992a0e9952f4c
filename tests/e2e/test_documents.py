"""The examples of README and docs, run as they stand on the real server."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from icportrait.server import ServerProcess
from tests.conftest import EXAMPLES
from tests.documents import BLOCKS, ROOT

MADE = {
    "README.md": {"out.png", "sweep.png"},
    "client/README.md": {"portrait.png", "portrait-0.png", "portrait-1.png", "out.png", "sweep.png"},
    "docs/api.md": {"out.png", "picture.png", "preview.png", "out-preview.png"}
    | {f"preview-{step}.png" for step in (5, 10, 15, 20)},
}
"""Pictures that a document's examples write, by document."""
PICTURES = {"hopper.jpg": ("me.jpg", "anna.jpg"), "astronaut.jpg": ("portrait.jpg", "window-light.jpg")}
CLIENT = "import sys; from icportrait_client.cli import main; sys.exit(main())"


@pytest.fixture
def folder(tmp_path: Path, server: ServerProcess, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Make a folder as the examples expect it: pictures, and the command ``icportrait``."""
    for picture, names in PICTURES.items():
        for name in names:
            (tmp_path / name).symlink_to(EXAMPLES / picture)
    (tmp_path / "examples").symlink_to(EXAMPLES)
    command = tmp_path / ".venv" / "bin" / "icportrait"
    command.parent.mkdir(parents=True)
    command.write_text(f"#!/bin/sh\nexec {sys.executable} -c '{CLIENT}' \"$@\" --url {server.grpc_url}\n")
    command.chmod(0o755)
    monkeypatch.setenv("PATH", f"{command.parent}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("document", MADE)
def test_the_examples_of_a_document_run_and_write_their_pictures(
    document: str, folder: Path, server: ServerProcess, capfd: pytest.CaptureFixture[str]
) -> None:
    names: dict[str, object] = {}
    made = set()
    for block in BLOCKS:
        if not (block.needs_server and block.path == ROOT / document):
            continue
        text = block.text.replace("localhost:8000", server.http_url).replace("localhost:8001", server.grpc_url)
        if block.language == "python":
            exec(compile(text, str(block), "exec"), names)
        else:
            command = ["bash", "-euo", "pipefail", "-c", text]
            done = subprocess.run(command, cwd=folder, stdin=subprocess.DEVNULL, timeout=180)
            assert done.returncode == 0, f"{block}: {capfd.readouterr().err}"
        for picture in folder.glob("*.png"):
            with Image.open(picture) as opened:
                opened.load()
                assert opened.width >= 128, f"{block}: {picture.name}"
            picture.unlink()
            made.add(picture.name)
    assert made == MADE[document]
    assert ("event: portraits" in capfd.readouterr().out) == (document == "docs/api.md")


def test_no_document_with_examples_is_left_out() -> None:
    assert {str(block.path.relative_to(ROOT)) for block in BLOCKS if block.needs_server} == set(MADE)
