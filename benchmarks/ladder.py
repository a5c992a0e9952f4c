"""Peers, one beside the other: the same portraits of the same weights, from files to a file, each in its own way.

Each round has new pictures, and asks every rung for their portrait once; which one begins changes from round to round.
What is told of two rungs is the ratio of a round's times.
"""

from __future__ import annotations

import io
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from tritonclient.grpc import InferenceServerClient

from benchmarks.bare_triton import bare_triton
from benchmarks.engines_alone import load_linked
from benchmarks.ladder_names import OURS, RUNGS
from benchmarks.pairs import asker, new_file, pixels
from benchmarks.peers.bls_repository import assemble_bls
from benchmarks.settings import LatencySettings
from benchmarks.spread import ratio, spread
from export.graph_pipeline import GraphModule, manifest_pipeline
from icportrait.contract import ENGINES
from icportrait.deploy.repository import assemble
from icportrait.errors import CheckpointError, RuntimeNotAvailable
from icportrait.manifest import Manifest
from icportrait.nn.checkpoint import Checkpoint, load_checkpoint
from icportrait.nn.pipeline import ReferencePipeline
from icportrait.pictures.imaging import encode_picture
from icportrait.pictures.prepare import prepare
from icportrait.policy import ServingPolicy
from icportrait.server import Ports, ServerProcess

IN_PROCESS = ("recomputing", "eager", "compiled", "onnxruntime", "openvino")
CLOSE = 12.0
"""Most mean difference, in 0..255, between a rung's portrait and the first rung's: all have the same weights."""
WARM_UPS = 2
Files = Mapping[str, bytes]
Ask = Callable[[Files, int], bytes]
"""Makes the portrait's PNG of two files and a seed."""


def climb(settings: LatencySettings, folder: Path, say: Callable[[str], None] = lambda _: None) -> dict[str, Any]:
    """Measure every rung that this machine has.

    Args:
        settings: the export and the checkpoint that it is of, steps, rounds, rungs.
        folder: for repositories and logs.
        say: is told what goes on, a line at a time.

    Returns:
        By rung: milliseconds, and the ratio to the whole server's of the same round; a rung that isn't here has its
        reason.

    Raises:
        CheckpointError: a rung's portrait isn't the first rung's: the export is of other weights.
    """
    rng = np.random.default_rng(settings.seed)
    pictures = {name: pixels(getattr(settings, name), name) for name in ("profile", "reference")}
    first = {name: new_file(each, np.random.default_rng(1)) for name, each in pictures.items()}
    with ExitStack() as stack:
        asks: dict[str, Ask] = {}
        missing: dict[str, str] = {}
        for name in settings.rungs:
            try:
                asks[name] = stack.enter_context(_rung(name, settings, folder))
                _warm_up(asks, name, first)
                say(f"{name}: ready")
            except RuntimeNotAvailable as error:
                missing[name] = str(error)
                say(f"{name}: left out ({error})")
        times: dict[str, list[float]] = {name: [] for name in asks}
        for number in range(settings.rounds):
            files = {name: new_file(each, rng) for name, each in pictures.items()}
            order = list(asks)
            order = order[number % len(order) :] + order[: number % len(order)]
            for name in order:
                began_s = time.perf_counter()
                asks[name](files, number)
                times[name].append(1000 * (time.perf_counter() - began_s))
            say(f"round {number + 1} of {settings.rounds}")
    rungs: dict[str, Any] = {}
    for name in settings.rungs:
        if name in missing:
            rungs[name] = {"what": RUNGS[name], "left_out": missing[name]}
        else:
            ours = {"ours_by_this": ratio(times[OURS], times[name])} if OURS in times else {}
            rungs[name] = {"what": RUNGS[name], "ms": spread(times[name]), **ours}
    return rungs


def _warm_up(asks: Mapping[str, Ask], name: str, files: Files) -> None:
    """Ask a new rung some times, and compare its portrait with the first rung's."""
    for _ in range(WARM_UPS):
        portrait = asks[name](files, 0)
    first = next(iter(asks.values()))(files, 0)
    ours, theirs = _decoded(portrait), _decoded(first)
    difference = float(np.abs(ours - theirs).mean()) if ours.shape == theirs.shape else 255.0
    if difference > CLOSE:
        raise CheckpointError(
            f"{name}: its portrait isn't {next(iter(asks))}'s: they differ by {difference:.1f} of 255 on average,"
            f" expected {CLOSE:g} at most; is the export of another checkpoint?"
        )


