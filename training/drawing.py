"""Heads and views drawn from seeds, each from its own, the same on every machine.

Seeds below ``FIRST_EVALUATION_SEED`` are for training, the others for evaluation, so no evaluated identity was trained.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from training.parameters import Identity, View, direction_to

FIRST_EVALUATION_SEED = 2**32
Uniforms = NDArray[np.float64]


class Draw(IntEnum):
    """The uses of a seed's numbers: the second word of the generator's key, apart from the server's."""

    IDENTITY = 1001
    VIEW = 1002
    PAIR = 1003


def uniforms(seed: int, draw: Draw, count: int) -> Uniforms:
    """Draw ``[count]`` uniform numbers in 0..1 that depend on seed and draw alone, the same on every machine."""
    bits = np.random.Philox(key=np.array([seed, int(draw)], dtype=np.uint64)).random_raw(count)
    return (np.asarray(bits, dtype=np.uint64) >> np.uint64(11)).astype(np.float64) * 2.0**-53


_SHAPE_RANGES = {
    "skull_width": (0.66, 0.80),
    "skull_height": (0.68, 0.80),
    "skull_depth": (0.78, 0.90),
    "jaw_width": (0.50, 0.68),
    "chin_y": (-1.12, -0.92),
    "chin_size": (0.16, 0.28),
    "cheek_size": (0.20, 0.33),
    "brow_ridge": (0.06, 0.13),
    "neck_size": (0.28, 0.42),
    "eye_x": (0.275, 0.345),
    "eye_y": (0.02, 0.11),
    "eye_size": (0.155, 0.195),
    "eye_open": (0.5, 0.9),
    "eye_tilt": (-0.12, 0.22),
    "nose_y": (-0.33, -0.20),
    "nose_out": (0.14, 0.32),
    "nose_width": (0.07, 0.15),
    "mouth_y": (-0.62, -0.53),
    "mouth_width": (0.20, 0.32),
    "mouth_curve": (-0.02, 0.06),
    "lip_fullness": (0.045, 0.09),
    "ear_size": (0.15, 0.24),
    "ear_out": (0.02, 0.12),
    "brow_y": (0.22, 0.29),
    "brow_thickness": (0.025, 0.06),
    "brow_arch": (0.0, 0.07),
    "brow_tilt": (-0.12, 0.18),
    "hair_parting": (-0.16, 0.16),
}


@dataclass(frozen=True)
class Variety:
    """The variety of heads and views: ``(low, high)`` of evenly drawn values, and shares that sum to 1."""

    yaw_degrees: tuple[float, float]
    pitch_degrees: tuple[float, float]
    roll_degrees: tuple[float, float]
    zoom: tuple[float, float]
    offset_x: tuple[float, float]
    offset_y: tuple[float, float]
    light_azimuth_degrees: tuple[float, float]
    light_elevation_degrees: tuple[float, float]
    light_strength: tuple[float, float]
    ambient: tuple[float, float]
    background: tuple[float, float]
    """Range of each channel of a background's colours."""
    background_contrast: float
    """Distance between the two colours of a background: 1 as they are drawn, 0 none."""
    glow_x: tuple[float, float]
    """Place at which the background is brighter."""
    glow_y: tuple[float, float]
    clothes: tuple[float, float]
    """Range of each channel of the clothes' colours."""
    clothes_contrast: float
    """Distance between the two colours of the clothes, as for the background."""
    striped_share: float
    hair_styles: tuple[float, ...]
    """Shares: bald, shorn, short, full, bun, bob, long."""
    hair_colours: tuple[float, ...]
    """Shares: black, dark brown, brown, auburn, orange, blond, grey, white, blue, pink."""


