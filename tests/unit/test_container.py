"""The images' Dockerfiles are well made, name what there is, and install what the lock file pins."""

from __future__ import annotations

import argparse
import importlib.metadata
import io
import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from dockerfile_parse import DockerfileParser
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from icportrait.gateway.http_door import HttpApp
from icportrait.gateway.settings import CONFIG_VARIABLE, Settings, read_settings
from icportrait.runtime.tensorrt.products import TENSORRT
from tests.conftest import ROOT
from tests.manifests import only, render

CONTAINER = ROOT / "deploy" / "container"
IMAGES = ("cpu", "gpu")
EXTRAS = ("c2pa", "sandbox", "serve", "tracing")
"""Extras of the images, as in the Makefile's lock-%."""


def steps(image: str) -> list[tuple[str, str]]:
    parser = DockerfileParser(fileobj=io.BytesIO((CONTAINER / f"Dockerfile.{image}").read_bytes()))
    return [(step["instruction"], step["value"]) for step in parser.structure if step["instruction"] != "COMMENT"]


def last(image: str, instruction: str) -> str:
    """Return an instruction's value in the last stage."""
    found = steps(image)
    start = max(index for index, (name, _) in enumerate(found) if name == "FROM")
    (value,) = [value for name, value in found[start:] if name == instruction]
    return value


def pins(path: Path) -> dict[str, str]:
    """Read the versions of a lock file by the packages' normal names."""
    found = re.findall(r"^([\w.-]+)==([^\s;]+)", path.read_text(), re.MULTILINE)
    return {canonicalize_name(name): version for name, version in found}


@pytest.mark.parametrize("image", IMAGES)
def test_a_dockerfile_is_hadolints_idea_of_right(image: str) -> None:
    hadolint = Path(sys.executable).parent / "hadolint"
    command = [hadolint, "--failure-threshold", "style", CONTAINER / f"Dockerfile.{image}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and not done.stdout, done.stdout + done.stderr


@pytest.mark.parametrize("image", IMAGES)
def test_an_image_runs_as_kubernetes_runs_it(image: str) -> None:
    security = only(render(image), "Deployment")["spec"]["template"]["spec"]["securityContext"]
    assert last(image, "USER") == f"{security['runAsUser']}:{security['runAsGroup']}"
    assert f"useradd --uid {security['runAsUser']} " in last(image, "RUN")
    tini, _, program = json.loads(last(image, "ENTRYPOINT"))
    assert f" {tini} " in last(image, "RUN")
    assert program in tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]


@pytest.mark.parametrize("image", IMAGES)
def test_an_image_has_the_servers_ports_settings_and_health(image: str) -> None:
    assert f"{CONFIG_VARIABLE}=/etc/icportrait/server.toml" in last(image, "ENV")
    settings = read_settings(argparse.Namespace(config=CONTAINER / "server.toml"), {})
    assert sorted(last(image, "EXPOSE").split()) == sorted(
        str(port) for port in (settings.http_port, settings.grpc_port, settings.metrics_port)
    )
    assert settings.repository == Path("/models/repository") and settings.host == settings.metrics_host == "0.0.0.0"
    port, path = re.findall(r"http://127\.0\.0\.1:(\d+)(/[\w/]+)", last(image, "HEALTHCHECK"))[0]
    routes = {route.path: route.endpoint._serve.__func__ for route in HttpApp._routes(HttpApp.__new__(HttpApp))}
    assert routes[path] is HttpApp._ready and int(port) == settings.http_port
    assert f"--start-period={Settings().ready_timeout_s:.0f}s" in last(image, "HEALTHCHECK")


@pytest.mark.parametrize("image", IMAGES)
def test_what_an_image_copies_is_in_its_context(image: str) -> None:
    allowed = [line.removeprefix("!") for line in (ROOT / ".dockerignore").read_text().splitlines() if line[0] == "!"]
    copied = [value.split()[:-1] for name, value in steps(image) if name == "COPY" and "--from" not in value]
    sources = {source for sources in copied for source in sources}
    assert {"icportrait", "pyproject.toml", f"deploy/container/requirements-{image}.txt"} <= sources
    for source in sources:
        assert (ROOT / source).exists()
        assert any(source == each or source.startswith(f"{each}/") for each in allowed), source


@pytest.mark.parametrize("image", IMAGES)
def test_every_package_is_pinned_with_its_hashes(image: str) -> None:
    lock = CONTAINER / f"requirements-{image}.txt"
    blocks = re.split(r"\n(?=\S)", lock.read_text().strip())
    assert len(blocks) == len(pins(lock)) and all("--hash=sha256:" in block for block in blocks)
    constraints = pins(ROOT / "constraints.txt")
    assert {name: constraints.get(name) for name in pins(lock)} == pins(lock), 'run "make locks"'
    (installing, *_) = [value for name, value in steps(image) if name == "RUN" and "--requirement" in value]
    assert "--no-deps --require-hashes" in installing and f"/src/requirements-{image}.txt" in installing
    for name, value in steps(image):
        if name == "RUN" and "pip install" in value:
            assert "--no-index" in value or "--require-hashes" in value or "${TENSORRT_INDEX}" in value


@pytest.mark.parametrize("image", IMAGES)
def test_a_lock_file_has_all_that_a_server_asks_for(image: str) -> None:
    """Read the installed packages' own requirements, because they have the pinned versions."""
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    waiting = [Requirement(line) for line in extras["dependencies"]]
    waiting += [Requirement(line) for extra in EXTRAS for line in extras["optional-dependencies"][extra]]
    inputs = (CONTAINER / f"{image}.in").read_text().splitlines()
    waiting += [Requirement(line) for line in inputs if not line.startswith("#")]
    needed: set[tuple[str, str]] = set()
    while waiting:
        requirement = waiting.pop()
        for extra in ("", *requirement.extras):
            key = canonicalize_name(requirement.name), extra
            if key not in needed:
                needed.add(key)
                # Of tritonserver's wheel only the binary is used.
                lines = [] if key[0] == "nvidia-pytriton" else importlib.metadata.requires(requirement.name) or []
                asked = [Requirement(line) for line in lines]
                waiting += [each for each in asked if not each.marker or each.marker.evaluate({"extra": extra})]
    missing = {name for name, _ in needed} - set(pins(CONTAINER / f"requirements-{image}.txt"))
    assert not missing, 'run "make locks"'
    if image == "cpu":
        assert set(pins(CONTAINER / "requirements-cpu.txt")) == {name for name, _ in needed}


def test_the_gpu_image_has_the_plans_tensorrt() -> None:
    arguments = dict(value.partition("=")[::2] for name, value in steps("gpu") if name == "ARG")
    assert TENSORRT.package.endswith(f"=={arguments['TENSORRT']}")
    (checking,) = [value for name, value in steps("gpu") if name == "RUN" and "TRT_VERSION" in value]
    for told, fits in (("11.4.0", True), ("11.4.0.106+cuda13", True), ("11.3.0", False), ("", False)):
        variables = {"TENSORRT": arguments["TENSORRT"], "TRT_VERSION": told}
        done = subprocess.run(["sh", "-c", checking], env=variables, capture_output=True, timeout=60)
        assert (done.returncode == 0) == fits, told


def test_kubernetes_images_are_those_that_the_document_builds() -> None:
    text = (ROOT / "docs" / "deploy.md").read_text()
    for image in IMAGES:
        container = only(render(image), "Deployment")["spec"]["template"]["spec"]["containers"][0]
        assert f"--file deploy/container/Dockerfile.{image}" in text and f"--tag {container['image']}" in text
