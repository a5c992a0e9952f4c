"""Engine plans on disk: each lies beside a manifest that says what it is, and is loaded only where that fits.

    unet.plan         the serialised engine
    unet.plan.json    its manifest

A plan is code that the GPU will run, so one whose hash isn't its manifest's is never given to TensorRT.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path

from icportrait.errors import PlanError
from icportrait.manifest import Manifest, file_sha256
from icportrait.runtime.device_engine import BUCKETS

Shape = tuple[int, ...]
BatchRange = tuple[int, int]
"""The smallest and the largest batch of an optimization profile."""


@dataclass(frozen=True)
class PlanTensor:
    """An input or output of a plan; -1 is a size that the profiles decide."""

    name: str
    is_input: bool
    dtype: str
    """TensorRT's name, such as FLOAT or HALF."""
    shape: Shape


@dataclass(frozen=True)
class PlanManifest:
    """The sources of a plan, its builder, and the GPUs that it runs on."""

    engine: str
    preset: str
    precision: str
    flavour: str
    tensorrt_version: str
    compute_capabilities: tuple[str, ...]
    """Compute capabilities of the GPUs that the plan runs on, such as 8.9."""
    profiles: tuple[dict[str, tuple[Shape, Shape, Shape]], ...]
    """The smallest, best and largest shape of every input, by optimization profile."""
    tensors: tuple[PlanTensor, ...]
    contract_hash: str
    onnx_sha256: str
    plan_sha256: str
    plan_bytes: int
    build_seconds: float
    peak_memory_bytes: int
    """The building process's largest resident size."""
    gpu_name: str = ""
    """The GPU model that it was built on, and runs on alone; empty for a plan that was compiled ahead of time."""
    warnings: tuple[str, ...] = ()
    """The builder's warnings; a graph of which the parser warns isn't built."""
    scratch_bytes: tuple[int, ...] = ()
    """Scratch memory by optimization profile, as the builder has planned it; empty where it didn't say."""
    attentions: int = 0
    """The graph's attentions."""
    fused_attentions: int = 0
    """The attentions that have a kernel of their own, in the profile that has the fewest."""

    @property
    def batch_ranges(self) -> tuple[BatchRange, ...]:
        """Return the batches that each optimization profile takes: the range of every input's leading axis."""
        shapes = [next(iter(profile.values())) for profile in self.profiles]
        return tuple((smallest[0], largest[0]) for smallest, _, largest in shapes)

    @staticmethod
    def path(plan: Path) -> Path:
        return plan.with_name(plan.name + ".json")

    def write(self, plan: Path) -> None:
        """Write the manifest of ``plan`` beside it."""
        self.path(plan).write_text(json.dumps(asdict(self), indent=2) + "\n", encoding="utf-8")

    @classmethod
    def read(cls, plan: Path) -> PlanManifest:
        """Read the manifest of ``plan``.

        Raises:
            PlanError: there is none, or it isn't of this code's form.
        """
        path = cls.path(plan)
        if not path.is_file():
            raise PlanError(
                f'{path} is missing, and no plan is loaded without it; make it with "python -m engines build"'
            )
        try:
            fields = json.loads(path.read_text(encoding="utf-8"))
            for name in ("compute_capabilities", "warnings", "scratch_bytes"):
                fields[name] = tuple(fields.get(name, ()))
            fields["profiles"] = tuple(
                {name: tuple(tuple(shape) for shape in shapes) for name, shapes in profile.items()}
                for profile in fields["profiles"]
            )
            fields["tensors"] = tuple(
                PlanTensor(**{**tensor, "shape": tuple(tensor["shape"])}) for tensor in fields["tensors"]
            )
            return cls(**fields)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise PlanError(f"{path}: not a plan's manifest of this version ({error}); build again") from error


@dataclass(frozen=True)
class PlanHost:
    """The software and the GPU that a plan is to be loaded by."""

    flavour: str
    tensorrt_version: str
    contract_hash: str
    compute_capability: str | None = None
    """The GPU's; None leaves it unchecked, where there is none."""
    gpu_name: str = ""
    """The GPU's; read where there is one."""


def read_plan(plan: Path, manifest: PlanManifest, host: PlanHost) -> bytes:
    """Read a plan's bytes, once everything that can be known without TensorRT fits.

    Args:
        plan: the file.
        manifest: the one beside it.
        host: what will load it.

    Raises:
        PlanError: the plan is missing or changed, or isn't for the host: see ``check_host``.
    """
    check_host(plan, manifest, host)
    _check_there(plan)
    content = plan.read_bytes()
    _check_hash(plan, manifest, hashlib.sha256(content).hexdigest())
    return content


