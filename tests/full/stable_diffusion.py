"""Write a Stable Diffusion directory with random weights: ``python -m tests.full.stable_diffusion DIRECTORY``."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from diffusers import PNDMScheduler
from transformers import CLIPTextConfig, CLIPTextModel

from icportrait.nn.geometry import unet_from_preset, vae_from_preset
from icportrait.nn.random_weights import SCHEDULER_CONFIG, drawn
from icportrait.presets import SD15_512

SEED = 0


def write_stable_diffusion(directory: Path) -> None:
    """Write random weights in Stable Diffusion 1.5's layout: the fp16 variant, scheduler, text encoder's sizes."""
    torch.manual_seed(SEED)
    generator = torch.Generator().manual_seed(SEED)
    with torch.device("meta"):
        unet, vae = unet_from_preset(SD15_512), vae_from_preset(SD15_512)
    drawn(unet, generator).half().save_pretrained(directory / "unet", variant="fp16")
    with torch.no_grad():
        drawn(vae, generator).quant_conv.weight.mul_(1 / SD15_512.vae_scaling_factor)
    vae.half().save_pretrained(directory / "vae", variant="fp16")
    text = CLIPTextConfig(
        hidden_size=768, intermediate_size=3072, num_attention_heads=12, bos_token_id=0, eos_token_id=2
    )
    CLIPTextModel(text).half().save_pretrained(directory / "text_encoder", variant="fp16")
    # Untrained nets keep latents near 1 where they are taken to predict v.
    beta = {name: SCHEDULER_CONFIG[name] for name in ("beta_start", "beta_end", "beta_schedule", "prediction_type")}
    PNDMScheduler(**beta, skip_prk_steps=True, steps_offset=1).save_pretrained(directory / "scheduler")
    (directory / "model_index.json").write_text(json.dumps({"_class_name": "StableDiffusionPipeline"}))


if __name__ == "__main__":
    write_stable_diffusion(Path(sys.argv[1]))
