"""A checkpoint in memory and on disk.

On disk it is a diffusers pipeline directory plus the constant prompt:

    model_index.json                components, preset, image_size, mask_patch_px, guidance_scale,
                                    num_inference_steps
    unet/  vae/  warping_network/   config.json, diffusion_pytorch_model.safetensors
    scheduler/                      scheduler_config.json
    prompt_embedding.safetensors    prompt_embedding [1, tokens, cross_attention_dim]
"""

from __future__ import annotations

import json
import logging
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from safetensors.torch import save_file
from torch import Tensor, nn

from icportrait.diffusion.sampling import NoiseSchedule, foreign_sampler
from icportrait.disk import room_for
from icportrait.errors import CheckpointError
from icportrait.nn.component_files import check_directory, read_json, read_model, read_tensor
from icportrait.nn.geometry import geometry_differences, preset_from_configs
from icportrait.nn.warping import WarpingNetwork
from icportrait.presets import PRESETS, Preset
from icportrait.request import SCHEDULERS

logger = logging.getLogger(__name__)

PIPELINE_CLASS = "ICPortraitPipeline"
INDEX = "model_index.json"
"""The file that makes a directory a checkpoint: it is written last."""
MODEL_CLASSES: dict[str, tuple[str, Any]] = {
    "unet": ("diffusers", UNet2DConditionModel),
    "vae": ("diffusers", AutoencoderKL),
    "warping_network": ("icportrait.nn", WarpingNetwork),
}
"""The model components by directory name: the library that ``model_index.json`` names, and the class."""


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """Everything that decides what a portrait looks like."""

    preset: Preset
    unet: UNet2DConditionModel
    vae: AutoencoderKL
    warping_network: WarpingNetwork
    prompt_embedding: Tensor
    """[1, tokens, cross_attention_dim] float32: the prompt that every portrait is denoised under."""
    scheduler_config: dict[str, Any]
    """diffusers' ``scheduler_config.json``; ``sampling.NoiseSchedule`` reads it."""
    guidance_scale: float = 1.0
    """Guidance of a request that doesn't name it; above 1 only for checkpoints trained with ``F_ref`` dropped."""
    num_inference_steps: int = 20
    """Steps of a request that doesn't name them."""

    @property
    def models(self) -> tuple[nn.Module, ...]:
        """Return the modules that have weights."""
        return self.unet, self.vae, self.warping_network

    @property
    def size_bytes(self) -> int:
        """Return the bytes of all weights in their present types, each counted once."""
        return sum(tensor.nbytes for model in self.models for tensor in (*model.parameters(), *model.buffers()))


def save_checkpoint(checkpoint: Checkpoint, directory: Path) -> None:
    """Write a checkpoint; what is interrupted leaves a directory that ``load_checkpoint`` refuses.

    Args:
        checkpoint: what to write; the weights keep their type.
        directory: created where it doesn't exist; files of the same names are replaced.

    Raises:
        NotEnoughDisk: there is no room for it beside the files that it replaces.
    """
    directory = Path(directory)
    preset = checkpoint.preset
    index: dict[str, Any] = {
        "_class_name": PIPELINE_CLASS,
        "_diffusers_version": diffusers.__version__,
        "preset": preset.name,
        "image_size": preset.image_size,
        "mask_patch_px": preset.mask_patch_px,
        "guidance_scale": checkpoint.guidance_scale,
        "num_inference_steps": checkpoint.num_inference_steps,
        "scheduler": ["diffusers", checkpoint.scheduler_config.get("_class_name", "DDIMScheduler")],
    }
    for name, (library, model_class) in MODEL_CLASSES.items():
        index[name] = [library, model_class.__name__]

    # Beside the target and then renamed: the models' weights may be mapped from the very files that are replaced.
    with room_for("the checkpoint", directory, checkpoint.size_bytes), _staging(directory) as staging:
        for component in MODEL_CLASSES:
            getattr(checkpoint, component).save_pretrained(staging / component, safe_serialization=True)
        _write_json(staging / "scheduler" / "scheduler_config.json", checkpoint.scheduler_config)
        prompt = checkpoint.prompt_embedding.contiguous()
        save_file({"prompt_embedding": prompt}, staging / "prompt_embedding.safetensors")
        _write_json(staging / INDEX, index)

        (directory / INDEX).unlink(missing_ok=True)
        files = [path.relative_to(staging) for path in staging.rglob("*") if path.is_file()]
        for file in sorted(files, key=lambda file: file == Path(INDEX)):
            (directory / file).parent.mkdir(exist_ok=True)
            (staging / file).replace(directory / file)


@contextmanager
def _staging(directory: Path) -> Iterator[Path]:
    """Make a folder beside a directory's files, and remove the folder at the end."""
    directory.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=directory, prefix=".saving-") as name:
        yield Path(name)


