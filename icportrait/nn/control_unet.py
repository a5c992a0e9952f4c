"""A control UNet: the encoder half of the diffusion UNet, turned into a feature extractor for canvases."""

from __future__ import annotations

import torch
from diffusers import UNet2DConditionModel
from diffusers.models.embeddings import TimestepEmbedding, Timesteps
from diffusers.models.unets.unet_2d_blocks import CrossAttnDownBlock2D, DownBlock2D, UNetMidBlock2DCrossAttn
from torch import Tensor, nn

from icportrait.presets import Preset

NORM_EPS = 1e-5


class ControlUNet(nn.Module):
    """Features of a canvas at every skip connection of the UNet (ControlNet's encoder, arXiv 2302.05543).

    Its modules have the names and shapes of ``UNet2DConditionModel``'s, but ``conv_in`` takes one more channel, the
    visibility. Canvases carry no noise, so the timestep is always 0.
    """

    def __init__(self, preset: Preset) -> None:
        super().__init__()
        channels = preset.unet_channels
        embedding = 4 * channels[0]
        self.conv_in = nn.Conv2d(preset.latent_channels + 1, channels[0], kernel_size=3, padding=1)
        self.time_proj = Timesteps(channels[0], flip_sin_to_cos=True, downscale_freq_shift=0)
        self.time_embedding = TimestepEmbedding(channels[0], embedding)
        self.down_blocks = nn.ModuleList(_down_block(preset, level) for level in range(preset.levels))
        self.mid_block = UNetMidBlock2DCrossAttn(
            in_channels=channels[-1],
            temb_channels=embedding,
            resnet_eps=NORM_EPS,
            resnet_groups=preset.norm_num_groups,
            num_attention_heads=preset.attention_heads,
            cross_attention_dim=preset.cross_attention_dim,
        )
        with torch.no_grad():
            self.conv_in.weight[:, -1].zero_()

    def forward(self, canvas: Tensor, prompt_embedding: Tensor) -> list[Tensor]:
        """Extract the canvas's features.

        Args:
            canvas: two latents side by side and their visibility, [batch, latent_channels + 1, s, 2 s].
            prompt_embedding: the constant prompt, [1, tokens, cross_attention_dim].

        Returns:
            One tensor [batch, channels, s_k, 2 s_k] for each of ``Preset.residuals``, in that order.
        """
        timestep = torch.zeros(1, device=canvas.device)
        time = self.time_embedding(self.time_proj(timestep).to(canvas.dtype))
        prompt = prompt_embedding.expand(canvas.shape[0], -1, -1)

        hidden: Tensor = self.conv_in(canvas)
        features = [hidden]
        for block in self.down_blocks:
            if isinstance(block, CrossAttnDownBlock2D):
                hidden, residuals = block(hidden, time, encoder_hidden_states=prompt)
            else:
                hidden, residuals = block(hidden, time)
            features.extend(residuals)
        features.append(self.mid_block(hidden, time, encoder_hidden_states=prompt))
        return features

    @torch.no_grad()
    def copy_encoder(self, unet: UNet2DConditionModel) -> None:
        """Take the weights of ``unet``'s encoder; the visibility channel becomes zero, so it has no effect yet."""
        own = self.state_dict()
        weights = {name: weight for name, weight in unet.state_dict().items() if name in own}
        base = weights["conv_in.weight"]
        weights["conv_in.weight"] = torch.cat((base, torch.zeros_like(base[:, :1])), dim=1)
        self.load_state_dict(weights)


def _down_block(preset: Preset, level: int) -> nn.Module:
    channels = preset.unet_channels
    shared = {
        "in_channels": channels[max(level - 1, 0)],
        "out_channels": channels[level],
        "temb_channels": 4 * channels[0],
        "num_layers": preset.layers_per_block,
        "resnet_eps": NORM_EPS,
        "resnet_groups": preset.norm_num_groups,
        "add_downsample": level + 1 < preset.levels,
        "downsample_padding": 1,
    }
    block: nn.Module
    if preset.attention_levels[level]:
        block = CrossAttnDownBlock2D(
            **shared,
            num_attention_heads=preset.attention_heads,
            cross_attention_dim=preset.cross_attention_dim,
        )
    else:
        block = DownBlock2D(**shared)
    return block
