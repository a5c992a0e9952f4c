"""Model geometries. A preset holds the few sizes that are chosen; every other size is derived from them."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from icportrait.errors import CheckpointError


@dataclass(frozen=True)
class Residual:
    """One entry of ``F_ref``: what a control UNet adds to one skip connection of the denoising UNet."""

    channels: int
    level: int


@dataclass(frozen=True)
class Preset:
    """The geometry of one IC-Portrait model, in diffusers' terms."""

    name: str
    image_size: int
    """Side of the square pictures, in pixels."""
    vae_channels: tuple[int, ...]
    """``AutoencoderKL.block_out_channels``; each level but the first halves the picture."""
    unet_channels: tuple[int, ...]
    """``UNet2DConditionModel.block_out_channels``; each level but the first halves the latent."""
    attention_levels: tuple[bool, ...]
    """One flag for each UNet level: whether it has transformer blocks."""
    attention_heads: int
    cross_attention_dim: int
    prompt_tokens: int
    norm_num_groups: int
    mask_patch_px: int
    """Side of the patches that hide the reference, in pixels."""
    layers_per_block: int = 2
    vae_layers_per_block: int = 2
    latent_channels: int = 4
    vae_scaling_factor: float = 0.18215
    max_unet_batch: int = 16
    max_vae_batch: int = 8
    max_warping_batch: int = 4

    def __post_init__(self) -> None:
        coarsest = self.vae_factor * 2 ** (len(self.unet_channels) - 1)
        if self.image_size % coarsest:
            raise CheckpointError(
                f"preset {self.name}: image_size is {self.image_size}, expected a multiple of {coarsest} "
                f"(VAE factor {self.vae_factor} times {coarsest // self.vae_factor} for the UNet's levels)"
            )
        if self.image_size % self.mask_patch_px or self.mask_patch_px % self.vae_factor:
            raise CheckpointError(
                f"preset {self.name}: mask_patch_px is {self.mask_patch_px}, expected a divisor of image_size "
                f"{self.image_size} and a multiple of the VAE factor {self.vae_factor}"
            )

    @property
    def vae_factor(self) -> int:
        """Return the pixels per latent cell."""
        return int(2 ** (len(self.vae_channels) - 1))

    @property
    def latent_size(self) -> int:
        """Return the side of one picture's latent; the canvas is twice as wide."""
        return self.image_size // self.vae_factor

    @property
    def levels(self) -> int:
        """Return the number of the UNet's resolutions."""
        return len(self.unet_channels)

    def level_size(self, level: int) -> int:
        """Return the side of one picture's features at ``level``; level 0 is the finest."""
        return self.latent_size >> level

    @property
    def residuals(self) -> tuple[Residual, ...]:
        """Return the residuals as diffusers' UNet takes them: the down path's in order, then the middle block's."""
        residuals = [Residual(self.unet_channels[0], 0)]
        for level, channels in enumerate(self.unet_channels):
            residuals += [Residual(channels, level)] * self.layers_per_block
            if level + 1 < self.levels:
                residuals.append(Residual(channels, level + 1))
        residuals.append(Residual(self.unet_channels[-1], self.levels - 1))
        return tuple(residuals)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> Preset:
        values: dict[str, Any] = {key: tuple(v) if isinstance(v, list) else v for key, v in fields.items()}
        return cls(**values)


DEMO_128 = Preset(
    name="demo-128",
    image_size=128,
    vae_channels=(16, 32, 64),
    unet_channels=(32, 64, 96, 96),
    attention_levels=(False, False, True, False),
    attention_heads=2,
    cross_attention_dim=64,
    prompt_tokens=4,
    norm_num_groups=4,
    mask_patch_px=8,
    max_warping_batch=8,
)
SD15_512 = Preset(
    name="sd15-512",
    image_size=512,
    vae_channels=(128, 256, 512, 512),
    unet_channels=(320, 640, 1280, 1280),
    attention_levels=(True, True, True, False),
    attention_heads=8,
    cross_attention_dim=768,
    prompt_tokens=77,
    norm_num_groups=32,
    mask_patch_px=16,
)
PRESETS = {preset.name: preset for preset in (DEMO_128, SD15_512)}
