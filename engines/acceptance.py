"""GPU acceptance: each installed product builds the engines of an export, and every engine is checked and timed.

Each product works in a process of its own: two TensorRTs don't share one, and a crash ends one report's part only.
"""

from __future__ import annotations

import copy
import multiprocessing
import secrets
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from engines.build_config import BuildConfig
from engines.building import build_engine
from engines.checks import Check, check_engine
from engines.gpu_target import no_kernels
from engines.ladder import REPEATS, WARM_UP, Rung, climb
from export.verification import TOLERANCES, WEIGHT_TYPES, cast, torch_outputs
from icportrait.contract import ENGINES, engine_specs
from icportrait.errors import IcPortraitError, RuntimeNotAvailable
from icportrait.manifest import Manifest
from icportrait.runtime.cuda import Stream, find_gpu
from icportrait.runtime.device_engine import DeviceEngine
from icportrait.runtime.eager import source_modules
from icportrait.runtime.tensorrt.engine import TensorRtExecutor, share_scratch
from icportrait.runtime.tensorrt.products import FLAVOURS, Flavour

TORCH = "torch"
"""The product that needs no plans."""
RUNG_NAMES = {TORCH: "torch modules"} | dict.fromkeys(FLAVOURS, "TensorRT")
TIMED = "unet"
"""The engine that runs once per denoising step: the ladder's."""


@dataclass
class Acceptance:
    """The findings about one product."""

    product: str
    conditions: dict[str, str | int] = field(default_factory=dict)
    """Conditions under which all of it was found and measured."""
    checks: list[Check] = field(default_factory=list)
    ladder: list[Rung] = field(default_factory=list)

    @property
    def passed(self) -> bool:
        return bool(self.checks) and all(check.passed for check in self.checks)


def installed_products(asked: str | None) -> list[Flavour]:
    """Return the product that is asked for, else all that are installed. None is imported.

    Raises:
        RuntimeNotAvailable: it isn't installed, or none is.
    """
    wanted = [FLAVOURS[asked]] if asked else list(FLAVOURS.values())
    if found := [flavour for flavour in wanted if find_spec(flavour.module)]:
        return found
    packages = " or ".join(flavour.package for flavour in wanted)
    raise RuntimeNotAvailable(
        f"{' and '.join(flavour.name for flavour in wanted)}: not installed; install it with: pip install {packages}"
    )


def products_for(asked: str | None, capability: str, torch_has_gpu: bool) -> list[str]:
    """Return the products to accept on a GPU: the one that is asked for, else all that can run there, torch last.

    Raises:
        RuntimeNotAvailable: it can't run there, or none can.
    """
    found, reasons = [], []
    if asked != TORCH:
        try:
            for flavour in installed_products(asked):
                if flavour.supports(capability):
                    found.append(flavour.name)
                else:
                    reasons.append(no_kernels(flavour, capability))
        except RuntimeNotAvailable as error:
            reasons.append(str(error))
    if asked in (None, TORCH):
        if torch_has_gpu:
            found.append(TORCH)
        else:
            reasons.append(f"torch {torch.__version__} has no CUDA here")
    for reason in reasons if found else ():
        print(f"left out: {reason}", flush=True)
    if not found:
        raise RuntimeNotAvailable("; ".join(reasons))
    return found


def accept(products: list[str], onnx: Path, out: Path) -> list[Acceptance]:
    """Check and time every product's engines.

    Args:
        products: names of ones that run here.
        onnx: directory of an export.
        out: directory for the plans, in ``plans/<product>``.

    Returns:
        One for each product, also where its process ended before it was done.
    """
    found = []
    for product in products:
        seed = secrets.randbits(31)
        print(f"{product}, random inputs of seed {seed}", flush=True)
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(max_workers=1, mp_context=context) as process:
            try:
                found.append(process.submit(_accept_product, product, onnx, out, seed).result())
            except Exception as error:  # whatever ended it is the report's to say
                failed = Check("all", None, "run", error=" ".join(f"{type(error).__name__}: {error}".split()))
                found.append(Acceptance(product, {"seed": seed}, [failed]))
    return found


