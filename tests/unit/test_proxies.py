"""The proxies' configurations are right by HAProxy itself, and name the servers' own paths and ports."""

from __future__ import annotations

import json
import re
import shutil
import subprocess

import pytest

from tests.conftest import ROOT
from tests.scale.tables import Tables

DEPLOY = ROOT / "deploy"
RESULTS = ROOT / "benchmarks" / "results" / "scale-test.json"


def test_haproxy_accepts_its_configuration() -> None:
    if shutil.which("haproxy") is None:
        pytest.skip("needs HAProxy, of Debian's package haproxy")
    command = ["haproxy", "-c", "-f", str(DEPLOY / "haproxy" / "haproxy.cfg")]
    checked = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert checked.returncode == 0 and "[WARNING]" not in checked.stderr, checked.stderr


def test_both_proxies_have_the_same_servers() -> None:
    haproxy = re.findall(
        r"^    server [abc] 127\.0\.0\.1:(\d+) ", (DEPLOY / "haproxy" / "haproxy.cfg").read_text(), re.M
    )
    nginx = re.findall(r"^    server 127\.0\.0\.1:(\d+) ", (DEPLOY / "nginx" / "servers.conf").read_text(), re.M)
    assert haproxy == nginx == ["8011", "8021", "8031"] * 2 + ["8010", "8020", "8030"]


def test_the_documents_figures_are_the_committed_ones() -> None:
    report = json.loads(RESULTS.read_text())
    text = (ROOT / "docs" / "scale.md").read_text()
    for line in Tables(report["tables"], report["notes"]).lines():
        assert f"{line}\n" in text, 'of a run of "make scale-test" that isn\'t the committed one'
