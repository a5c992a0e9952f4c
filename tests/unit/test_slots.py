"""Rows of F_ref: in the host's memory, and in an engine's own buffers on a stand-in for the GPU."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest

from icportrait.contract import Array, ModelSpec, engine_specs
from icportrait.errors import ContractError
from icportrait.runtime.cuda import DeviceArray, DeviceMemory, Stream
from icportrait.runtime.placement import join
from icportrait.runtime.slots import HostSlots
from icportrait.runtime.tensorrt.plans import BUCKETS
from icportrait.runtime.tensorrt.slots import DeviceSlots
from tests.host_cuda import HostCuda, view
from tests.rows import step
from tests.rows import warp as run_warping
from tests.tiny import TINY

SPECS = engine_specs(TINY)
WARPING, UNET = SPECS["warping_network"], SPECS["unet"]
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


class DeviceEngine:
    """The same with ``TensorRtEngine``'s buffers and buckets, all of a bucket's rows computed and written."""

    version = "fake"

    def __init__(
        self, spec: ModelSpec, function: Function, cuda: HostCuda, stream: Stream, buckets: tuple[int, ...] = BUCKETS
    ) -> None:
        self._buckets = buckets
        self.spec, self.stream, self._function, self._cuda = spec, stream, function, cuda
        self.inputs, self.outputs = (
            {
                tensor.name: DeviceMemory(tensor.nbytes(spec.batch.max)).array(
                    tensor.shape(batch=spec.batch.max), np.dtype(tensor.dtype.numpy)
                )
                for tensor in tensors
            }
            for tensors in (spec.inputs, spec.outputs)
        )
        self.bound: list[set[str]] = []

    def bucket(self, batch: int) -> int:
        return min(size for size in self._buckets if size >= batch)

    def execute(self, batch: int, outputs: Mapping[str, DeviceArray] | None = None) -> None:
        size = self.bucket(batch)
        targets = self.outputs | dict(outputs or {})
        assert all(array.shape[0] >= size for array in targets.values())
        assert all(array.pointer % 256 == 0 for array in targets.values())
        self.bound.append(set(outputs or {}))

        def compute() -> None:
            found = self._function({name: host(array.rows(0, size)) for name, array in self.inputs.items()})
            for name, array in targets.items():
                host(array.rows(0, size))[...] = found[name]

        self._cuda.put("execute", compute)


def host(array: DeviceArray) -> np.ndarray:
    return view(array.pointer, array.shape, array.dtype)


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> HostCuda:
    emulated = HostCuda()
    emulated.install(monkeypatch)
    return emulated


class OnDevice:
    def __init__(self, cuda: HostCuda, rows: int = 16, pinned: bool = False) -> None:
        self.stream = Stream()
        warping, unet = ((WARPING.batch.max,), (UNET.batch.max,)) if pinned else (BUCKETS, BUCKETS)
        self.warping = DeviceEngine(WARPING, warp, cuda, self.stream, warping)
        self.unet = DeviceEngine(UNET, denoise, cuda, self.stream, unet)
        engines: tuple[Any, Any] = (self.warping, self.unet)
        self.slots = DeviceSlots(*engines, rows)

    def f_ref(self, row: int) -> list[float]:
        """Return one value of each residual in a row."""
        self.stream.synchronize()
        return [float(host(self.unet.inputs[name].rows(row, 1)).flat[-1]) for name in F_REF]


@pytest.fixture
def device(cuda: HostCuda) -> OnDevice:
    return OnDevice(cuda)


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


@pytest.mark.parametrize("pinned", [False, True], ids=["buckets", "one bucket"])
def test_rows_on_the_device_hold_what_rows_on_the_host_hold(cuda: HostCuda, pinned: bool) -> None:
    """Join, leave and compact at random, as an in-flight batcher does; a row in use is never another's."""
    device = OnDevice(cuda, pinned=pinned)
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


