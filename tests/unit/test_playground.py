"""The playground's server: what it gives to a page of its own, and refuses to others'. The page is tested in
``tests/e2e/test_playground.py``.
"""

from __future__ import annotations

import base64
import hashlib
import http.client
import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from typing import Any

import pytest
from icportrait_client.cli import main
from icportrait_client.playground import MAX_BODY_BYTES
from icportrait_client.testing import FakePortraitServer

from tests.conftest import EXAMPLES

COMMAND = "import sys; from icportrait_client.cli import main; sys.exit(main())"
PICTURES = [(EXAMPLES / name).read_bytes() for name in ("hopper.jpg", "astronaut.jpg")]


@pytest.fixture(scope="module")
def portraits() -> Iterator[FakePortraitServer]:
    with FakePortraitServer(steps=4) as server:
        yield server


@pytest.fixture(scope="module")
def host(portraits: FakePortraitServer) -> Iterator[str]:
    """Start the playground and yield its host and port."""
    process = subprocess.Popen(
        [sys.executable, "-c", COMMAND, "playground", "--url", portraits.address, "--port", "0"],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout
    try:
        yield process.stdout.readline().strip().removeprefix("http://")
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


@pytest.fixture
def connection(host: str) -> Iterator[http.client.HTTPConnection]:
    connection = http.client.HTTPConnection(host, timeout=60)
    yield connection
    connection.close()


def body(pictures: list[bytes] = PICTURES, **options: Any) -> bytes:
    head = {"profile_bytes": len(pictures[0]), "options": options}
    return json.dumps(head).encode() + b"\n" + b"".join(pictures)


def ask(
    connection: http.client.HTTPConnection, method: str, path: str, data: bytes | None = None, **headers: str
) -> tuple[int, bytes]:
    if method == "POST":
        headers = {"origin": f"http://{connection.host}:{connection.port}", **headers}
    connection.request(method, path, data, headers)
    answer = connection.getresponse()
    return answer.status, answer.read()


def lines(data: bytes) -> list[dict[str, Any]]:
    return [json.loads(line) for line in data.splitlines()]


def test_the_page_runs_its_own_script_and_nothing_else(connection: http.client.HTTPConnection) -> None:
    connection.request("GET", "/")
    answer = connection.getresponse()
    page, policy = answer.read(), answer.headers["content-security-policy"]
    (script,) = re.findall(rb"<script>(.*?)</script>", page, re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(script).digest()).decode()
    assert f"script-src 'sha256-{digest}';" in policy
    assert policy.startswith("default-src 'none'")
    assert "unsafe" not in policy
    assert not re.findall(rb"(?:src|href)=\"(?!data:)", page)


def test_the_options_are_the_contracts(connection: http.client.HTTPConnection, portraits: FakePortraitServer) -> None:
    status, data = ask(connection, "GET", "/options")
    found = json.loads(data)
    assert (status, found["servers"]) == (200, [portraits.address])
    assert found["options"]["num_inference_steps"]["maximum"] == 150
    assert "profile" not in found["options"]


def test_a_portrait_comes_step_by_step(connection: http.client.HTTPConnection, portraits: FakePortraitServer) -> None:
    status, data = ask(connection, "POST", "/portraits", body(seed=7, preview_every=2, profile_box=[0, 0, 0.5, 1]))
    events = lines(data)
    assert (status, [event.get("step") for event in events]) == (200, [1, 2, 3, 4, None])
    assert ["pictures" in event for event in events] == [False, True, False, False, True]
    assert events[-1]["metadata"]["seed"] == 7
    sent = portraits.calls[-1].inputs
    assert [sent["profile"], sent["reference"]] == PICTURES
    assert sent["profile_box"] == (0, 0, 0.5, 1)


def test_an_error_is_the_last_line(connection: http.client.HTTPConnection, portraits: FakePortraitServer) -> None:
    portraits.fail("INVALID_ARGUMENT", "profile: no face", after_steps=1)
    events = lines(ask(connection, "POST", "/portraits", body())[1])
    assert events[-1] == {"error": "profile: no face", "kind": "request"}
    events = lines(ask(connection, "POST", "/portraits", body(seed="/etc/passwd"))[1])
    assert events == [{"error": events[0]["error"], "kind": "request"}]
    assert events[0]["error"].startswith("seed: '/etc/passwd', expected a whole number")


@pytest.mark.parametrize(
    "headers",
    [
        {"origin": "http://elsewhere.example"},
        {"origin": "null"},
        {"origin": ""},
        {"host": "rebound.example:8010", "origin": "http://rebound.example:8010"},
    ],
)
def test_another_sites_page_is_refused(
    connection: http.client.HTTPConnection, portraits: FakePortraitServer, headers: dict[str, str]
) -> None:
    before = len(portraits.calls)
    status, data = ask(connection, "POST", "/portraits", body(), **headers)
    assert (status, "expected" in json.loads(data)["error"]) == (403, True)
    assert len(portraits.calls) == before


def test_a_page_can_not_be_read_under_another_name(connection: http.client.HTTPConnection) -> None:
    assert ask(connection, "GET", "/options", host="rebound.example")[0] == 403
    assert ask(connection, "GET", "/", host="localhost")[0] == 200


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"no JSON\nbytes",
        b"[]\nbytes",
        body(profile="/etc/passwd"),
        body(timeout_s=1),
        b'{"profile_bytes": 99, "options": {}}\nbytes',
        b'{"profile_bytes": -1, "options": {}}\nbytes',
        b'{"profile_bytes": "/etc/passwd", "options": {}}\nbytes',
    ],
)
def test_what_is_not_the_pages_is_refused(connection: http.client.HTTPConnection, data: bytes) -> None:
    assert ask(connection, "POST", "/portraits", data) == (400, b'{"error":"the request isn\'t this page\'s"}')


def test_too_much_is_refused_before_it_is_read(connection: http.client.HTTPConnection) -> None:
    connection.putrequest("POST", "/portraits")
    connection.putheader("origin", f"http://{connection.host}:{connection.port}")
    connection.putheader("content-length", str(MAX_BODY_BYTES + 1))
    connection.endheaders()
    assert connection.getresponse().status == 413


def test_a_browser_that_goes_cancels_on_the_server(
    connection: http.client.HTTPConnection, portraits: FakePortraitServer
) -> None:
    before = portraits.cancelled
    portraits.step_s = 60
    try:
        origin = f"http://{connection.host}:{connection.port}"
        calls = len(portraits.calls)
        connection.request("POST", "/portraits", body(), {"origin": origin})
        pause = threading.Event()
        while len(portraits.calls) == calls:
            pause.wait(0.01)
        connection.close()
        while portraits.cancelled == before:
            pause.wait(0.01)
    finally:
        portraits.step_s = 0


def test_without_its_packages_it_says_which(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == "starlette"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.delitem(sys.modules, "icportrait_client.playground")
    monkeypatch.setitem(sys.modules, "starlette", None)
    monkeypatch.setitem(sys.modules, "starlette.applications", None)
    assert main(["playground"]) == 1
    assert "pip install 'icportrait-client[playground]'" in capsys.readouterr().err


@pytest.mark.parametrize("host", ["0.0.0.0", "::", ""])
def test_it_listens_under_one_name(host: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["playground", "--host", host, "--port", "0"]) == 1
    assert capsys.readouterr().err.startswith(f"error: host: '{host}', expected one address or name of this machine")


def test_a_taken_port_is_an_error_in_one_line(host: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["playground", "--port", host.rpartition(":")[2]]) == 1
    assert re.fullmatch(r"error: .*[Aa]ddress already in use.*\n", capsys.readouterr().err)
