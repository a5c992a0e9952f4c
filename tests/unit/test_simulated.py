"""Simulated engines: what a latency table says, and that a run takes it."""

from __future__ import annotations

import dataclasses
import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from icportrait.contract import ENGINES, engine_specs
from icportrait.errors import ContractError, LatencyTableError
from icportrait.manifest import Manifest
from icportrait.pictures.imaging import encode_picture
from icportrait.policy import ServingPolicy
from icportrait.presets import DEMO_128, PRESETS, Preset
from icportrait.runtime import Slots, load_engine, load_slots, simulated
from icportrait.runtime.latency_table import LatencyTable
from tests.conftest import ROOT
from tests.rows import step as run_step
from tests.rows import warp
from tests.tiny import TINY
from tests.trivial_engines import write_trivial_export
from tests.unit.conftest import Clock

TABLES = ROOT / "benchmarks" / "latency"
FIVE_MS = {"device": "test device", "engines": {name: {"1": 5.0} for name in ENGINES}}


@pytest.fixture(autouse=True)
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Put the devices of repositories that no server serves in a folder of the test's."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))


def write(path: Path, fields: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(fields if isinstance(fields, str) else json.dumps(fields))
    return path


@pytest.fixture
def table(tmp_path: Path) -> Path:
    return write(tmp_path / "table.json", FIVE_MS)


@pytest.mark.parametrize(
    ("points", "batch", "expected"),
    [
        ({"1": 10.0, "16": 14.0}, 1, 10.0),
        ({"1": 10.0, "16": 14.0}, 16, 14.0),
        ({"1": 10, "16": 14}, 4, 10.8),
        ({"16": 14.0, "4": 8.0, "1": 2.0}, 3, 6.0),
        ({"16": 14.0, "4": 8.0, "1": 2.0}, 10, 11.0),
        ({"4": 8.0, "16": 14.0}, 1, 8.0),
        ({"1": 2.0, "2": 4.0, "4": 5.0}, 8, 7.0),
        ({"2": 3.0}, 1, 3.0),
        ({"2": 3.0}, 8, 3.0),
        ({"1": 9.0, "2": 3.0}, 8, 3.0),
    ],
)
def test_a_table_is_linear_between_its_sizes(tmp_path: Path, points: Any, batch: int, expected: float) -> None:
    path = write(tmp_path / "table.json", FIVE_MS | {"engines": FIVE_MS["engines"] | {"unet": points}})
    found = LatencyTable.read(path)
    assert found.of("unet", batch) == pytest.approx(expected)
    assert found.of("vae_decoder", batch) == 5.0


@pytest.mark.parametrize("preset", PRESETS.values(), ids=lambda preset: preset.name)
def test_a_measured_table_reaches_every_largest_batch_and_states_its_conditions(preset: Preset) -> None:
    path = TABLES / f"h200-torch-{preset.name}.json"
    table, fields = LatencyTable.read(path), json.loads(path.read_text())
    assert fields["preset"] == preset.name and preset.name in fields["conditions"]
    largest = {name: max(sizes) for name, sizes in table.latency_ms.items()}
    assert largest == {name: spec.batch.max for name, spec in engine_specs(preset).items()}


def test_a_table_faster_than_its_device_can_be_is_refused(tmp_path: Path) -> None:
    """Refuse too short a time: 16 rows of 1.849 TFLOP are 29.9 ms at an H100's 989 TFLOP/s."""
    slow = {name: {"1": 1000.0} for name in ENGINES}
    fields = {"device": "NVIDIA H100 80GB", "preset": "sd15-512", "engines": slow | {"unet": {"1": 10.0, "16": 30.0}}}
    LatencyTable.read(write(tmp_path / "table.json", fields))
    fields["engines"]["unet"]["16"] = 14.0
    with pytest.raises(LatencyTableError) as refused:
        LatencyTable.read(write(tmp_path / "table.json", fields))
    text = "unet: batch 16 in 14 ms is 2113 TFLOP/s, and H100 has 989 at most; expected 29.9 ms or more"
    assert str(refused.value) == f"{tmp_path / 'table.json'}: {text}"
    for other in ({"device": "a device of our own"}, {"preset": None}):
        LatencyTable.read(write(tmp_path / "table.json", fields | other))


def with_unet(points: object) -> dict[str, Any]:
    return FIVE_MS | {"engines": FIVE_MS["engines"] | {"unet": points}}


@pytest.mark.parametrize(
    ("fields", "complaint"),
    [
        ("{", "can't be read as JSON (Expecting property name"),
        ([1], "is [1], expected an object with device and engines"),
        ({"engines": FIVE_MS["engines"]}, "device is missing, expected its name, in one line"),
        (FIVE_MS | {"device": "two\nlines"}, r'device is "two\nlines", expected its name'),
        (FIVE_MS | {"engines": {}}, "engines is empty, expected an object with vae_encoder, warping_network, unet, "),
        (FIVE_MS | {"engines": {"unet": {"1": 1.0}}}, "engines is unet, expected an object with vae_encoder"),
        (FIVE_MS | {"engines": FIVE_MS["engines"] | {"vae": {"1": 1}}}, "vae_decoder, vae, expected an object"),
        (FIVE_MS | {"preset": "sdxl"}, 'preset is "sdxl", expected one of demo-128, sd15-512'),
        (with_unet({}), "unet is {}, expected milliseconds by batch size"),
        (with_unet(5.0), "unet is 5.0, expected milliseconds by batch size"),
        (with_unet({"0": 1.0}), 'unet: batch size is "0", expected a whole number from 1'),
        (with_unet({"1.5": 1.0}), 'unet: batch size is "1.5", expected a whole number from 1'),
        (with_unet({"4": "fast"}), 'unet: batch 4 is "fast", expected milliseconds above 0'),
        (with_unet({"4": True}), "unet: batch 4 is true, expected milliseconds above 0"),
        (with_unet({"4": 0}), "unet: batch 4 is 0, expected milliseconds above 0"),
        (with_unet({"4": -1.0}), "unet: batch 4 is -1.0, expected milliseconds above 0"),
        (with_unet({"4": float("nan")}), "unet: batch 4 is NaN, expected milliseconds above 0"),
        (with_unet({"4": float("inf")}), "unet: batch 4 is Infinity, expected milliseconds above 0, up to 600000"),
    ],
)
def test_what_is_no_table_is_refused_with_both_sides(tmp_path: Path, fields: Any, complaint: str) -> None:
    path = write(tmp_path / "table.json", fields)
    with pytest.raises(LatencyTableError) as refused:
        LatencyTable.read(path)
    assert str(refused.value).startswith(f"{path}: {complaint}" if complaint.startswith("is") else f"{path}: ")
    assert complaint in str(refused.value) and "\n" not in str(refused.value)


def test_a_missing_table_is_named(tmp_path: Path) -> None:
    with pytest.raises(LatencyTableError, match=r"none\.json: can't be read as JSON \(.*No such file"):
        LatencyTable.read(tmp_path / "none.json")


def engine(name: str, table: Path, preset: Any = TINY, precision: str = "fp32") -> Any:
    manifest = write_manifest(table.parent / "model", preset, precision)
    policy = ServingPolicy(runtime="simulated", latency_table=str(table))
    return load_engine(name, table.parent / "repository" / "model" / "1", manifest, policy)


def write_manifest(directory: Path, preset: Any, precision: str) -> Manifest:
    write_trivial_export(directory, preset)
    return dataclasses.replace(Manifest.read(directory), precision=precision)


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("name", ENGINES)
def test_outputs_are_what_the_contract_says_and_nobody_can_change_them(name: str, precision: str, table: Path) -> None:
    spec, simulates = engine_specs(TINY, precision)[name], engine(name, table, precision=precision)
    assert simulates.version == "simulated-test device"
    for batch in (1, 3):
        outputs = simulates.run(spec.dummy_inputs(batch))
        assert list(outputs) == [tensor.name for tensor in spec.outputs]
        for tensor in spec.outputs:
            array = outputs[tensor.name]
            assert (array.shape, str(array.dtype)) == (tensor.shape(batch=batch), tensor.dtype.numpy)
            assert np.isfinite(array.astype(np.float32)).all()
            assert not array.flags.writeable and array.flags.c_contiguous
            assert all(np.array_equal(row, array[0]) for row in array), "a row depends on no other"


@pytest.mark.parametrize(("batch", "expected_ms"), [(1, 3.0), (8, 10.0)])
@pytest.mark.parametrize("meanwhile_ms", [0.0, 2.0, 50.0])
def test_a_run_takes_the_batchs_time_and_no_less(
    batch: int, expected_ms: float, meanwhile_ms: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Let the host work within that time; more work than that takes its own time."""
    clock = Clock()
    monkeypatch.setattr(simulated, "time", clock.as_module())
    monkeypatch.setattr(simulated, "_WAIT", simulated._Wait())
    unet = engine("unet", write(tmp_path / "table.json", with_unet({"1": 3.0, "16": 18.0})))
    inputs, began_s = engine_specs(TINY)["unet"].dummy_inputs(batch), clock.now_s
    unet.launch(inputs)
    clock.pass_ms(meanwhile_ms)
    unet.wait()
    assert clock.now_s - began_s == pytest.approx(max(expected_ms, meanwhile_ms) / 1000, abs=1e-5)


def test_a_sleep_that_ends_late_is_followed_by_shorter_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, wait = Clock(), simulated._Wait()
    clock.late_ms = 0.5
    monkeypatch.setattr(simulated, "time", clock.as_module())
    ends_s = [clock.now_s + second for second in (1, 2, 3)]
    reached_s = []
    for end_s in ends_s:
        wait.until(end_s)
        reached_s.append(clock.now_s)
    late_s = [reached - end for reached, end in zip(reached_s, ends_s, strict=True)]
    assert late_s == pytest.approx([0.0005, 0, 0], abs=1e-5)


def test_what_breaks_the_contract_is_refused_without_taking_any_time(tmp_path: Path) -> None:
    table = write(tmp_path / "table.json", with_unet({"1": 60_000.0}))
    inputs = engine_specs(TINY)["unet"].dummy_inputs(2)
    with pytest.raises(ContractError, match="timestep is float64"):
        engine("unet", table).run(inputs | {"timestep": np.zeros(2)})


def test_pictures_cost_what_pictures_cost_to_encode(table: Path) -> None:
    (pixels, *_) = engine("vae_decoder", table, DEMO_128).run(engine_specs(DEMO_128)["vae_decoder"].dummy_inputs(1))[
        "portrait_pixels"
    ]
    assert 10_000 < len(encode_picture(pixels, "png")) < pixels.nbytes


def slots(table: Path) -> Slots:
    manifest = write_manifest(table.parent / "model", DEMO_128, "fp16")
    policy = ServingPolicy(runtime="simulated", latency_table=str(table), slots=12)
    return load_slots(table.parent / "repository" / "denoise" / "1", manifest, policy)


def test_slots_step_without_copying_any_f_ref(table: Path) -> None:
    rows, specs = slots(table), engine_specs(DEMO_128, "fp16")
    assert (rows.rows, rows.max_jobs, rows.version) == (12, 8, "simulated-test device")
    job = specs["warping_network"].dummy_inputs(1)
    confidence = warp(rows, [job, job], [[0, 1], [2]])
    assert confidence.shape == (2,) and confidence.dtype == np.float32
    rows.clear([3])
    rows.move(2, 0)
    step = specs["unet"].dummy_inputs(3)
    noise_pred = run_step(rows, step["canvas_latent"], step["timestep"])
    assert noise_pred.shape == step["canvas_latent"].shape and np.isfinite(noise_pred).all()
    f_ref = vars(rows)["_f_ref"]
    assert f_ref and all(set(array.strides) == {0} for array in f_ref.values())
    with pytest.raises(ContractError, match="visibility"):
        warp(rows, [job | {"visibility": job["visibility"][:, :, 1:]}], [[0]])
