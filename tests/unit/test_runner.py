"""The TensorRT runner on stand-ins for TensorRT and CUDA: its contexts, CUDA graphs and memory."""

from __future__ import annotations

import dataclasses
import gc
import hashlib
import logging
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import icportrait.runtime.tensorrt.engine
import icportrait.runtime.tensorrt.loading
from engines.build_config import LAYOUTS, BuildConfig
from icportrait.contract import Array, ModelSpec, engine_specs
from icportrait.errors import PlanError, RuntimeNotAvailable
from icportrait.manifest import Manifest
from icportrait.policy import ServingPolicy
from icportrait.runtime import load_engine, load_slots
from icportrait.runtime.cuda import CudaError, DeviceArray, DeviceMemory, Gpu, Stream
from icportrait.runtime.device_engine import BUCKETS, DeviceEngine
from icportrait.runtime.device_slots import DeviceSlots
from icportrait.runtime.tensorrt.engine import TensorRtExecutor
from icportrait.runtime.tensorrt.loading import load_plans
from icportrait.runtime.tensorrt.plans import PlanManifest, check_content
from icportrait.runtime.tensorrt.products import FLAVOURS, TENSORRT_RTX, Flavour
from tests.fake_plans import VERSIONS, write_fake_plans
from tests.host_cuda import HostCuda, view
from tests.host_tensorrt import CACHES, Context, Engine, tensorrt_module
from tests.tiny import TINY
from tests.trivial_engines import write_trivial_export

PRESET = dataclasses.replace(TINY, max_vae_batch=8, max_warping_batch=8, max_unet_batch=16)
SPECS = engine_specs(PRESET)
FULL = Flavour("tensorrt", "tensorrt_stand_in", "tensorrt==0", compiles_without_gpu=False)
WARPING = SPECS["warping_network"]


def computed(spec: ModelSpec, inputs: Mapping[str, Array]) -> dict[str, Array]:
    """Compute what the stand-in for an engine gives: an output's row is a number that all of the inputs' rows make."""
    rows = sum(
        (index + 1) * array.reshape(len(array), -1).sum(axis=1, dtype=np.float64)
        for index, array in enumerate(inputs.values())
    )
    outputs = {}
    for index, tensor in enumerate(spec.outputs):
        values = (np.asarray(rows) + index).reshape(-1, *[1] * (len(tensor.axes) - 1))
        outputs[tensor.name] = np.broadcast_to(values, tensor.shape(batch=len(values))).astype(tensor.dtype.numpy)
    return outputs


@pytest.fixture
def engines(cuda: HostCuda, monkeypatch: pytest.MonkeyPatch) -> dict[str, Engine]:
    """Return the stand-ins that were deserialised, by the plan's content, which is its name."""
    made: dict[str, Engine] = {}

    def deserialize(content: bytes) -> Engine:
        name = content.decode()
        spec = SPECS[name.split(".")[0]]
        made[name] = Engine(spec, lambda inputs: computed(spec, inputs), cuda)
        return made[name]

    for flavour in (FULL, TENSORRT_RTX):
        monkeypatch.setitem(sys.modules, flavour.module, tensorrt_module(flavour.name, deserialize))
    monkeypatch.setitem(FLAVOURS, "tensorrt", FULL)
    return made


@pytest.fixture
def cuda(cuda: HostCuda, monkeypatch: pytest.MonkeyPatch) -> HostCuda:
    for module in (icportrait.runtime.tensorrt.loading, icportrait.runtime.tensorrt.engine):
        monkeypatch.setattr(module, "find_gpu", lambda: Gpu("NVIDIA Test", "8.9", 8 * 10**9, cuda.free_bytes, "13.0"))
    return cuda


