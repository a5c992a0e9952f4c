"""Torch's executor and its loading on the stand-in for a GPU: real modules, streams, recordings and what ends them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from icportrait.contract import ModelSpec, engine_specs
from icportrait.errors import RuntimeNotAvailable
from icportrait.manifest import Manifest
from icportrait.policy import ServingPolicy
from icportrait.runtime import load_engine, load_slots
from icportrait.runtime.cuda import CudaError, Stream
from icportrait.runtime.device_engine import DeviceEngine
from icportrait.runtime.device_slots import DeviceSlots
from icportrait.runtime.eager import TorchEngine
from icportrait.runtime.slots import HostSlots, Slots
from icportrait.runtime.torch_device import TorchExecutor
from tests.host_cuda import DEFAULT_STREAM, HostCuda
from tests.host_torch import HostTorch
from tests.rows import rows_that_differ, step, warp
from tests.tiny import SMALL
from tests.trivial_engines import write_trivial_export

TORCH = ServingPolicy(runtime="torch", slots=3)
ENCODER = engine_specs(SMALL)["vae_encoder"]
ADDS_IN_ANY_ORDER = {"index_add", "scatter_add", "scatter_reduce", "index_put", "cumsum", "bincount", "histc"}
"""Operators that give other bits on a GPU from run to run, by torch's list (``torch.use_deterministic_algorithms``)."""


@pytest.fixture
def gpu(cuda: HostCuda, monkeypatch: pytest.MonkeyPatch) -> Iterator[HostTorch]:
    emulated = HostTorch(cuda)
    emulated.install(monkeypatch)
    with emulated:
        yield emulated
    assert emulated.stream == DEFAULT_STREAM


