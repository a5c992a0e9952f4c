"""The synthetic heads that the demo checkpoint is trained on: reproducible, consistent over views, truly matched."""

from __future__ import annotations

import math
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch

from training import pairs as pairs_module
from training.appearance import Part
from training.correspondence import correspondence
from training.drawing import FIRST_EVALUATION_SEED, NARROW, VARIETIES, WIDE, Variety
from training.heads import Identity, Rendering, View, draw_identities, draw_views, render
from training.pairs import PairCache, crossed_set, render_pairs, training_batch

SEEDS = (3, 14, 15, 92)


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def people() -> Identity:
    return draw_identities(SEEDS, WIDE)


@pytest.fixture(scope="module")
def views() -> View:
    return draw_views(SEEDS, WIDE)


@pytest.fixture(scope="module")
def frontal(people: Identity, views: View) -> Rendering:
    """Render four people who look at the camera, in flat light."""
    return render(people, views.turned(0).in_flat_light())


def _pixels(rendering: Rendering, item: int, part: Part) -> torch.Tensor:
    """Return colours ``[n, 3]`` of a part's pixels whose eight neighbours are of the part too."""
    mask = (rendering.part[item] == part).float()[None, None]
    inner = -torch.nn.functional.max_pool2d(-mask, 3, stride=1, padding=1)[0, 0] > 0.5
    return rendering.image[item].permute(1, 2, 0)[inner]


@pytest.mark.parametrize("draw", [draw_identities, draw_views])
def test_what_is_drawn_depends_on_its_own_seed_alone(draw):
    together, alone, others = draw([5, 6, 2**32 + 6]), draw([6]), draw([7, 2**32 + 6])
    for field in fields(together):
        value = getattr(together, field.name)
        assert value.dtype == torch.float32
        torch.testing.assert_close(value[1], getattr(alone, field.name)[0], rtol=0, atol=0)
        torch.testing.assert_close(value[2], getattr(others, field.name)[1], rtol=0, atol=0)
    varied = [f.name for f in fields(together) if not torch.equal(*getattr(draw(range(2)), f.name))]
    assert len(varied) > 0.8 * len(fields(together))


def test_a_picture_does_not_depend_on_its_batch(people, views):
    together = render(people, views, 64)
    alone = render(people[2:3], views[2:3], 64)
    torch.testing.assert_close(together.image[2:3], alone.image, rtol=0, atol=2e-3)
    torch.testing.assert_close(together.surface_point[2:3], alone.surface_point, rtol=0, atol=2e-3)
    assert torch.equal(together.part[2:3], alone.part)
    assert torch.equal(render(people, views, 64).image, together.image)


def test_pictures_can_be_trained_on(people, views):
    # Tensors made in inference mode can't be saved for a backward pass.
    weight = torch.zeros(1, 3, 1, 1, requires_grad=True)
    torch.nn.functional.conv2d(render(people[:1], views[:1], 32).image, weight).sum().backward()
    assert weight.grad.abs().max() > 0


def test_light_changes_the_picture_and_not_the_surface(people, views):
    left, right = (render(people, views.turned(0).lit_from(azimuth, 10), 64) for azimuth in (-75, 75))
    assert torch.equal(left.surface_point, right.surface_point)
    assert torch.equal(left.part, right.part)
    torch.testing.assert_close(left.albedo, right.albedo)
    side = torch.linspace(-1, 1, 64).expand(64, 64)
    for item in range(len(people)):
        face = left.head_mask[item] & (left.surface_point[item, ..., 2] > 0)
        change = (right.image - left.image)[item].mean(0)
        assert change[face & (side > 0.15)].mean() > 0.05
        assert change[face & (side < -0.15)].mean() < -0.05


@pytest.mark.parametrize("kind", ["shadow", "hollow"])
def test_shadows_and_hollows_darken_a_part_of_the_head(people, views, kind):
    view = views.turned(0).in_flat_light().lit_from(70, 20)
    if kind == "shadow":
        view = replace(view, light_colour=torch.ones(4, 3), ambient=torch.zeros(4, 3))
    open_sky = render(people, view, 64)
    shadowed = render(people, replace(view, occlusion=torch.ones(4)), 64)
    for item, head in enumerate(open_sky.head_mask):
        before, after = (r.image[item].mean(0)[head] for r in (open_sky, shadowed))
        assert (after - before).max() < 1e-4
        lit = before > 0.15
        darkened = (after[lit] < 0.9 * before[lit]).float().mean()
        assert 0.03 < darkened < 0.6


