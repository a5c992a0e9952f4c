"""The cost of each precision to a portrait: ``python -m export.quality``.

The graphs that engines are built from, Q/DQ included, make portraits of heads that no training ever saw, in ONNX
Runtime on the CPU. It keeps float32 between float16 operators, so fp16's figures are an upper bound, and whether a
tensor would overflow is ``export.magnitudes``' to say. bf16, for which ONNX Runtime's CPU has no kernels, is computed
by torch.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity
from tqdm import tqdm

from export.graph_pipeline import GraphModule, load_graphs, manifest_pipeline
from icportrait.contract import ENGINES
from icportrait.errors import CheckpointError, IcPortraitError
from icportrait.manifest import Manifest
from icportrait.nn.pipeline import ReferencePipeline
from icportrait.runtime.eager import source_modules
from training.evaluation_pairs import EvaluationPairs, evaluation_pairs
from training.metrics import psnr

LEAST_PSNR_DB = {"fp16": 45.0, "int8": 30.0, "fp8": 30.0}
"""Limits against fp32. A precision below its limit is never a default."""


@dataclass(frozen=True)
class Quality:
    """One precision's figures; means over pairs unless they say otherwise."""

    precision: str
    runtime: str
    latent_cosine: float
    """Cosine of the portrait's latent and fp32's."""
    psnr_db: float
    """The portrait against fp32's."""
    worst_psnr_db: float
    truth_psnr_db: float
    """The portrait's head against the ground truth's."""

    @property
    def passed(self) -> bool:
        return self.psnr_db >= LEAST_PSNR_DB.get(self.precision, 0.0)


def compare_precisions(exports: list[Path], count: int, seed: int = 0) -> list[Quality]:
    """Make the same portraits in every precision, fp32 first.

    Args:
        exports: directories of exports of one checkpoint; one of them is fp32.
        count: number of pairs.
        seed: of the evaluation's pairs; pair i is hidden and sampled with ``seed + i``.

    Raises:
        CheckpointError: none of the exports is fp32, one is bf16, they are of different checkpoints, or a graph isn't
            the one that its manifest names.
    """
    manifests = {directory: Manifest.read(directory) for directory in exports}
    plain = {directory: manifest for directory, manifest in manifests.items() if manifest.precision == "fp32"}
    if not plain:
        raise CheckpointError("none of the exports is fp32, with which the others are compared")
    first_directory, first = next(iter(plain.items()))
    for directory, manifest in manifests.items():
        if manifest.precision == "bf16":
            raise CheckpointError(f"{directory}: is bf16, which is computed by torch here; leave it out")
        for name in ENGINES:
            manifest.check_files(name, directory)
        if (manifest.source, manifest.preset) != (first.source, first.preset):
            raise CheckpointError(
                f"{directory}: was made from {manifest.source}, {first_directory} from {first.source}"
            )
    pairs = evaluation_pairs(first.preset, seed, count)
    expected = _portraits("fp32", _graphs(first_directory, first), pairs, seed)
    found = [_quality("fp32", "onnxruntime", expected, expected, pairs)]
    for directory, manifest in manifests.items():
        if directory != first_directory:
            made = _portraits(manifest.precision, _graphs(directory, manifest), pairs, seed)
            found.append(_quality(manifest.precision, "onnxruntime", made, expected, pairs))
    # Copies: the modules are shared by all that ask for this export's.
    modules = {name: copy.deepcopy(module).bfloat16() for name, module in source_modules(first).items()}
    made = _portraits("bf16", manifest_pipeline(first, modules), pairs, seed)
    return [*found, _quality("bf16", "torch", made, expected, pairs)]


def _graphs(directory: Path, manifest: Manifest) -> ReferencePipeline:
    engines = load_graphs(manifest, directory)
    return manifest_pipeline(manifest, {name: GraphModule(engine) for name, engine in engines.items()})


def _portraits(title: str, pipeline: ReferencePipeline, pairs: EvaluationPairs, seed: int) -> tuple[Tensor, Tensor]:
    """Make latents [N, latent_channels, s, s] and pictures [N, 3, S, S] uint8."""
    latents, pictures = [], []
    for index in tqdm(range(len(pairs)), title, unit="portrait"):
        profile, reference = (picture[index].permute(1, 2, 0).numpy() for picture in (pairs.profile, pairs.reference))
        result = pipeline(profile, reference, seed=seed + index)
        latents.append(torch.from_numpy(result.latents))
        pictures.append(torch.from_numpy(result.portraits).permute(0, 3, 1, 2))
    return torch.cat(latents), torch.cat(pictures)


def _quality(
    precision: str,
    runtime: str,
    made: tuple[Tensor, Tensor],
    expected: tuple[Tensor, Tensor],
    pairs: EvaluationPairs,
) -> Quality:
    (latents, pictures), (expected_latents, expected_pictures) = made, expected
    against_fp32 = psnr(pictures, expected_pictures)
    return Quality(
        precision,
        runtime,
        latent_cosine=cosine_similarity(latents.flatten(1), expected_latents.flatten(1)).mean().item(),
        psnr_db=against_fp32.mean().item(),
        worst_psnr_db=against_fp32.min().item(),
        truth_psnr_db=psnr(pictures, pairs.target, pairs.target_head).mean().item(),
    )


def table(found: list[Quality]) -> str:
    """Write the figures as Markdown."""
    lines = [
        "| precision | by | latent cosine | PSNR to fp32, dB | worst, dB | head's PSNR to the truth, dB | |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in found:
        least = LEAST_PSNR_DB.get(row.precision)
        verdict = "" if least is None else f"{'holds' if row.passed else 'FAILS'} {least:g} dB"
        lines.append(
            f"| {row.precision} | {row.runtime} | {row.latent_cosine:.5f} | {row.psnr_db:.1f} "
            f"| {row.worst_psnr_db:.1f} | {row.truth_psnr_db:.2f} | {verdict} |"
        )
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m export.quality", description=__doc__.splitlines()[0])
    parser.add_argument("exports", type=Path, nargs="+", help="directories of exports of one checkpoint, one in fp32")
    parser.add_argument("--pairs", type=int, default=64, help="rendered pairs (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the pairs (default: %(default)s)")
    parser.add_argument("--json", action="store_true", help="print JSON")
    args = parser.parse_args(argv)
    if args.pairs < 1:
        parser.error(f"--pairs is {args.pairs}, expected 1 or more")
    try:
        found = compare_precisions(args.exports, args.pairs, args.seed)
    except (IcPortraitError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    if args.json:
        # JSON has no infinity, which fp32's PSNR to itself is.
        rows = [{name: None if value == math.inf else value for name, value in asdict(row).items()} for row in found]
        print(json.dumps(rows, indent=2, allow_nan=False))
    else:
        print(table(found))
    return 0 if all(row.passed for row in found) else 1


if __name__ == "__main__":
    sys.exit(main())
