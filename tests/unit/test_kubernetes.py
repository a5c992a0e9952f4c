"""Kubernetes' manifests are right by Kubernetes' own schemas, and name what the server really has."""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml

from benchmarks.planning.autoscale import AutoscaleSettings
from benchmarks.planning.question import find_profile
from icportrait.deploy.memory import SERVER_BYTES, shared_memory
from icportrait.gateway.doctor import LEAST_SHM_BYTES
from icportrait.gateway.http_door import HttpApp
from icportrait.gateway.settings import CONFIG_VARIABLE, FIELDS, PREFIX, Settings, read_settings
from icportrait.metrics import FAMILIES, Kind
from icportrait.policy import ServingPolicy
from icportrait.presets import DEMO_128, SD15_512
from icportrait.request import INPUTS
from tests.documents import logical_lines, read
from tests.manifests import KUBERNETES, MONITORING, ROOT, RULES, crd_schema, only, render, rules_text
from tests.unit.test_gateway_metrics import ask
from tests.unit.test_monitoring import RECORDINGS, asked, metrics, promtool

OVERLAYS = ("gpu", "cpu", "kserve")
KUBERNETES_VERSIONS = ("1.31", "1.37")
"""The oldest with all fields that are used, and the latest whose schemas are there."""
KINDS_WITH_CRD = ("InferencePool", "InferenceService", "PodMonitor", "PrometheusRule", "ScaledObject")
PROFILES = {
    "gpu": [f"{gpu}-sd15-512-fp16" for gpu in ("a100", "b200", "h100", "h200", "l40s")],
    "cpu": ["cpu-avx2-demo-128-fp32"],
}
"""The machines whose longest job a server must have time for when it stops."""
DEPLOY = ROOT / "docs" / "deploy.md"
COMMANDS = [line for block in read(DEPLOY)[1] if block.language == "sh" for line in logical_lines(block.text)]
END_OF_TRITON_S = 10
UNITS = {"Ki": 2**10, "Mi": 2**20, "Gi": 2**30}


def pod(overlay: str) -> dict[str, Any]:
    """Return the specification of an overlay's pods."""
    if overlay == "kserve":
        return dict(only(render(overlay), "InferenceService")["spec"]["predictor"])
    return dict(only(render(overlay), "Deployment")["spec"]["template"]["spec"])


def server(overlay: str) -> dict[str, Any]:
    """Return the server's container."""
    (container,) = pod(overlay)["containers"]
    return dict(container)


def number(quantity: str) -> float:
    """Read a quantity of Kubernetes."""
    unit = next((unit for unit in UNITS if quantity.endswith(unit)), "")
    return float(quantity.removesuffix(unit)) * UNITS.get(unit, 1)


def walk(value: Any) -> Iterator[dict[str, Any]]:
    """Yield every mapping within a manifest."""
    if isinstance(value, dict):
        yield value
    for each in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from walk(each)


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    """Read the settings that every server gets. The file of keys is a secret, and stands elsewhere here."""
    text = (KUBERNETES / "base" / "server.toml").read_text()
    keys = tmp_path / "keys.toml"
    keys.touch()
    assert '"/etc/icportrait/keys/keys.toml"' in text
    (tmp_path / "server.toml").write_text(text.replace("/etc/icportrait/keys/keys.toml", str(keys)))
    return read_settings(argparse.Namespace(config=tmp_path / "server.toml"), {})


# Schemas.


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_an_overlay_is_kubernetes_idea_of_right(overlay: str) -> None:
    kinds = set()
    for manifest in render(overlay):
        kinds.add(manifest["kind"])
        if manifest["kind"] in KINDS_WITH_CRD:
            jsonschema.Draft202012Validator(crd_schema(manifest["kind"])).validate(manifest)
        else:
            for version in KUBERNETES_VERSIONS:
                kubernetes_validate.validate(manifest, version, strict=True)
    workload = {"InferenceService"} if overlay == "kserve" else {"Deployment", "ScaledObject"}
    common = {"PodDisruptionBudget", "PriorityClass", "Service", "PodMonitor", "PrometheusRule"}
    assert common | workload <= kinds


