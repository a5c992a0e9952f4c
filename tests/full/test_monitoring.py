"""A real Prometheus scrapes a real server: every panel of the dashboard has its series."""

from __future__ import annotations

import json
import shutil
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import yaml

from benchmarks.dashboard import ask, main, read_panels, resolved
from tests.e2e.caller import infer
from tests.e2e.conftest import simulated_repository
from tests.e2e.supervised import supervised
from tests.prometheus import run_prometheus
from tests.unit.test_monitoring import ALERTS, MONITORING, RECORDINGS

pytestmark = [pytest.mark.full, pytest.mark.xdist_group("monitoring")]


@contextmanager
def prometheus(target: str, folder: Path) -> Iterator[str]:
    """Run Prometheus with the committed rules and configuration, but for the target and the times."""
    for rules in ("alerts.yml", "recordings.yml"):
        shutil.copy(MONITORING / rules, folder)
    config = yaml.safe_load((MONITORING / "prometheus.yml").read_text())
    config["global"] = {"scrape_interval": "1s", "evaluation_interval": "1s"}
    config["scrape_configs"][0]["static_configs"][0]["targets"] = [target]
    (folder / "prometheus.yml").write_text(yaml.safe_dump(config))
    with run_prometheus(folder) as url:
        yield url


def until_asked(url: str, query: str) -> None:
    """Wait until a query has a series."""
    end_s = time.monotonic() + 60
    while not ask(url, query, 1, 1):
        assert time.monotonic() < end_s, query
        time.sleep(0.2)


def test_every_panel_and_rule_has_its_series(tmp_path: Path, pictures: dict[str, bytes]) -> None:
    repository = simulated_repository(tmp_path, {"unet": 5})
    with supervised(repository, tmp_path) as server, prometheus(server.metrics_url, tmp_path) as url:
        for seed in (7, 7, 8):
            infer(server.url, seed=seed, **pictures)
            until_asked(url, "icportrait_gateway_answers_total > 0")
        # A rate needs two scrapes with an answer between them.
        until_asked(url, 'rate(icportrait_gateway_answers_total{code="OK"}[1m]) > 0')
        until_asked(url, "rate(icportrait_stage_ms_sum[1m]) > 0")
        infer(server.url, seed=9, **pictures)
        for panel in read_panels():
            for query, _ in panel.queries:
                until_asked(url, resolved(query, "1m"))
        for record in set(RECORDINGS):
            until_asked(url, record)
        with urllib.request.urlopen(f"{url}/api/v1/rules?type=alert", timeout=10) as answer:
            rules = [rule for group in json.loads(answer.read())["data"]["groups"] for rule in group["rules"]]
        assert {rule["name"]: rule["health"] for rule in rules} == dict.fromkeys(ALERTS, "ok")
        out = tmp_path / "dashboard.png"
        assert main(["--prometheus", url, "--out", str(out), "--minutes", "1"]) == 0
    assert out.stat().st_size > 50_000