NARROW = Variety(
    yaw_degrees=(-35, 35),
    pitch_degrees=(-8, 8),
    roll_degrees=(-4, 4),
    zoom=(0.97, 1.05),
    offset_x=(-0.04, 0.04),
    offset_y=(-0.03, 0.03),
    light_azimuth_degrees=(-70, 70),
    light_elevation_degrees=(0, 45),
    light_strength=(0.50, 0.80),
    ambient=(0.35, 0.55),
    background=(0.35, 0.85),
    background_contrast=0.4,
    glow_x=(-0.3, 0.3),
    glow_y=(-0.1, 0.4),
    clothes=(0.15, 0.75),
    clothes_contrast=0.5,
    striped_share=0.0,
    hair_styles=(0.0, 0.18, 0.46, 0.0, 0.0, 0.20, 0.16),
    hair_colours=(0.24, 0.22, 0.18, 0.10, 0.06, 0.14, 0.06, 0.0, 0.0, 0.0),
)
"""The demo checkpoint's variety: turned no further than a posing person, evenly lit, plainly dressed."""
WIDE = Variety(
    yaw_degrees=(-50, 50),
    pitch_degrees=(-16, 16),
    roll_degrees=(-7, 7),
    zoom=(0.94, 1.08),
    offset_x=(-0.08, 0.08),
    offset_y=(-0.06, 0.06),
    light_azimuth_degrees=(-85, 85),
    light_elevation_degrees=(-15, 60),
    light_strength=(0.65, 1.15),
    ambient=(0.22, 0.5),
    background=(0.1, 0.95),
    background_contrast=1.0,
    glow_x=(-0.7, 0.7),
    glow_y=(-0.4, 0.8),
    clothes=(0.06, 0.95),
    clothes_contrast=1.0,
    striped_share=0.4,
    hair_styles=(0.08, 0.12, 0.26, 0.12, 0.12, 0.14, 0.16),
    hair_colours=(0.17, 0.15, 0.13, 0.09, 0.10, 0.14, 0.07, 0.06, 0.045, 0.045),
)
VARIETIES = {"narrow": NARROW, "wide": WIDE}

# The ranges of hair_top, hair_side, hair_bottom, hairline_y, hair_frame, bun_size for each of Variety.hair_styles.
_HAIR_STYLES = (
    ((-0.10, -0.06), (-0.10, -0.06), (-0.1, 0.0), (0.6, 0.7), (0.6, 0.7), (-0.3, -0.3)),  # bald
    ((0.03, 0.05), (0.02, 0.04), (-0.25, -0.1), (0.56, 0.72), (0.56, 0.66), (-0.3, -0.3)),  # shorn
    ((0.10, 0.24), (0.05, 0.11), (-0.3, -0.1), (0.48, 0.68), (0.56, 0.66), (-0.3, -0.3)),  # short
    ((0.28, 0.42), (0.24, 0.36), (-0.5, -0.2), (0.50, 0.66), (0.56, 0.66), (-0.3, -0.3)),  # full
    ((0.05, 0.10), (0.05, 0.08), (-0.3, -0.1), (0.48, 0.62), (0.54, 0.64), (0.24, 0.34)),  # bun
    ((0.10, 0.18), (0.14, 0.24), (-0.95, -0.6), (0.46, 0.64), (0.48, 0.60), (-0.3, -0.3)),  # bob
    ((0.08, 0.18), (0.12, 0.22), (-1.9, -1.4), (0.48, 0.70), (0.48, 0.62), (-0.3, -0.3)),  # long
)
_HAIR_FIELDS = ("hair_top", "hair_side", "hair_bottom", "hairline_y", "hair_frame", "bun_size")
_SKIN = ((0.97, 0.84, 0.77), (0.93, 0.75, 0.63), (0.83, 0.62, 0.47), (0.66, 0.45, 0.32), (0.48, 0.31, 0.22), (0.34, 0.22, 0.17))  # fmt: skip  # noqa: E501
_HAIR = ((0.10, 0.09, 0.10), (0.24, 0.15, 0.10), (0.42, 0.26, 0.15), (0.55, 0.22, 0.12), (0.78, 0.38, 0.14), (0.88, 0.72, 0.40), (0.62, 0.60, 0.60), (0.92, 0.90, 0.88), (0.25, 0.35, 0.70), (0.80, 0.35, 0.55))  # fmt: skip  # noqa: E501
_IRIS = ((0.30, 0.17, 0.09), (0.52, 0.34, 0.12), (0.25, 0.50, 0.28), (0.22, 0.48, 0.78), (0.45, 0.55, 0.62))


def draw_identities(seeds: Sequence[int], variety: Variety = NARROW) -> Identity:
    """Draw one head per seed. A seed's head doesn't depend on the other seeds."""
    return Identity.cat([_identity(uniforms(seed, Draw.IDENTITY, 64), variety) for seed in seeds])


def draw_views(seeds: Sequence[int], variety: Variety = NARROW) -> View:
    """Draw one view per seed. A seed's view doesn't depend on the other seeds."""
    return View.cat([_view(uniforms(seed, Draw.VIEW, 64), variety) for seed in seeds])