def test_a_wrong_member_would_be_found() -> None:
    deployment = only(render("gpu"), "Deployment")
    deployment = {**deployment, "spec": {**deployment["spec"], "replica": 2}}
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(deployment, KUBERNETES_VERSIONS[-1], strict=True)
    scaled = only(render("gpu"), "ScaledObject")
    scaled = {**scaled, "spec": {**scaled["spec"], "minReplicas": 2}}
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(scaled, crd_schema("ScaledObject"))


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_what_a_manifest_names_is_there(overlay: str) -> None:
    manifests = render(overlay)
    maps = {each["metadata"]["name"] for each in manifests if each["kind"] == "ConfigMap"}
    spec = pod(overlay)
    named = [each["configMap"]["name"] for each in spec["volumes"] if "configMap" in each]
    named += [
        source["configMapRef"]["name"]
        for source in spec["initContainers"][0]["envFrom"]
        if len(source) == 1 and "configMapRef" in source
    ]
    assert len(named) == 3 and set(named) <= maps
    volumes = {each["name"] for each in spec["volumes"]}
    for container in (*spec["containers"], *spec["initContainers"]):
        assert {mount["name"] for mount in container["volumeMounts"]} <= volumes
    ports = {port["name"] for port in server(overlay)["ports"]}
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        assert server(overlay)[probe]["httpGet"]["port"] in ports
    services = [each for each in manifests if each["kind"] == "Service"]
    assert {port["targetPort"] for service in services for port in service["spec"]["ports"]} <= ports
    endpoints = only(manifests, "PodMonitor")["spec"]["podMetricsEndpoints"]
    assert {endpoint["port"] for endpoint in endpoints} == {"metrics"} <= ports
    assert spec["priorityClassName"] == only(manifests, "PriorityClass")["metadata"]["name"]
    assert spec["serviceAccountName"] == only(manifests, "ServiceAccount")["metadata"]["name"]


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_a_selector_selects_the_servers(overlay: str) -> None:
    manifests = render(overlay)
    owner = (
        only(manifests, "InferenceService")["spec"]["predictor"]
        if overlay == "kserve"
        else (only(manifests, "Deployment")["spec"]["template"]["metadata"])
    )
    labels = {"app.kubernetes.io/name": "icportrait"}
    assert owner["labels"] == labels
    for manifest in manifests:
        selector = manifest.get("spec", {}).get("selector")
        if selector:
            assert selector.get("matchLabels", selector) == labels, manifest["kind"]
    for each in walk(pod(overlay)):
        assert each.get("labelSelector", {}).get("matchLabels", labels) == labels


