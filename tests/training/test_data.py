"""Training shows the networks the same as serving does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from icportrait.diffusion.masking import hide, reference_visibility
from icportrait.nn.engine_modules import VaeEncoder
from tests.tiny import TINY
from tests.training.tiny import generator, stage, write_views
from training import canvas_stage
from training.data import PictureFolder, RenderedPairs
from training.evaluation import warped
from training.portraits import Portraits, whole_levels
from training.recipe import Data, RecipeError

NO = torch.zeros(16, dtype=torch.bool)
pytestmark = pytest.mark.usefixtures("one_thread_and_one_seed")


# Rendered pairs


@pytest.mark.parametrize("ratio", [0.0, 0.5, 0.8, 1.0])
def test_training_hides_what_serving_hides(tiny_pairs: RenderedPairs, ratio: float) -> None:
    drawn = stage("matching", tiny_pairs, mask_ratio=ratio).visibility(64, generator())
    served = torch.from_numpy(np.concatenate([reference_visibility(TINY, ratio, seed) for seed in range(64)]))
    assert drawn.shape == served.shape and drawn.dtype == served.dtype
    assert drawn.flatten(1).sum(1).unique().tolist() == served.flatten(1).sum(1).unique().tolist()
    cells = TINY.mask_patch_px // TINY.vae_factor
    patches = drawn[:, :, ::cells, ::cells]
    assert torch.equal(patches.repeat_interleave(cells, 2).repeat_interleave(cells, 3), drawn)
    if ratio == 0.5:
        assert len(drawn.unique(dim=0)) == 64  # every row has its own
        assert patches.mean(0).min() > 0.2 and patches.mean(0).max() < 0.8  # and no patch is favoured


def test_training_sees_the_canvas_that_serving_sees(tiny_pairs: RenderedPairs) -> None:
    trained = stage("appearance", tiny_pairs, mask_ratio=0.5)
    batch, numbers = trained.draw(generator())
    _, canvas = trained.canvas(batch, numbers, generator(1))
    visibility = trained.visibility(4, generator(1))
    profile, reference = (
        whole_levels(pictures).permute(0, 2, 3, 1).contiguous() for pictures in (batch.profile, batch.reference)
    )
    pairs = zip(reference.numpy(), visibility.numpy()[:, None], strict=True)
    hidden = torch.from_numpy(np.stack([hide(picture, seen) for picture, seen in pairs]))
    encoder = VaeEncoder(trained.checkpoint.vae)
    with torch.no_grad():
        expected = trained.checkpoint.warping_network.canvas(encoder(profile), encoder(hidden), visibility)
    # Latents that are kept are kept in half precision.
    torch.testing.assert_close(canvas, expected, rtol=2e-3, atol=2e-3)
    again = stage("appearance", tiny_pairs, trained.checkpoint, mask_ratio=0.5, keep_latents=False)
    torch.testing.assert_close(again.canvas(batch, numbers, generator(1))[1], expected, rtol=1e-4, atol=1e-4)


def test_samples_hide_as_much_as_training(tiny_pairs: RenderedPairs, monkeypatch: pytest.MonkeyPatch) -> None:
    ratios, make = [], canvas_stage.make_portraits

    def spy(*arguments: Any, mask_ratio: float, **settings: Any) -> Portraits:
        ratios.append(mask_ratio)
        return make(*arguments, mask_ratio=mask_ratio, **(settings | {"num_inference_steps": 1}))

    monkeypatch.setattr(canvas_stage, "make_portraits", spy)
    stage("appearance", tiny_pairs, mask_ratio=0.25).samples()
    assert ratios == [0.25]


def test_kept_latents_are_their_own_pictures(tiny_pairs: RenderedPairs) -> None:
    """Compare with a fresh encoding. Another pair's, the mirrored picture's or the target's latents would differ."""
    trained = stage("appearance", tiny_pairs, batch=16)
    for seed in range(3):
        batch, numbers = trained.draw(generator(seed))
        for kind, pictures in (("profile", batch.profile), ("target", batch.target)):
            for _ in range(2):
                known = trained.encode_known(kind, numbers, pictures)
                torch.testing.assert_close(known, trained.encode(pictures), rtol=2e-3, atol=2e-3)


