"""Commands, links, file names and tables in README and docs are right.

A command is one of these: a make target, a command line of this project, part of a block that
``tests/e2e/test_documents.py`` runs on a real server, or exempt with a reason.
"""

from __future__ import annotations

import argparse
import ast
import functools
import importlib
import json
import os
import re
import shlex
import subprocess
import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest

from icportrait.metrics import FAMILIES
from icportrait.serving.counters import CACHE_COUNTERS, ENGINE_COUNTERS
from tests.documents import (
    API,
    BLOCKS,
    DOCUMENTS,
    GUIDES,
    ROOT,
    Block,
    anchors,
    code_spans,
    links,
    logical_lines,
    variants,
    with_tables,
)

LANGUAGES = {"sh", "python", "toml", "json", "nginx", "ini", "text", "js"}
IMAGE = "registry.example/icportrait:0.1.0"
NO_ENGINE = "needs a container engine; make image-check takes the CPU image's steps, and runs its server, without one"
NO_CLUSTER = "needs a cluster; tests/unit/test_kubernetes.py renders and validates what is applied"
EXEMPT = {
    "apt-get install git make python3 python3-venv libpython3.11": "installs packages as root",
    "docker run --rm nvcr.io/nvidia/tritonserver:YY.MM-py3 printenv TRT_VERSION": "needs docker and NVIDIA's registry",
    "pip install 'icportrait[c2pa]'": "make setup installs the package; the project is in no index",
    "pip install 'icportrait[tracing]'": "make setup installs the packages; the project is in no index",
    "deploy/kubernetes/publish.sh build/repository/onnxruntime store:portraits": "tests/unit/test_kubernetes.py does",
    f"docker build --file deploy/container/Dockerfile.cpu --tag {IMAGE}-cpu .": NO_ENGINE,
    "docker build --file deploy/container/Dockerfile.gpu --build-arg TRITON_RELEASE=YY.MM "
    f"--build-arg TENSORRT_INDEX=NVIDIAS_INDEX --tag {IMAGE}-gpu .": NO_ENGINE,
    f"docker push {IMAGE}-cpu": NO_ENGINE,
    "docker run --rm --read-only --tmpfs /tmp --shm-size 256m --volume ./models:/models "
    f"--publish 127.0.0.1:8000:8000 {IMAGE}-cpu": NO_ENGINE,
    "kubectl apply --filename deploy/kubernetes/base/namespace.yaml": NO_CLUSTER,
    "kubectl apply --kustomize deploy/kubernetes/overlays/gpu": NO_CLUSTER,
    "kubectl rollout status deployment/icportrait --namespace icportrait": NO_CLUSTER,
    "kubectl rollout undo deployment/icportrait --namespace icportrait": NO_CLUSTER,
    "node examples/node/portrait.js localhost:8001 me.jpg portrait.jpg out.png": "tests/e2e/test_node.py runs it",
    "nvidia-cuda-mps-control -d": "needs an NVIDIA GPU; it comes with the driver",
    "npm ci --prefix examples/node": "tests/e2e/test_node.py installs the same packages elsewhere",
    "pip install ./client": "make setup installs the client from the same folder",
}
"""Commands that no test runs or parses, each with the reason."""
RUN_BY_KUBERNETES = ("kubectl create ", "kubectl kustomize ")
"""Commands that ``tests/unit/test_kubernetes.py`` runs without a cluster."""
PROGRAMS = {
    ".venv/bin/icportrait": "icportrait_client.cli",
    "icportrait": "icportrait_client.cli",
    "icportrait-server": "icportrait.server",
}
MADE_BEFORE = {"CHECKPOINT=adapted": "CHECKPOINT=checkpoints/demo-128"}
"""A checkpoint that the document's reader has by then, and one that is here."""
IMPORTS_TORCH = ("benchmarks.torch_latency", "export.magnitudes", "export.quality")
"""Modules that are read and not imported, because their import takes seconds."""
OURS = re.compile(r"-m ((?:benchmarks|engines|examples|export|icportrait|tests|training)\b[\w.]*)((?: [^;|&\n]*)?)")
SHELL = [block for block in BLOCKS if block.language == "sh"]
LINES = {(str(block), line): block for block in SHELL for line in logical_lines(block.text)}
MAKE = sorted({line for _, line in LINES if line.startswith("make ")})


