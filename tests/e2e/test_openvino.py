"""The demo checkpoint on OpenVINO, in a server that had to choose for little memory."""

from __future__ import annotations

import io
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from PIL import Image
from tritonclient.utils import InferenceServerException

from examples.comparison import psnr_db
from icportrait.deploy.memory import needs
from icportrait.deploy.repository import assemble
from icportrait.manifest import Manifest
from icportrait.policy import ServingPolicy
from icportrait.server import Ports, ServerProcess
from tests.e2e.caller import infer

SLOTS = 4


@pytest.fixture(scope="module")
def few_slots(
    server: ServerProcess, demo_export: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[ServerProcess, list[str]]]:
    """Start a server where only four slots and a row at once fit, and yield it with what it said.

    It runs beside ``server``, so that one worker has both: a test compares them.
    """
    folder, said = tmp_path_factory.mktemp("openvino"), []
    assemble(demo_export, folder / "repository", ServingPolicy(runtime="openvino", deterministic=True))
    least = ServingPolicy(runtime="openvino", deterministic=True, slots=SLOTS, rows_at_once=1)
    found = needs(Manifest.read(folder / "repository" / "denoise" / "1"), least)
    room = f'Room({sum(need.memory for need in found)}, "this machine")'
    (folder / "sitecustomize.py").write_text(
        f"import icportrait.deploy.machine_memory\nfrom icportrait.deploy.machine_memory import Room\n"
        f"icportrait.deploy.machine_memory.room = lambda: {room}\n"
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(folder))
        with ServerProcess(folder / "repository", Ports.free(), folder / "server.log", say=said.append) as running:
            yield running, said


def test_portraits_are_onnx_runtimes_but_for_rounding(
    few_slots: tuple[ServerProcess, list[str]], server: ServerProcess, pictures: dict[str, bytes]
) -> None:
    request = {**pictures, "seed": 7, "num_inference_steps": 3, "guidance_scale": 1.5}
    (found, metadata), (expected, _) = infer(few_slots[0].grpc_url, **request), infer(server.grpc_url, **request)
    assert metadata["versions"]["engine"].startswith("openvino-")
    likeness = psnr_db(*(Image.open(io.BytesIO(images[0])) for images in (found, expected)))
    assert likeness >= 50


@pytest.mark.full
def test_callers_at_once_get_the_bytes_that_each_gets_alone(
    few_slots: tuple[ServerProcess, list[str]], pictures: dict[str, bytes]
) -> None:
    url = few_slots[0].grpc_url
    requests = [{**pictures, "seed": seed, "num_inference_steps": 2 + seed, "guidance_scale": 1.5} for seed in range(3)]
    alone = [infer(url, **request)[0] for request in requests]
    with ThreadPoolExecutor(len(requests)) as threads:
        assert list(threads.map(lambda request: infer(url, **request)[0], requests)) == alone


def test_the_models_have_the_slots_that_start_up_chose(
    few_slots: tuple[ServerProcess, list[str]], pictures: dict[str, bytes]
) -> None:
    server, said = few_slots
    assert any(line.startswith(f"openvino with {SLOTS} slots, 1 row at once: needs up to ") for line in said)
    with pytest.raises(InferenceServerException, match=f"need 8 slots, this server has {SLOTS}"):
        infer(server.grpc_url, **pictures, seed=1, num_portraits=8, guidance_scale=1.0)
