import numpy as np
import pytest

from icportrait.diffusion.masking import HIDDEN_LEVEL, hide, reference_visibility
from icportrait.errors import InvalidRequest
from icportrait.presets import DEMO_128, SD15_512

PRESETS = pytest.mark.parametrize("preset", [DEMO_128, SD15_512], ids=lambda preset: preset.name)


def patches_of(preset, visibility):
    """Return each patch's latent cells, ``[patches, cells]``."""
    across, cells = preset.image_size // preset.mask_patch_px, preset.mask_patch_px // preset.vae_factor
    blocks = visibility[0, 0].reshape(across, cells, across, cells).transpose(0, 2, 1, 3)
    return blocks.reshape(across * across, cells * cells)


@PRESETS
@pytest.mark.parametrize("mask_ratio", [0.0, 0.333, 0.8, 0.98, 1.0])
def test_exactly_the_asked_share_of_whole_patches_is_hidden(preset, mask_ratio):
    visibility = reference_visibility(preset, mask_ratio, seed=11)
    assert visibility.shape == (1, 1, preset.latent_size, preset.latent_size)
    assert visibility.dtype == np.float32
    patches = patches_of(preset, visibility)
    assert set(np.unique(patches)) <= {0.0, 1.0}
    assert (patches == patches[:, :1]).all()
    assert (patches[:, 0] == 0).sum() == round(mask_ratio * len(patches))


def test_the_seed_decides_which_patches():
    first, again, other = (reference_visibility(DEMO_128, 0.8, seed) for seed in (1, 1, 2))
    assert (first == again).all()
    assert (first != other).any()


def test_seeds_differ_up_to_the_last_one():
    masks = {
        reference_visibility(DEMO_128, 0.5, seed).tobytes() for seed in (0, 2**53, 2**53 + 1, 2**63 - 1, 2**63 + 6)
    }
    assert len(masks) == 5


def test_a_higher_ratio_hides_the_same_patches_and_more():
    low, high = (reference_visibility(DEMO_128, ratio, seed=4) for ratio in (0.5, 0.8))
    assert (high <= low).all()
    assert high.sum() < low.sum()


def test_no_place_is_preferred():
    seeds, visible_share = 600, 0.2
    masks = np.stack([patches_of(DEMO_128, reference_visibility(DEMO_128, 0.8, seed))[:, 0] for seed in range(seeds)])
    deviation = np.abs(masks.mean(axis=0) - visible_share) / np.sqrt(visible_share * (1 - visible_share) / seeds)
    assert deviation.max() < 5
    assert deviation.std() < 1.5


def test_the_mask_keeps_its_values():
    visible = np.flatnonzero(patches_of(DEMO_128, reference_visibility(DEMO_128, 0.97, seed=42))[:, 0])
    assert visible.tolist() == [29, 56, 131, 161, 166, 183, 203, 221]


@pytest.mark.parametrize("mask_ratio", [-0.1, 1.1, float("nan")])
def test_a_ratio_out_of_range_is_refused(mask_ratio):
    with pytest.raises(InvalidRequest, match=r"^mask_ratio: .*expected 0\.\.1"):
        reference_visibility(DEMO_128, mask_ratio, seed=0)


@PRESETS
def test_hidden_pixels_are_filled_and_visible_ones_kept(preset):
    pixels = np.random.default_rng(0).integers(0, 128, (preset.image_size, preset.image_size, 3), dtype=np.uint8)
    before = pixels.copy()
    visibility = reference_visibility(preset, 0.8, seed=3)
    masked = hide(pixels, visibility)
    visible = np.kron(visibility[0, 0], np.ones((preset.vae_factor, preset.vae_factor)))[..., None].astype(bool)
    assert masked.dtype == np.uint8
    np.testing.assert_array_equal(masked, np.where(visible, pixels, HIDDEN_LEVEL))
    assert HIDDEN_LEVEL == 128
    np.testing.assert_array_equal(pixels, before)


def test_hiding_takes_pixels_of_any_memory_layout():
    pixels = np.asfortranarray(np.random.default_rng(1).integers(0, 128, (128, 128, 3), dtype=np.uint8))
    visibility = reference_visibility(DEMO_128, 0.5, seed=3)
    masked = hide(pixels, visibility)
    np.testing.assert_array_equal(masked, hide(np.ascontiguousarray(pixels), visibility))
    assert masked.flags.c_contiguous