# The server's own names.


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_probes_ask_the_gateways_own_routes(overlay: str) -> None:
    routes = {
        route.path: route.endpoint._serve.__func__
        for route in HttpApp._routes(HttpApp.__new__(HttpApp))
        if "GET" in route.methods
    }
    wanted = {"startupProbe": HttpApp._ready, "readinessProbe": HttpApp._ready, "livenessProbe": HttpApp._live}
    for probe, serve in wanted.items():
        assert routes.get(server(overlay)[probe]["httpGet"]["path"]) is serve, probe
        assert server(overlay)[probe]["httpGet"]["port"] == "http"


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_ports_are_those_of_the_settings(overlay: str, settings: Settings) -> None:
    ports = {port["name"]: port["containerPort"] for port in server(overlay)["ports"]}
    assert ports == {"http": settings.http_port, "grpc": settings.grpc_port, "metrics": settings.metrics_port}
    assert next(iter(ports)) == "http", "KServe's service has the first one"
    assert (settings.host, settings.metrics_host) == ("0.0.0.0", "0.0.0.0")
    for service in [each for each in render(overlay) if each["kind"] == "Service"]:
        for port in service["spec"]["ports"]:
            assert port["port"] == ports[port["targetPort"]]
    for pool in [each for each in render(overlay) if each["kind"] == "InferencePool"]:
        assert pool["spec"]["targetPorts"] == [{"number": settings.grpc_port}]


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_variables_and_files_are_those_that_the_server_reads(overlay: str, settings: Settings) -> None:
    variables = {each["name"]: each["value"] for each in server(overlay)["env"]}
    assert variables.pop("PROTOCOL", "v2") == "v2"
    mounts = {mount["name"]: mount["mountPath"] for mount in server(overlay)["volumeMounts"]}
    assert variables.pop(CONFIG_VARIABLE) == f"{mounts['settings']}/server.toml"
    assert {name.removeprefix(PREFIX).lower() for name in variables} <= set(FIELDS)
    text = (KUBERNETES / "base" / "server.toml").read_text()
    assert f'api_keys = "{mounts["keys"]}/keys.toml"' in text
    fetched = {each["name"]: each.get("value") for each in pod(overlay)["initContainers"][0]["env"]}
    assert settings.repository == Path(str(fetched["MODELS"])) / "repository"
    assert fetched["MODELS"] == mounts["models"] and mounts["shm"] == "/dev/shm"


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_metrics_are_not_open_to_everybody(overlay: str) -> None:
    policy = only(render(overlay), "NetworkPolicy")["spec"]
    assert policy["podSelector"]["matchLabels"] == {"app.kubernetes.io/name": "icportrait"}
    to_all = {port["port"] for rule in policy["ingress"] if "from" not in rule for port in rule["ports"]}
    bounded = {port["port"] for rule in policy["ingress"] if "from" in rule for port in rule["ports"]}
    assert (to_all, bounded) == ({"http", "grpc"}, {"metrics"})
    assert to_all | bounded == {port["name"] for port in server(overlay)["ports"]}


# Start, stop, sizes.


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_a_server_has_time_to_start_and_to_drain(overlay: str, settings: Settings) -> None:
    probe = server(overlay)["startupProbe"]
    assert probe["periodSeconds"] * probe["failureThreshold"] > settings.ready_timeout_s
    command, pause = server(overlay)["lifecycle"]["preStop"]["exec"]["command"]
    assert command == "sleep" and shutil.which("sleep")
    readiness = server(overlay)["readinessProbe"]
    assert int(pause) > readiness["periodSeconds"] * readiness["failureThreshold"]
    grace = pod(overlay)["terminationGracePeriodSeconds"]
    assert grace >= int(pause) + settings.stop_timeout_s + END_OF_TRITON_S


@pytest.mark.parametrize(("overlay", "profile"), [(name, each) for name in PROFILES for each in PROFILES[name]])
def test_the_longest_job_ends_before_the_server(overlay: str, profile: str, settings: Settings) -> None:
    assert longest_job_s(profile) < settings.stop_timeout_s


def test_the_document_names_the_gpu_that_needs_more(settings: Settings) -> None:
    (seconds,) = re.findall(r"an L4 needs (\d+) s", DEPLOY.read_text())
    assert settings.stop_timeout_s < longest_job_s("l4-sd15-512-fp16") < float(seconds)


