"""Type stubs of both TensorRT products, from the installed wheels: ``python -m engines.stubs``.

    build/stubs/tensorrt-rtx/tensorrt/__init__.pyi
    build/stubs/tensorrt/tensorrt/__init__.pyi

Each product's directory is a root for mypy in which ``import tensorrt`` means that product. The full product's
libraries aren't on PyPI, but its bindings are: they are imported with stand-ins for the libraries.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import re
import subprocess
import sys
import tempfile
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

from engines.elf import write_library
from icportrait.errors import IcPortraitError, RuntimeNotAvailable
from icportrait.runtime.tensorrt.products import FLAVOURS, Flavour

OUT = Path("build/stubs")

_STAND_INS = ("libnvinfer.so.11", "libnvinfer_plugin.so.11", "libnvonnxparser.so.11")
_ENTRY_POINTS = (
    "createInferBuilder_INTERNAL",
    "createInferRefitter_INTERNAL",
    "createInferRuntime_INTERNAL",
    "createNvOnnxParserRefitter_INTERNAL",
    "createNvOnnxParser_INTERNAL",
    "getBuilderPluginRegistry",
    "getNvOnnxParserVersion",
    "getPluginRegistry",
    "initLibNvInferPlugins",
)
"""Entry points that the full product's bindings need in its libraries."""

_REPAIRS = (
    (r"\bin: ", "in_: "),  # a keyword as a parameter's name
    (r"(= None, channel_axis: [\w.]+)\)", r"\1 = ...)"),  # a parameter without a default behind some with one
    (r"(?m)^bool: DataType\n", ""),  # hides Python's bool from all that follows
    (r"typing\.SupportsInt", "int"),  # what a method is called with, and then it can't be overridden with int
    (r"(?m)^class Dims:", "class Dims(collections.abc.Sequence[int]):"),  # a sequence in all but its base class
)
"""From what pybind11-stubgen writes to what mypy takes. Types that it couldn't name are ``...``, which mypy reports
inside of the stub and reads as Any."""


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m engines.stubs", description=__doc__)
    parser.add_argument("--out", type=Path, default=OUT, help="directory of the stubs (default: %(default)s)")
    args = parser.parse_args(argv)
    try:
        for flavour in FLAVOURS.values():
            write_stub(flavour, args.out)
    except (IcPortraitError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def write_stub(flavour: Flavour, out: Path) -> Path:
    """Write one product's stub, unless it is there already; returns its root for mypy.

    Raises:
        RuntimeNotAvailable: its bindings aren't installed, are of another version or can't be imported.
    """
    package, version = flavour.package.split("==")
    bindings = f"{package}-bindings"
    root = out / flavour.name
    stub = root / "tensorrt" / "__init__.pyi"
    origin = f"# {bindings}=={version}, by engines/stubs.py {hashlib.sha256(Path(__file__).read_bytes()).hexdigest()}\n"
    if stub.is_file() and stub.read_text(encoding="utf-8").startswith(origin):
        return root
    try:
        found = metadata.version(bindings)
    except metadata.PackageNotFoundError:
        found = "none"
    if found != version:
        raise RuntimeNotAvailable(
            f"type stubs need {bindings} {version}, and {found} is installed; pip install {bindings}=={version}"
        )
    text = _generate(flavour.module)
    for pattern, replacement in _REPAIRS:
        text = re.sub(pattern, replacement, text)
    stub.parent.mkdir(parents=True, exist_ok=True)
    part = stub.with_suffix(".part")
    part.write_text(origin + text, encoding="utf-8")
    part.replace(stub)
    return root


def _generate(module: str) -> str:
    """Return pybind11-stubgen's text for the bindings' native module.

    It runs in a process of its own, because it imports the module.
    """
    with tempfile.TemporaryDirectory() as directory:
        for name in _STAND_INS:
            write_library(Path(directory) / name, _ENTRY_POINTS)
        libraries = [directory, *_locations("tensorrt_rtx_libs"), os.environ.get("LD_LIBRARY_PATH", "")]
        made = subprocess.run(
            [sys.executable, "-m", "pybind11_stubgen", module, "--output-dir", directory, "--ignore-all-errors"],
            env=os.environ
            | {
                "PYTHONPATH": os.pathsep.join(_locations(f"{module}_bindings")),
                "LD_LIBRARY_PATH": os.pathsep.join(filter(None, libraries)),
            },
            capture_output=True,
            text=True,
        )
        if made.returncode != 0:
            reason = (made.stderr.strip().splitlines() or ["it says nothing"])[-1]
            raise RuntimeNotAvailable(f"no type stubs could be made of {module}: {reason}")
        return (Path(directory) / f"{module}.pyi").read_text(encoding="utf-8")


def _locations(package: str) -> list[str]:
    """Find the directories of an installed package, which isn't imported."""
    spec = find_spec(package)
    return list(spec.submodule_search_locations or ()) if spec else []


if __name__ == "__main__":
    sys.exit(main())
