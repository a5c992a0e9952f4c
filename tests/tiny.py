"""The smallest geometry that has every kind of part that the real ones have: one layer a block, two levels."""

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
    layers_per_block=1,
    vae_layers_per_block=1,
)

SMALL = replace(TINY, unet_channels=(8, 32), max_unet_batch=4, max_vae_batch=3, max_warping_batch=2)
"""To be exported: graphs are verified at their largest batches, and TensorRT fuses no attention of smaller heads."""
