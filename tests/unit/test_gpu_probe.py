"""``python -m benchmarks gpu-probe``: without a GPU, and on the stand-ins for CUDA and TensorRT."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.__main__ import main
from benchmarks.gpu import copies, share
from benchmarks.gpu.settings import PROBES, GpuProbeSettings
from benchmarks.loop import LEAST_STEPS
from icportrait.contract import ENGINES, Array, ModelSpec, engine_specs
from icportrait.runtime.device_engine import BUCKETS, buckets_up_to
from icportrait.runtime.latency_table import LatencyTable
from icportrait.runtime.tensorrt.products import FLAVOURS, Flavour
from tests.fake_plans import write_fake_plans
from tests.host_cuda import HostCuda
from tests.host_tensorrt import Engine, tensorrt_module
from tests.tiny import TINY
from tests.trivial_engines import write_trivial_export

SPECS = engine_specs(TINY)


def answered(spec: ModelSpec) -> dict[str, Array]:
    return {tensor.name: np.zeros((), tensor.dtype.numpy) for tensor in spec.outputs}


@pytest.fixture
def engines(cuda: HostCuda, monkeypatch: pytest.MonkeyPatch) -> dict[str, Engine]:
    """Return the stand-ins for plans that were loaded, by the engine's name."""
    made: dict[str, Engine] = {}

    def deserialize(content: bytes) -> Engine:
        spec = SPECS[content.decode().split(".")[0]]
        made[spec.name] = Engine(spec, lambda inputs: answered(spec), cuda)
        return made[spec.name]

    product = Flavour("tensorrt", "tensorrt_stand_in", "tensorrt==0", compiles_without_gpu=False)
    monkeypatch.setitem(FLAVOURS, "tensorrt", product)
    monkeypatch.setitem(sys.modules, product.module, tensorrt_module("tensorrt", deserialize))
    return made


@pytest.fixture
def probe(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., dict[str, Any]]:
    """Run a probe on plans of the smallest geometry, and return its JSON."""
    export = write_trivial_export(tmp_path / "export", TINY)
    write_fake_plans(tmp_path / "plans", export, "tensorrt")

    def run(*words: str) -> dict[str, Any]:
        given = ["--export", str(tmp_path / "export"), "--runtime", "tensorrt", "--plans", str(tmp_path / "plans")]
        assert main(["gpu-probe", *words, *given, "--json"]) == 0
        return json.loads(capsys.readouterr().out)

    return run


@pytest.mark.parametrize("name", PROBES)
def test_without_a_gpu_a_probe_says_so_in_one_line(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["gpu-probe", name]) == 1
    said = capsys.readouterr()
    assert said.out == "" and said.err.startswith("error: no NVIDIA GPU was found (") and said.err.count("\n") == 1


