"""Rules and dashboard ask for metrics that exist; each alert fires when it should, and has its advice."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from benchmarks.dashboard import DASHBOARD, read_panels
from icportrait.metrics import FAMILIES, Kind
from icportrait.serving.counters import CACHE_COUNTERS, ENGINE_COUNTERS
from tests.conftest import ROOT

MONITORING = ROOT / "deploy" / "monitoring"
OPERATIONS = ROOT / "docs" / "operations.md"
RULES = {name: yaml.safe_load((MONITORING / f"{name}.yml").read_text()) for name in ("recordings", "alerts")}
ALERTS = {rule["alert"]: rule for group in RULES["alerts"]["groups"] for rule in group["rules"]}
RECORDINGS = {rule["record"]: rule for group in RULES["recordings"]["groups"] for rule in group["rules"]}


def metrics() -> set[str]:
    """List all series of a server by name."""
    gateway = [
        name
        for module in ("main", "records")
        for name in re.findall(r'"(\w+)", "(?:gauge|counter)"', (ROOT / f"icportrait/gateway/{module}.py").read_text())
    ]
    ours = {f"icportrait_gateway_{name}" for name in gateway} | set(CACHE_COUNTERS) | set(ENGINE_COUNTERS)
    for name, family in FAMILIES.items():
        ends = ("_bucket", "_sum", "_count") if family.kind is Kind.HISTOGRAM else ("",)
        ours |= {f"icportrait_{name}{end}" for end in ends}
    return ours


def asked(expression: str) -> set[str]:
    """List the series and records that an expression names."""
    return set(re.findall(r"\bicportrait[_:][\w:]+", expression))


def promtool(*arguments: str) -> None:
    if shutil.which("promtool") is None:
        pytest.skip("needs promtool, of Debian's package prometheus")
    ended = subprocess.run(["promtool", *arguments], cwd=MONITORING, capture_output=True, text=True, timeout=60)
    assert ended.returncode == 0, ended.stdout + ended.stderr


def test_rules_and_configuration_are_prometheus_own_idea_of_right() -> None:
    promtool("check", "rules", "alerts.yml", "recordings.yml")
    promtool("check", "config", "prometheus.yml")


@pytest.mark.parametrize("name", ALERTS)
def test_an_alert_fires_on_its_trouble_and_not_on_a_well_server(name: str, tmp_path: Path) -> None:
    content = yaml.safe_load((MONITORING / "alerts.test.yml").read_text())
    content["rule_files"] = [str(MONITORING / rules) for rules in content["rule_files"]]
    for test in content["tests"]:
        test["alert_rule_test"] = [case for case in test["alert_rule_test"] if case["alertname"] == name]
        assert test["alert_rule_test"]
    (tmp_path / "alert.test.yml").write_text(yaml.safe_dump(content))
    promtool("test", "rules", str(tmp_path / "alert.test.yml"))


def test_recordings_are_right() -> None:
    promtool("test", "rules", "alerts.test.yml")


def test_each_alert_has_a_case_that_fires_it_and_one_that_does_not() -> None:
    cases = [
        case
        for test in yaml.safe_load((MONITORING / "alerts.test.yml").read_text())["tests"]
        for case in test["alert_rule_test"]
    ]
    assert {case["alertname"] for case in cases if case.get("exp_alerts")} == set(ALERTS)
    assert {case["alertname"] for case in cases if not case.get("exp_alerts")} == set(ALERTS)


@pytest.mark.parametrize("name", [*ALERTS, *RECORDINGS])
def test_a_rule_asks_for_what_exists(name: str) -> None:
    rule = ALERTS.get(name) or RECORDINGS[name]
    assert asked(rule["expr"]) <= metrics() | set(RECORDINGS)


@pytest.mark.parametrize("panel", read_panels(), ids=lambda panel: panel.title)
def test_a_panel_asks_for_what_exists(panel: object) -> None:
    for query, _ in panel.queries:  # type: ignore[attr-defined]
        assert asked(query) and asked(query) <= metrics() | set(RECORDINGS), query


def test_the_dashboards_variables_are_its_own() -> None:
    text = DASHBOARD.read_text()
    own = {variable["name"] for variable in json.loads(text)["templating"]["list"]} | {"__rate_interval", "__all"}
    assert set(re.findall(r"\$\{?(\w+)", text)) <= own


@pytest.mark.parametrize("name", ALERTS)
def test_each_alert_has_its_advice(name: str) -> None:
    assert re.search(rf"^\| `{name}` \| .+ \| .+ \|$", OPERATIONS.read_text(), re.MULTILINE)


def test_each_advice_is_of_an_alert() -> None:
    assert re.findall(r"^\| `(IcPortrait\w+)` \|", OPERATIONS.read_text(), re.MULTILINE) == list(ALERTS)