def test_a_full_bucket_is_warped_straight_into_its_rows(device: OnDevice, cuda: HostCuda) -> None:
    run_warping(device.slots, [job(1.0)], [[0]])
    run_warping(device.slots, [job(2.0), job(3.0)], [[4], [5]])
    assert device.warping.bound == [set(F_REF), set(F_REF)]
    assert "copy" not in moved(cuda)
    assert [device.f_ref(row) for row in (0, 4, 5)] == [f_ref_of(value) for value in (1.0, 2.0, 3.0)]


@pytest.mark.parametrize("rows", [[[0], [1], [2]], [[2], [0]], [[0, 1], [2]]], ids=["padding", "order", "shared"])
def test_what_cannot_be_bound_writes_no_row_but_its_own(device: OnDevice, rows: list[list[int]]) -> None:
    run_warping(device.slots, [job(9.0)], [[3]])
    run_warping(device.slots, [job(float(index)) for index in range(len(rows))], rows)
    assert device.warping.bound[-1] == set()
    assert device.f_ref(3) == f_ref_of(9.0)
    for index, targets in enumerate(rows):
        assert all(device.f_ref(row) == f_ref_of(float(index)) for row in targets)


def test_portraits_of_one_request_share_one_conditioning(device: OnDevice, cuda: HostCuda) -> None:
    run_warping(device.slots, [job(7.0, 2.0)], [[1, 4, 6]])
    assert [name for name, _ in cuda.log].count("execute") == 1
    assert moved(cuda)["copy"] == 2 * sum(spec.nbytes(1) for spec in WARPING.outputs if spec.name in F_REF)
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
    names = [name for name, _ in cuda.log if name in ("execute", "meanwhile", "download", "synchronize")]
    assert names == 2 * ["execute", "meanwhile", "download"]


def test_a_latent_that_is_on_the_device_stays_there(device: OnDevice, cuda: HostCuda) -> None:
    placed = job(5.0, 1.0)
    placed["profile_latent"] = join([placed["profile_latent"]], device.stream)
    moved(cuda)
    run_warping(device.slots, [placed], [[0]])
    totals = moved(cuda)
    assert totals["copy"] == placed["profile_latent"].nbytes
    assert totals["upload"] == placed["reference_latent"].nbytes + placed["visibility"].nbytes
    assert device.f_ref(0) == f_ref_of(5.0, 1.0)
    assert np.array_equal(device.slots.to_host(placed["profile_latent"]), job(5.0)["profile_latent"])


def test_rows_that_tensorrt_could_not_write_to_are_copied(device: OnDevice, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let no row begin where TensorRT wants an output to begin."""
    monkeypatch.setattr("icportrait.runtime.tensorrt.slots.ALIGNMENT_BYTES", 1 << 30)
    run_warping(device.slots, [job(1.0)], [[1]])
    assert device.warping.bound == [set()]
    assert device.f_ref(1) == f_ref_of(1.0)


def test_what_breaks_the_contract_is_refused_before_anything_runs(device: OnDevice, cuda: HostCuda) -> None:
    wrong = job(1.0) | {"visibility": np.ones((1, 2, 16, 16), np.float32)}
    moved(cuda)
    for slots in (device.slots, HostSlots(HostEngine(WARPING, warp), HostEngine(UNET, denoise), 16)):
        with pytest.raises(ContractError, match="visibility"):
            run_warping(slots, [wrong], [[0]])
        with pytest.raises(ContractError, match="timestep is float64"):
            step(slots, canvas(1)[0], np.zeros(1))
    assert "execute" not in moved(cuda)


def test_rows_are_at_most_the_engines_largest_batch(cuda: HostCuda) -> None:
    assert OnDevice(cuda, 99).slots.rows == UNET.batch.max
    assert OnDevice(cuda, 5).slots.rows == 5
    assert HostSlots(HostEngine(WARPING, warp), HostEngine(UNET, denoise), 99).rows == UNET.batch.max


def test_engines_on_two_streams_are_refused(cuda: HostCuda) -> None:
    engines: tuple[Any, Any] = (
        DeviceEngine(WARPING, warp, cuda, Stream()),
        DeviceEngine(UNET, denoise, cuda, Stream()),
    )
    with pytest.raises(ValueError, match="one stream"):
        DeviceSlots(*engines, 16)
