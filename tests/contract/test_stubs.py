"""Our use of TensorRT against the signatures of the real bindings, in mypy's eyes."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

from engines import stubs
from icportrait.errors import RuntimeNotAvailable
from icportrait.runtime.tensorrt.products import FLAVOURS, TENSORRT_RTX, Flavour

SNIPPET = """
import tensorrt as trt


def configure(builder: trt.Builder) -> trt.IBuilderConfig:
    config = builder.create_builder_config()
    config.set_flag(trt.BuilderFlag.TF32)
    return config


def run(context: trt.IExecutionContext, pointer: int, stream: int) -> bool:
    context.set_device_memory(pointer, 256)
    return context.set_input_shape("x", (1, 2)) and context.execute_async_v3(stream)
"""


PLANTED = {
    "engines/network.py": "NetworkDefinitionCreationFlag.STRONGLY_TYPED",
    "engines/inspection.py": "LayerType",
    "engines/building.py": "MemoryPoolType.WORKSPACE",
    "icportrait/runtime/tensorrt/engine.py": "ExecutionContextAllocationStrategy.USER_MANAGED",
}
"""Names that are replaced by some that TensorRT 11 has no more, in each of our files that speak to it."""


@pytest.mark.parametrize("flavour", FLAVOURS.values(), ids=FLAVOURS)
def test_what_the_bindings_have_not_fails(flavour: Flavour, tmp_path: Path) -> None:
    """Check a snippet, right and with three mistakes, and our own files with one planted in each, in one run of mypy.

    That our files are right as they are is ``make lint``'s to say.
    """
    (tmp_path / "right.py").write_text(SNIPPET)
    (tmp_path / "removed.py").write_text(SNIPPET.replace("BuilderFlag.TF32", "BuilderFlag.FP16"))
    (tmp_path / "signature.py").write_text(SNIPPET.replace("set_device_memory(pointer, 256)", "set_device_memory(256)"))
    (tmp_path / "value.py").write_text(SNIPPET.replace('set_input_shape("x", (1, 2))', 'set_input_shape("x", 2)'))
    arguments: list[str | Path] = [*tmp_path.glob("*.py"), *PLANTED]
    (tmp_path / "planted").mkdir()
    for file, good in PLANTED.items():
        text = Path(file).read_text()
        assert f"trt.{good}" in text
        shadow = tmp_path / "planted" / Path(file).name
        shadow.write_text(text.replace(f"trt.{good}", "trt.BuilderFlag.FP16"))
        arguments += ["--shadow-file", file, shadow]
    errors = mypy(flavour, tmp_path / "cache", *arguments)
    in_snippets = [error for error in errors if error.startswith(str(tmp_path))]
    assert [Path(error.split(":")[0]).name for error in in_snippets] == ["removed.py", "signature.py", "value.py"]
    assert 'removed.py:7: error: "type[BuilderFlag]" has no attribute "FP16"' in in_snippets[0]
    removed = {error.split(":")[0] for error in errors if '"type[BuilderFlag]" has no attribute "FP16"' in error}
    assert removed == {in_snippets[0].split(":")[0], *PLANTED}


def mypy(flavour: Flavour, cache: Path, *arguments: str | Path) -> list[str]:
    """Return mypy's errors. Stubs are always looked into, other imports never."""
    root = stubs.write_stub(flavour, stubs.OUT)
    checked = subprocess.run(
        [sys.executable, "-m", "mypy", "--cache-dir", cache, "--follow-imports", "skip", *arguments],
        env=os.environ | {"MYPYPATH": str(root)},
        capture_output=True,
        text=True,
    )
    assert checked.returncode in (0, 1), checked.stderr
    return sorted(line for line in checked.stdout.splitlines() if ": error: " in line)


def test_what_only_tensorrt_rtx_has_is_there() -> None:
    """Check names that the runner uses unchecked, because the full product's bindings lack them."""
    rtx = TENSORRT_RTX.load()
    assert rtx.DynamicShapesKernelSpecializationStrategy.EAGER
    assert hasattr(rtx.IRuntimeConfig, "dynamic_shapes_kernel_specialization_strategy")


def test_stubs_are_made_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = []
    monkeypatch.setattr(
        stubs, "_generate", lambda module: made.append(module) or "bool: DataType\nclass Dims:\n    ...\n"
    )
    root = stubs.write_stub(TENSORRT_RTX, tmp_path)
    stub = root / "tensorrt" / "__init__.pyi"
    assert stub.read_text().endswith("\nclass Dims(collections.abc.Sequence[int]):\n    ...\n")
    assert stubs.write_stub(TENSORRT_RTX, tmp_path) == root and made == ["tensorrt_rtx"]
    stub.write_text("# tensorrt-rtx-cu13-bindings==1.0\n")
    stubs.write_stub(TENSORRT_RTX, tmp_path)
    assert made == ["tensorrt_rtx"] * 2


@pytest.mark.parametrize("installed", [None, "11.3.0.1"])
def test_missing_bindings_are_named(
    installed: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def version(name: str) -> str:
        if installed is None:
            raise metadata.PackageNotFoundError(name)
        return installed

    monkeypatch.setattr(stubs.metadata, "version", version)
    assert stubs.main(["--out", str(tmp_path)]) == 1
    package, wanted = TENSORRT_RTX.package.split("==")
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert f"type stubs need {package}-bindings {wanted}, and {installed or 'none'} is installed" in said


def test_bindings_that_cannot_be_imported_say_why() -> None:
    with pytest.raises(
        RuntimeNotAvailable, match=r"no type stubs could be made of absent: ModuleNotFoundError: .*'absent'"
    ):
        stubs._generate("absent")
