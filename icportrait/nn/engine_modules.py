"""The engines' computations as torch modules: argument and output order, shapes and types are ``contract.ENGINES``'.

They hold the checkpoint's own models, not copies. After ``.half()`` they still take and give the contract's types: they
cast inside, and what is numerically delicate at the edges stays in float32.
"""

from __future__ import annotations

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import Tensor, nn

from icportrait.nn.checkpoint import Checkpoint


def encode(vae: AutoencoderKL, images: Tensor) -> Tensor:
    """Encode images [batch, 3, S, S] in -1..1 as the scaled posterior mean: [batch, latent_channels, s, s] float32."""
    mean: Tensor = vae.encode(images).latent_dist.mode()
    latent: Tensor = (mean.float() - _shift(vae)) * vae.config.scaling_factor
    return latent


def decode(vae: AutoencoderKL, latent: Tensor) -> Tensor:
    """Decode latents [batch, latent_channels, s, s] to pictures, about -1..1: [batch, 3, S, S] in the weights' type."""
    unscaled = latent / vae.config.scaling_factor + _shift(vae)
    images: Tensor = vae.decode(unscaled.to(next(vae.parameters()).dtype), return_dict=False)[0]
    return images


class VaeEncoder(nn.Module):
    """Pictures to latents."""

    def __init__(self, vae: AutoencoderKL) -> None:
        super().__init__()
        self.vae = vae

    def forward(self, pixels: Tensor) -> Tensor:
        """Encode ``pixels`` [batch, S, S, 3] uint8; ``latent`` is the posterior's mean, scaled, float32."""
        images = (pixels.float() / 127.5 - 1).permute(0, 3, 1, 2)
        return encode(self.vae, images.to(_dtype(self)))


class UNet(nn.Module):
    """One denoising step of a canvas, under a constant prompt."""

    def __init__(self, unet: UNet2DConditionModel, prompt_embedding: Tensor) -> None:
        """Hold ``unet`` and the prompt [1, tokens, cross_attention_dim]."""
        super().__init__()
        self.unet = unet
        self.prompt_embedding: Tensor
        self.register_buffer("prompt_embedding", prompt_embedding.clone())

    def forward(self, canvas_latent: Tensor, timestep: Tensor, *f_ref: Tensor) -> Tensor:
        """Predict the noise.

        Args:
            canvas_latent: [batch, latent_channels, s, 2 s] float32.
            timestep: [batch] float32, 0..999; each row has its own.
            *f_ref: what the warping network gave, in its order, in the weights' type.

        Returns:
            ``noise_pred``, [batch, latent_channels, s, 2 s] float32.
        """
        noise: Tensor = self.unet(
            canvas_latent.to(_dtype(self)),
            timestep,
            self.prompt_embedding.expand(canvas_latent.shape[0], -1, -1),
            down_block_additional_residuals=f_ref[:-1],
            mid_block_additional_residual=f_ref[-1],
            return_dict=False,
        )[0]
        return noise.float()


class VaeDecoder(nn.Module):
    """Latents to pictures."""

    def __init__(self, vae: AutoencoderKL) -> None:
        super().__init__()
        self.vae = vae

    def forward(self, portrait_latent: Tensor) -> Tensor:
        """Decode ``portrait_latent`` [batch, latent_channels, s, s] float32 to [batch, S, S, 3] uint8."""
        images = decode(self.vae, portrait_latent)
        pixels = ((images.float() + 1) * 127.5).clamp(0, 255).round()
        return pixels.permute(0, 2, 3, 1).to(torch.uint8)


def engine_modules(checkpoint: Checkpoint) -> dict[str, nn.Module]:
    """Return the four engines of ``contract.ENGINES`` by name, in evaluation mode."""
    modules: dict[str, nn.Module] = {
        "vae_encoder": VaeEncoder(checkpoint.vae),
        "warping_network": checkpoint.warping_network,
        "unet": UNet(checkpoint.unet, checkpoint.prompt_embedding),
        "vae_decoder": VaeDecoder(checkpoint.vae),
    }
    return {name: module.eval() for name, module in modules.items()}


def _dtype(module: nn.Module) -> torch.dtype:
    return next(module.parameters()).dtype


def _shift(vae: AutoencoderKL) -> float:
    return float(vae.config.shift_factor or 0.0)
