"""The playground's page, in a real browser, against the real server."""

from __future__ import annotations

import base64
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from icportrait_client import PortraitClient
from PIL import Image

from icportrait.server import ServerProcess
from tests.browser import PROGRAM, Page, chromium
from tests.conftest import EXAMPLES

COMMAND = "import sys; from icportrait_client.cli import main; sys.exit(main())"
DONE = "document.querySelectorAll('#gallery button').length === {} && $('make').textContent === 'Make the portrait'"


@pytest.fixture
def address(server: ServerProcess) -> Iterator[str]:
    """Start the playground and yield its address."""
    words = ["playground", "--url", server.grpc_url, "--port", "0"]
    process = subprocess.Popen([sys.executable, "-c", COMMAND, *words], stdout=subprocess.PIPE, text=True)
    assert process.stdout
    try:
        yield process.stdout.readline().strip()
        process.send_signal(signal.SIGINT)
        assert process.wait(30) == 130
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


@pytest.fixture
def page(address: str, tmp_path: Path) -> Iterator[Page]:
    if PROGRAM is None:
        pytest.skip("no Chromium here; apt-get install chromium")
    with chromium(tmp_path) as page:
        page.open(address)
        page.wait("servers.length > 0")
        yield page


def test_two_pictures_become_a_portrait_on_the_page(
    page: Page, address: str, server: ServerProcess, tmp_path: Path
) -> None:
    page.run("$('options').requestSubmit()")
    page.wait("$('error').textContent === 'Choose a profile and a reference first.'")
    page.choose("#profile input[type=file]", EXAMPLES / "hopper.jpg")
    page.choose("#reference input[type=file]", EXAMPLES / "astronaut.jpg")
    page.wait("[...document.querySelectorAll('.box')].every((box) => !box.hidden)")
    page.run(
        # Each change by its own record: two events that come at once are told to the observer together.
        "globalThis.seen = []; new MutationObserver((records) => records.forEach((record) =>"
        " record.addedNodes.forEach((node) => seen.push(node.textContent)))).observe($('state'), {childList: true})"
    )
    page.run("$('options').elements.num_inference_steps.value = 6; $('options').elements.preview_every.value = 2")
    page.run("$('options').requestSubmit()")
    page.wait(DONE.format(1))
    told = page.run("seen")
    assert [text for text in told if "preview" in text] == [f"Seed 7: step {step} of 6, preview" for step in (2, 4)]
    assert page.run("[...$('stages').rows].map((row) => row.cells[0].textContent)") == [
        *("queue", "preprocess", "conditioning", "denoise", "decode", "postprocess", "total"),
    ]
    assert "face" in page.run("document.querySelector('#profile .note').textContent")

    # The page's portrait is the Python client's.
    with PortraitClient(server.grpc_url) as client:
        portrait = client.generate(
            profile=EXAMPLES / "hopper.jpg", reference=EXAMPLES / "astronaut.jpg", seed=7, num_inference_steps=6
        )
    shown = page.run("document.querySelector('#pictures img').src")
    assert base64.b64decode(shown.partition(",")[2]) == portrait.bytes

    # A box that is moved is the request's own.
    page.drag("#profile .box", 0, -15)
    box = page.run("inputs.profile.box")
    assert box and "Crop: yours." in page.run("document.querySelector('#profile .note').textContent")
    page.run("$('more').click()")
    page.wait(DONE.format(5))
    seeds = page.run("[...document.querySelectorAll('#gallery button')].map((each) => each.textContent)")
    assert seeds == ["seed 7", "seed 7", "seed 8", "seed 9", "seed 10"]
    python, curl = page.run("[$('python').textContent, $('curl').textContent]")
    assert compile(python, "call", "exec") and "seed=7" in python and "profile_box=[" in python
    assert f"-F 'profile_box={','.join(f'{share:g}' for share in box)}'" in curl
    assert not page.problems()
    assert page.requested() == {f"{address}/", f"{address}/options", f"{address}/portraits"}
    page.screenshot(tmp_path / "playground.png")
    with Image.open(tmp_path / "playground.png") as opened:
        assert opened.width >= 1000


def test_the_camera_takes_a_picture(page: Page) -> None:
    page.run("document.querySelector('#reference button').click()")
    page.wait("document.querySelector('#reference video').videoWidth > 0")
    page.run("document.querySelector('#reference button').click()")
    page.wait("inputs.reference.blob && !document.querySelector('#reference img').hidden")
    assert page.run("inputs.reference.blob.type") == "image/jpeg"
    assert page.run("document.querySelector('#reference video').hidden")


def test_an_error_is_shown_as_the_server_says_it(page: Page, tmp_path: Path) -> None:
    (tmp_path / "text.png").write_text("no picture")
    page.choose("#profile input[type=file]", EXAMPLES / "hopper.jpg")
    page.choose("#reference input[type=file]", tmp_path / "text.png")
    page.run("$('options').requestSubmit()")
    page.wait("$('error').textContent && $('make').textContent === 'Make the portrait'")
    assert re.match(r"reference: ", page.run("$('error').textContent"))