@pytest.fixture(scope="module")
def export(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    return write_trivial_export(tmp_path_factory.mktemp("export"), SMALL)


def test_modules_on_the_gpus_slots_compute_what_they_compute_on_the_host(export: Manifest, gpu: HostTorch) -> None:
    on_host = HostSlots(*(TorchEngine.from_manifest(name, export, TORCH) for name in ("warping_network", "unet")), 3)
    specs = engine_specs(SMALL)
    given, canvas = specs["warping_network"].dummy_inputs(2), specs["unet"].dummy_inputs(3)
    jobs = [{name: array[index : index + 1] for name, array in given.items()} for index in range(2)]

    def steps(slots: Slots) -> list[np.ndarray]:
        warp(slots, jobs, [[0, 2], [1]])
        slots.clear([2])
        return [step(slots, canvas["canvas_latent"][:rows], canvas["timestep"][:rows]).copy() for rows in (3, 1)]

    expected = steps(on_host)  # before the weights, which a process has once, are moved
    on_gpu = load_slots(Path(), export, TORCH)
    assert isinstance(on_gpu, DeviceSlots)
    for pair in zip(steps(on_gpu), expected, strict=True):
        np.testing.assert_allclose(*pair, rtol=1e-3, atol=1e-4, equal_nan=False)
    graphs = sum(len(engine.buckets) for engine in (on_gpu._warping, on_gpu._unet))
    assert len(gpu.pools) == graphs and len(set(gpu.pools)) == 1  # the engines never run at once, and share memory
    assert not any(operator.removeprefix("aten::").rstrip("_") in ADDS_IN_ANY_ORDER for operator in gpu.operators)
    assert torch.backends.cudnn.deterministic and not torch.backends.cudnn.allow_tf32


def test_rows_are_computed_alone_if_deterministic(export: Manifest, gpu: HostTorch, cuda: HostCuda) -> None:
    for deterministic in (False, True):
        encoder = load_engine(
            "vae_encoder", Path(), export, ServingPolicy(runtime="torch", deterministic=deterministic)
        )
        work = []
        for rows in (1, 3):
            cuda.log.clear()
            encoder.run(encoder.spec.dummy_inputs(rows))
            work.append([name for name, _ in cuda.log].count("execute"))
        assert work[1] == work[0] * (3 if deterministic else 1)
    assert np.isfinite(encoder.run(ENCODER.dummy_inputs(3))["latent"]).all()
    assert rows_that_differ(encoder, (2, 3)) == []


def test_engines_that_do_not_fit_are_refused_before_they_are_moved(
    export: Manifest, gpu: HostTorch, cuda: HostCuda
) -> None:
    cuda.free_bytes = 1000
    with pytest.raises(RuntimeNotAvailable, match=r"unet: need .* NVIDIA Test has 0\.0 of 8\.0 GB free"):
        load_slots(Path(), export, TORCH)
    assert not gpu.operators


# Recordings that fail


class Doubled(torch.nn.Module):
    """Answers with twice a pixel, and may ask the GPU for a number meanwhile, which no recording bears."""

    def __init__(self, asking: tuple[int, ...] = ()) -> None:
        super().__init__()
        self.asking = asking

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        if len(pixels) in self.asking:
            pixels.sum().item()
        rows = pixels[:, 0, 0, 0].float() * 2
        return rows.reshape(-1, 1, 1, 1).expand(ENCODER.outputs[0].shape(batch=len(rows)))


def warm(spec: ModelSpec, module: torch.nn.Module) -> DeviceEngine:
    stream = Stream()
    engine = DeviceEngine(spec, TorchExecutor(module, spec, stream), stream)
    engine.warm_up()
    return engine


def answers_right(engine: DeviceEngine) -> bool:
    for rows in range(1, engine.spec.batch.max + 1):
        given = engine.spec.dummy_inputs(rows, rows)
        found = engine.run(given)["latent"]
        if not (found == 2.0 * given["pixels"][:, 0, 0, 0].reshape(-1, 1, 1, 1)).all():
            return False
    return True


def test_a_batch_that_cannot_be_recorded_runs_directly_and_the_others_from_their_graphs(
    gpu: HostTorch, cuda: HostCuda, caplog: pytest.LogCaptureFixture
) -> None:
    engine = warm(ENCODER, Doubled(asking=(2,)))
    (line,) = caplog.messages
    assert line == (
        "vae_encoder: batches of 2 rows run without a CUDA graph: CUDA error: cudaErrorStreamCaptureUnsupported, "
        "then CUDA error: cudaErrorStreamCaptureInvalidated"
    )
    assert gpu.stream == DEFAULT_STREAM  # and not the one that was captured
    cuda.calls.clear()
    assert answers_right(engine)
    assert cuda.calls.count("cudaGraphLaunch") == engine.spec.batch.max - 1


def test_a_stream_that_cannot_be_captured_is_said_once(
    gpu: HostTorch, cuda: HostCuda, caplog: pytest.LogCaptureFixture
) -> None:
    cuda.can_capture = False
    engine = warm(ENCODER, Doubled())
    (line,) = caplog.messages
    assert line.endswith("of 1, 2, 3 rows run without a CUDA graph: CUDA error: cudaErrorStreamCaptureUnsupported")
    assert gpu.stream == DEFAULT_STREAM
    assert answers_right(engine)


def test_waiting_in_a_recording_is_an_error_after_which_the_engine_is_right(gpu: HostTorch) -> None:
    engine = warm(ENCODER, Doubled())
    given = ENCODER.dummy_inputs(1)
    engine.run(given)
    with pytest.raises(CudaError, match="CaptureUnsupported"), engine.stream.capture():
        engine.run(given)
    assert answers_right(engine)


def test_the_weights_are_there_before_the_first_run(
    export: Manifest, gpu: HostTorch, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = []

    def refused(self: TorchExecutor, bucket: int) -> None:
        found.append(bool(self._outputs[0][:bucket].isfinite().all()))
        raise RuntimeError  # ``torch.cuda.graph`` would wait for the weights, too

    monkeypatch.setattr(TorchExecutor, "record", refused)
    assert load_engine("vae_encoder", Path(), export, TORCH).unrecorded[1] == "RuntimeError"
    assert found == [True] * 3
