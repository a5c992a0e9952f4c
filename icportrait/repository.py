"""Assemble a model repository that Triton can load: ``python -m icportrait.repository``.

``triton_repo/`` holds each model's ``model.py`` and its committed ``config.pbtxt``. A repository adds the exported
engines and the manifest, and writes the configurations anew for the preset and policy that are to be served.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
from pathlib import Path

from icportrait.contract import ENGINES, ENSEMBLE
from icportrait.errors import CheckpointError, IcPortraitError
from icportrait.manifest import MANIFEST_NAME, Manifest
from icportrait.policy import RUNTIMES, ServingPolicy
from icportrait.presets import DEMO_128
from icportrait.request import client_contract_text
from icportrait.triton_config import model_configs, write_configs

ROOT = Path(__file__).parents[1]
TEMPLATE = ROOT / "triton_repo"
CLIENT_CONTRACT = ROOT / "client" / "src" / "icportrait_client" / "contract.json"
ENGINE_OWNERS = {
    "vae_encoder": "vae_encoder",
    "vae_decoder": "vae_decoder",
    "warping_network": "denoise",
    "unet": "denoise",
}
"""Which Triton model runs an engine."""


def assemble(export: Path, repository: Path, policy: ServingPolicy, template: Path = TEMPLATE) -> Manifest:
    """Write ``repository`` from the template's models and an export's engines, replacing what was there.

    Args:
        export: directory written by ``python -m export``.
        repository: directory to write; a folder for each model.
        policy: the deployment's settings.
        template: the folder of ``model.py`` files.

    Raises:
        CheckpointError: the export is incomplete, was made for another contract or runtime, or a graph isn't the one
            its manifest names.
        IcPortraitError: ``repository`` holds something else.
    """
    manifest = Manifest.read(export)
    for name in ENGINES:
        manifest.check_files(name, export)
    if policy.runtime == "torch" and manifest.precision != "fp32":
        raise CheckpointError(f"{export}: is {manifest.precision}, expected fp32: the torch runtime computes in fp32")
    configs = model_configs(manifest.preset, manifest.precision, policy)
    models = sorted(path.parent.parent.name for path in template.glob("*/1/model.py"))
    if {*models, ENSEMBLE} != set(configs):
        raise CheckpointError(f"{template}: has models {', '.join(models)}, expected {', '.join(sorted(configs))}")
    _remove_old(repository)
    for model in models:
        version = repository / model / "1"
        version.mkdir(parents=True)
        shutil.copy(template / model / "1" / "model.py", version)
        shutil.copy(export / MANIFEST_NAME, version)
        for name, owner in ENGINE_OWNERS.items():
            if owner == model and policy.runtime == "onnxruntime":
                _place(export, version, name, manifest)
    # An ensemble has no files of its own, but Triton wants its version folder.
    (repository / ENSEMBLE / "1").mkdir(parents=True)
    write_configs(repository, configs)
    return manifest


def _remove_old(repository: Path) -> None:
    """Remove an earlier repository, and nothing that isn't one."""
    if repository.exists() and any(repository.iterdir()) and not (repository / ENSEMBLE / "config.pbtxt").is_file():
        raise IcPortraitError(f"{repository}: isn't empty and no model repository; choose another folder")
    shutil.rmtree(repository, ignore_errors=True)


def _place(export: Path, version: Path, name: str, manifest: Manifest) -> None:
    """Link an engine's files into a model's version folder, or copy them across file systems."""
    for path in manifest.files(name, export):
        try:
            os.link(path, version / path.name)
        except OSError:
            shutil.copy(path, version)


def main(argv: list[str] | None = None) -> int:
    policy = ServingPolicy()
    parser = argparse.ArgumentParser(prog="python -m icportrait.repository", description=__doc__.splitlines()[0])
    parser.add_argument("--export", type=Path, help="directory written by python -m export")
    parser.add_argument("--out", type=Path, help="the repository to write")
    parser.add_argument("--runtime", choices=RUNTIMES, default=policy.runtime, help="default: %(default)s")
    parser.add_argument("--configs", action="store_true", help="only rewrite what is generated and committed")
    args = parser.parse_args(argv)
    policy = ServingPolicy(runtime=args.runtime)
    if args.configs:
        write_configs(TEMPLATE, model_configs(DEMO_128, "fp32", ServingPolicy()))
        CLIENT_CONTRACT.write_text(client_contract_text())
        return 0
    if not (args.export and args.out):
        parser.error("--export and --out are required")
    try:
        manifest = assemble(args.export, args.out, policy)
    except IcPortraitError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"{args.out}: {manifest.preset.name}, {manifest.precision}, {policy.runtime}, model {manifest.model_version}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
