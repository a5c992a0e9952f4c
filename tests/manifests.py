"""Kubernetes' manifests as tests read them: rendered by kubectl, and checked against schemas of kinds that need CRDs.

``python -m tests.manifests`` writes the generated rules of Prometheus' operator again.
"""

from __future__ import annotations

import functools
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[1]
KUBERNETES = ROOT / "deploy" / "kubernetes"
MONITORING = ROOT / "deploy" / "monitoring"
RULES = KUBERNETES / "components" / "monitoring" / "rules.yaml"
CRDS = Path(__file__).parent / "kubernetes"
OLDEST_KUSTOMIZE = (5, 0)
"""Kustomize in kubectl 1.27; older ones know neither components with generators nor this way to patch."""

Manifest = dict[str, Any]


def rules_text() -> str:
    """Write the rules of ``deploy/monitoring`` as a resource of Prometheus' operator."""
    files = ("recordings.yml", "alerts.yml")
    groups = [group for name in files for group in yaml.safe_load((MONITORING / name).read_text())["groups"]]
    for rule in (rule for group in groups for rule in group["rules"]):
        rule["expr"] = rule["expr"].strip()
    resource = {
        "apiVersion": "monitoring.coreos.com/v1",
        "kind": "PrometheusRule",
        "metadata": {"name": "icportrait"},
        "spec": {"groups": groups},
    }
    head = '# Generated from deploy/monitoring by "make configs"; do not edit.\n'
    return head + yaml.safe_dump(resource, sort_keys=False, width=1000)


@functools.cache
def render(overlay: str) -> tuple[Manifest, ...]:
    """Render an overlay by kubectl. A warning fails the test; a kubectl that is missing skips it."""
    kubectl = shutil.which("kubectl")
    if kubectl is None:
        pytest.skip("needs kubectl 1.27 or later, of the package kubectl or kubernetes-client")
    told = subprocess.run([kubectl, "version", "--client"], capture_output=True, text=True, timeout=60).stdout
    version = re.search(r"Kustomize Version: v(\d+)\.(\d+)", told)
    if version is None or (int(version[1]), int(version[2])) < OLDEST_KUSTOMIZE:
        pytest.skip("needs kubectl 1.27 or later, and this one's kustomize is older")
    folder = KUBERNETES / "overlays" / overlay
    done = subprocess.run([kubectl, "kustomize", folder], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and not done.stderr, done.stderr
    return tuple(yaml.safe_load_all(done.stdout))


def only(manifests: tuple[Manifest, ...], kind: str, name: str = "icportrait") -> Manifest:
    """Return the one manifest of a kind and name; a generated name's hash is left out."""
    (found,) = [
        each
        for each in manifests
        if each["kind"] == kind and re.sub(r"-[0-9a-z]{10}$", "", each["metadata"]["name"]) == name
    ]
    return found


def crd_schema(kind: str) -> dict[str, Any]:
    """Read a kind's schema. Members that the schema doesn't name are wrong, because Kubernetes would drop them."""
    schema: dict[str, Any] = json.loads((CRDS / f"{kind.lower()}.json").read_text())["schema"]
    close(schema)
    for name, kind_of_member in (("apiVersion", "string"), ("kind", "string"), ("metadata", "object")):
        schema["properties"][name] = {"type": kind_of_member}
    return schema


def close(schema: Any) -> None:
    """Refuse members that a schema doesn't name."""
    if isinstance(schema, list):
        for each in schema:
            close(each)
    if not isinstance(schema, dict):
        return
    if isinstance(schema.get("properties"), dict) and not schema.get("x-kubernetes-preserve-unknown-fields"):
        schema.setdefault("additionalProperties", False)
    for each in schema.values():
        close(each)


def main() -> int:
    RULES.write_text(rules_text())
    return 0


if __name__ == "__main__":
    sys.exit(main())
