"""Traces that are off, and traces that can't be had."""

from __future__ import annotations

import subprocess
import sys

import pytest

from icportrait.errors import IcPortraitError
from icportrait.gateway.traces import Traces


def test_a_server_without_a_collector_imports_nothing_of_opentelemetry() -> None:
    code = "import sys, icportrait.gateway.main; sys.exit(any('opentelemetry' in name for name in sys.modules))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "opentelemetry", None)
    with pytest.raises(
        IcPortraitError, match=r"^otlp_endpoint: needs OpenTelemetry .*pip install 'icportrait\[tracing\]'"
    ):
        Traces("http://127.0.0.1:1", 1.0)
