"""A server's words about itself, and about settings that it can't begin with."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from icportrait.errors import IcPortraitError
from icportrait.gateway.main import _listen, _openness, _ready_line
from icportrait.gateway.settings import Settings
from icportrait.presets import DEMO_128
from icportrait.server import main
from tests.trivial_engines import write_trivial_export

FILE = Path("a file")
TWO_ENGINES = """
import sys, threading
from icportrait.server import _say

def speak(device):
    for _ in range(3000):
        start.wait()
        _say(f"ready; device {device}")

sys.setswitchinterval(1e-6)
start = threading.Barrier(2)
for device in range(2):
    threading.Thread(target=speak, args=(device,)).start()
"""


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({}, ()),
        ({"host": "::1"}, ()),
        ({"host": "0.0.0.0"}, ("api_keys", "tls_certificate")),
        ({"host": "10.0.0.1", "api_keys": FILE}, ("tls_certificate",)),
        ({"host": "10.0.0.1", "tls_certificate": FILE, "tls_key": FILE}, ("api_keys",)),
        ({"host": "::", "tls_certificate": FILE, "tls_key": FILE, "tls_client_ca": FILE}, ()),
        ({"host": "::", "tls_certificate": FILE, "tls_key": FILE, "api_keys": FILE}, ()),
    ],
)
def test_a_door_that_others_reach_without_a_key_or_encryption_is_told(
    settings: dict[str, object], told: tuple[str, ...]
) -> None:
    warning = _openness(Settings(**settings)) or ""  # type: ignore[arg-type]
    assert [name for name in ("api_keys", "tls_certificate") if name in warning] == list(told)
    assert warning.startswith("warning: it listens on") == bool(told)


def test_metrics_stay_on_loopback_and_addresses_are_written_as_such(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("icportrait.gateway.main.simulation_note", lambda repository: None)
    line = _ready_line(Settings(repository=tmp_path, host="::"))
    assert line == "ready: gRPC [::]:8001, HTTP [::]:8000, metrics 127.0.0.1:8002"


def test_what_is_no_repository_is_told_how_one_is_made(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_trivial_export(tmp_path, DEMO_128)
    for folder in (tmp_path, tmp_path / "gone"):
        assert main(["--repository", str(folder)]) == 1
        error = capsys.readouterr().err
        assert error.startswith(f"error: repository: {folder} is none, expected a folder assembled by python -m")


@pytest.mark.parametrize("name", ["my studio", "a.b]", "", "x" * 65, "ü"])
def test_a_key_has_a_name_that_a_section_can_have(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["key", name]) == 1
    assert capsys.readouterr().err.startswith("error: key: ")


def test_connections_leave_descriptors_to_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("resource.getrlimit", lambda kind: (1024, 1024))
    assert Settings().limits.connections == (1024 - 256) // 2
    assert Settings(tls_certificate=FILE, tls_key=FILE).limits.connections == (1024 - 256) // 4
    assert Settings(connections=7).limits.connections == 7
    monkeypatch.setattr("resource.getrlimit", lambda kind: (2**16, 2**16))
    assert Settings().limits.connections == 1024


@pytest.mark.parametrize("host", [70 * "a", "a..b", "\udcff", "a\0b"])
def test_a_host_that_is_neither_a_name_nor_an_address_is_told_as_that(host: str) -> None:
    async def listen() -> None:
        opening = asyncio.get_running_loop().create_server(asyncio.Protocol, host, 8001)
        await _listen("grpc_port", Settings(host=host), opening)  # type: ignore[type-var]

    with pytest.raises(IcPortraitError, match=r"^grpc_port: .*: its host is neither a name nor an address$"):
        asyncio.run(listen())


SAYING = """
import sys
import icportrait.gateway.main
from icportrait.server import main

def run(settings, say):
    say("before")
    sys.stdin.readline()
    for _ in range(3):
        say("nobody reads this")
    print("it has served", file=sys.stderr)

icportrait.gateway.main.run = run
sys.exit(main(["--repository", "."]))
"""


def test_a_server_whose_words_nobody_reads_any_more_serves_on_and_ends_in_order() -> None:
    with subprocess.Popen(
        [sys.executable, "-c", SAYING], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdin and process.stdout and process.stderr
        assert process.stdout.readline() == "before\n"
        process.stdout.close()
        process.stdin.write("\n")
        process.stdin.close()
        assert process.stderr.read() == "it has served\n"
        assert process.wait() == 0


def test_lines_of_two_engines_stay_whole() -> None:
    said = subprocess.run([sys.executable, "-c", TWO_ENGINES], capture_output=True, text=True, check=True, timeout=60)
    assert Counter(said.stdout.splitlines()) == {"ready; device 0": 3000, "ready; device 1": 3000}
