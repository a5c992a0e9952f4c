"""The real server on simulated engines: at the table's speed, with the batching that was asked for, and labelled."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from PIL import Image

from icportrait.contract import ENGINES
from icportrait.presets import DEMO_128
from icportrait.repository import main
from icportrait.server import HOST, Ports
from tests.conftest import ROOT
from tests.e2e.caller import infer
from tests.e2e.test_server import wait_ready
from tests.trivial_engines import write_trivial_export

STEP_MS = 10.0


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, str, Path]]:
    """A server that batches whole requests: its URL, the line that it says it is ready with, its temporary folder."""
    folder = tmp_path_factory.mktemp("simulated")
    write_trivial_export(folder / "export", DEMO_128)
    table = {"device": "test device", "engines": {name: {"1": 2.0} for name in ENGINES} | {"unet": {"1": STEP_MS}}}
    (folder / "table.json").write_text(json.dumps(table))
    repository = ["--export", str(folder / "export"), "--out", str(folder / "repository"), "--runtime", "simulated"]
    assert main([*repository, "--latency-table", str(folder / "table.json"), "--batching", "whole"]) == 0
    ports = Ports.free()
    with (folder / "server.log").open("w") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "icportrait.server", "--repository", str(folder / "repository")]
            + [f"--{name}-port={port}" for name, port in vars(ports).items()],
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            cwd=ROOT,
            env={**os.environ, "TMPDIR": str(folder)},
        )
    with process:
        try:
            yield f"{HOST}:{ports.grpc}", wait_ready(process), folder
        finally:
            process.terminate()


def test_a_portrait_has_the_right_size_and_says_that_it_is_simulated(
    whole: tuple[str, str, Path], pictures: dict[str, bytes]
) -> None:
    url, ready, folder = whole
    assert "SIMULATED" in ready and "test device" in ready
    images, metadata = infer(url, num_portraits=2, num_inference_steps=20, **pictures)
    side = DEMO_128.image_size
    assert [Image.open(io.BytesIO(image)).size for image in images] == [(side, side)] * 2
    assert metadata["simulated"] is True
    assert metadata["versions"]["engine"] == "simulated-test device"
    assert metadata["stage_ms"]["denoise"] >= 20 * STEP_MS
    (device,) = folder.glob("icportrait-server-*/device")
    assert {path.name for path in device.iterdir()} == {"turn", "busy"}
    assert not list(folder.glob("icportrait-device-*"))


def test_whole_batches_keep_a_later_request_waiting(whole: tuple[str, str, Path], pictures: dict[str, bytes]) -> None:
    url = whole[0]
    infer(url, num_inference_steps=1, **pictures)
    with ThreadPoolExecutor(1) as thread:
        first = thread.submit(infer, url, num_inference_steps=150, **pictures)
        time.sleep(0.5)
        _, metadata = infer(url, num_inference_steps=1, **pictures)
        _, longer = first.result()
    assert longer["stage_ms"]["denoise"] >= 150 * STEP_MS
    assert metadata["stage_ms"]["conditioning"] > 300, "in-flight, it joins after a step or two"
