"""One device for all engines of a server, in whichever process they run."""

from __future__ import annotations

import fcntl
import itertools
import json
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from icportrait.contract import ENGINES
from icportrait.runtime.shared_device import DEVICE_FOLDER, SharedDevice, device_folder
from tests.conftest import ROOT

CHILD = """
import sys, time
from pathlib import Path
from icportrait.contract import engine_specs
from icportrait.runtime.shared_device import SharedDevice
from icportrait.runtime.latency_table import LatencyTable
from icportrait.runtime.simulated import SimulatedEngine
from tests.tiny import TINY
table, folder, runs = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
spec = engine_specs(TINY)["vae_encoder"]
engine, inputs = SimulatedEngine(spec, LatencyTable.read(table), SharedDevice(folder)), spec.dummy_inputs(1)
print("ready", flush=True)
sys.stdin.readline()
had_it_s = []
for _ in range(runs):
    engine.launch(inputs)
    had_it_s.append(time.monotonic())
    engine.wait()
print(*had_it_s, flush=True)
"""
"""Runs when it is told to, and says when it had the device."""


def write_table(path: Path, latency_ms: float) -> Path:
    engines = {name: {"1": latency_ms} for name in ENGINES}
    path.write_text(json.dumps({"device": "test device", "engines": engines}))
    return path


@contextmanager
def child(table: Path, folder: Path, runs: int) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        [sys.executable, "-c", CHILD, str(table), str(folder), str(runs)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    )
    with process:
        try:
            assert process.stdout.readline() == "ready\n"
            yield process
        finally:
            process.kill()


def go(process: subprocess.Popen[str]) -> None:
    process.stdin.write("go\n")
    process.stdin.flush()


@pytest.mark.parametrize("devices", [("one", "one"), ("one", "two")], ids=["one device", "two devices"])
def test_processes_take_turns_on_one_device_and_not_on_two(tmp_path: Path, devices: tuple[str, str]) -> None:
    latency_ms = 20.0
    table = write_table(tmp_path / "table.json", latency_ms)
    for name in devices:
        (tmp_path / name).mkdir(exist_ok=True)
    with child(table, tmp_path / devices[0], 20) as first, child(table, tmp_path / devices[1], 20) as second:
        for process in (first, second):
            go(process)
        times = [[float(text) for text in process.stdout.readline().split()] for process in (first, second)]
    # From when it was said to when the device was given back it was a little less than the latency.
    at_once = [(a, b) for a, b in itertools.product(*times) if abs(a - b) < 0.75 * latency_ms / 1000]
    assert bool(at_once) is (len(set(devices)) == 2)


def test_a_process_that_dies_gives_the_device_back(tmp_path: Path) -> None:
    table = write_table(tmp_path / "table.json", 600_000.0)
    folder = tmp_path / "device"
    folder.mkdir()
    with child(table, folder, 1) as process:
        go(process)
        with (folder / "busy").open() as busy:
            deadline = time.monotonic() + 20
            while not is_locked(busy):
                assert time.monotonic() < deadline
                time.sleep(0.01)
        taken = threading.Event()

        def take() -> None:
            device = SharedDevice(folder)
            device.acquire()
            taken.set()
            device.release()

        thread = threading.Thread(target=take, daemon=True)
        thread.start()
        assert not taken.wait(0.3)
        process.kill()
        assert taken.wait(10)
        thread.join()


def is_locked(file: Any) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    fcntl.flock(file, fcntl.LOCK_UN)
    return False


def test_who_waits_goes_before_who_has_just_computed(tmp_path: Path) -> None:
    """Let the waiting device hold the turn, so that no other can ask for the device before it has it."""
    loop, waiter, got, done = SharedDevice(tmp_path), SharedDevice(tmp_path), threading.Event(), threading.Event()

    def wait() -> None:
        waiter.acquire()
        got.set()
        done.wait(10)
        waiter.release()

    thread = threading.Thread(target=wait)
    with (tmp_path / "turn").open() as turn:
        loop.acquire()
        assert not is_locked(turn)
        thread.start()
        deadline = time.monotonic() + 10
        while not is_locked(turn):
            assert time.monotonic() < deadline, "it waits for the device without holding the turn"
            time.sleep(0.001)
        assert not got.is_set()
        loop.release()
        assert got.wait(10) and not is_locked(turn)
    done.set()
    thread.join()


def test_threads_that_share_a_handle_take_turns_too(tmp_path: Path) -> None:
    device, inside, most = SharedDevice(tmp_path), [0], [0]

    def use() -> None:
        for _ in range(5):
            device.acquire()
            inside[0] += 1
            most[0] = max(most[0], inside[0])
            time.sleep(0.002)
            inside[0] -= 1
            device.release()

    threads = [threading.Thread(target=use) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == [1]


def test_models_of_a_server_share_a_device_and_two_servers_of_one_repository_do_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    repository, servers = tmp_path / "repository", [tmp_path / "a", tmp_path / "b"]
    repository.mkdir()
    for server in servers:
        (server / DEVICE_FOLDER).mkdir(parents=True)
        (server / "repository").symlink_to(repository)
    assert [device_folder(server / "repository") for server in servers] == [server / "device" for server in servers]
    SharedDevice.of(servers[0] / "repository" / "denoise" / "1")
    assert {path.name for path in (servers[0] / "device").iterdir()} == {"turn", "busy"}
    assert not list((servers[1] / "device").iterdir()) and not list(temporary.iterdir())
    # Started by hand, without a folder of the server's own: by the repository, through whichever link it is seen.
    (tmp_path / "link").symlink_to(repository)
    alone = device_folder(repository)
    assert alone == device_folder(tmp_path / "link") and alone.parent == temporary and alone.is_dir()
    assert alone != device_folder(tmp_path / "another")