def test_yaw_turns_the_face_to_the_right_and_pitch_up(people, views):
    column = torch.arange(64.0).expand(4, 64, 64)

    def eyes(view: View, along: torch.Tensor) -> torch.Tensor:
        rendering = render(people, view, 64)
        shown = (rendering.part == Part.IRIS) | (rendering.part == Part.PUPIL) | (rendering.part == Part.EYE_WHITE)
        return (along * shown).sum((1, 2)) / shown.sum((1, 2))

    middle = views.turned(0)
    assert (eyes(views.turned(40), column) - eyes(middle, column) > 5).all()
    assert (eyes(views.turned(-40), column) - eyes(middle, column) < -5).all()
    row = column.transpose(1, 2)
    nodding = replace(middle, pitch=torch.full((4,), 0.25))
    assert (eyes(nodding, row) - eyes(middle, row) < -1.5).all()


@pytest.mark.parametrize("grid", [32, 16, 8, 4])
def test_a_picture_matches_itself_in_place(frontal, grid):
    flow, visible = correspondence(frontal, frontal, grid)
    cell = 128 // grid
    middle = slice(cell // 2, None, cell)
    assert torch.equal(visible, frontal.head_mask[:, middle, middle].flatten(1))
    assert visible.any(1).all()
    assert torch.equal(flow[visible], torch.arange(grid * grid).expand(4, -1)[visible])
    assert (flow[~visible] == 0).all()


def test_correspondence_finds_the_colours_after_a_turn(people, views, frontal):
    turned = render(people, views.turned(35))
    flow, visible = correspondence(frontal, turned, 32)

    def cells(rendering: Rendering) -> torch.Tensor:
        return rendering.albedo[:, :, 2::4, 2::4].flatten(2)

    there, here = cells(turned), cells(frontal)
    moved = here.gather(2, flow[:, None].expand_as(here))
    error = (moved - there).abs().mean(1)[visible]
    unmoved = (here - there).abs().mean(1)[visible]
    assert error.median() < 0.01
    assert error.mean() < 0.35 * unmoved.mean()
    on_head = turned.head_mask[:, 2::4, 2::4].flatten(1)
    shown = (visible.sum(1) / on_head.sum(1)).tolist()
    assert all(0.6 < share < 0.97 for share in shown), shown  # most is seen from both sides, the far side isn't
    shift = (flow % 32 - torch.arange(1024) % 32)[visible].float()
    assert shift.mean() < -1  # the face has moved to the right


def test_different_people_are_matched_by_meaning(people, views, frontal):
    others = render(people[[1, 2, 3, 0]], views.turned(15).in_flat_light())
    flow, visible = correspondence(frontal, others, 64, reach=0.12)
    source, target = (r.part[:, 1::2, 1::2].flatten(1).long() for r in (frontal, others))
    matched = source.gather(1, flow)
    for part, accepted in ((Part.LIPS, (Part.LIPS,)), (Part.IRIS, (Part.IRIS, Part.PUPIL, Part.EYE_WHITE))):
        cells = visible & (target == part)
        right = torch.stack([matched == other for other in accepted]).any(0)
        assert right[cells].float().mean() > 0.6
    hair = visible & (target == Part.HAIR)
    assert (matched[hair] == Part.HAIR).float().mean() > 0.9
    bare = torch.full((4,), -0.1)
    bald = render(replace(people, hair_top=bare, hair_side=bare, hair_bottom=bare, bun_size=bare), views.turned(0))
    assert not (bald.part == Part.HAIR).any()
    assert not correspondence(bald, others, 64, reach=0.12)[1][target == Part.HAIR].any()


def test_features_lie_in_one_canonical_place_on_all_heads(people, views):
    heights = torch.tensor([-0.53, -0.62, -0.53, -0.62])
    people = replace(people, mouth_y=heights, eye_y=torch.tensor([0.02, 0.02, 0.11, 0.11]))
    frontal = render(people, views.turned(0).in_flat_light())
    for part in (Part.LIPS, Part.IRIS):
        shown = [frontal.part[item] == part for item in range(4)]
        own = [frontal.surface_point[item][mask][:, 1].mean() for item, mask in enumerate(shown)]
        shared = [frontal.canonical_point[item][mask][:, 1].mean() for item, mask in enumerate(shown)]
        assert max(own) - min(own) > 0.06
        assert max(shared) - min(shared) < 0.045


def test_the_head_fills_a_sensible_share(people, views, frontal):
    share = frontal.head_mask.float().mean((1, 2))
    assert ((share > 0.2) & (share < 0.6)).all()
    assert frontal.head_mask[:, 48:80, 56:72].all()  # the face is in the middle
    assert not frontal.head_mask[:, :8, :8].any()
    assert (frontal.surface_point[~frontal.head_mask] == 0).all()
    assert (frontal.surface_point[frontal.head_mask].norm(dim=-1) < 2.2).all()
    for item in range(4):
        assert set(frontal.part[item].unique().tolist()) == {int(part) for part in Part}


@pytest.mark.parametrize("part", ["skin", "hair", "iris", "lip", "brow"])
def test_parts_have_their_identity_s_colours_in_flat_light(people, views, frontal, part):
    label = {"skin": Part.SKIN, "hair": Part.HAIR, "iris": Part.IRIS, "lip": Part.LIPS, "brow": Part.BROWS}[part]
    if part == "skin":
        people = replace(people, beard=torch.zeros(4))
        frontal = render(people, views.turned(0).in_flat_light())
    tolerance = {"hair": 0.12, "skin": 0.03}.get(part, 0.05)  # hair has its ripple
    for item, colour in enumerate(getattr(people, f"{part}_colour")):
        seen = frontal.albedo[item].permute(1, 2, 0)[frontal.part[item] == label].median(0).values
        torch.testing.assert_close(seen, colour, rtol=0, atol=tolerance)
    spread = getattr(people, f"{part}_colour").std(0).max()
    assert spread > 0.05  # else any colour would do


def test_flat_light_shows_the_colours_and_outlines_are_smooth(frontal):
    difference = (frontal.image - frontal.albedo).abs().amax(1)
    changed = difference > 2e-3
    share = changed.float().mean((1, 2))
    assert ((share > 0.01) & (share < 0.15)).all()
    grown = torch.nn.functional.max_pool2d(frontal.head_mask.float(), 3, stride=1, padding=1) > 0.5
    edge = grown & ~frontal.head_mask
    assert changed[edge].float().mean() > 0.15
    inside = _pixels(frontal, 0, Part.SKIN)
    assert len(inside) > 500


def test_the_body_and_the_background_are_the_view_s(people, views):
    first, second = render(people[:1], views[:1], 64), render(people[1:2], views[:1], 64)
    both = (first.part == Part.BACKGROUND) & (second.part == Part.BACKGROUND)
    inner = -torch.nn.functional.max_pool2d(-both.float(), 5, stride=1, padding=2) > 0.5
    assert inner.sum() > 300
    assert torch.equal(first.image.permute(0, 2, 3, 1)[inner], second.image.permute(0, 2, 3, 1)[inner])
    clothes = [render(people[:1], views[i : i + 1].in_flat_light(), 64) for i in range(2)]
    means = [r.image.permute(0, 2, 3, 1)[r.part == Part.CLOTHES].mean(0) for r in clothes]
    assert (means[0] - means[1]).abs().max() > 0.1


def test_pairs_are_what_training_needs():
    pairs = render_pairs(11, 4, cross_identity_share=0.5, size=64)
    same = pairs.same_identity.tolist()
    assert True in same and False in same
    for item, is_same in enumerate(same):
        reference, target = pairs.reference.image[item], pairs.target.image[item]
        assert torch.equal(reference, target) == is_same
        shown = (pairs.reference.part[item] == Part.BACKGROUND) & (pairs.target.part[item] == Part.BACKGROUND)
        shown = -torch.nn.functional.max_pool2d(-shown.float()[None, None], 5, stride=1, padding=2)[0, 0] > 0.5
        torch.testing.assert_close(reference[:, shown], target[:, shown])
        assert not torch.equal(pairs.profile.image[item], target)
        irises = [r.albedo[item][:, r.part[item] == Part.IRIS].median(1).values for r in (pairs.profile, pairs.target)]
        assert (irises[0] - irises[1]).abs().max() < 0.1  # the target shows the profile's person
    assert render_pairs(11, 2, cross_identity_share=0, size=32).same_identity.all()
    assert not render_pairs(11, 2, cross_identity_share=1, size=32).same_identity.any()


def test_pairs_keep_their_place_and_their_true_flow():
    pairs = training_batch(11, 3, size=64, grids=(16, 8))
    later = training_batch(11, 1, size=64, grids=(16, 8), first=2)
    assert (pairs.target[2].int() - later.target[0].int()).abs().max() <= 1
    assert pairs.same_identity[2] == later.same_identity[0]
    rendered = render_pairs(11, 3, size=64)
    for grid in (16, 8):
        flow, visible = pairs.flow(grid, (16, 8))
        expected_flow, expected_visible = correspondence(rendered.profile, rendered.target, grid)
        assert torch.equal(visible, expected_visible)
        assert torch.equal(flow, expected_flow)
    profile, _, _ = pairs.images()
    torch.testing.assert_close((profile + 1) / 2, rendered.profile.image, rtol=0, atol=0.003)


def test_four_pictures_make_four_training_pairs():
    pairs = crossed_set(11, 8, size=64, grids=(16, 8))
    assert torch.equal(pairs.target, pairs.profile[[2, 3, 0, 1, 6, 7, 4, 5]])
    assert torch.equal(pairs.reference, pairs.profile[[3, 2, 1, 0, 7, 6, 5, 4]])
    assert not pairs.same_identity.any()
    pictures = list(pairs.profile.unbind())
    assert not any(torch.equal(a, b) for place, a in enumerate(pictures) for b in pictures[:place])
    # 0 and 1 are two people in one view, 0 and 2 one person in two.
    background = [picture[:, :6, :6].float().mean((1, 2)) for picture in pictures]
    assert (background[0] - background[1]).abs().max() < 2
    assert (background[0] - background[2]).abs().max() > 5
    later = crossed_set(11, 4, size=64, grids=(16, 8), first=4)
    assert (pairs.profile[4:].int() - later.profile.int()).abs().max() <= 1
    flow, visible = pairs.flow(16, (16, 8))
    moved = flow[visible] != torch.arange(256).expand(8, -1)[visible]
    assert visible.any(1).all() and moved.float().mean() > 0.3
    with pytest.raises(ValueError, match="pairs 2 to 6: expected multiples of 4"):
        crossed_set(11, 4, first=2)


@pytest.mark.parametrize("variety", VARIETIES.values(), ids=VARIETIES)
def test_what_is_drawn_keeps_to_its_variety_and_uses_it(variety: Variety):
    heads, views = draw_identities(range(300), variety), draw_views(range(300), variety)
    azimuth = torch.atan2(views.light_direction[:, 0], views.light_direction[:, 2]).rad2deg()
    drawn = {
        "yaw_degrees": views.yaw.rad2deg(),
        "pitch_degrees": views.pitch.rad2deg(),
        "zoom": views.zoom,
        "light_azimuth_degrees": azimuth,
        "light_elevation_degrees": views.light_direction[:, 1].asin().rad2deg(),
        "ambient": views.ambient[:, 1],
        "background": views.background,
        "clothes": views.clothes,
    }
    for name, values in drawn.items():
        low, high = getattr(variety, name)
        assert low - 1e-3 <= values.min() < low + 0.1 * (high - low), name
        assert high + 1e-3 >= values.max() > high - 0.1 * (high - low), name
    striped = (views.clothes_stripes > 0).float().mean()
    assert abs(striped - variety.striped_share) < 0.1
    bald, buns = (heads.hair_top < 0).float().mean(), (heads.bun_size > 0).float().mean()
    assert abs(bald - variety.hair_styles[0]) < 0.06 and abs(buns - variety.hair_styles[4]) < 0.06
    for shares in (variety.hair_styles, variety.hair_colours):
        assert math.isclose(sum(shares), 1)


def test_evaluation_never_shows_a_trained_identity(monkeypatch):
    drawn = []

    def note(seeds, variety=NARROW):
        drawn.append(list(seeds))
        return draw_identities(seeds, variety)

    monkeypatch.setattr(pairs_module, "draw_identities", note)
    render_pairs(1, 2, size=32, cross_identity_share=1)
    crossed_set(1, 4, size=32, grids=(8,))
    assert all(seed < FIRST_EVALUATION_SEED for seeds in drawn for seed in seeds)
    drawn.clear()
    render_pairs(1, 2, size=32, cross_identity_share=1, evaluation=True)
    assert len(drawn) == 2
    assert all(seed >= FIRST_EVALUATION_SEED for seeds in drawn for seed in seeds)


def test_the_cache_renders_once(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(pairs_module, "_SHARD", 4)
    cache = PairCache(tmp_path / "pairs", seed=4, size=32, grids=(8,))
    first = cache.pairs(5)
    assert len(first) == 5
    assert sorted(path.name for path in cache.folder.iterdir()) == [cache.path(0).name, cache.path(1).name]
    monkeypatch.setattr(pairs_module, "crossed_set", lambda *_: pytest.fail("rendered again"))
    again = PairCache(tmp_path / "pairs", seed=4, size=32, grids=(8,)).pairs(5)
    for field in fields(first):
        assert torch.equal(getattr(first, field.name), getattr(again, field.name))
        assert getattr(first, field.name).dtype == getattr(again, field.name).dtype
    for change in ({"seed": 5}, {"variety": "wide"}):
        other = PairCache(tmp_path / "pairs", **{"seed": 4, "size": 32, "grids": (8,), **change})
        assert other.path(0) not in list(cache.folder.iterdir())


def test_what_does_not_fit_is_refused(people, views, frontal):
    with pytest.raises(ValueError, match="3 views for 4 identities"):
        render(people, views[:3])
    with pytest.raises(ValueError, match="size: 50, expected a multiple of 4"):
        render(people, views, 50)
    with pytest.raises(ValueError, match="grid: 24, expected a divisor of 128"):
        correspondence(frontal, frontal, 24)
    with pytest.raises(ValueError, match="target:"):
        correspondence(frontal, render(people, views, 64), 16)