def longest_job_s(profile: str) -> float:
    """Compute the seconds that a full queue of the longest requests takes."""
    policy = ServingPolicy()
    step_ms = find_profile(profile, Path()).engine_ms["unet"][policy.slots]
    most_steps = next(field.maximum for field in INPUTS if field.name == "num_inference_steps")
    return (1 + policy.max_queued_slots / policy.slots) * float(most_steps or 0) * step_ms / 1000


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_memory_and_shared_memory_are_enough(overlay: str, settings: Settings) -> None:
    (shm,) = [each["emptyDir"] for each in pod(overlay)["volumes"] if each["name"] == "shm"]
    assert shm["medium"] == "Memory" and number(shm["sizeLimit"]) >= LEAST_SHM_BYTES
    for preset in (DEMO_128, SD15_512):
        for precision in ("fp16", "fp32"):
            described: Any = SimpleNamespace(preset=preset, precision=precision)
            assert number(shm["sizeLimit"]) > 2 * shared_memory(described, ServingPolicy())
    variables = {each["name"]: each["value"] for each in server(overlay)["env"]}
    pictures = int(variables[f"{PREFIX}PICTURE_WORKERS"]) * settings.picture_memory_bytes
    resources = server(overlay)["resources"]
    assert number(resources["limits"]["memory"]) > pictures + SERVER_BYTES + number(shm["sizeLimit"])
    assert resources["limits"]["memory"] == resources["requests"]["memory"]
    assert ("nvidia.com/gpu" in resources["limits"]) == (overlay != "cpu")


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_no_container_may_do_more_than_it_must(overlay: str) -> None:
    spec = pod(overlay)
    assert spec["securityContext"]["runAsNonRoot"] and spec["securityContext"]["runAsUser"] > 1000
    assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert spec["automountServiceAccountToken"] is False
    for container in (*spec["containers"], *spec["initContainers"]):
        own = container["securityContext"]
        assert own["readOnlyRootFilesystem"] and not own["allowPrivilegeEscalation"]
        assert own["capabilities"] == {"drop": ["ALL"]}
        assert re.search(r":[\w.-]+$", container["image"]) and not container["image"].endswith(":latest")


# Metrics.


def test_prometheus_operator_gets_the_committed_rules() -> None:
    assert RULES.read_text() == rules_text(), 'run "make configs"'
    groups = [
        group
        for name in ("recordings.yml", "alerts.yml")
        for group in yaml.safe_load((MONITORING / name).read_text())["groups"]
    ]
    given = only(render("gpu"), "PrometheusRule")["spec"]["groups"]
    assert [rule.get("alert") or rule["record"] for group in given for rule in group["rules"]] == [
        rule.get("alert") or rule["record"] for group in groups for rule in group["rules"]
    ]


def test_promtool_takes_the_operators_rules_and_the_autoscalers_queries(tmp_path: Path) -> None:
    spec = only(render("gpu"), "PrometheusRule")["spec"]
    triggers = only(render("gpu"), "ScaledObject")["spec"]["triggers"]
    asked_for = [{"record": f"asked:{each['name']}", "expr": each["metadata"]["query"]} for each in triggers]
    groups = [*spec["groups"], {"name": "autoscaling", "rules": asked_for}]
    (tmp_path / "rules.yml").write_text(yaml.safe_dump({"groups": groups}))
    promtool("check", "rules", "--lint=all", "--lint-fatal", str(tmp_path / "rules.yml"))


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_metrics_are_scraped_where_they_are_and_under_the_rules_job(overlay: str) -> None:
    monitor = only(render(overlay), "PodMonitor")["spec"]
    (endpoint,) = monitor["podMetricsEndpoints"]
    (answer,) = ask(f"GET {endpoint['path']} HTTP/1.1\r\n\r\n".encode())
    assert answer.startswith(b"HTTP/1.1 200 ")
    label = monitor["jobLabel"]
    (job,) = set(re.findall(r'up\{job="(\w+)"\}', (MONITORING / "alerts.yml").read_text()))
    assert monitor["selector"]["matchLabels"][label] == job


def test_replicas_are_scaled_by_what_the_server_counts() -> None:
    scaled = only(render("gpu"), "ScaledObject")["spec"]
    assert scaled == only(render("cpu"), "ScaledObject")["spec"]
    assert scaled["scaleTargetRef"]["name"] == only(render("gpu"), "Deployment")["metadata"]["name"]
    queries = {trigger["name"]: trigger["metadata"] for trigger in scaled["triggers"]}
    assert asked(queries["queue"]["query"]) == {"icportrait:queue_s"} <= set(RECORDINGS)
    assert asked(queries["slots"]["query"]) == {"icportrait_active_slots"} <= metrics()
    assert float(queries["slots"]["threshold"]) < ServingPolicy().slots
    behavior = scaled["advanced"]["horizontalPodAutoscalerConfig"]["behavior"]
    # Else replicas are added as if those that start were of no use.
    (policy,) = behavior["scaleUp"]["policies"]
    assert policy["periodSeconds"] >= max(AutoscaleSettings.cold_start_s)
    predictor = only(render("kserve"), "InferenceService")["spec"]["predictor"]
    assert predictor["autoScaling"]["behavior"] == behavior
    own = [each["external"] for each in predictor["autoScaling"]["metrics"]]
    assert [
        (each["metric"]["query"], each["metric"]["serverAddress"], each["target"]["averageValue"]) for each in own
    ] == [(each["query"], each["serverAddress"], each["threshold"]) for each in queries.values()]
    assert (predictor["minReplicas"], predictor["maxReplicas"]) == (
        scaled["minReplicaCount"],
        scaled["maxReplicaCount"],
    )


