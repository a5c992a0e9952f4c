"""The threat model names a test for each threat, and each test that is named exists."""

from __future__ import annotations

import ast
import functools
import io
import re

import numpy as np
import pytest
from PIL import Image

from icportrait.pictures.imaging import encode_picture
from icportrait.pictures.prepare import prepare
from tests.conftest import ROOT

SECURITY = (ROOT / "docs" / "security.md").read_text()
ROWS = [line for line in SECURITY.splitlines() if line.startswith("| ")]
THREATS = [  # all rows but the heads and the table of the parts
    row
    for row in ROWS
    if "::" in row or not re.match(r"\| (part|threat|data|---|gateway |pictures'|triton|operator)", row)
]
NAMED = re.findall(r"`(tests/[\w/]+\.py)::((?:Test\w+::)?test_\w+)`", SECURITY)


@functools.cache
def names_in(path: str) -> set[str]:
    """List the tests of a file as pytest takes them: those of a class with its name."""
    body = ast.parse((ROOT / path).read_text()).body
    places = [("", body)] + [(f"{node.name}::", node.body) for node in body if isinstance(node, ast.ClassDef)]
    functions = ast.FunctionDef | ast.AsyncFunctionDef
    return {before + node.name for before, nodes in places for node in nodes if isinstance(node, functions)}


@pytest.mark.parametrize("row", THREATS, ids=lambda row: row.split("|")[1].strip())
def test_each_line_names_a_test(row: str) -> None:
    assert re.search(r"`tests/[\w/]+\.py::[\w:]*test_\w+`", row.split("|")[-2]), row


@pytest.mark.parametrize(("path", "name"), sorted(set(NAMED)))
def test_each_named_test_exists(path: str, name: str) -> None:
    assert name in names_in(path)


def test_there_are_lines() -> None:
    assert len(THREATS) > 30 and len(NAMED) >= len(THREATS)


@pytest.mark.parametrize("output_format", ["png", "jpeg", "webp"])
def test_a_place_in_an_inputs_exif_is_in_no_portrait(output_format: str) -> None:
    exif = Image.Exif()
    exif[0x010E], exif[0x8298] = "PLACE 48.858 N 2.294 E", "Jane Doe"
    Image.fromarray(np.zeros((64, 64, 3), np.uint8)).save(data := io.BytesIO(), "JPEG", exif=exif)
    assert b"Jane Doe" in data.getvalue()
    _, pixels = prepare(data.getvalue(), "profile", None, False, 64)
    portrait = encode_picture(pixels, output_format)
    assert b"Jane Doe" not in portrait and b"48.858" not in portrait