def test_mirrored_pairs_have_mirrored_correspondence(tiny_pairs: RenderedPairs) -> None:
    plain, mirrored = (tiny_pairs.batch(torch.arange(16), flip, NO) for flip in (NO, ~NO))
    for name in ("profile", "reference", "target"):
        assert torch.equal(getattr(mirrored, name), getattr(plain, name).flip(3))
    assert plain.flows and mirrored.flows and plain.visibles and mirrored.visibles
    for level in range(TINY.levels):
        side = TINY.level_size(level)
        flow, other = plain.flows[level], mirrored.flows[level].view(-1, side, side).flip(2).flatten(1)
        visible = plain.visibles[level].view(-1, side, side)
        assert torch.equal(mirrored.visibles[level].view(-1, side, side).flip(2), visible) and visible.any()
        head, cell = flow != 0, TINY.image_size // side
        assert not other[~head].any() and not head.all()  # 0 says that there is no head
        on_head = head.view(-1, 1, side, side).repeat_interleave(cell, 2).repeat_interleave(cell, 3)
        expected = warped(plain.profile, flow, cell) * on_head
        assert torch.equal(warped(mirrored.profile, mirrored.flows[level], cell).flip(3) * on_head, expected)
        assert not torch.equal(warped(mirrored.profile, flow, cell).flip(3) * on_head, expected)


def test_pairs_are_drawn_as_the_recipe_says(tiny_pairs: RenderedPairs) -> None:
    _, numbers = stage("matching", tiny_pairs, batch=64).draw(generator())
    assert 16 < (numbers % 2).sum() < 48 and len((numbers // 2).unique()) > 32
    _, numbers = stage("matching", tiny_pairs, batch=64, flip=False).draw(generator())
    assert not (numbers % 2).any()
    for share, least, most in ((0.0, 0, 0), (0.25, 6, 26), (1.0, 64, 64)):
        batch, _ = stage("matching", tiny_pairs, batch=64, same_identity_share=share).draw(generator())
        assert least <= (batch.reference == batch.target).flatten(1).all(1).sum() <= most


# Folders of real people


@pytest.fixture
def folder(tmp_path: Path, tiny_pairs: RenderedPairs) -> PictureFolder:
    """Write two views of each of eight people, and files that aren't pictures."""
    write_views(tmp_path, tiny_pairs.pairs[:8])
    (tmp_path / "ORIGIN.md").write_text("no person")
    (tmp_path / "00" / "notes.txt").write_text("no picture")
    return PictureFolder(Data(pictures=str(tmp_path)), TINY)


def test_a_folder_gives_every_ordered_pair_of_one_persons_views(
    folder: PictureFolder, tiny_pairs: RenderedPairs
) -> None:
    assert len(folder) == 16
    no = NO[:8]
    batch, expected = folder.batch(torch.arange(0, 16, 2), no, no), tiny_pairs.batch(torch.arange(8), no, no)
    torch.testing.assert_close(batch.profile, expected.profile)
    torch.testing.assert_close(batch.target, expected.target)
    assert torch.equal(batch.reference, batch.target) and batch.flows is None and batch.visibles is None
    swapped = folder.batch(torch.arange(1, 16, 2), ~no, no)
    assert torch.equal(swapped.profile.flip(3), batch.target) and torch.equal(swapped.target.flip(3), batch.profile)
    assert len(folder.examples().profile) == 8


def test_views_are_turned_upright_and_cut_square(tmp_path: Path) -> None:
    wide = Image.new("RGB", (96, 32), "red")
    wide.paste("blue", (32, 0, 64, 32))
    (tmp_path / "someone").mkdir()
    wide.save(tmp_path / "someone" / "wide.png")
    halves = Image.new("RGB", (64, 64), "red")
    halves.paste("blue", (0, 0, 32, 64))  # to the left as it is stored, and above once it is turned by the tag
    exif = Image.Exif()
    exif[0x0112] = 6
    halves.save(tmp_path / "someone" / "turned.png", exif=exif)
    batch = PictureFolder(Data(pictures=str(tmp_path)), TINY).examples()
    turned, cut = batch.profile[0], batch.target[0]
    assert turned.shape == cut.shape == (3, 32, 32)
    assert turned[:, 4, 16].tolist() == [-1, -1, 1] and turned[:, 28, 16].tolist() == [1, -1, -1]
    assert (cut[2] > 0.9).all()


def test_folders_without_pairs_are_refused(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"data.pictures: .*nowhere has no folder with two pictures"):
        PictureFolder(Data(pictures=str(tmp_path / "nowhere")), TINY)
    (tmp_path / "someone").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "someone" / "alone.png")
    with pytest.raises(RecipeError, match=r"expected <person>/<view>.jpg, .png or .webp"):
        PictureFolder(Data(pictures=str(tmp_path)), TINY)
