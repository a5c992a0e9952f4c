"""The client's public names: each has an example, and the examples run."""

from __future__ import annotations

import doctest
import importlib
import inspect
import pkgutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import icportrait_client
import pytest
from icportrait_client import PortraitClient
from icportrait_client.testing import FakePortraitServer

from tests.conftest import EXAMPLES
from tests.documents import BLOCKS

MODULES = sorted(module.name for module in pkgutil.iter_modules(icportrait_client.__path__))
CONSTANTS = {"DEFAULT_TIMEOUT_S", "DEFAULT_URL", "PictureSource", "__version__"}
"""Names without a docstring of their own."""


@pytest.fixture
def names(tmp_path: Path) -> Iterator[dict[str, Any]]:
    """Return the names that the examples use beside their own."""
    with FakePortraitServer() as server, PortraitClient(server.address, timeout_s=20) as client:
        yield {
            "server": server,
            "client": client,
            "folder": tmp_path,
            "profile": EXAMPLES / "hopper.jpg",
            "reference": EXAMPLES / "astronaut.jpg",
        }


def examples() -> list[doctest.DocTest]:
    finder = doctest.DocTestFinder(exclude_empty=True)
    return [
        test
        for name in MODULES
        for test in finder.find(importlib.import_module(f"icportrait_client.{name}"))
        if test.examples
    ]


@pytest.mark.parametrize("example", examples(), ids=lambda example: example.name)
def test_an_example_does_what_it_says(
    example: doctest.DocTest, names: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    example.globs.update(names)
    result = doctest.DocTestRunner(optionflags=doctest.IGNORE_EXCEPTION_DETAIL).run(example, clear_globs=False)
    assert not result.failed, capsys.readouterr().out


def test_the_readmes_example_of_a_callers_test_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (block,) = (block for block in BLOCKS if block.language == "python" and "FakePortraitServer" in block.text)
    (tmp_path / "anna.jpg").symlink_to(EXAMPLES / "hopper.jpg")
    (tmp_path / "window-light.jpg").symlink_to(EXAMPLES / "astronaut.jpg")
    monkeypatch.chdir(tmp_path)
    exec(compile(block.text, str(block), "exec"), {"PortraitClient": PortraitClient})


def test_every_public_name_has_an_example() -> None:
    public = {name: getattr(icportrait_client, name) for name in icportrait_client.__all__ if name not in CONSTANTS}
    lacking = [name for name, value in public.items() if ">>> " not in (inspect.getdoc(value) or "")]
    lacking += [] if ">>> " in (FakePortraitServer.__doc__ or "") else ["FakePortraitServer"]
    assert not lacking


def test_the_export_list_is_what_there_is() -> None:
    """Compare with the modules' own public classes, so that none is forgotten."""
    exported = set(icportrait_client.__all__)
    assert all(getattr(icportrait_client, name) is not None for name in exported)
    errors = importlib.import_module("icportrait_client.errors")
    assert {name for name, value in vars(errors).items() if inspect.isclass(value)} <= exported
    portraits = importlib.import_module("icportrait_client.portraits")
    own = {
        name
        for name, value in vars(portraits).items()
        if inspect.isclass(value) and value.__module__ == portraits.__name__ and not name.startswith("_")
    }
    assert own <= exported
