"""Rows of F_ref: in the host's memory, and in an engine's own buffers on a stand-in for the GPU, by either executor."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator, Mapping
from itertools import groupby
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest.mock import Mock, patch

import numpy as np
import pytest
import torch

from engines.build_config import BuildConfig
from icportrait.contract import Array, ModelSpec, engine_specs
from icportrait.errors import ContractError
from icportrait.runtime.cuda import DeviceArray, Gpu, Stream
from icportrait.runtime.device_engine import DeviceEngine, buckets_up_to
from icportrait.runtime.device_slots import DeviceSlots
from icportrait.runtime.slots import HostSlots
from icportrait.runtime.tensorrt.engine import TensorRtExecutor, share_scratch
from icportrait.runtime.torch_device import TorchExecutor
from tests.fake_plans import write_fake_plan
from tests.host_cuda import HostCuda, view
from tests.host_tensorrt import Engine as HostTensorRt
from tests.host_tensorrt import tensorrt_module
from tests.host_torch import HostTorch
from tests.rows import step
from tests.rows import warp as run_warping
from tests.tiny import TINY
from tests.trivial_engines import write_trivial_export

SPECS = engine_specs(TINY)
WARPING, UNET = SPECS["warping_network"], SPECS["unet"]
GPU = Gpu("NVIDIA Test", "8.9", 8 * 10**9, 8 * 10**9, "13.0")
F_REF = [spec.name for spec in WARPING.outputs if spec.name.startswith("f_ref_")]
Function = Callable[[Mapping[str, Array]], dict[str, Array]]


def warp(inputs: Mapping[str, Array]) -> dict[str, Array]:
    """Return outputs of which each tells the row's inputs, and its own name, from all others."""
    mark = inputs["profile_latent"][:, 0, 0, 0] + 10 * inputs["reference_latent"][:, 0, 0, 0]
    outputs = {}
    for index, spec in enumerate(WARPING.outputs):
        values = (mark + index).reshape(-1, *[1] * (len(spec.axes) - 1))
        with np.errstate(invalid="ignore"):
            outputs[spec.name] = np.broadcast_to(values, spec.shape(batch=len(mark))).astype(spec.dtype.numpy)
    return outputs


def denoise(inputs: Mapping[str, Array]) -> dict[str, Array]:
    f_ref = sum(inputs[name].mean(axis=(1, 2, 3)) * 3**index for index, name in enumerate(F_REF))
    return {"noise_pred": (inputs["canvas_latent"] + (inputs["timestep"] + f_ref)[:, None, None, None])}


class HostEngine:
    """A function of a batch behind the ``Engine`` protocol."""

    version = "fake"

    def __init__(self, spec: ModelSpec, function: Function) -> None:
        self.spec, self._function = spec, function

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        self.spec.check_inputs(inputs)
        return self._function(inputs)