@pytest.fixture(scope="module")
def export(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    return write_trivial_export(tmp_path_factory.mktemp("export"), PRESET)


@pytest.fixture
def plans(tmp_path: Path, export: Manifest) -> Callable[..., Path]:
    def write(layout: str = "profiles", **options: Any) -> Path:
        options = {"buckets": (1, 2, 4, 8, 16)} | options
        write_fake_plans(tmp_path, export, "tensorrt", BuildConfig(layout=layout, **options))
        return tmp_path

    return write


def test_a_profile_per_bucket_gives_a_context_each(plans, export, engines, cuda) -> None:
    decoder = load_plans(["vae_decoder"], plans(), export, FULL)["vae_decoder"]
    assert decoder.buckets == (1, 2, 3, 4, 6, 8) and decoder.bucket(5) == 6
    contexts = engines["vae_decoder.plan"].contexts
    assert [context.profile for context in contexts] == [0, 1, 2, 2, 3, 3]
    assert [context.shapes["portrait_latent"][0] for context in contexts] == [1, 2, 3, 4, 6, 8]


def test_one_wide_profile_gives_a_context_per_bucket_on_the_same_profile(plans, export, engines, cuda) -> None:
    unet = load_plans(["unet"], plans("dynamic"), export, FULL)["unet"]
    assert unet.buckets == BUCKETS
    contexts = engines["unet.plan"].contexts
    assert {context.profile for context in contexts} == {0}
    assert [context.shapes["timestep"] for context in contexts] == [(bucket,) for bucket in BUCKETS]


def test_plans_of_one_bucket_each_are_one_engine(plans, export, engines, cuda) -> None:
    unet = load_plans(["unet"], plans("static", buckets=(2, 4)), export, FULL)["unet"]
    assert unet.buckets == (2, 4, 16)
    for batch in unet.buckets:
        (context,) = engines[f"unet.batch{batch}.plan"].contexts
        assert context.profile == 0 and context.shapes["timestep"] == (batch,)
        # One set of buffers for all of them.
        assert context.addresses["timestep"] == unet.inputs["timestep"].pointer


def test_engines_of_a_process_share_a_stream_and_scratch_memory(plans, export, engines, cuda) -> None:
    slots = load_slots(plans(), export, ServingPolicy(runtime="tensorrt", slots=12))
    assert isinstance(slots, DeviceSlots) and slots.rows == 12 and slots.max_jobs == PRESET.max_warping_batch
    assert slots.version == f"tensorrt-{VERSIONS['tensorrt']}"
    contexts = [context for name in ("unet", "warping_network") for context in engines[f"{name}.plan"].contexts]
    assert len({context.scratch for context in contexts}) == 1 and contexts[0].scratch[1] == 1000


# One bucket, for the deterministic mode


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("slots", "unet", "warping"), [(16, 16, 8), (9, 16, 8), (4, 4, 4), (3, 4, 4), (1, 1, 1)])
def test_deterministic_slots_run_one_bucket_that_holds_them_all(
    slots: int, unet: int, warping: int, layout: str, plans, export, engines, cuda
) -> None:
    policy = ServingPolicy(runtime="tensorrt", slots=slots, deterministic=True)
    assert load_slots(plans(layout), export, policy).rows == slots
    batches = {name: [next(iter(c.shapes.values()))[0] for c in engine.contexts] for name, engine in engines.items()}
    if layout == "dynamic":  # one profile, which has room for every bucket
        unet, warping = (min(bucket for bucket in BUCKETS if bucket >= min(slots, most)) for most in (16, 8))
    if layout == "static":  # and no plan is loaded but the bucket's
        assert batches == {f"unet.batch{unet}.plan": [unet], f"warping_network.batch{warping}.plan": [warping]}
    else:
        assert batches == {"unet.plan": [unet], "warping_network.plan": [warping]}


