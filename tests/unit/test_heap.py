"""A process that has freed its large blocks is as small as before."""

from __future__ import annotations

import json
import os
import secrets
import subprocess
import sys
import tracemalloc
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from icportrait.deploy.heap import environment
from icportrait.request import PortraitRequest
from icportrait.serving.control import parse
from tests.label_slots import BASE

GROWN = """
import os, pathlib, sys
from icportrait.deploy import heap

def resident():
    return int(pathlib.Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

if sys.argv[1] == "limits":
    heap.fix_limits()
before = resident()
for _ in range(2):
    block = b"x" * (20 << 20)  # the first raises glibc's own limits
    del block
if sys.argv[1] == "trim":
    heap.trim()
print(resident() - before)
"""
COLLECTED = """
import gc
from icportrait.deploy import heap

imported = [[] for _ in range(10_000)]
heap.keep_present_objects()
print(len(gc.get_objects()))
"""


def grown_bytes(how: str, variables: dict[str, str]) -> int:
    plain = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    command = [sys.executable, "-c", GROWN, how]
    return int(subprocess.run(command, env=plain | variables, check=True, capture_output=True, text=True).stdout)


@pytest.mark.parametrize(
    ("how", "variables"),
    [("limits", {}), ("trim", {}), ("environment", environment("onnxruntime"))],
    ids=["limits", "trim", "environment"],
)
def test_what_is_freed_goes_back_to_the_machine(how: str, variables: dict[str, str]) -> None:
    assert grown_bytes(how, variables) < 4 << 20


def test_a_process_of_torch_keeps_what_it_will_need_again() -> None:
    assert grown_bytes("environment", environment("torch")) > 16 << 20


def test_collections_dont_look_at_what_was_there_before() -> None:
    found = subprocess.run([sys.executable, "-c", COLLECTED], check=True, capture_output=True, text=True).stdout
    assert int(found) < 1000


@pytest.mark.parametrize(
    ("read", "write"),
    [
        (parse, lambda key: json.dumps({"op": "cancel", "key": key}).encode()),
        (PortraitRequest.from_json, lambda key: replace(BASE, key=key).to_json()),
    ],
    ids=["control line", "request"],
)
def test_no_key_is_kept_once_its_message_is_read(read: Callable[[bytes], Any], write: Callable[[str], bytes]) -> None:
    messages = [write(secrets.token_hex(16)) for _ in range(2000)]
    read(messages[0])
    tracemalloc.start()
    try:
        for message in messages:
            read(message)
        assert tracemalloc.get_traced_memory()[0] < 20_000
    finally:
        tracemalloc.stop()