def _accept_product(product: str, onnx: Path, out: Path, seed: int) -> Acceptance:
    manifest = Manifest.read(onnx)
    acceptance = Acceptance(product, _conditions(product, manifest, seed))
    modules = _torch_modules(manifest)
    stream, executors = Stream(), dict[str, Any]()
    for name in ENGINES:
        with _error_noted(acceptance, name, "build"):
            if product == TORCH:
                executors[name] = _torch_executor(modules[name], manifest, name, stream)
            else:
                plans = out / "plans" / product
                executors[name] = _build_and_load(FLAVOURS[product], onnx, manifest, name, plans, stream)
    if executors and product != TORCH:
        share_scratch(executors.values())
    engines: dict[str, DeviceEngine] = {}
    for name, executor in executors.items():
        with _error_noted(acceptance, name, "warm-up"):
            engine = DeviceEngine(executor.spec, executor, stream)
            engine.warm_up()
            engines[name] = engine
    for name, engine in engines.items():
        reference = partial(torch_outputs, modules[name], engine.spec)
        tolerance = TOLERANCES[manifest.engines[name].precision][name]
        with _error_noted(acceptance, name, "run"):
            for check in check_engine(engine, reference, tolerance, engine.buckets, seed):
                _note(acceptance, check)
    if TIMED in engines:
        with _error_noted(acceptance, TIMED, "ladder"):
            for rung in climb(engines[TIMED], modules[TIMED], seed, RUNG_NAMES[product]):
                print(f"  {rung.name}, batch {rung.batch}: {rung.missing or f'{rung.ms:.3f} ms'}", flush=True)
                acceptance.ladder.append(rung)
    return acceptance


@contextmanager
def _error_noted(acceptance: Acceptance, engine: str, name: str) -> Iterator[None]:
    """Note an error, ours or torch's, as a check that failed, and let the rest go on."""
    try:
        yield
    except (IcPortraitError, RuntimeError) as error:
        _note(acceptance, Check(engine, None, name, error=" ".join(str(error).split())))


def _build_and_load(
    flavour: Flavour, onnx: Path, manifest: Manifest, name: str, plans: Path, stream: Stream
) -> TensorRtExecutor:
    spec = engine_specs(manifest.preset, manifest.precision)[name]
    config = BuildConfig(compute_capabilities=(find_gpu().compute_capability,))
    build_engine(flavour, onnx, manifest, spec, config, plans)
    (plan,) = config.plans(spec)
    return TensorRtExecutor(plans / plan, spec, manifest.contract_hash, flavour, stream)


def _torch_executor(module: torch.nn.Module, manifest: Manifest, name: str, stream: Stream) -> Any:
    """Take a copy of a module, because the reference is computed by the module itself, in fp32."""
    from icportrait.runtime.torch_device import TorchExecutor

    copied = copy.deepcopy(module)
    torch.cuda.synchronize()
    return TorchExecutor(copied, engine_specs(manifest.preset, manifest.precision)[name], stream)


def _torch_modules(manifest: Manifest) -> dict[str, torch.nn.Module]:
    """Load the export's modules with its rounded weights, on the GPU where torch has CUDA, and without TF32."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    modules = source_modules(manifest)
    for module in modules.values():
        cast(module, WEIGHT_TYPES[manifest.precision])
        module.to("cuda" if torch.cuda.is_available() else "cpu")
    return modules


def _conditions(product: str, manifest: Manifest, seed: int) -> dict[str, str | int]:
    gpu = find_gpu()
    return {
        "gpu": gpu.name,
        "compute_capability": gpu.compute_capability,
        "driver_cuda_version": gpu.driver_cuda_version,
        "product": product,
        "product_version": torch.__version__ if product == TORCH else FLAVOURS[product].version(),
        "torch_version": torch.__version__,
        "tf32": "off",
        "preset": manifest.preset.name,
        "precision": manifest.precision,
        "model_version": manifest.model_version,
        "seed": seed,
        "warm_up": WARM_UP,
        "repeats": REPEATS,
    }


def _note(acceptance: Acceptance, check: Check) -> None:
    batch = "" if check.batch is None else f" at batch {check.batch}"
    verdict = "passed" if check.passed else "FAILED"
    print(f"  {check.engine}{batch}, {check.name}: {verdict}: {check.text}", flush=True)
    acceptance.checks.append(check)