def _identity(drawn: Uniforms, variety: Variety) -> Identity:
    numbers = iter(drawn.tolist())
    values: dict[str, float | list[float]] = {
        name: low + (high - low) * next(numbers) for name, (low, high) in _SHAPE_RANGES.items()
    }
    style = _choose(variety.hair_styles, next(numbers))
    for name, (low, high) in zip(_HAIR_FIELDS, _HAIR_STYLES[style], strict=True):
        values[name] = low + (high - low) * next(numbers)
    long_haired = style >= 4
    beard, strength = next(numbers), next(numbers)
    values["beard"] = 0.35 + 0.6 * strength if beard < (0.0 if long_haired else 0.35) else 0.0
    skin = _along(_SKIN, next(numbers)) * (1 + 0.06 * (np.array([next(numbers) for _ in range(3)]) - 0.5))
    hair = np.array(_HAIR[_choose(variety.hair_colours, next(numbers))]) * (0.85 + 0.3 * next(numbers))
    iris = np.array(_IRIS[int(next(numbers) * len(_IRIS))]) * (0.85 + 0.3 * next(numbers))
    painted, depth = next(numbers), next(numbers)
    red = np.array([0.78, 0.12, 0.22]) if painted < 0.3 else np.array([0.80, 0.36, 0.36]) * (0.6 + 0.4 * skin)
    lips = skin + (red - skin) * ((0.75 if painted < 0.3 else 0.45) + 0.25 * depth)
    brows = hair * 0.7 + 0.05 * skin
    if style == 0 or hair.min() > 0.8:  # the brows of bald and of white heads
        brows = 0.5 * brows + 0.25 * skin
    for name, colour in (("skin", skin), ("hair", hair), ("iris", iris), ("lip", lips), ("brow", brows)):
        values[f"{name}_colour"] = np.clip(colour, 0.03, 0.98).tolist()
    return Identity(**_tensors(values))


def _view(drawn: Uniforms, variety: Variety) -> View:
    numbers = iter(drawn.tolist())

    def between(low: float, high: float) -> float:
        return low + (high - low) * float(next(numbers))

    def colour(low: float, high: float) -> Uniforms:
        return np.array([between(low, high) for _ in range(3)])

    values: dict[str, float | list[float]] = {
        "yaw": math.radians(between(*variety.yaw_degrees)),
        "pitch": math.radians(between(*variety.pitch_degrees)),
        "roll": math.radians(between(*variety.roll_degrees)),
        "zoom": between(*variety.zoom),
        "offset": [between(*variety.offset_x), between(*variety.offset_y)],
        "light_direction": direction_to(
            between(*variety.light_azimuth_degrees), between(*variety.light_elevation_degrees)
        ),
    }
    strength, warmth, tint = between(*variety.light_strength), between(-1, 1), between(-1, 1)
    values["light_colour"] = [
        strength * (1 + 0.16 * warmth),
        strength * (1 + 0.04 * tint),
        strength * (1 - 0.2 * warmth),
    ]
    level, warmth = between(*variety.ambient), between(-1, 1)
    values["ambient"] = [level * (1 + 0.12 * warmth), level, level * (1 - 0.12 * warmth)]
    values["occlusion"] = 1.0
    background, second = colour(*variety.background), colour(*variety.background)
    second = background + variety.background_contrast * (second - background)
    values["background"], values["background_second"] = background.tolist(), second.tolist()
    values["background_shape"] = [
        between(0, math.tau),
        between(1, 6),
        between(*variety.glow_x),
        between(*variety.glow_y),
    ]
    clothes, clothes_second = colour(*variety.clothes), colour(*variety.clothes)
    clothes_second = clothes + variety.clothes_contrast * (clothes_second - clothes)
    values["clothes"], values["clothes_second"] = clothes.tolist(), clothes_second.tolist()
    striped, density = next(numbers), between(1.2, 2.5)
    values["clothes_stripes"] = density if striped < variety.striped_share else 0.0
    return View(**_tensors(values))


def _tensors(values: dict[str, float | list[float]]) -> dict[str, Tensor]:
    return {name: torch.tensor([value], dtype=torch.float32) for name, value in values.items()}


def _choose(shares: Sequence[float], uniform: float) -> int:
    """Return the index whose part of the unit interval, as long as its share, holds ``uniform``."""
    return min(int(np.searchsorted(np.cumsum(shares), uniform, side="right")), len(shares) - 1)


def _along(colours: Sequence[tuple[float, float, float]], position: float) -> Uniforms:
    """Return the colour at ``position`` (0..1) of a ramp of colours."""
    knots, table = np.linspace(0, 1, len(colours)), np.array(colours)
    return np.stack([np.interp(position, knots, table[:, channel]) for channel in range(3)])
