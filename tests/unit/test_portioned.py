"""The decoder on a GPU gives the GPU back between portions; its rows are the same."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest

from icportrait.contract import ENGINES, Array, engine_specs
from icportrait.errors import ContractError
from icportrait.policy import SIMULATED, ServingPolicy
from icportrait.presets import SD15_512
from icportrait.runtime import load_engine
from icportrait.runtime.cuda import DeviceArray
from icportrait.runtime.load import DECODER_ROWS, most_rows
from icportrait.runtime.portioned import PortionedEngine
from icportrait.runtime.shared_device import SharedDevice
from tests.tiny import TINY
from tests.trivial_engines import write_trivial_export

SPEC = engine_specs(TINY)["vae_decoder"]


class Doubling:
    """An engine that notes its batches."""

    spec, version = SPEC, "doubling"

    def __init__(self) -> None:
        self.given: list[Array | DeviceArray] = []

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        self.given.append(inputs["portrait_latent"])
        rows = inputs["portrait_latent"].shape[0]
        return {"portrait_pixels": np.full(SPEC.outputs[0].shape(batch=rows), len(self.given), np.uint8)}


@pytest.mark.parametrize(("batch", "sizes"), [(1, [1]), (4, [4]), (5, [4, 1]), (8, [4, 4])])
def test_rows_come_in_order_from_portions(batch: int, sizes: list[int]) -> None:
    engine = Doubling()
    latents = SPEC.dummy_inputs(batch)["portrait_latent"]
    pixels = PortionedEngine(engine, 4).run({"portrait_latent": latents})["portrait_pixels"]
    assert [len(given) for given in engine.given] == sizes
    assert np.array_equal(np.concatenate(engine.given), latents)
    assert [int(row.flat[0]) for row in pixels] == [index + 1 for index, size in enumerate(sizes) for _ in range(size)]


def test_a_batch_in_gpu_memory_is_split_where_it_lies() -> None:
    engine, dtype = Doubling(), np.dtype(np.float32)
    array = DeviceArray(4096, SPEC.inputs[0].shape(batch=6), dtype, None)
    PortionedEngine(engine, 4).run({"portrait_latent": array})
    assert engine.given == [array.rows(0, 4), array.rows(4, 2)]


def test_a_batch_beyond_the_contract_is_refused_before_anything_runs() -> None:
    engine = Doubling()
    with pytest.raises(ContractError):
        PortionedEngine(engine, 4).run(
            {"portrait_latent": np.zeros((9, *SPEC.inputs[0].shape(batch=1)[1:]), np.float32)}
        )
    assert not engine.given


def test_the_decoder_alone_runs_few_rows_at_once() -> None:
    specs = engine_specs(SD15_512, "fp16")
    assert {name: most_rows(specs[name]) for name in ENGINES} == {
        "vae_encoder": 8,
        "warping_network": 4,
        "unet": 16,
        "vae_decoder": DECODER_ROWS,
    }


def test_a_simulated_decoder_gives_the_device_back_between_portions(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    export = write_trivial_export(tmp_path / "export", TINY)
    table = tmp_path / "table.json"
    table.write_text(json.dumps({"device": "test", "engines": {name: {"1": 0.1} for name in ENGINES}}))
    policy = ServingPolicy(runtime=SIMULATED, latency_table=str(table))
    turns = []
    acquire = SharedDevice.acquire
    monkeypatch.setattr(SharedDevice, "acquire", lambda device: turns.append(device) or acquire(device))
    folder = tmp_path / "repository" / "vae_decoder" / "1"
    for name, expected in (("vae_decoder", 2), ("vae_encoder", 1)):
        engine = load_engine(name, folder, export, policy)
        turns.clear()
        engine.run(engine.spec.dummy_inputs(8))
        assert len(turns) == expected