class ParsedError(Exception):
    """A command line was accepted; nothing of it is run."""


@pytest.fixture
def parse(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[[str, list[str]], None]:
    """Let a module's own parser look at a command line, and run nothing."""
    parse_args = argparse.ArgumentParser.parse_args

    def only_parse(self: argparse.ArgumentParser, *args: object) -> None:
        parse_args(self, *args)  # type: ignore[call-overload]
        raise ParsedError

    def check(module: str, words: list[str]) -> None:
        if module in IMPORTS_TORCH:
            assert {word for word in words if word.startswith("--")} <= flags_in_source(module), (module, words)
            return
        name = f"{module}.__main__" if source_of(module).name == "__main__.py" else module
        try:
            importlib.import_module(name).main(words)
        except ParsedError:
            return
        except SystemExit:
            pytest.fail(f"{module} {shlex.join(words)}: {capsys.readouterr().err}")
        pytest.fail(f"{module} {shlex.join(words)}: no parser was asked")

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", only_parse)
    return check


def source_of(module: str) -> Path:
    """Find the file that ``python -m`` runs."""
    path = (ROOT / "client" / "src" if module.startswith("icportrait_client") else ROOT) / module.replace(".", "/")
    return path / "__main__.py" if path.is_dir() else path.with_suffix(".py")


def flags_in_source(module: str) -> set[str]:
    """Read the flags that a module's parser takes."""
    tree = ast.parse(source_of(module).read_text())
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    adding = [call for call in calls if isinstance(call.func, ast.Attribute) and call.func.attr == "add_argument"]
    return {argument.value for call in adding for argument in call.args if isinstance(argument, ast.Constant)}


def command_line(words: list[str]) -> tuple[str, list[str]] | None:
    """Find the module of this project that a command runs, and the module's arguments."""
    if words[0] in PROGRAMS:
        return PROGRAMS[words[0]], words[1:]
    if words[0] in ("python", ".venv/bin/python") and words[1] == "-m":
        return words[2], words[3:]
    return None


@functools.cache
def makefile() -> str:
    return (ROOT / "Makefile").read_text()


# Commands.


@pytest.mark.parametrize(("where", "line"), LINES)
def test_a_command_is_made_parsed_run_or_exempt(where: str, line: str, parse: Callable[[str, list[str]], None]) -> None:
    if (
        line in EXEMPT
        or line in MAKE
        or line.startswith(RUN_BY_KUBERNETES)
        or (LINES[where, line].needs_server and line.split()[0] not in PROGRAMS)
    ):
        return
    for words in variants(line):
        command = command_line(words)
        assert command, f"{where}: {line}: neither run nor parsed by a test, nor exempt"
        parse(*command)
        for word in words[1:]:
            if word.split("/")[0] in ("benchmarks", "checkpoints", "docs", "examples", "training"):
                assert (ROOT / word).exists() or "/" not in word, f"{where}: {word}: no such file"


@pytest.mark.parametrize("line", MAKE)
def test_a_make_target_exists_and_its_command_lines_are_accepted(
    line: str, parse: Callable[[str, list[str]], None]
) -> None:
    _, *words = shlex.split(line)
    for variable in [word.partition("=") for word in words if "=" in word]:
        assert re.search(rf"^{variable[0]} \?=|\$\({variable[0]}\)", makefile(), re.MULTILINE), f"{line}: {variable[0]}"
        if variable[2].startswith("benchmarks/"):
            assert (ROOT / variable[2]).is_file(), line
    words = [MADE_BEFORE.get(word, word) for word in words]
    command = ["make", "--dry-run", "--no-print-directory", *words]
    # Else this make would count as part of the one that runs the tests.
    environment = {name: value for name, value in os.environ.items() if name not in ("MAKEFLAGS", "MAKELEVEL")}
    planned = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60)
    assert planned.returncode == 0, planned.stderr
    for module, arguments in OURS.findall(planned.stdout.replace("\\\n", " ")):
        if arguments.strip():
            parse(module, shlex.split(arguments))