def test_the_endpoint_picker_reads_gauges_of_the_server() -> None:
    manifests = render("gpu")
    picker = yaml.safe_load(only(manifests, "ConfigMap", "icportrait-picker")["data"]["picker.yaml"])
    plugins = {plugin["type"]: plugin.get("parameters", {}) for plugin in picker["plugins"]}
    (engine,) = plugins["core-metrics-extractor"]["engineConfigs"]
    assert engine["name"] == plugins["core-metrics-extractor"]["defaultEngine"]
    for spec in ("queuedRequestsSpec", "runningRequestsSpec"):
        assert FAMILIES[engine[spec].removeprefix("icportrait_")].kind is Kind.GAUGE
    assert engine["queuedRequestsSpec"] == "icportrait_queued_requests"
    (endpoint,) = only(manifests, "PodMonitor")["spec"]["podMetricsEndpoints"]
    assert plugins["metrics-data-source"]["path"] == endpoint["path"]
    used = [each["pluginRef"] for each in picker["schedulingProfiles"][0]["plugins"]]
    used += [each["pluginRef"] for each in (*picker["requestHandler"]["parsers"], *picker["dataLayer"]["sources"])]
    used += [each["pluginRef"] for source in picker["dataLayer"]["sources"] for each in source["extractors"]]
    assert set(used) == set(plugins)


# The document.


@pytest.mark.parametrize("line", [line for line in COMMANDS if line.startswith("kubectl kustomize ")])
def test_an_overlay_of_the_document_is_one(line: str) -> None:
    assert Path(line.split()[-1]) in {Path("deploy/kubernetes/overlays") / overlay for overlay in OVERLAYS}