def check_host(plan: Path, manifest: PlanManifest, host: PlanHost) -> None:
    """Compare what a plan was built for with what is to load it.

    Raises:
        PlanError: the manifest names another product, version, contract or GPU than the host; the text names both.
    """
    differences = (
        ("product", manifest.flavour, host.flavour),
        ("TensorRT", manifest.tensorrt_version, host.tensorrt_version),
        ("contract", manifest.contract_hash, host.contract_hash),
    )
    for what, built_for, found in differences:
        if built_for != found:
            raise PlanError(f"{plan}: was built for {what} {built_for}, and this is {found}; build it again here")
    capability = host.compute_capability
    if capability is not None and capability not in manifest.compute_capabilities:
        raise PlanError(
            f"{plan}: was built for GPUs of compute capability {', '.join(manifest.compute_capabilities)}, and this "
            f"one has {capability}; build it again with --compute-capability {capability}"
        )
    if capability is not None and manifest.gpu_name not in ("", host.gpu_name):
        raise PlanError(
            f"{plan}: was built on {manifest.gpu_name}, and this is {host.gpu_name}; its kernels were chosen for that "
            "model, so build it again here"
        )


def check_content(plan: Path, manifest: PlanManifest) -> None:
    """Compare a plan's hash with its manifest's.

    Raises:
        PlanError: the plan is missing or changed.
    """
    _check_there(plan)
    found = plan.stat()
    _check_hash(plan, manifest, _hash_once(plan, found.st_ino, found.st_size, found.st_mtime_ns))


def find_plans(directory: Path, engine: str) -> list[Path]:
    """Find an engine's plans as ``python -m engines build`` writes them: one for all buckets, or one for each.

    Raises:
        PlanError: there are none, or both kinds are there.
    """
    whole, static = directory / f"{engine}.plan", list(directory.glob(f"{engine}.batch*.plan"))
    if whole.is_file() and static:
        raise PlanError(f"{directory}: has both {whole.name} and {min(static).name}; remove one kind")
    if not static and not whole.is_file():
        raise PlanError(f'{whole} is missing; make it with "python -m engines build"')
    return sorted(static, key=lambda path: (len(path.name), path.name)) or [whole]


def covering_bucket(plans: Iterable[Path], rows: int) -> tuple[Path, int]:
    """Find the smallest bucket of ``rows`` rows or more, and which of an engine's plans has it.

    Raises:
        PlanError: a manifest is missing or wrong, or no bucket is as large.
    """
    buckets = {bucket: plan for plan in plans for bucket in buckets_of(PlanManifest.read(plan).batch_ranges)}
    fitting = [bucket for bucket in buckets if bucket >= rows]
    if not fitting:
        names = ", ".join(str(plan) for plan in dict.fromkeys(buckets.values()))
        raise PlanError(f"{names}: the largest bucket is {max(buckets)}, expected {rows} or more; build it again")
    return buckets[min(fitting)], min(fitting)


def fitting_plans(directory: Path, engine: str, export: Manifest, flavour: str) -> dict[Path, PlanManifest]:
    """Return an engine's plans with their manifests, once they are known to be an export's.

    Args:
        directory: written by ``python -m engines build``.
        engine: its name.
        export: the manifest of what the plans must have been built from.
        flavour: the product that is to run them.

    Raises:
        PlanError: one is missing or changed, or was built for another product or contract, or from another graph; the
            text names both sides.
    """
    plans = {plan: PlanManifest.read(plan) for plan in find_plans(directory, engine)}
    graph = export.engines[engine].sha256
    for plan, manifest in plans.items():
        differences = (
            ("engine", manifest.engine, engine),
            ("product", manifest.flavour, flavour),
            ("contract", manifest.contract_hash, export.contract_hash),
            ("a graph with hash", manifest.onnx_sha256[:12], graph[:12]),
        )
        for what, built_for, expected in differences:
            if built_for != expected:
                raise PlanError(f"{plan}: was built for {what} {built_for}, expected {expected}; build it again")
        check_content(plan, manifest)
    return plans


def buckets_of(ranges: Iterable[BatchRange]) -> tuple[int, ...]:
    """Return the batches that are run with optimization profiles of these ranges, smallest first."""
    ranges = list(ranges)
    inside = {bucket for low, high in ranges for bucket in BUCKETS if low <= bucket <= high}
    return tuple(sorted(inside | {high for _, high in ranges}))


@lru_cache(maxsize=64)
def _hash_once(plan: Path, *_state: int) -> str:
    """Hash a plan, once for each state of its file: gigabytes take seconds, and a gateway starts engines again."""
    return file_sha256(plan)


def _check_there(plan: Path) -> None:
    if not plan.is_file():
        raise PlanError(f'{plan} is missing; make it with "python -m engines build"')


def _check_hash(plan: Path, manifest: PlanManifest, found: str) -> None:
    if found != manifest.plan_sha256:
        raise PlanError(
            f"{plan}: its SHA-256 is {found[:12]}..., its manifest says {manifest.plan_sha256[:12]}...: it was "
            "changed after it was built and won't be loaded; build it again"
        )