@pytest.mark.parametrize("path", GUIDES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_command_in_a_sentence_exists(path: Path) -> None:
    for words in [words for words in code_spans(path) if len(words) > 1]:
        if words[0] == "make":
            assert re.search(rf"^{re.escape(words[1])}:", makefile(), re.MULTILINE), f"{path}: {words}"
        elif command := command_line(words):
            module, arguments = command
            source = source_of(module).read_text()
            flags = {word for word in arguments if word.startswith("--")} - {"--help"}
            for word in flags | set(arguments[:1] if words[0] in PROGRAMS else ()):
                assert f'"{word}"' in source, f"{path}: {words}: {word}"


def test_no_exemption_is_left_over() -> None:
    assert set(EXEMPT) <= {line for _, line in LINES}


def test_a_wrong_command_would_be_found(parse: Callable[[str, list[str]], None]) -> None:
    for module, words in (
        ("export", ["--no-such-flag"]),
        ("icportrait.server", ["--grpc-prt", "1"]),
        ("icportrait_client.cli", ["generate", "--profile", "me.jpg"]),
    ):
        with pytest.raises(pytest.fail.Exception):
            parse(module, words)
    with pytest.raises(AssertionError):
        parse("export.quality", ["--no-such-flag"])
    assert command_line(["curl", "localhost"]) is None


# Blocks.


@pytest.mark.parametrize("block", BLOCKS, ids=str)
def test_a_block_says_its_language_and_is_of_it(block: Block) -> None:
    assert block.language in LANGUAGES
    if block.language == "python":
        compile(block.text, str(block), "exec")
    elif block.language == "toml":
        tomllib.loads(block.text)
    elif block.language == "json":
        json.loads(block.text)


# Links and names.


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(path: Path) -> None:
    for target in links(path):
        if re.match(r"https?://", target):
            continue
        file, _, anchor = target.partition("#")
        there = (path.parent / file).resolve() if file else path
        assert there.exists() and there.is_relative_to(ROOT), f"{path}: {target}"
        assert not anchor or anchor in anchors(there), f"{path}: {target}: no such heading"


@pytest.mark.parametrize("path", GUIDES, ids=lambda path: str(path.relative_to(ROOT)))
def test_files_that_are_named_exist(path: Path) -> None:
    tracked = {folder.name for folder in ROOT.iterdir() if folder.is_dir()} - {"build"}
    for word, *others in code_spans(path):
        if not others and re.fullmatch(r"[\w.-]+(/[\w.-]+)+/?|[\w-]+/", word) and word.split("/")[0] in tracked:
            assert (ROOT / word).exists(), f"{path}: {word}: no such file"


def test_every_document_is_in_the_index() -> None:
    index = ROOT / "docs" / "README.md"
    listed = {(index.parent / target).resolve() for target in links(index)}
    assert {path for path in GUIDES if path.parent == index.parent} - {index} <= listed
    assert {ROOT / name / "README.md" for name in ("benchmarks", "client", "training")} <= listed


def test_the_readme_is_short_and_says_where_things_have_run_on_the_first_screen() -> None:
    lines = (ROOT / "README.md").read_text().splitlines()
    assert len(lines) <= 130
    assert lines.index("## State of things") < 40


# Tables.


def test_the_tables_of_the_api_are_the_generated_ones() -> None:
    assert API.read_text() == with_tables(API.read_text()), 'run "make configs"'


def test_every_input_and_output_has_its_word() -> None:
    assert not re.findall(r"^\| `\w+` .*\|\s*\|$", API.read_text(), re.MULTILINE)


def test_every_metric_is_described() -> None:
    text = (ROOT / "docs" / "operations.md").read_text()
    gateway = [
        name
        for module in ("main", "records")
        for name in re.findall(r'"(\w+)", "(?:gauge|counter)"', (ROOT / f"icportrait/gateway/{module}.py").read_text())
    ]
    assert gateway
    ours = [*FAMILIES, *(name.removeprefix("icportrait_") for name in CACHE_COUNTERS | ENGINE_COUNTERS)]
    for name in [*ours, *(f"gateway_{name}" for name in gateway)]:
        assert re.search(rf"`{name}[`{{]", text), name