@pytest.mark.parametrize("line", [line for line in COMMANDS if line.startswith("kubectl create ")])
def test_the_document_makes_what_the_pods_name(line: str, tmp_path: Path) -> None:
    manifests = render("gpu")
    (tmp_path / "keys.toml").touch()
    command = [*line.split(), "--dry-run=client", "--output=yaml"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and not done.stderr, done.stderr
    made = yaml.safe_load(done.stdout)
    namespace = only(manifests, "Namespace")["metadata"]["name"]
    spec = pod("gpu")
    named = {each["secret"]["secretName"]: "keys.toml" for each in spec["volumes"] if "secret" in each}
    named |= {
        each["secretRef"]["name"]: "RCLONE_CONFIG_STORE_TYPE"
        for each in spec["initContainers"][0]["envFrom"]
        if "secretRef" in each
    }
    assert made["metadata"]["namespace"] == namespace
    assert named[made["metadata"]["name"]] in made["data"]


def test_the_documents_names_and_figures_are_the_manifests(settings: Settings) -> None:
    manifests, text = render("gpu"), DEPLOY.read_text()
    (headless,) = [each for each in manifests if each["kind"] == "Service" and each["spec"].get("clusterIP") == "None"]
    (port,) = headless["spec"]["ports"]
    address = f"{headless['metadata']['name']}.{headless['metadata']['namespace']}:{port['port']}"
    pool, scaled = only(manifests, "InferencePool"), only(manifests, "ScaledObject")["spec"]
    threshold = {each["name"]: each["metadata"]["threshold"] for each in scaled["triggers"]}
    probe, container = server("gpu")["startupProbe"], server("gpu")
    for words in (
        f"`dns:///{address}`",
        f"`{pool['spec']['endpointPickerRef']['name']}`",
        f"`--pool-name {pool['metadata']['name']} --model-server-metrics-port {settings.metrics_port}`",
        f"{probe['periodSeconds'] * probe['failureThreshold']:,} s",
        f"waits {container['lifecycle']['preStop']['exec']['command'][1]} s",
        f"{settings.stop_timeout_s:.0f} s (`stop_timeout_s`)",
        f"`icportrait:queue_s` | {threshold['queue']} |",
        f"`icportrait_active_slots` | {threshold['slots']} of {ServingPolicy().slots} |",
    ):
        assert words in " ".join(text.split()), words


# The model store.


@pytest.fixture
def store(tmp_path: Path) -> dict[str, str]:
    """Make an rclone remote of a folder, and a repository with an empty folder, as an ensemble has."""
    if shutil.which("rclone") is None:
        pytest.skip("needs rclone, of Debian's package rclone")
    (tmp_path / "repository" / "portrait_pipeline" / "1").mkdir(parents=True)
    (tmp_path / "repository" / "portrait_pipeline" / "config.pbtxt").write_text("max_batch_size: 0\n")
    (tmp_path / "models").mkdir()
    remote = {"RCLONE_CONFIG_STORE_TYPE": "alias", "RCLONE_CONFIG_STORE_REMOTE": str(tmp_path / "bucket")}
    return {**os.environ, **remote, "MODELS": str(tmp_path / "models"), "MODEL_STORE": "store:portraits"}


def publish(folder: Path, store: dict[str, str]) -> str:
    command = [str(KUBERNETES / "publish.sh"), str(folder / "repository"), store["MODEL_STORE"]]
    return subprocess.run(command, env=store, capture_output=True, text=True, check=True, timeout=60).stdout.strip()


def fetch(overlay: str, folder: Path, store: dict[str, str], version: str) -> subprocess.CompletedProcess[str]:
    """Run the init container's command on the script that the overlay mounts."""
    (folder / "fetch.sh").write_text(only(render(overlay), "ConfigMap", "icportrait-fetch")["data"]["fetch.sh"])
    shell, script = pod(overlay)["initContainers"][0]["command"]
    assert Path(script).name == "fetch.sh"
    command = [shell, str(folder / "fetch.sh")]
    return subprocess.run(command, env=store | {"MODEL_SHA256": version}, capture_output=True, text=True, timeout=60)


def test_a_published_repository_is_fetched_whole_and_again(tmp_path: Path, store: dict[str, str]) -> None:
    version = publish(tmp_path, store)
    assert publish(tmp_path, store) == version
    for _ in range(2):
        done = fetch("gpu", tmp_path, store, version)
        assert done.returncode == 0, done.stderr
    fetched = tmp_path / "models" / "repository"
    assert (fetched / "portrait_pipeline" / "config.pbtxt").read_text() == "max_batch_size: 0\n"
    assert (fetched / "portrait_pipeline" / "1").is_dir()
    assert [path.name for path in (tmp_path / "models").iterdir()] == ["repository"]


def test_a_repository_that_was_changed_is_not_unpacked(tmp_path: Path, store: dict[str, str]) -> None:
    version = publish(tmp_path, store)
    archive = tmp_path / "bucket" / "portraits" / f"{version}.tar"
    archive.write_bytes(archive.read_bytes().replace(b"max_batch_size: 0", b"max_batch_size: 1"))
    assert fetch("gpu", tmp_path, store, version).returncode != 0
    assert not (tmp_path / "models" / "repository").exists()


def test_a_version_that_nobody_has_published_fails(tmp_path: Path, store: dict[str, str]) -> None:
    (given,) = [each["data"] for each in render("gpu") if each["metadata"]["name"].startswith("icportrait-models")]
    assert set(given) == {"MODEL_STORE", "MODEL_SHA256"}
    assert fetch("gpu", tmp_path, store, given["MODEL_SHA256"]).returncode != 0
    assert not (tmp_path / "models" / "repository").exists()
