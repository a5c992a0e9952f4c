"""F_ref in the UNet engine's own buffers on a real GPU: rows that stay equal rows handed over at every step."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engines.build_config import LAYOUTS, BuildConfig
from engines.building import build_engine
from icportrait.contract import engine_specs
from icportrait.manifest import Manifest
from icportrait.policy import ServingPolicy
from icportrait.runtime.cuda import Stream, find_gpu
from icportrait.runtime.device_engine import DeviceEngine
from icportrait.runtime.device_slots import DeviceSlots
from icportrait.runtime.placement import private_copy
from icportrait.runtime.slots import HostSlots, Slots
from icportrait.runtime.tensorrt.loading import load_plans
from icportrait.runtime.tensorrt.products import FLAVOURS
from tests.rows import step, warp

pytestmark = pytest.mark.timeout(1800)
ENGINES = ("warping_network", "unet")


def rows_of_a_batch(slots: Slots, manifest: Manifest) -> list[np.ndarray]:
    """Let jobs join, share, be guided and leave, and return the UNet's answer after each."""
    specs = engine_specs(manifest.preset, manifest.precision)
    given, canvas = specs["warping_network"].dummy_inputs(2), specs["unet"].dummy_inputs(4)
    jobs = [{name: array[index : index + 1] for name, array in given.items()} for index in range(2)]

    def predict(rows: int) -> np.ndarray:
        return step(slots, canvas["canvas_latent"][:rows], canvas["timestep"][:rows])

    found = [warp(slots, jobs[:1], [[0]]), predict(1)]
    found += [warp(slots, jobs, [[0], [1]]), predict(2)]
    found += [warp(slots, jobs[::-1], [[1, 2], [3]]), predict(4)]
    slots.clear([2])
    found.append(predict(4))
    slots.move(3, 0)
    return [*found, predict(3)]


def compare(product: str, export: Path, out: Path, layout: str) -> list[int]:
    """Count the bytes, after each step, that differ between rows handed over to the same engines and rows that stay."""
    flavour, manifest = FLAVOURS[product], Manifest.read(export)
    config = BuildConfig(layout=layout, compute_capabilities=(find_gpu().compute_capability,))
    for name in ENGINES:
        build_engine(flavour, export, manifest, engine_specs(manifest.preset, manifest.precision)[name], config, out)
    return differing(load_plans(ENGINES, out, manifest, flavour), manifest)


def differing(engines: dict[str, DeviceEngine], manifest: Manifest) -> list[int]:
    pair: tuple[Any, Any] = engines["warping_network"], engines["unet"]
    expected = rows_of_a_batch(HostSlots(*pair, rows=4), manifest)
    found = rows_of_a_batch(DeviceSlots(*pair, rows=4), manifest)
    assert all(np.isfinite(array).all() for array in found)
    return [int(np.count_nonzero(a.view(np.uint8) != b.view(np.uint8))) for a, b in zip(found, expected, strict=True)]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("product", FLAVOURS)
def test_rows_that_stay_equal_rows_that_are_handed_over(
    on_product: Callable[..., list[int]], product: str, layout: str
) -> None:
    assert set(on_product(product, compare, layout)) == {0}


@pytest.mark.usefixtures("torch_on_gpu")
def test_rows_of_torch_that_stay_equal_rows_that_are_handed_over(request: pytest.FixtureRequest) -> None:
    from icportrait.runtime.torch_device import load_modules

    manifest = Manifest.read(request.getfixturevalue("small_fp16_export"))
    assert set(differing(load_modules(ENGINES, manifest, ServingPolicy(runtime="torch")), manifest)) == {0}


def test_a_tensor_of_another_library_is_copied_on_the_gpu(torch_on_gpu: Any) -> None:
    torch = torch_on_gpu
    stream, tensor = Stream(), torch.arange(24, dtype=torch.float32, device="cuda").reshape(2, 3, 4)
    copied = private_copy(tensor, stream)
    tensor.zero_()
    torch.cuda.synchronize()
    found = stream.download(copied)
    stream.synchronize()
    assert found.tolist() == np.arange(24, dtype=np.float32).reshape(2, 3, 4).tolist()
