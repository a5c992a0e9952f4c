"""The client against real servers with simulated engines: servers that are killed, a slow one, and many streams."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import random
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing, closing, contextmanager
from pathlib import Path
from typing import Any

import pytest
from icportrait_client import AsyncPortraitClient, Portrait, PortraitClient, PortraitRequest, Progress

from icportrait.contract import ENGINES
from icportrait.deploy.repository import assemble
from icportrait.policy import ServingPolicy
from icportrait.presets import DEMO_128
from icportrait.server import Ports
from tests.conftest import ROOT
from tests.e2e.caller import series, settled
from tests.e2e.conftest import CACHE_BYTES, simulated_repository
from tests.e2e.supervised import temporary_folder
from tests.full.conftest import say
from tests.trivial_engines import write_trivial_export

pytestmark = [pytest.mark.full, pytest.mark.timeout(600), pytest.mark.xdist_group("client")]

PORTRAITS, CONCURRENCY, KILL_EVERY_S, MOST_ATTEMPTS = 2000, 16, 10.0, 1.10
STEPS = 20
HEDGED_PORTRAITS, HEDGED_CALLERS = 75, 3
STREAMS = 256


class Restartable:
    """A server's process, which can be killed and started again on the same ports."""

    def __init__(self, repository: Path, folder: Path, *flags: str) -> None:
        folder.mkdir()
        self.ports = Ports.free()
        self.url, self.metrics_url = f"127.0.0.1:{self.ports.grpc}", f"127.0.0.1:{self.ports.metrics}"
        ports = [f"--{name}-port={port}" for name, port in vars(self.ports).items()]
        self._command = [sys.executable, "-m", "icportrait.server", f"--repository={repository}", *ports, *flags]
        self._folder, self._stack = folder, contextlib.ExitStack()
        self.process: subprocess.Popen[str] | None = None

    def start(self) -> None:
        """Start the process; it is ready later."""
        environment = self._stack.enter_context(temporary_folder(self._folder))
        log = self._stack.enter_context((self._folder / "server.log").open("a"))
        self.process = subprocess.Popen(self._command, stdout=log, stderr=log, text=True, cwd=ROOT, env=environment)

    def wait_until_ready(self) -> None:
        assert self.process
        with PortraitClient(self.url) as client:
            end_s = time.monotonic() + 120
            while not client.is_ready():
                assert self.process.poll() is None, (self._folder / "server.log").read_text()
                assert time.monotonic() < end_s
                time.sleep(0.1)

    def kill(self) -> None:
        assert self.process
        self.process.kill()
        self.process.wait()
        self._stack.close()

    def stop(self) -> None:
        if self.process:
            self.process.terminate()
            self.process.wait(60)
        self._stack.close()


@contextmanager
def running(*servers: Restartable) -> Iterator[None]:
    try:
        for server in servers:
            server.start()
        for server in servers:
            server.wait_until_ready()
        yield
    finally:
        for server in servers:
            server.stop()


def requests(count: int, pictures: dict[str, bytes], **options: Any) -> Iterator[PortraitRequest]:
    fixed = {**pictures, "guidance_scale": 1.0, **options}
    return ({**fixed, "seed": seed} for seed in range(count))  # type: ignore[misc]


def test_two_thousand_portraits_while_servers_are_killed(tmp_path: Path, pictures: dict[str, bytes]) -> None:
    """Kill a server every 10 s. The graphs do next to nothing, but a row of theirs depends on nothing but itself."""
    write_trivial_export(tmp_path / "export", DEMO_128)
    repository = tmp_path / "repository"
    assemble(tmp_path / "export", repository, ServingPolicy(cache_bytes=CACHE_BYTES, engine_threads=1))
    servers = [Restartable(repository, tmp_path / name, "--picture-workers=1") for name in "abc"]
    with running(*servers[:1]), PortraitClient(servers[0].url) as client:
        alone = [
            (portrait.metadata.seed, portrait.bytes)
            for portrait in client.map(requests(PORTRAITS, pictures, num_inference_steps=2), concurrency=16)
            if isinstance(portrait, Portrait)
        ]
    assert len(alone) == PORTRAITS
    assert [seed for seed, _ in alone] == list(range(PORTRAITS))
    ended, kills = threading.Event(), 0

    def kill_in_turn() -> None:
        nonlocal kills
        while not ended.wait(KILL_EVERY_S):
            server = servers[kills % len(servers)]
            server.kill()
            kills += 1
            server.start()

    with running(*servers), PortraitClient([server.url for server in servers]) as client:
        killing = threading.Thread(target=kill_in_turn)
        killing.start()
        began = time.monotonic()
        try:
            # At least until two were killed.
            answers, rounds = [], 0
            while kills < 2 or not answers:
                answers = list(
                    client.map(requests(PORTRAITS, pictures, num_inference_steps=2), concurrency=CONCURRENCY)
                )
                rounds += 1
                errors = [answer for answer in answers if not isinstance(answer, Portrait)]
                assert not errors, errors[:3]
                assert [
                    (answer.metadata.seed, answer.bytes) for answer in answers if isinstance(answer, Portrait)
                ] == alone
        finally:
            ended.set()
            killing.join()
        took_s, counts = time.monotonic() - began, client.counts
    say(
        f"{rounds * PORTRAITS} portraits in {took_s:.0f} s, {kills} kills, "
        f"{counts.attempts / counts.requests:.4f} attempts a portrait, {len(set(alone))} different"
    )
    assert counts.attempts <= MOST_ATTEMPTS * counts.requests


