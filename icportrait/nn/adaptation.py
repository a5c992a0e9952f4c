"""From a Stable Diffusion 1.5 class model to an IC-Portrait checkpoint that can be trained."""

from __future__ import annotations

from pathlib import Path

from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import Tensor

from icportrait.errors import CheckpointError
from icportrait.nn.checkpoint import PIPELINE_CLASS, Checkpoint, read_preset, read_scheduler_config
from icportrait.nn.component_files import check_directory, read_json, read_model
from icportrait.nn.prompt import encode_prompt, read_prompt_embedding
from icportrait.nn.warping import WarpingNetwork


def from_stable_diffusion(
    directory: Path,
    *,
    prompt_embedding: Path | None = None,
    prompt: str = "",
    image_size: int | None = None,
) -> Checkpoint:
    """Adapt a model in diffusers' layout; the result predicts exactly what the model's own UNet does.

    Both control UNets start as the UNet's encoder and don't see the visibility yet, and the zero convolutions keep
    ``F_ref`` at zero until they are trained. Components that aren't needed, a safety checker for one, aren't read.

    Args:
        directory: has ``unet/``, ``vae/``, ``scheduler/`` and, unless ``prompt_embedding`` is given,
            ``text_encoder/`` and ``tokenizer/``. Weights are safetensors, plain or of the ``fp16`` variant.
        prompt_embedding: a safetensors file with ``prompt_embedding``, used instead of the text encoder.
        prompt: what the text encoder embeds; every portrait will be denoised under it.
        image_size: side of the pictures in pixels; by default the one that the UNet was trained for.

    Raises:
        CheckpointError: something is missing, unsafe or of a geometry that isn't supported; the text names it.
    """
    directory = Path(directory)
    check_directory(directory)
    index = directory / "model_index.json"
    if index.is_file() and read_json(index).get("_class_name") == PIPELINE_CLASS:
        raise CheckpointError(f"{directory}: is an IC-Portrait checkpoint already; read it with load_checkpoint")
    embedding = _prompt_embedding(directory, prompt_embedding, prompt)
    preset = read_preset(directory, prompt_tokens=embedding.shape[1], image_size=image_size)
    if embedding.shape[2] != preset.cross_attention_dim:
        raise CheckpointError(
            f"{directory}: the prompt embedding has {embedding.shape[2]} channels, "
            f"expected the UNet's cross_attention_dim, {preset.cross_attention_dim}"
        )
    # DDIMScheduler's default clamps its predictions to -1..1: right for pixels, wrong for latents, which exceed that.
    scheduler_config = read_scheduler_config(directory, clip_sample=False)
    unet = read_model(UNet2DConditionModel, directory / "unet")
    vae = read_model(AutoencoderKL, directory / "vae")
    network = WarpingNetwork.from_unet(preset, unet, embedding)
    return Checkpoint(preset, unet, vae, network, embedding, scheduler_config)


def _prompt_embedding(directory: Path, file: Path | None, prompt: str) -> Tensor:
    if file is not None:
        if prompt:
            raise CheckpointError(f"give either the prompt {prompt!r} or the embedding {file}, not both")
        return read_prompt_embedding(Path(file))
    if not (directory / "text_encoder").is_dir():
        raise CheckpointError(
            f"{directory}: has no text_encoder/ to embed the prompt with; add the text encoder that the UNet was "
            "trained with, or give prompt_embedding, a .safetensors file with the tensor prompt_embedding "
            "[tokens, cross_attention_dim]"
        )
    return encode_prompt(directory, prompt)