@pytest.mark.parametrize("deterministic", [True, False])
def test_a_row_has_the_same_bits_beside_any_number_of_others_if_deterministic(
    deterministic: bool, plans, export, engines, cuda, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Use an engine whose rows depend on how many are computed, as a GPU's kernels may."""
    exact = computed

    def rounded(spec: ModelSpec, inputs: Mapping[str, Array]) -> dict[str, Array]:
        return {name: array + len(array) for name, array in exact(spec, inputs).items()}

    monkeypatch.setitem(globals(), "computed", rounded)
    policy = ServingPolicy(runtime="tensorrt", deterministic=deterministic)
    encoder = load_engine("vae_encoder", plans(), export, policy)
    pixels = encoder.spec.dummy_inputs(8)["pixels"]
    alone = [encoder.run({"pixels": pixels[row : row + 1]})["latent"][0] for row in range(8)]
    kept = []
    for count in range(1, 9):
        together = encoder.run({"pixels": pixels[8 - count :]})["latent"]
        kept.append(np.array_equal(together, alone[8 - count :]))
    assert kept == ([True] * 8 if deterministic else [True] + [False] * 7)


def test_plans_without_a_bucket_for_all_slots_are_refused(plans, export, engines, cuda) -> None:
    directory = plans(buckets=(2,))
    manifest = PlanManifest.read(directory / "unet.plan")
    small = dataclasses.replace(manifest, profiles=manifest.profiles[:1])
    small.write(directory / "unet.plan")
    with pytest.raises(PlanError, match=r"unet\.plan: the largest bucket is 2, expected 3 or more; build it again"):
        load_slots(directory, export, ServingPolicy(runtime="tensorrt", slots=3, deterministic=True))
    assert not engines


def test_unused_rows_begin_as_zeros(plans, export, engines, cuda) -> None:
    unet = load_plans(["unet"], plans(), export, FULL)["unet"]
    filled = sum(nbytes for name, nbytes in cuda.log if name == "fill")
    assert filled == sum(array.nbytes for array in unet.inputs.values())


@pytest.mark.parametrize("flavour", [FULL, TENSORRT_RTX], ids=lambda flavour: flavour.name)
def test_only_tensorrt_rtx_is_asked_to_specialise_kernels_at_once(
    flavour: Flavour, tmp_path: Path, export, engines, cuda
) -> None:
    write_fake_plans(tmp_path, export, flavour.name)
    load_plans(["warping_network"], tmp_path, export, flavour)
    expected = {"allocation": "user managed"}
    if flavour is TENSORRT_RTX:
        expected["dynamic_shapes_kernel_specialization_strategy"] = "eager"
    contexts = engines["warping_network.plan"].contexts
    assert contexts and all(context.asked == expected for context in contexts)


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_f_ref_of_half_precision_lies_in_half_the_bytes(
    precision: str, tmp_path: Path, engines, cuda, monkeypatch: pytest.MonkeyPatch
) -> None:
    export = write_trivial_export(tmp_path / "export", PRESET, precision)
    write_fake_plans(tmp_path / "plans", export, "tensorrt")
    whole = SPECS["unet"].inputs[-1]
    monkeypatch.setitem(SPECS, "unet", engine_specs(PRESET, precision)["unet"])
    unet = load_plans(["unet"], tmp_path / "plans", export, FULL)["unet"]
    assert unet.inputs[whole.name].nbytes == whole.nbytes(16) // 2


# Running, and CUDA graphs


@pytest.fixture
def warping(plans, export, engines, cuda) -> DeviceEngine:
    """Load the warping network in buckets of 1, 2, 4 and 8."""
    loaded = load_plans(["warping_network"], plans(), export, FULL)["warping_network"]
    loaded.stream.synchronize()
    cuda.log.clear()
    return loaded


def jobs(batch: int, seed: int = 0) -> dict[str, Array]:
    """Make inputs with which all sums are exact."""
    generator = np.random.default_rng(seed)
    return {spec.name: generator.integers(-8, 9, spec.shape(batch=batch)).astype(np.float32) for spec in WARPING.inputs}


def same(found: Mapping[str, Array], expected: Mapping[str, Array]) -> bool:
    return found.keys() == expected.keys() and all(np.array_equal(found[name], expected[name]) for name in expected)


def rows_of(arrays: Mapping[str, DeviceArray], first: int, count: int) -> dict[str, Array]:
    rows = {name: array.rows(first, count) for name, array in arrays.items()}
    return {name: view(array.pointer, array.shape, array.dtype).copy() for name, array in rows.items()}


def untouched(arrays: Mapping[str, Array]) -> bool:
    """Tell whether arrays are as fresh memory and ``fill_outputs(0xFF)`` leave them."""
    return all((array.view(np.uint8) == 0xFF).all() for array in arrays.values())


def enqueued(engine: Engine) -> list[int]:
    """Count how often each bucket was put on the stream, to be done or recorded."""
    return [len(context.bound) for context in engine.contexts]


def test_a_run_pads_its_bucket_and_gives_the_asked_rows(warping: DeviceEngine, engines, cuda) -> None:
    given = jobs(3)
    warping.fill_outputs(0xFF)
    assert same(warping.run(given), computed(WARPING, given))
    moved = {way: sum(nbytes for name, nbytes in cuda.log if name == way) for way in ("upload", "download", "copy")}
    uploaded, downloaded = (sum(spec.nbytes(3) for spec in specs) for specs in (WARPING.inputs, WARPING.outputs))
    assert moved == {"upload": uploaded, "download": downloaded, "copy": 0}
    # All of the bucket is computed, the row that pads it from zeros, and nothing after it.
    zeros = {name: np.zeros_like(array[:1]) for name, array in given.items()}
    assert same(rows_of(warping.outputs, 3, 1), computed(WARPING, zeros))
    assert untouched(rows_of(warping.outputs, 4, 4))


def test_inputs_on_the_device_are_copied_there(warping: DeviceEngine, cuda) -> None:
    given = jobs(2)
    name, array = next(iter(given.items()))
    placed = DeviceMemory(array.nbytes).array(array.shape, array.dtype)
    warping.stream.upload(array, placed)
    cuda.log.clear()
    assert same(warping.run(given | {name: placed}), computed(WARPING, given))
    assert [nbytes for way, nbytes in cuda.log if way == "copy"] == [array.nbytes]


def test_every_bucket_is_recorded_as_it_is_loaded_and_then_only_replays(warping: DeviceEngine, engines, cuda) -> None:
    """Count runs: a warm-up runs a bucket directly, then records it; replays reach TensorRT no more."""
    assert len(cuda.graphs) == 4  # one per bucket, and what they were made of is gone
    for seed, batch in enumerate((4, 3, 4, 1, 8)):
        cuda.log.clear()
        given = jobs(batch, seed)
        assert same(warping.run(given), computed(WARPING, given))  # replays see what the buffers hold now
        assert [name for name, _ in cuda.log].count("execute") == 1
        assert enqueued(engines["warping_network.plan"]) == [2, 2, 2, 2]


def test_a_direct_run_replays_nothing(warping: DeviceEngine, engines, cuda) -> None:
    for count in (1, 2):
        given = jobs(2, count)
        assert same(warping.run(given, directly=True), computed(WARPING, given))
        assert enqueued(engines["warping_network.plan"]) == [2, 2 + count, 2, 2]


@pytest.mark.parametrize("cause", ["the stream can't be captured", "TensorRT says so"])
def test_a_bucket_that_cannot_be_recorded_runs_directly(
    cause: str, tmp_path: Path, export, engines, cuda, caplog, monkeypatch: pytest.MonkeyPatch
) -> None:
    cuda.can_capture = cause == "TensorRT says so"
    monkeypatch.setattr(Engine, "is_capturable", not cuda.can_capture)
    write_fake_plans(tmp_path, export, "tensorrt-rtx")
    warping = load_plans(["warping_network"], tmp_path, export, TENSORRT_RTX)["warping_network"]
    assert not cuda.graphs
    said = "says that it can't be captured" if cuda.can_capture else "operation not permitted when stream is capturing"
    (line,) = (line for line in caplog.messages if "CUDA graph" in line)
    assert line.startswith("warping_network: batches of 1, 2, 3, 4, 6, 8 rows run without") and said in line
    for batch in (3, 8, 1):
        given = jobs(batch)
        assert same(warping.run(given), computed(WARPING, given))


def test_a_lost_device_ends_the_loading(tmp_path: Path, export, engines, cuda) -> None:
    cuda.can_capture, cuda.sticky_error = False, lost_context()
    write_fake_plans(tmp_path, export, "tensorrt-rtx")
    with pytest.raises(CudaError):
        load_plans(["warping_network"], tmp_path, export, TENSORRT_RTX)


def test_memory_that_the_collector_finds_is_given_back_before_a_recording_or_after_it(
    plans, export, engines, cuda, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Leave a block in a cycle, and let the collector look at every allocation."""
    given_back: list[bool] = []
    execute = Context.execute_async_v3

    def allocating(self: Context, stream: int) -> bool:
        cycle: list[Any] = [DeviceMemory(8)] if not cuda.is_capturing else []
        cycle.append(cycle)
        del cycle
        list(map(list, range(0)))
        gc.collect(0) if gc.isenabled() else given_back.append(cuda.is_capturing)
        return execute(self, stream)

    monkeypatch.setattr(Context, "execute_async_v3", allocating)
    warping = load_plans(["warping_network"], plans(), export, FULL)["warping_network"]
    assert given_back == [True] * 4 and len(cuda.graphs) == len(warping.buckets)
    assert gc.isenabled()


def test_kernels_that_tensorrt_rtx_compiled_are_kept_for_the_next_start(tmp_path: Path, export, engines, cuda) -> None:
    write_fake_plans(tmp_path, export, "tensorrt-rtx")
    caches = {"warping_network": tmp_path / "kernels"}
    for expected in ((), (b"kernels",), (b"kernels",)):
        load_plans(["warping_network"], tmp_path, export, TENSORRT_RTX, caches=caches)
        assert CACHES[-1].read == list(expected) and caches["warping_network"].read_bytes() == b"kernels"
    caches["warping_network"].write_bytes(b"of another GPU")
    load_plans(["warping_network"], tmp_path, export, TENSORRT_RTX, caches=caches)
    assert caches["warping_network"].read_bytes() == b"kernels"


def test_a_plan_is_hashed_once_a_process(plans, export, engines, cuda, monkeypatch: pytest.MonkeyPatch) -> None:
    hashed: list[bytes] = []
    sha256 = hashlib.sha256

    def counted(content: bytes = b"") -> Any:
        hashed.append(content)
        return sha256(content)

    directory = plans()
    monkeypatch.setattr("icportrait.runtime.tensorrt.plans.hashlib.sha256", counted)
    load_plans(["warping_network", "unet"], directory, export, FULL)
    assert sorted(hashed) == [b"unet.plan", b"warping_network.plan"]
    for _ in range(3):  # and the gateway, which starts engines again
        check_content(directory / "unet.plan", PlanManifest.read(directory / "unet.plan"))
    assert len(hashed) == 3


# Memory


def test_what_all_engines_need_together_is_said_in_one_line_before_they_are_loaded(
    plans, export, engines, cuda, caplog
) -> None:
    with caplog.at_level(logging.INFO, "icportrait"):
        load_plans(["warping_network", "unet"], plans(), export, FULL)
    line = caplog.messages[0]
    assert "engines take" in line and "warping_network 0." in line and "unet 0." in line
    assert "scratch memory on top" in line and "NVIDIA Test has 8.0 of 8.0 GB free" in line


def test_engines_that_fit_alone_and_not_together_are_refused_before_one_is_loaded(plans, export, engines, cuda) -> None:
    buffers = {
        name: sum(tensor.nbytes(spec.batch.max) for tensor in (*spec.inputs, *spec.outputs))
        for name, spec in SPECS.items()
    }
    cuda.free_bytes = buffers["unet"] + 10000
    load_plans(["unet"], plans(), export, FULL)
    engines.clear()
    with pytest.raises(RuntimeNotAvailable) as refusal:
        load_plans(["warping_network", "unet"], plans(), export, FULL)
    assert "warping_network, unet: need 0." in str(refusal.value) and "NVIDIA Test has" in str(refusal.value)
    assert "\n" not in str(refusal.value) and not engines


def test_scratch_memory_that_the_builder_planned_is_looked_at_before_an_engine_is_loaded(
    plans, export, engines, cuda
) -> None:
    directory = plans()
    for name, scratch in (("warping_network", 9 * 10**9), ("unet", 3 * 10**9)):  # they share one block
        plan = directory / f"{name}.plan"
        dataclasses.replace(PlanManifest.read(plan), scratch_bytes=(1, scratch)).write(plan)
    with pytest.raises(RuntimeNotAvailable, match=r"scratch memory 9\.00\), and NVIDIA Test has 8\.0"):
        load_plans(["warping_network", "unet"], directory, export, FULL)
    assert not engines
    load_plans(["unet"], directory, export, FULL)


def test_scratch_memory_that_does_not_fit_is_refused(plans, export, engines, cuda, monkeypatch) -> None:
    monkeypatch.setattr(Engine, "device_memory_size_v2", 9 * 10**9)
    with pytest.raises(RuntimeNotAvailable, match=r"unet: need 9.0 GB of scratch memory, and NVIDIA Test has 8.0"):
        load_plans(["unet"], plans(), export, FULL)


# What is refused


def test_a_plan_for_another_gpu_never_reaches_tensorrt(plans, export, engines, cuda, monkeypatch) -> None:
    other = Gpu("NVIDIA Other", "9.0", 8 * 10**9, 8 * 10**9, "13.0")
    monkeypatch.setattr(icportrait.runtime.tensorrt.engine, "find_gpu", lambda: other)
    with pytest.raises(PlanError, match=r"compute capability 8\.9, and this one has 9\.0"):
        TensorRtExecutor(plans() / "unet.plan", SPECS["unet"], export.contract_hash, FULL, Stream())
    assert not engines


@pytest.mark.parametrize("runtime", ["tensorrt", "tensorrt-rtx"])
def test_without_a_gpu_nothing_native_is_touched(
    tmp_path: Path, export: Manifest, runtime: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cuda.bindings.runtime.cudaDriverGetVersion", lambda: (cuda_success(), 0))
    monkeypatch.setattr(Flavour, "load", lambda self: pytest.fail("TensorRT was loaded"))
    write_fake_plans(tmp_path, export, runtime)
    policy = ServingPolicy(runtime=runtime)
    for load in (lambda: load_engine("unet", tmp_path, export, policy), lambda: load_slots(tmp_path, export, policy)):
        with pytest.raises(RuntimeNotAvailable, match="no NVIDIA GPU was found"):
            load()


def test_a_plan_of_another_gpu_model_is_refused(plans, export, engines, cuda, monkeypatch) -> None:
    directory = plans()
    manifest = PlanManifest.read(directory / "unet.plan")
    dataclasses.replace(manifest, gpu_name="NVIDIA Test").write(directory / "unet.plan")
    load_plans(["unet"], directory, export, FULL)
    engines.clear()
    dataclasses.replace(manifest, gpu_name="NVIDIA Other").write(directory / "unet.plan")
    with pytest.raises(PlanError, match=r"was built on NVIDIA Other, and this is NVIDIA Test; .* build it again here"):
        load_plans(["unet"], directory, export, FULL)
    assert not engines


def cuda_success() -> Any:
    from cuda.bindings import runtime

    return runtime.cudaError_t.cudaSuccess


def lost_context() -> Any:
    from cuda.bindings import runtime

    return runtime.cudaError_t.cudaErrorIllegalAddress