def times(pictures: dict[str, bytes], urls: list[str], **options: Any) -> tuple[list[float], Any]:
    """Return the time of each request, from callers that ask again as soon as they are answered."""
    with PortraitClient(urls, balance="round-robin", **options) as client:
        # Every server says its numerics_id.
        for request in requests(2 * len(urls), pictures, num_inference_steps=1):
            client.generate(**request)
        waiting, took_s, lock = (
            list(requests(HEDGED_PORTRAITS, pictures, num_inference_steps=STEPS)),
            [],
            threading.Lock(),
        )

        def caller() -> None:
            while True:
                with lock:
                    if not waiting:
                        return
                    request = waiting.pop()
                began = time.monotonic()
                client.generate(**request)
                took_s.append(time.monotonic() - began)

        with ThreadPoolExecutor(HEDGED_CALLERS) as pool:
            for calling in [pool.submit(caller) for _ in range(HEDGED_CALLERS)]:
                calling.result()
        return took_s, client.counts


def rows_of_steps(servers: list[Restartable]) -> float:
    return sum(settled(server.metrics_url)["icportrait_step_slots_sum"] for server in servers)


def test_a_slow_server_is_hedged_at_little_cost(tmp_path: Path, pictures: dict[str, bytes]) -> None:
    quick_ms = {"vae_encoder": 20.0, "warping_network": 20.0, "unet": 10.0, "vae_decoder": 10.0}
    assert set(quick_ms) == set(ENGINES)
    servers = []
    for name, factor in (("a", 1), ("b", 1), ("slow", 10)):
        (tmp_path / name).mkdir()
        repository = simulated_repository(tmp_path / name, {each: factor * ms for each, ms in quick_ms.items()})
        servers.append(Restartable(repository, tmp_path / name / "run", "--picture-workers=1"))
    urls = [server.url for server in servers]
    with running(*servers):
        before = rows_of_steps(servers)
        plain_s, _ = times(pictures, urls)
        between = rows_of_steps(servers)
        cancelled = series(servers[2].metrics_url)["icportrait_cancellations_total"]
        median_ms = 1000 * statistics.median(plain_s)
        hedged_s, counts = times(pictures, urls, hedge_after_ms=1.1 * median_ms)
        after = rows_of_steps(servers)
        cancelled = series(servers[2].metrics_url)["icportrait_cancellations_total"] - cancelled
    p99_s = [statistics.quantiles(each, n=100)[98] for each in (plain_s, hedged_s)]
    extra = (after - between) / (between - before) - 1
    say(
        f"p99 {p99_s[0]:.2f} s, hedged {p99_s[1]:.2f} s ({1 - p99_s[1] / p99_s[0]:.0%} less); {counts.hedges} hedges "
        f"of {HEDGED_PORTRAITS}, {counts.hedges_won} won; {extra:.1%} more rows of steps"
    )
    assert counts.hedges_won >= HEDGED_PORTRAITS / 4, "a third of all requests went to the slow server first"
    assert extra <= 0.07
    assert cancelled >= 0.9 * counts.hedges_won, "losers are cancelled on their server"


def test_many_streams_that_are_left_early_leave_nothing_behind(tmp_path: Path, pictures: dict[str, bytes]) -> None:
    repository = simulated_repository(tmp_path, {"unet": 60.0}, max_queued_slots=1024, max_pending_requests=1024)
    server = Restartable(repository, tmp_path / "run")
    options: dict[str, Any] = {**pictures, "num_inference_steps": 12, "guidance_scale": 1.0}
    leaves_at = [random.Random(number).randint(1, 16) for number in range(STREAMS)]
    threads_before = threading.active_count()

    def watch(client: PortraitClient, number: int) -> bool:
        with closing(client.stream(seed=number, **options)) as events:
            for event in events:
                if isinstance(event, Progress) and event.step >= leaves_at[number]:
                    return False
        return True

    async def watch_all(url: str, numbers: range) -> list[bool]:
        async with AsyncPortraitClient(url) as client:

            async def one(number: int) -> bool:
                async with aclosing(client.stream(seed=number, **options)) as events:
                    async for event in events:
                        if isinstance(event, Progress) and event.step >= leaves_at[number]:
                            return False
                return True

            return await asyncio.gather(*map(one, numbers))

    half = STREAMS // 2
    with running(server):
        before = settled(server.metrics_url)
        with PortraitClient(server.url) as client, ThreadPoolExecutor(half) as pool:
            watching = [pool.submit(watch, client, number) for number in range(half)]
            whole = asyncio.run(watch_all(server.url, range(half, STREAMS)))
            whole += [each.result(60) for each in watching]
        gc.collect()
        assert threading.active_count() <= threads_before + 1, "gRPC's own poller stays"
        after = settled(server.metrics_url)
    rows = after["icportrait_step_slots_sum"] - before["icportrait_step_slots_sum"]
    expected = sum(min(each, 12) for each in leaves_at)
    say(f"{STREAMS} streams, {sum(whole)} to their end; {rows - expected:.0f} rows of steps beyond what was told")
    assert sum(whole) == sum(each > 12 for each in leaves_at)
    # A step is under way when a stream is left, and its cancel comes before the next but one.
    assert rows <= expected + 2 * STREAMS
    assert after["icportrait_active_slots"] == 0
