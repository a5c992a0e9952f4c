"""An autoscaler without a cluster: it asks Prometheus, decides by the planner's rule, and starts and stops servers."""

from __future__ import annotations

import json
import math
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import yaml

from benchmarks.planning.fleet import FleetSettings
from benchmarks.planning.scaling_rule import Autoscaler
from tests.manifests import MONITORING
from tests.prometheus import run_prometheus
from tests.scale.proxies import Haproxy
from tests.scale.replicas import Replica

RECORD, RATE_WINDOW = "icportrait:queue_s", "[1m]"


@dataclass(frozen=True)
class Seen:
    """The fleet at a moment at which the autoscaler looked; the moment counts from its start."""

    at_s: float
    wanted: int
    ready: int
    metrics: dict[str, float | None]


@contextmanager
def prometheus(folder: Path, settings: FleetSettings) -> Iterator[str]:
    """Run Prometheus with the committed rule, but for the times; its targets are in ``targets.json``."""
    rules = yaml.safe_load((MONITORING / "recordings.yml").read_text())
    (rule,) = [each for group in rules["groups"] for each in group["rules"] if each["record"] == RECORD]
    assert RATE_WINDOW in rule["expr"]
    rule["expr"] = rule["expr"].replace(RATE_WINDOW, f"[{_ms(settings.window_s)}]")
    group = {"name": "icportrait", "interval": _ms(settings.evaluate_s), "rules": [rule]}
    (folder / "rules.yml").write_text(yaml.safe_dump({"groups": [group]}))
    config = {
        "global": {"scrape_interval": _ms(settings.scrape_s), "scrape_timeout": _ms(settings.scrape_s)},
        "rule_files": ["rules.yml"],
        "scrape_configs": [{"job_name": "icportrait", "file_sd_configs": [{"files": ["targets.json"]}]}],
    }
    (folder / "prometheus.yml").write_text(yaml.safe_dump(config))
    write_targets(folder, [])
    with run_prometheus(folder) as url:
        yield url


def write_targets(folder: Path, replicas: Sequence[Replica]) -> None:
    """Tell Prometheus which servers there are."""
    (folder / "new.json").write_text(json.dumps([{"targets": [each.metrics_url for each in replicas]}]))
    (folder / "new.json").rename(folder / "targets.json")


def ask(url: str, query: str) -> float | None:
    """Ask for a query's value now: 0 without a result, as KEDA has it, and None where Prometheus doesn't answer."""
    words = urllib.parse.urlencode({"query": query})
    try:
        with urllib.request.urlopen(f"{url}/api/v1/query?{words}", timeout=5) as answer:
            results = json.loads(answer.read())["data"]["result"]
    except (OSError, urllib.error.URLError):
        return None
    value = float(results[0]["value"][1]) if results else 0.0
    return value if math.isfinite(value) else 0.0


class RealFleet:
    """Servers behind HAProxy that come and go by the autoscaler's rule."""

    def __init__(
        self, replicas: Sequence[Replica], running: int, proxy: Haproxy, url: str, folder: Path, settings: FleetSettings
    ) -> None:
        """Take over servers.

        Args:
            replicas: as many as there may ever be.
            running: the first of them that run and are ready.
            proxy: before them.
            url: Prometheus' address.
            folder: Prometheus', with its targets.
            settings: the rule, and how long a server that is to end stays.
        """
        self._proxy, self._url, self._folder, self._settings = proxy, url, folder, settings
        self._idle = list(replicas[running:])
        self._ready: list[Replica] = list(replicas[:running])
        self._starting: list[Replica] = []
        self._autoscaler = Autoscaler(settings.rule, running)
        self._lock, self._stopping = threading.Lock(), threading.Event()
        self._workers: list[threading.Thread] = []
        self.seen: list[Seen] = []
        self.failed_starts = 0
        self.paid_s = 0.0
        """Seconds of all servers, from their start to their end."""
        self._began = dict.fromkeys((each.name for each in self._ready), time.monotonic())

    @contextmanager
    def scaling(self) -> Iterator[None]:
        """Let the servers follow the load until the block ends."""
        write_targets(self._folder, self._ready)
        thread = threading.Thread(target=self._follow)
        thread.start()
        try:
            yield
        finally:
            self._stopping.set()
            thread.join()
            for worker in self._workers:
                worker.join()
            for replica in self._ready:
                self.paid_s += time.monotonic() - self._began[replica.name]

    def _follow(self) -> None:
        began_s = time.monotonic()
        number = 0
        while not self._stopping.wait(max(0.0, began_s + number * self._settings.rule.sync_s - time.monotonic())):
            number += 1
            metrics = {each.name: ask(self._url, each.query) for each in self._settings.rule.triggers}
            now_s = time.monotonic()
            wanted = self._autoscaler.decide(now_s, metrics)
            with self._lock:
                self.seen.append(Seen(now_s - began_s, wanted, len(self._ready), metrics))
                change = wanted - len(self._ready) - len(self._starting)
                for _ in range(change):
                    self._starting.append(replica := self._idle.pop(0))
                    self._began[replica.name] = time.monotonic()
                    self._work(self._start, replica)
                for _ in range(-change):
                    # One that starts goes on starting: it can't be taken back here.
                    if len(self._ready) > 1:
                        self._work(self._stop, self._ready.pop())

    def _work(self, work: object, replica: Replica) -> None:
        thread = threading.Thread(target=work, args=(replica,))  # type: ignore[arg-type]
        self._workers.append(thread)
        thread.start()

    def _start(self, replica: Replica) -> None:
        while True:
            began_s = replica.begin(in_background=True)
            try:
                replica.until_ready(began_s)
                break
            except AssertionError:
                # As Kubernetes does with a container that ends.
                replica.kill()
                self.failed_starts += 1
        with self._lock:
            self._proxy.add(replica)
            self._starting.remove(replica)
            self._ready.append(replica)
            write_targets(self._folder, self._ready)
        # The server ends with the thread that has started it.
        self._stopping.wait()

    def _stop(self, replica: Replica) -> None:
        self._proxy.drain(replica)
        time.sleep(self._settings.drain_s)
        replica.stop()
        with self._lock:
            write_targets(self._folder, self._ready)
            self.paid_s += time.monotonic() - self._began[replica.name]
            self._idle.append(replica)


def _ms(seconds: float) -> str:
    return f"{round(1000 * seconds)}ms"