def load_checkpoint(directory: Path) -> Checkpoint:
    """Read a checkpoint that ``save_checkpoint`` wrote; weights become float32, whatever type they are stored in.

    Only JSON and safetensors files are read, and only from ``directory``.

    Raises:
        CheckpointError: a file is missing, unsafe or doesn't fit the others; the text names it.
    """
    directory = Path(directory)
    check_directory(directory)
    index = read_index(directory)
    fields = _fields(directory / INDEX, index)
    prompt_embedding = read_tensor(directory / "prompt_embedding.safetensors", "prompt_embedding")
    preset = _preset(directory, fields, prompt_embedding)
    scheduler_config = read_scheduler_config(directory)
    unet, vae, network = (read_model(cls, directory / name) for name, (_, cls) in MODEL_CLASSES.items())
    if differences := geometry_differences(network.preset, preset):
        path = directory / "warping_network" / "config.json"
        raise CheckpointError(f"{path}: differs from the rest of the checkpoint: {differences[0]}")
    # Half precision keeps 11 bits; anything further apart is another prompt.
    if not torch.allclose(network.prompt_embedding, prompt_embedding, rtol=1e-3, atol=1e-3):
        raise CheckpointError(
            f"{directory / 'warping_network'}: was built with another prompt than prompt_embedding.safetensors"
        )
    defaults = {name: fields[name] for name in ("guidance_scale", "num_inference_steps")}
    return Checkpoint(preset, unet, vae, network, prompt_embedding, scheduler_config, **defaults)


def read_index(directory: Path) -> dict[str, Any]:
    """Read ``model_index.json`` and make sure that it is an IC-Portrait checkpoint's.

    Raises:
        CheckpointError: it is missing or another pipeline's, or names components of other classes.
    """
    path = directory / INDEX
    index = read_json(path)
    pipeline = index.get("_class_name")
    if pipeline != PIPELINE_CLASS:
        advice = ""
        if str(pipeline).startswith("StableDiffusion"):
            advice = "; adapt it with icportrait.nn.from_stable_diffusion and save the result"
        raise CheckpointError(f"{path}: _class_name is {pipeline!r}, expected {PIPELINE_CLASS!r}{advice}")
    for name, (library, model_class) in MODEL_CLASSES.items():
        expected = [library, model_class.__name__]
        if index.get(name) != expected:
            raise CheckpointError(f"{path}: {name} is {index.get(name)!r}, expected {expected!r}")
    return index


def read_preset(
    directory: Path, *, prompt_tokens: int, image_size: int | None = None, mask_patch_px: int | None = None
) -> Preset:
    """Read the geometry that ``unet/config.json`` and ``vae/config.json`` describe; see ``preset_from_configs``.

    Raises:
        CheckpointError: a file is missing, or the geometry isn't supported.
    """
    try:
        return preset_from_configs(
            read_json(directory / "unet" / "config.json"),
            read_json(directory / "vae" / "config.json"),
            prompt_tokens=prompt_tokens,
            image_size=image_size,
            mask_patch_px=mask_patch_px,
        )
    except CheckpointError as error:
        raise CheckpointError(f"{directory}: {error}") from error


def read_scheduler_config(directory: Path, **changes: Any) -> dict[str, Any]:
    """Read ``scheduler/scheduler_config.json``, with ``changes``, and make sure that our samplers can follow it.

    Raises:
        CheckpointError: it is missing, or asks for something that isn't supported.
    """
    path = directory / "scheduler" / "scheduler_config.json"
    config = read_json(path) | changes
    try:
        NoiseSchedule.from_config(config)
    except CheckpointError as error:
        raise CheckpointError(f"{path.parent}: {error}") from error
    if sampler := foreign_sampler(config):
        ours = ", ".join(SCHEDULERS)
        logger.warning(
            "%s: %s isn't a sampler here; its noise levels hold, and requests run by %s", path, sampler, ours
        )
    return config


def _fields(path: Path, index: dict[str, Any]) -> dict[str, Any]:
    """Return our own entries of ``model_index.json``, checked."""
    fields = {"guidance_scale": 1.0, "num_inference_steps": 20} | index
    if fields.get("preset") not in (*PRESETS, "custom"):
        raise CheckpointError(
            f"{path}: preset is {fields.get('preset')!r}, expected one of {', '.join(PRESETS)} or custom"
        )
    for name, unit in (("image_size", "pixels"), ("mask_patch_px", "pixels"), ("num_inference_steps", "UNet calls")):
        value = fields.get(name)
        if type(value) is not int or value <= 0:
            raise CheckpointError(f"{path}: {name} is {value!r}, expected {unit}, an integer above 0")
    scale = fields["guidance_scale"]
    if type(scale) not in (int, float) or not 1 <= scale <= sys.float_info.max:
        raise CheckpointError(f"{path}: guidance_scale is {scale!r}, expected a number of at least 1")
    return fields


def _preset(directory: Path, fields: dict[str, Any], prompt_embedding: Tensor) -> Preset:
    """Read the geometry that the configurations describe, and check that ``model_index.json`` names the same."""
    if prompt_embedding.ndim != 3 or prompt_embedding.shape[0] != 1:
        raise CheckpointError(
            f"{directory / 'prompt_embedding.safetensors'}: prompt_embedding is {list(prompt_embedding.shape)}, "
            "expected [1, tokens, cross_attention_dim]"
        )
    preset = read_preset(
        directory,
        prompt_tokens=prompt_embedding.shape[1],
        image_size=fields["image_size"],
        mask_patch_px=fields["mask_patch_px"],
    )
    if prompt_embedding.shape[2] != preset.cross_attention_dim:
        raise CheckpointError(
            f"{directory / 'prompt_embedding.safetensors'}: prompt_embedding has {prompt_embedding.shape[2]} channels, "
            f"expected the UNet's cross_attention_dim, {preset.cross_attention_dim}"
        )
    named = PRESETS.get(fields["preset"])
    if named and (differences := geometry_differences(preset, named)):
        raise CheckpointError(f"{directory}: isn't of the preset {named.name}: {differences[0]}")
    return preset


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