def test_a_torch_without_cuda_is_named(cuda: HostCuda, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_trivial_export(tmp_path, TINY)
    for name in ("capture", "steps", "loop", "share"):
        assert main(["gpu-probe", name, "--export", str(tmp_path)]) == 1
        said = capsys.readouterr().err
        assert "has no CUDA here; install a build of torch for CUDA" in said and said.count("\n") == 1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--runtime", "tensorrt-rtx"], "plans: None, expected the folder of the plans"),
        (["--plans", "plans"], "plans: plans, expected none with torch"),
        (["--seconds", "0"], "seconds: 0, expected a number above 0, up to 60"),
    ],
)
def test_settings_that_make_no_sense_are_refused(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main(["gpu-probe", "steps", *words])
    assert message in capsys.readouterr().err


def test_facts_are_the_drivers_and_the_packages(probe: Callable[..., dict[str, Any]], cuda: HostCuda) -> None:
    cuda.attributes = {"cudaDevAttrComputeMode": 3, "cudaDevAttrMpsEnabled": 1, "cudaDevAttrMultiProcessorCount": 66}
    cuda.has_batches = False
    found = probe("facts")
    where = found["conditions"]
    assert (where["gpu"], where["compute_capability"], where["driver_cuda_version"]) == ("NVIDIA Test", "8.9", "13.0")
    assert (where["compute_mode"], where["mps"]) == ("exclusive process", True)
    assert found["multiprocessors"] == 66 and found["batched_copies"] is False
    assert found["torch"]["sees_gpu"] is False and found["packages"]["cuda-bindings"]
    assert found["make_serve"]["runtime"] == "tensorrt-rtx"  # has kernels for 8.9


def test_copies_are_of_a_steps_and_a_joins_bytes(
    probe: Callable[..., dict[str, Any]], cuda: HostCuda, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(copies, "BLOCK_BYTES", 2**20)
    found = {each["copy"]: each for each in probe("copies")["copies"]}
    latent = next(spec for spec in SPECS["unet"].inputs if spec.name == "canvas_latent")
    assert found["a step's upload, pinned"]["bytes"] == found["a step's upload, pageable"]["bytes"] == latent.nbytes(16)
    f_ref = 8 * sum(spec.nbytes(1) for spec in SPECS["unet"].inputs if spec.name.startswith("f_ref_"))
    joins = [each for name, each in found.items() if name.startswith("F_ref of 8 rows")]
    assert [each["bytes"] for each in joins] == [f_ref, f_ref]
    assert all(each["gpu_us"] > 0 and each["host_us"] > 0 and each["gb_per_s"] > 0 for each in found.values())
    assert found["1 MB upload, pageable"]["bytes"] == 2**20
    assert cuda.calls.count("cudaMemcpyBatchAsync") > 20


def test_a_batch_that_differs_or_is_not_recorded_is_told(
    probe: Callable[..., dict[str, Any]], engines: dict[str, Engine], cuda: HostCuda
) -> None:
    found = probe("capture")["batches"]
    assert [each["rows"] for each in found if each["engine"] == "unet"] == list(BUCKETS)
    assert {(each["differing_bytes"], each["unrecorded_because"]) for each in found} == {(0, None)}
    assert all(each["graph_ms"] > 0 and each["directly_host_us"] > 0 for each in found)
    cuda.can_capture = False
    found = probe("capture")["batches"]
    assert all("cudaErrorStreamCaptureUnsupported" in each["unrecorded_because"] for each in found)


def test_steps_make_a_latency_table(
    probe: Callable[..., dict[str, Any]], engines: dict[str, Engine], tmp_path: Path
) -> None:
    probe("steps", "--out", str(tmp_path / "table.json"))
    table = LatencyTable.read(tmp_path / "table.json")
    assert table.device == "NVIDIA Test"
    for name in ENGINES:
        assert tuple(table.latency_ms[name]) == buckets_up_to(SPECS[name].batch.max)
    graphs = sum(len(sizes) for sizes in table.latency_ms.values())
    assert "tensorrt-11.4.0.106" in json.loads((tmp_path / "table.json").read_text())["conditions"] and graphs > 20


def test_the_loop_runs_on_the_gpus_slots(probe: Callable[..., dict[str, Any]], engines: dict[str, Engine]) -> None:
    found = probe("loop", "--seconds", "0.2")
    assert [each["guidance_scale"] for each in found["loops"]] == [1.0, 3.0]
    # How full the rows are is chance: these engines are faster than the thread that submits requests.
    assert all(each["steps"] >= LEAST_STEPS and 0 < each["occupancy"] <= 16 for each in found["loops"])
    assert found["slots"] == 16 and set(found["step_ms_alone"]) == {str(rows) for rows in range(1, 17)}
    assert "simulated" not in found


def test_steps_beside_a_decoder_are_compared_with_steps_alone(
    probe: Callable[..., dict[str, Any]], engines: dict[str, Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    steps, begun = iter([1.0, 1.5, 1.9, 2.0, 2.1, 3.0, 4.0]), []

    @contextmanager
    def neighbour(settings: GpuProbeSettings, batch: int) -> Iterator[None]:
        begun.append((settings.runtime, batch))
        yield

    monkeypatch.setattr(share, "decoding", neighbour)
    monkeypatch.setattr(share, "_steps", lambda *_: {"steps": 9, "median_ms": 1.0, "p99_ms": next(steps)})
    found = probe("share")
    assert begun == [("tensorrt", batch) for batch in buckets_up_to(SPECS["vae_decoder"].batch.max)]
    assert [each["p99_of_median_alone"] for each in found["beside"]] == [1.5, 1.9, 2.0, 2.1, 3.0, 4.0][: len(begun)]
    assert found["largest_fine_batch"] == begun[2][1]


def test_the_steps_of_share_are_the_slots(
    probe: Callable[..., dict[str, Any]], engines: dict[str, Engine], monkeypatch: pytest.MonkeyPatch, cuda: HostCuda
) -> None:
    monkeypatch.setattr(share, "buckets_up_to", lambda _: ())
    cuda.calls.clear()
    found = probe("share", "--seconds", "0.01")
    assert found["alone"]["steps"] >= share.LEAST_STEPS and 0 < found["alone"]["median_ms"] <= found["alone"]["p99_ms"]
    assert cuda.calls.count("cudaGraphLaunch") >= found["alone"]["steps"]


class Turns:
    """An event that is set after so many questions."""

    def __init__(self, turns: int) -> None:
        self.left = turns

    def is_set(self) -> bool:
        self.left -= 1
        return self.left < 0

    def set(self) -> None:
        self.left = 0


def test_the_neighbour_decodes_until_it_is_told_to_stop(
    probe: Callable[..., dict[str, Any]], engines: dict[str, Engine], cuda: HostCuda, tmp_path: Path
) -> None:
    settings = GpuProbeSettings("share", tmp_path / "export", "tensorrt", tmp_path / "plans")
    ready, warm = Turns(99), len(buckets_up_to(SPECS["vae_decoder"].batch.max))
    share.decode(settings, 4, ready, Turns(5))
    assert ready.left == 0
    assert [name for name, _ in cuda.log].count("execute") == warm + 5


def test_a_neighbour_that_ends_is_an_error(tmp_path: Path) -> None:
    """Start the process itself, which finds no export."""
    settings = replace(GpuProbeSettings("share"), export=tmp_path)
    with pytest.raises(Exception, match="the process that decodes 2 at once didn't start"), share.decoding(settings, 2):
        pass
