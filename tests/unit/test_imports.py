"""Imports go one way through the package, in no circle, and a stub of Triton's loads no more than its own stage."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

from tests.conftest import ROOT

VOCABULARY = ("contract", "disk", "errors", "manifest", "metrics", "pace", "phases", "policy", "presets", "request")
MAY_IMPORT = {
    "vocabulary": set(),
    "diffusion": {"vocabulary"},
    "pictures": {"vocabulary"},
    "nn": {"vocabulary", "diffusion"},
    "runtime": {"vocabulary", "diffusion", "nn"},
    "loop": {"vocabulary", "diffusion", "runtime"},
    "serving": {"vocabulary", "diffusion", "pictures", "runtime", "loop"},
    "deploy": {"vocabulary", "runtime", "serving"},
    "gateway": {"vocabulary", "diffusion", "pictures", "loop", "serving", "deploy"},
    "server": {"vocabulary", "deploy", "gateway"},
}


def modules(package: str) -> dict[str, Path]:
    found = {}
    for path in sorted((ROOT / package).rglob("*.py")):
        name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
        found[name.removesuffix(".__init__")] = path
    return found


def imports(path: Path, known: dict[str, Path]) -> Iterator[str]:
    """Yield our own modules that a file imports, in functions too, but none that only type checkers read."""
    tree = ast.parse(path.read_text())
    unread = {
        id(node)
        for block in ast.walk(tree)
        if isinstance(block, ast.If) and ast.unparse(block.test) == "TYPE_CHECKING"
        for node in ast.walk(block)
    }
    for node in ast.walk(tree):
        if id(node) in unread:
            continue
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names if name.name in known)
        elif isinstance(node, ast.ImportFrom) and node.module:
            for name in node.names:
                whole = f"{node.module}.{name.name}"
                if whole in known or node.module in known:
                    yield whole if whole in known else node.module


def part(module: str) -> str:
    name = module.split(".")[1] if "." in module else "vocabulary"
    return "vocabulary" if name in VOCABULARY else name


def test_imports_go_one_way_through_the_packages() -> None:
    known = modules("icportrait")
    wrong = [
        f"{module} imports {imported}"
        for module, path in known.items()
        for imported in imports(path, known)
        if part(imported) not in MAY_IMPORT[part(module)] | {part(module)}
    ]
    assert not wrong


@pytest.mark.parametrize("package", ["icportrait", "benchmarks", "engines", "export", "training"])
def test_no_module_imports_itself_through_others(package: str) -> None:
    known = modules(package)
    graph = {module: set(imports(path, known)) - {package} for module, path in known.items() if module != package}
    for module, imported in graph.items():
        # A package's own page imports its modules; they import each other, and not the page.
        graph[module] = {name for name in imported if not module.startswith(f"{name}.")}
    assert list(TopologicalSorter(graph).static_order())


@pytest.mark.parametrize(
    ("model", "unwanted"),
    [
        ("denoise", ["PIL", "cv2", "starlette", "grpc"]),
        ("preprocess", ["icportrait.loop.loop", "torch", "onnxruntime"]),
        ("postprocess", ["icportrait.loop.loop", "torch", "cv2"]),
        ("vae_encoder", ["icportrait.loop.loop", "PIL", "cv2", "pydantic"]),
    ],
)
def test_a_stub_imports_its_own_stage_only(model: str, unwanted: list[str]) -> None:
    program = f"""
import runpy, sys, types
sys.modules["triton_python_backend_utils"] = types.ModuleType("triton_python_backend_utils")
runpy.run_path({str(ROOT / "triton_repo" / model / "1" / "model.py")!r})
print(*(name for name in {unwanted!r} if name in sys.modules))
"""
    run = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert (run.stdout.strip(), run.stderr) == ("", "")
