"""Random numbers that belong to a seed: the same on every machine and under every version of numpy.

Two things are avoided because they may change: the ``Generator`` methods, whose algorithms numpy replaces between
versions, and ``np.log``, ``np.sin`` and ``np.cos``, whose last bit depends on the processor's vector units. What is
left is the raw output of Philox-4x64 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011), a pure
function of key and counter, and arithmetic that IEEE 754 defines to the bit: + - * / and the square root.
"""

from __future__ import annotations

import math
from enum import IntEnum

import numpy as np
from numpy.typing import NDArray

from icportrait.errors import InvalidRequest
from icportrait.presets import Preset

MAX_SEED = 2**64 - 1
Doubles = NDArray[np.float64]
_LN_2 = 0.6931471805599453


class Stream(IntEnum):
    """The uses of a seed's numbers. The streams of one seed are independent of each other."""

    MASK = 1
    NOISE = 2


def raw_bits(seed: int, stream: Stream, count: int) -> NDArray[np.uint64]:
    """Draw the first ``count`` 64-bit words of a seed's stream: ``[count]`` uint64, a prefix of every longer draw.

    Raises:
        InvalidRequest: ``seed`` isn't within 0..2**64-1.
    """
    if not 0 <= seed <= MAX_SEED:
        raise InvalidRequest(f"seed: {seed}, expected 0..{MAX_SEED}")
    # The key's two words are the seed and the stream: no two pairs share a key, and nothing is hashed or cut off.
    key = np.array([seed, int(stream)], dtype=np.uint64)
    return np.asarray(np.random.Philox(key=key).random_raw(count), dtype=np.uint64)


def unit_normal(seed: int, stream: Stream, shape: tuple[int, ...]) -> NDArray[np.float32]:
    """Draw independent numbers from the unit normal distribution: ``shape`` float32.

    Box and Muller, "A note on the generation of random normal deviates", 1958: two uniforms give two normals.
    The uniforms have 53 bits; the one under the logarithm is in (0, 1], so no draw is infinite.
    """
    count = math.prod(shape)
    uniforms = (raw_bits(seed, stream, count + count % 2) >> np.uint64(11)).astype(np.float64)
    radius = np.sqrt(-2.0 * _log((uniforms[0::2] + 1.0) * 2.0**-53))
    cosine, sine = _cos_sin_turns(uniforms[1::2] * 2.0**-53)
    normals: Doubles = np.stack([radius * cosine, radius * sine], axis=1).reshape(-1)
    return normals[:count].reshape(shape).astype(np.float32)


def canvas_noise(preset: Preset, seed: int) -> NDArray[np.float32]:
    """Draw the noise from which a request's canvas is denoised: ``[latent_channels, s, 2 s]`` float32, unit normal."""
    side = preset.latent_size
    return unit_normal(seed, Stream.NOISE, (preset.latent_channels, side, 2 * side))


def _log(x: Doubles) -> Doubles:
    """Return ``log x`` of ``x`` in (0, 1]: ``x = m 2**e``, ``log m = 2 artanh((m - 1) / (m + 1))`` by its series."""
    mantissa, exponent = np.frexp(x)
    low = mantissa < math.sqrt(0.5)
    mantissa, exponent = np.where(low, mantissa * 2.0, mantissa), exponent - low
    t: Doubles = (mantissa - 1.0) / (mantissa + 1.0)  # |t| < 0.172: twelve terms reach 1e-18
    series = 2.0 * t * _polynomial(t * t, [1.0 / (2 * k + 1) for k in range(12)])
    logarithm: Doubles = exponent * _LN_2 + series
    return logarithm


def _cos_sin_turns(turns: Doubles) -> tuple[Doubles, Doubles]:
    """Return cosine and sine of ``2 pi turns``, ``turns`` in [0, 1): Taylor series about the nearest quarter turn."""
    quarter = np.floor(turns * 4.0 + 0.5)
    angle = (turns * 4.0 - quarter) * (math.pi / 2)  # |angle| <= pi / 4: ten terms reach 1e-19
    square = angle * angle
    cosine = _polynomial(square, [(-1.0) ** k / math.factorial(2 * k) for k in range(10)])
    sine = angle * _polynomial(square, [(-1.0) ** k / math.factorial(2 * k + 1) for k in range(10)])
    odd, turned = quarter % 2 == 1, np.isin(quarter, (2.0, 3.0))
    swapped_cosine, swapped_sine = np.where(odd, -sine, cosine), np.where(odd, cosine, sine)
    return np.where(turned, -swapped_cosine, swapped_cosine), np.where(turned, -swapped_sine, swapped_sine)


def _polynomial(x: Doubles, coefficients: list[float]) -> Doubles:
    """Return ``sum(coefficients[k] * x**k)`` by Horner's rule."""
    total = np.full_like(x, coefficients[-1])
    for coefficient in reversed(coefficients[:-1]):
        total = total * x + coefficient
    return total
