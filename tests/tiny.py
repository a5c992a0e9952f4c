"""The smallest geometry that has every part of the real ones."""

from dataclasses import replace

from icportrait.presets import DEMO_128

TINY = replace(
    DEMO_128,
    name="custom",
    image_size=32,
    vae_channels=(8, 8),
    unet_channels=(8, 16),
    attention_levels=(False, True),
    attention_heads=2,
    cross_attention_dim=12,
    prompt_tokens=6,
    norm_num_groups=4,
    mask_patch_px=4,
)

# One layer a block: tracing costs time for each operation.
SMALL = replace(
    TINY, layers_per_block=1, vae_layers_per_block=1, max_unet_batch=4, max_vae_batch=3, max_warping_batch=2
)
