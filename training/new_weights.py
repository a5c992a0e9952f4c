"""Untrained weights to train from, where there is no base."""

from __future__ import annotations

import torch

from icportrait.nn import Checkpoint
from icportrait.nn.geometry import unet_from_preset, vae_from_preset
from icportrait.nn.random_weights import SCHEDULER_CONFIG
from icportrait.nn.warping import WarpingNetwork
from icportrait.presets import Preset


def new_checkpoint(preset: Preset, seed: int = 0) -> Checkpoint:
    """Draw weights as torch and diffusers do for training. ``F_ref`` is zero, and the prompt is all zeros.

    Guidance is 1: nothing has been trained without ``F_ref`` yet.
    """
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        unet, vae = unet_from_preset(preset), vae_from_preset(preset)
        network = WarpingNetwork(preset.to_dict())
        for control in (network.matching_net, network.appearance_net):
            torch.nn.init.kaiming_uniform_(control.conv_in.weight, a=5**0.5)
    prompt = torch.zeros(1, preset.prompt_tokens, preset.cross_attention_dim)
    return Checkpoint(preset, unet, vae, network, prompt, dict(SCHEDULER_CONFIG))
