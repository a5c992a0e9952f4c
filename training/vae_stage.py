"""The autoencoder's training."""

from __future__ import annotations

import copy

import torch
from diffusers import AutoencoderKL
from PIL import Image
from torch import Tensor, nn

from icportrait.nn.checkpoint import Checkpoint
from training.grids import picture_grid
from training.portraits import through_vae, whole_levels
from training.recipe import VaeRecipe
from training.stage import Stage


class VaeStage(Stage):
    """The autoencoder: mean absolute error of pixels and a little KL divergence (arXiv 2112.10752, section 3.1)."""

    recipe: VaeRecipe

    def modules(self) -> nn.ModuleDict:
        return nn.ModuleDict({"vae": self.checkpoint.vae})

    def loss(self, progress: float, generator: torch.Generator) -> dict[str, Tensor]:
        batch, _ = self.draw(generator)
        kind = torch.randint(3, (self.recipe.batch,), generator=generator).to(self.device)
        pictures = torch.stack((batch.profile, batch.reference, batch.target), dim=1)
        pictures = pictures[torch.arange(len(kind), device=self.device), kind]
        crop, side = self.recipe.crop_px, self.preset.image_size
        if crop < side:
            corners = torch.randint(side - crop + 1, (self.recipe.batch, 2), generator=generator).tolist()
            pictures = torch.stack(
                [picture[:, y : y + crop, x : x + crop] for picture, (y, x) in zip(pictures, corners, strict=True)]
            )
        posterior = self.checkpoint.vae.encode(pictures).latent_dist
        noise = torch.randn(posterior.mean.shape, generator=generator).to(self.device)
        restored = self.checkpoint.vae.decode(posterior.mean + posterior.std * noise, return_dict=False)[0].float()
        error = (restored - pictures).abs().mean()
        kl = posterior.kl().mean() / posterior.mean[0].numel()
        with torch.no_grad():
            mse = ((restored.clamp(-1, 1) - pictures) / 2).square().flatten(1).mean(1)
            psnr = (-10 * mse.log10()).mean()
        return {"loss": error + self.recipe.kl_weight * kl, "error": error, "kl": kl, "psnr": psnr}

    def samples(self) -> Image.Image:
        pictures = self.source.examples().target
        return picture_grid({"picture": whole_levels(pictures), "restored": through_vae(self.checkpoint, pictures)})

    @torch.no_grad()
    def finished(self) -> Checkpoint:
        """Give latents mean 0 and deviation 1 in every channel, once they are scaled by the VAE's factor."""
        generator = torch.Generator().manual_seed(self.recipe.seed)
        targets = torch.cat([self.draw(generator)[0].target for _ in range(8)])
        vae = copy.deepcopy(self.checkpoint.vae).eval()
        latents = vae.encode(targets).latent_dist.mode().float().transpose(0, 1).flatten(1)
        mean, deviation = latents.mean(1), latents.std(1)
        self.checkpoint.vae.load_state_dict(_rescaled(vae, mean, deviation).state_dict())
        return self.checkpoint


def _rescaled(vae: AutoencoderKL, mean: Tensor, deviation: Tensor) -> AutoencoderKL:
    """Rescale the autoencoder's latents to (z - mean) / (deviation * scaling factor)."""
    gain, channels = 1 / (deviation * vae.config.scaling_factor), len(mean)
    encoder, decoder = vae.quant_conv, vae.post_quant_conv
    encoder.bias[:channels].sub_(mean).mul_(gain)
    encoder.weight[:channels].mul_(gain[:, None, None, None])
    encoder.bias[channels:].add_(2 * gain.log())
    decoder.bias.add_(decoder.weight[:, :, 0, 0] @ mean)
    decoder.weight.div_(gain[None, :, None, None])
    return vae