class Warp(torch.nn.Module):
    """``warp`` by torch."""

    def forward(self, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        given = {spec.name: tensor for spec, tensor in zip(WARPING.inputs, inputs, strict=True)}
        mark = given["profile_latent"][:, 0, 0, 0] + 10 * given["reference_latent"][:, 0, 0, 0]
        outputs = []
        for index, spec in enumerate(WARPING.outputs):
            values = (mark + index).reshape(-1, *[1] * (len(spec.axes) - 1))
            outputs.append(values.expand(spec.shape(batch=len(mark))).to(getattr(torch, spec.dtype.numpy)))
        return tuple(outputs)


class Denoise(torch.nn.Module):
    """``denoise`` by torch."""

    def forward(self, *inputs: torch.Tensor) -> torch.Tensor:
        given = {spec.name: tensor for spec, tensor in zip(UNET.inputs, inputs, strict=True)}
        f_ref = sum(given[name].mean(dim=(1, 2, 3)) * 3**index for index, name in enumerate(F_REF))
        return given["canvas_latent"] + (given["timestep"] + f_ref)[:, None, None, None]


def host(array: DeviceArray) -> np.ndarray:
    return view(array.pointer, array.shape, array.dtype)


@pytest.fixture(autouse=True)
def torch_gpu(cuda: HostCuda, monkeypatch: pytest.MonkeyPatch) -> Iterator[HostTorch]:
    gpu = HostTorch(cuda)
    gpu.install(monkeypatch)
    with gpu:
        yield gpu


class OnDevice:
    """Slots on the stand-in for the GPU, with either executor behind them."""

    def __init__(self, cuda: HostCuda, executor: str, rows: int = 16, pinned: bool = False) -> None:
        self.cuda, self.executor, self.stream = cuda, executor, Stream()
        self.enqueued: list[tuple[str, int]] = []
        self.warping, self.unet = (self._engine(*model, pinned) for model in ((WARPING, warp), (UNET, denoise)))
        self.slots = DeviceSlots(self.warping, self.unet, rows)
        cuda.log.clear()
        cuda.calls.clear()

    def _engine(self, spec: ModelSpec, function: Function, pinned: bool) -> DeviceEngine:
        executor: Any = (self._tensorrt if self.executor == "tensorrt" else self._torch)(
            spec, function, spec.batch.max if pinned else None
        )
        name = "enqueue" if self.executor == "tensorrt" else "compute"
        enqueue = getattr(executor, name)

        def counted(bucket: int) -> None:
            self.enqueued.append((spec.name, bucket))
            enqueue(bucket)

        setattr(executor, name, counted)
        engine = DeviceEngine(spec, executor, self.stream)
        engine.warm_up()
        return engine

    def _torch(self, spec: ModelSpec, function: Function, pinned: int | None) -> TorchExecutor:
        module = Warp() if function is warp else Denoise()
        executor = TorchExecutor(module, spec, self.stream)
        executor.buckets = (pinned,) if pinned else executor.buckets
        return executor

    def _tensorrt(self, spec: ModelSpec, function: Function, pinned: int | None) -> TensorRtExecutor:
        """Load a plan into the stand-in for TensorRT."""
        engine = HostTensorRt(spec, function, self.cuda)
        module = tensorrt_module("tensorrt", lambda content: engine)
        flavour = Mock(load=lambda: module, version=lambda: module.__version__)
        flavour.name = "tensorrt"
        with TemporaryDirectory() as folder, patch(f"{TensorRtExecutor.__module__}.find_gpu", lambda: GPU):
            plan, export = Path(folder) / f"{spec.name}.plan", write_trivial_export(Path(folder), TINY)
            write_fake_plan(plan, spec, next(iter(BuildConfig().plans(spec).values())), export, "tensorrt")
            executor = TensorRtExecutor(plan, spec, export.contract_hash, flavour, self.stream, pinned)
        share_scratch([executor])
        return executor

    def f_ref(self, row: int) -> list[float]:
        """Return one value of each residual in a row."""
        self.stream.synchronize()
        return [float(host(self.unet.inputs[name].rows(row, 1)).flat[-1]) for name in F_REF]


@pytest.fixture(params=["tensorrt", "torch"])
def executor(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def device(cuda: HostCuda, executor: str) -> OnDevice:
    return OnDevice(cuda, executor)


def job(profile: float, reference: float = 0.0) -> dict[str, Any]:
    values = {"profile_latent": profile, "reference_latent": reference, "visibility": 1.0}
    return {spec.name: np.full(spec.shape(batch=1), values[spec.name], np.float32) for spec in WARPING.inputs}


def f_ref_of(profile: float, reference: float = 0.0) -> list[float]:
    return [profile + 10 * reference + index for index in range(len(F_REF))]


def canvas(rows: int, seed: int = 0) -> tuple[Array, Array]:
    dummies = UNET.dummy_inputs(rows, seed)
    return dummies["canvas_latent"], dummies["timestep"]


def moved(cuda: HostCuda) -> dict[str, int]:
    """Count how many bytes went which way since the last time."""
    totals = {name: sum(nbytes for entry, nbytes in cuda.log if entry == name) for name, _ in cuda.log}
    cuda.log.clear()
    return totals


def in_turn(cuda: HostCuda) -> list[str]:
    """List what was done, of which torch does one in many."""
    return [name for name, _ in groupby(name for name, _ in cuda.log)]


@pytest.mark.parametrize("pinned", [False, True], ids=["buckets", "one bucket"])
def test_rows_on_the_device_hold_what_rows_on_the_host_hold(cuda: HostCuda, executor: str, pinned: bool) -> None:
    """Join, leave and compact at random, as an in-flight batcher does; a row in use is never another's."""
    device = OnDevice(cuda, executor, pinned=pinned)
    reference = HostSlots(HostEngine(WARPING, warp), HostEngine(UNET, denoise), 16)
    generator, used = np.random.default_rng(3), 0
    for turn in range(60):
        counts = generator.integers(1, 4, generator.integers(1, 6))
        if used + counts.sum() <= 16:
            jobs = [job(*generator.integers(0, 50, 2)) for _ in counts]
            ends = used + np.cumsum(counts)
            rows = [list(range(end - count, end)) for count, end in zip(counts, ends, strict=True)]
            found, expected = (run_warping(slots, jobs, rows) for slots in (device.slots, reference))
            assert np.array_equal(found, expected)
            used = int(ends[-1])
            if generator.random() < 0.5:
                for slots in (device.slots, reference):
                    slots.clear([used - 1])
        else:
            leaving = int(generator.integers(used))
            used -= 1
            if leaving != used:
                for slots in (device.slots, reference):
                    slots.move(used, leaving)
        found, expected = (step(slots, *canvas(used, turn)) for slots in (device.slots, reference))
        assert np.isfinite(found).all() and np.array_equal(found, expected)


@pytest.mark.parametrize("rows", [[[0], [1], [2]], [[2], [0]], [[0, 1], [2]]], ids=["padding", "order", "shared"])
def test_a_joining_job_writes_no_row_but_its_own(device: OnDevice, rows: list[list[int]]) -> None:
    run_warping(device.slots, [job(9.0)], [[3]])
    run_warping(device.slots, [job(float(index)) for index in range(len(rows))], rows)
    assert device.f_ref(3) == f_ref_of(9.0)
    for index, targets in enumerate(rows):
        assert all(device.f_ref(row) == f_ref_of(float(index)) for row in targets)


def test_portraits_of_one_request_share_one_conditioning(device: OnDevice, cuda: HostCuda) -> None:
    run_warping(device.slots, [job(7.0, 2.0)], [[1, 4, 6]])
    assert in_turn(cuda).count("execute") == 1
    assert moved(cuda)["copy"] == 3 * sum(spec.nbytes(1) for spec in WARPING.outputs if spec.name in F_REF)
    assert all(device.f_ref(row) == f_ref_of(7.0, 2.0) for row in (1, 4, 6))


def test_a_step_uploads_latents_and_timesteps_and_copies_nothing_else(device: OnDevice, cuda: HostCuda) -> None:
    run_warping(device.slots, [job(1.0), job(2.0)], [[0], [1]])
    moved(cuda)
    latent, timestep = canvas(2)
    step(device.slots, latent, timestep)
    assert moved(cuda) == {"upload": latent.nbytes + timestep.nbytes, "execute": 0, "download": latent.nbytes}


def test_engines_run_from_their_launch_on(device: OnDevice, cuda: HostCuda) -> None:
    device.slots.launch_warping([job(1.0)], [[0]])
    cuda.log.append(("meanwhile", 0))
    device.slots.wait_warping()
    device.slots.launch(*canvas(1))
    cuda.log.append(("meanwhile", 0))
    device.slots.wait()
    names = [name for name in in_turn(cuda) if name in ("execute", "meanwhile", "download")]
    assert names == 2 * ["execute", "download", "meanwhile"]


def test_what_breaks_the_contract_is_refused_before_anything_runs(device: OnDevice, cuda: HostCuda) -> None:
    wrong = job(1.0) | {"visibility": np.ones((1, 2, 16, 16), np.float32)}
    moved(cuda)
    for slots in (device.slots, HostSlots(HostEngine(WARPING, warp), HostEngine(UNET, denoise), 16)):
        with pytest.raises(ContractError, match="visibility"):
            run_warping(slots, [wrong], [[0]])
        with pytest.raises(ContractError, match="timestep is float64"):
            step(slots, canvas(1)[0], np.zeros(1))
    assert "execute" not in moved(cuda)


def test_rows_are_at_most_the_engines_largest_batch(cuda: HostCuda, executor: str) -> None:
    assert OnDevice(cuda, executor, 99).slots.rows == UNET.batch.max
    assert OnDevice(cuda, executor, 5).slots.rows == 5
    assert HostSlots(HostEngine(WARPING, warp), HostEngine(UNET, denoise), 99).rows == UNET.batch.max


def test_engines_on_two_streams_are_refused(cuda: HostCuda) -> None:
    with pytest.raises(ValueError, match="one stream"):
        DeviceSlots(OnDevice(cuda, "torch").warping, OnDevice(cuda, "torch").unet, 16)


# Calls and bytes, which are what a step costs beside its engine


@pytest.mark.parametrize("rows", [1, 16])
def test_a_step_makes_as_many_calls_whatever_its_rows(rows: int, device: OnDevice, cuda: HostCuda) -> None:
    gc.collect()  # or what other tests have left is given back meanwhile, by calls that count
    cuda.calls.clear()
    step(device.slots, *canvas(rows))
    assert sorted(cuda.calls) == sorted(
        ["cudaMemcpyAsync"] * 3 + ["cudaEventRecord"] * 2 + ["cudaGraphLaunch", "cudaStreamSynchronize"]
    )


@pytest.mark.parametrize("has_batches", [True, False], ids=["batched copies", "an older driver"])
def test_a_join_of_eight_guided_jobs_takes_a_few_calls(has_batches: bool, cuda: HostCuda, device: OnDevice) -> None:
    jobs = [job(float(index)) for index in range(1, 5)]
    cuda.has_batches = has_batches
    gc.collect()  # or what other tests have left is given back meanwhile, by calls that count
    for turn in range(2):  # a driver is asked for batches once
        cuda.calls.clear()
        for first in (0, 8):
            device.slots.launch_warping(jobs, [[first + 2 * index] for index in range(4)])
            device.slots.wait_warping()
            device.slots.clear([first + 2 * index + 1 for index in range(4)])
        assert len(cuda.calls) <= (24 if has_batches else 24 + 2 * 8 * len(F_REF) + (2 - 2 * turn))
    assert [device.f_ref(row) for row in (2, 10)] == [f_ref_of(2.0)] * 2
    assert device.f_ref(3) == [0.0] * len(F_REF)


def test_nothing_crosses_from_memory_that_is_not_pinned(device: OnDevice, cuda: HostCuda) -> None:
    cuda.pageable_bytes = 0
    run_warping(device.slots, [job(1.0), job(2.0)], [[0], [1]])
    step(device.slots, *canvas(2))
    assert cuda.pageable_bytes == 0


def test_an_engine_alone_moves_by_pinned_memory_and_gives_fresh_arrays(device: OnDevice, cuda: HostCuda) -> None:
    cuda.pageable_bytes = 0
    latent, timestep = canvas(2)
    given = {"canvas_latent": latent, "timestep": timestep}
    given |= {name: np.zeros((2, *device.unet.inputs[name].shape[1:]), np.float32) for name in F_REF}
    first = device.unet.run(given)["noise_pred"]
    kept = first.copy()
    device.unet.run(given | {"timestep": timestep + 100})
    assert np.array_equal(first, kept) and np.allclose(first, denoise(given)["noise_pred"])
    assert cuda.pageable_bytes == 0


def test_a_prediction_stays_until_the_next_wait(device: OnDevice) -> None:
    """Launch the next step before the last prediction has been read, as the loop does."""
    first = step(device.slots, *canvas(2, seed=1))
    kept = first.copy()
    device.slots.launch(*canvas(2, seed=2))
    device.stream.synchronize()
    assert np.array_equal(first, kept)
    assert not np.array_equal(device.slots.wait(), kept)


def test_what_a_launch_was_given_may_change_before_it_is_done(device: OnDevice) -> None:
    latent, timestep = canvas(2)
    expected = step(device.slots, latent, timestep).copy()
    device.slots.launch(latent, timestep)
    latent[...] = timestep[...] = 0
    assert np.array_equal(device.slots.wait(), expected)


def test_every_bucket_has_run_and_is_recorded_before_the_first_request(device: OnDevice) -> None:
    warm = list(device.enqueued)
    buckets = [(spec.name, bucket) for spec in (WARPING, UNET) for bucket in buckets_up_to(spec.batch.max)]
    assert sorted(warm) == sorted(2 * buckets)  # to run, and to record
    run_warping(device.slots, [job(1.0)], [[0]])
    for rows in range(1, 17):
        step(device.slots, *canvas(rows))
    assert device.enqueued == warm


def test_the_pace_begins_with_what_the_warm_up_measured(cuda: HostCuda, executor: str) -> None:
    device = OnDevice(cuda, executor, rows=5)
    assert list(device.slots.step_s) == [1, 2, 3, 4, 5]
    assert device.slots.step_s[5] > 0


def test_copies_are_no_time_of_the_engine(device: OnDevice, cuda: HostCuda) -> None:
    launch, seen = device.stream.upload, []
    device.stream.upload = lambda source, target: (
        cuda.put(device.stream.handle, "upload", lambda: time.sleep(0.02)),
        seen.append(target),
    )
    step(device.slots, *canvas(1))
    device.stream.upload = launch
    assert len(seen) == 2 and device.slots.engine_s < 0.02