def _decoded(file: bytes) -> Any:
    return np.asarray(Image.open(io.BytesIO(file)).convert("RGB"), np.float32)


@contextmanager
def _rung(name: str, settings: LatencySettings, folder: Path) -> Iterator[Ask]:
    if name in IN_PROCESS:
        yield _in_process(_pipeline(name, settings, folder), settings)
        return
    repository, log = folder / name, folder / f"{name}.log"
    policy = ServingPolicy(runtime=settings.runtime)
    if name == OURS:
        assemble(settings.export, repository, policy)
        with ServerProcess(repository, Ports.free(), log) as server:
            yield from _asking(server.grpc_url, settings)
        return
    if name == "bls":
        assemble_bls(settings.export, repository, policy)
    else:
        assemble(settings.export, repository, policy, standalone=True)
    with bare_triton(repository, log) as bare:
        yield from _asking(bare.grpc_url, settings)


def _asking(url: str, settings: LatencySettings) -> Iterator[Ask]:
    options = {"num_inference_steps": settings.num_inference_steps, "guidance_scale": settings.guidance_scale}
    client = InferenceServerClient(url)
    ask = asker(url, client, options)
    try:
        yield lambda files, seed: ask(files, seed)[1]
    finally:
        client.close()


def _in_process(pipeline: ReferencePipeline, settings: LatencySettings) -> Ask:
    size = pipeline.preset.image_size

    def ask(files: Files, seed: int) -> bytes:
        profile, reference = (prepare(files[name], name, None, False, size)[1] for name in ("profile", "reference"))
        result = pipeline(
            profile,
            reference,
            seed=seed,
            num_inference_steps=settings.num_inference_steps,
            guidance_scale=settings.guidance_scale,
        )
        return encode_picture(result.portraits[0], "png")

    return ask


def _pipeline(name: str, settings: LatencySettings, folder: Path) -> ReferencePipeline:
    if name in ("onnxruntime", "openvino"):
        return _engines_pipeline(name, settings, folder)
    if name == "recomputing":
        return RecomputingPipeline.of(load_checkpoint(settings.checkpoint))
    pipeline = ReferencePipeline.of(load_checkpoint(settings.checkpoint))
    if name == "compiled":
        _check_compiler()
        pipeline.modules["unet"].compile()
    return pipeline


def _check_compiler() -> None:
    """Ask torch for the C++ compiler that its own compiler takes on a CPU.

    Raises:
        RuntimeNotAvailable: there is none.
    """
    from torch._inductor.cpp_builder import get_cpp_compiler

    try:
        get_cpp_compiler()
    except Exception as error:
        raise RuntimeNotAvailable('torch.compile needs a C++ compiler; "apt install g++"') from error


class RecomputingPipeline(ReferencePipeline):
    """Computes the conditioning at every step, as diffusers' loops do with what they are given beside the canvas."""

    @classmethod
    def of(cls, checkpoint: Checkpoint, device: str = "cpu") -> RecomputingPipeline:
        """Make a checkpoint's pipeline; see ``ReferencePipeline.of``."""
        pipeline = super().of(checkpoint, device)
        pipeline.modules["warping_network"] = _Remembering(pipeline.modules["warping_network"])
        return pipeline  # type: ignore[return-value]

    def _predict(self, canvas: Any, timestep: Any, f_ref: Any, guidance_scale: float) -> Any:
        warping: Any = self.modules["warping_network"]
        return super()._predict(canvas, timestep, warping(*warping.inputs)[: len(f_ref)], guidance_scale)


class _Remembering(torch.nn.Module):
    """A module that keeps the inputs of its last call."""

    def __init__(self, module: torch.nn.Module) -> None:
        super().__init__()
        self._module = module
        self.inputs: Any = ()

    def forward(self, *inputs: torch.Tensor) -> Any:
        self.inputs = inputs
        return self._module(*inputs)


def _engines_pipeline(runtime: str, settings: LatencySettings, folder: Path) -> ReferencePipeline:
    modules = {name: GraphModule(load_linked(name, settings.export, runtime, folder)) for name in ENGINES}
    return manifest_pipeline(Manifest.read(settings.export), modules)
