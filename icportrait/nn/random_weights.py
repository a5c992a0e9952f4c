"""Random weights under which every input shows in the picture: for tests and measurements."""

from __future__ import annotations

import math
from typing import Any, TypeVar

import torch
from torch import nn

from icportrait.nn.checkpoint import Checkpoint
from icportrait.nn.geometry import unet_from_preset, vae_from_preset
from icportrait.nn.warping import WarpingNetwork
from icportrait.presets import Preset

SCHEDULER_CONFIG: dict[str, Any] = {
    "_class_name": "DDIMScheduler",
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "prediction_type": "v_prediction",
    "steps_offset": 1,
    "set_alpha_to_one": False,
    "clip_sample": False,
}
"""Stable Diffusion 1.5's noise levels. Predicting v keeps the latents of untrained nets near 1: what a net that knows
nothing of the noise leaves of it, epsilon prediction divides by the small signal level of the first steps."""
F_REF_SCALE = 0.1
"""``F_ref`` beside the skip features that it is added to: enough to shape the picture without ruling it, so that a
match that two runtimes round differently stays a small difference."""

_Model = TypeVar("_Model", bound=nn.Module)


def random_checkpoint(preset: Preset, seed: int = 0, device: str = "cpu") -> Checkpoint:
    """Make a checkpoint whose weights, zero convolutions and visibility channel included, are drawn from ``seed``.

    Each kind of device draws other numbers from a seed. Latents are of the order of 1 and pictures use the whole range.
    The nets are untrained, but identical halves of a canvas have near-identical features, so even here identical
    pictures match at identical positions.
    """
    generator = torch.Generator(device).manual_seed(seed)
    with torch.device("meta"):
        unet, vae, network = unet_from_preset(preset), vae_from_preset(preset), WarpingNetwork(preset.to_dict())
    prompt_shape = (1, preset.prompt_tokens, preset.cross_attention_dim)
    prompt_embedding = torch.randn(prompt_shape, generator=generator, device=device)
    unet, vae, network = (drawn(model, generator) for model in (unet, vae, network))
    with torch.no_grad():
        network.prompt_embedding.copy_(prompt_embedding)
        for zero_conv in network.zero_convs:
            zero_conv.weight.mul_(F_REF_SCALE)
        vae.quant_conv.weight.mul_(1 / preset.vae_scaling_factor)
    return Checkpoint(preset, unet, vae, network, prompt_embedding, dict(SCHEDULER_CONFIG))


@torch.no_grad()
def drawn(model: _Model, generator: torch.Generator) -> _Model:
    """Give memory to a model that was built on the meta device, and values to its weights; returns the model."""
    model.to_empty(device=generator.device)
    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            module.weight.normal_(0, 1 / math.sqrt(module.weight[0].numel()), generator=generator)
            if module.bias is not None:
                module.bias.zero_()
        elif isinstance(module, nn.GroupNorm | nn.LayerNorm):
            module.weight.fill_(1)
            module.bias.zero_()
        else:
            assert not list(module.parameters(recurse=False)), f"no draw is defined for {type(module).__name__}"
    return model.eval()
