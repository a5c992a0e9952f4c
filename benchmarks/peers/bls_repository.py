"""The repository of the peer that runs one BLS call a step: the standalone pipeline with another ``denoise``."""

from __future__ import annotations

import shutil
from pathlib import Path

from icportrait.contract import engine_specs
from icportrait.deploy.repository import assemble
from icportrait.deploy.triton_config import engine_model, write_configs
from icportrait.manifest import Manifest
from icportrait.policy import ServingPolicy

MODELS = Path(__file__).parent / "bls"


def assemble_bls(export: Path, repository: Path, policy: ServingPolicy) -> Manifest:
    """Write the peer's repository; see ``icportrait.deploy.repository.assemble``."""
    manifest = assemble(export, repository, policy, standalone=True)
    specs = engine_specs(manifest.preset, manifest.precision)
    ours = repository / "denoise" / "1"
    for name in ("unet", "warping_network"):
        version = repository / name / "1"
        version.mkdir(parents=True)
        shutil.copy(MODELS / name / "1" / "model.py", version)
        shutil.copy(ours / "manifest.json", version)
        for path in manifest.files(name, ours):
            path.rename(version / path.name)
        config = engine_model(specs[name], policy)
        for tensor in (*config.input, *config.output):
            if not tensor.dims:  # Triton wants one beside the batch; the model doesn't see it
                tensor.dims.append(1)
                tensor.reshape.SetInParent()
        write_configs(repository, {name: config})
    shutil.copy(MODELS / "denoise" / "1" / "model.py", ours)
    return manifest
