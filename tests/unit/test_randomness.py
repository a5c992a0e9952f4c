import hashlib
import math

import numpy as np
import pytest

from icportrait.diffusion.randomness import Stream, canvas_noise, raw_bits, unit_normal
from icportrait.errors import InvalidRequest
from icportrait.presets import DEMO_128, SD15_512

WIDE_SEEDS = [0, 1, 2**32, 2**53, 2**53 + 1, 2**63 - 1, 2**63, 2**63 + 6, 2**64 - 1]
WORD = 2**64 - 1


def philox_4x64(key: tuple[int, int], counter: int) -> list[int]:
    """Compute Philox-4x64 with ten rounds in Python's integers, from the paper's definition."""
    state, (key_0, key_1) = [counter, 0, 0, 0], key
    for _ in range(10):
        product_0, product_1 = 0xD2E7470EE14C6C93 * state[0], 0xCA5A826395121157 * state[2]
        state = [
            (product_1 >> 64) ^ state[1] ^ key_0,
            product_1 & WORD,
            (product_0 >> 64) ^ state[3] ^ key_1,
            product_0 & WORD,
        ]
        key_0, key_1 = (key_0 + 0x9E3779B97F4A7C15) & WORD, (key_1 + 0xBB67AE8584CAA73B) & WORD
    return state


def test_the_reference_implementation_gives_the_papers_known_answer():
    assert philox_4x64((0, 0), 0)[0] == 0x16554D9ECA36314C


@pytest.mark.parametrize("seed", WIDE_SEEDS)
@pytest.mark.parametrize("stream", list(Stream))
def test_raw_bits_are_philox_keyed_by_seed_and_stream(seed, stream):
    expected = [word for counter in (1, 2, 3) for word in philox_4x64((seed, int(stream)), counter)]
    assert raw_bits(seed, stream, 12).tolist() == expected


def test_raw_bits_keep_their_values():
    assert [hex(word) for word in raw_bits(0, Stream.MASK, 2).tolist()] == ["0xd037f8c3f9a1d176", "0xc057419b4c210765"]
    assert [hex(word) for word in raw_bits(42, Stream.NOISE, 2).tolist()] == [
        "0x6d4a942db725cf48",
        "0xd7c00903ecc97903",
    ]


@pytest.mark.parametrize("seed", [-1, 2**64])
def test_a_seed_out_of_range_is_refused(seed):
    with pytest.raises(InvalidRequest, match=rf"^seed: {seed}, expected 0\.\.18446744073709551615"):
        raw_bits(seed, Stream.NOISE, 1)


def test_all_bits_of_a_seed_count():
    draws = [raw_bits(seed, stream, 1)[0] for seed in WIDE_SEEDS for stream in Stream]
    assert len(set(draws)) == len(draws)
    noises = [canvas_noise(DEMO_128, seed).tobytes() for seed in WIDE_SEEDS]
    assert len(set(noises)) == len(noises)


def test_normals_are_box_muller_on_53_bit_uniforms():
    words = raw_bits(9, Stream.NOISE, 1000).tolist()
    expected = []
    for first, second in zip(words[0::2], words[1::2], strict=True):
        radius = math.sqrt(-2 * math.log(((first >> 11) + 1) / 2**53))
        angle = 2 * math.pi * (second >> 11) / 2**53
        expected += [radius * math.cos(angle), radius * math.sin(angle)]
    np.testing.assert_allclose(unit_normal(9, Stream.NOISE, (1000,)), expected, rtol=2e-7, atol=1e-9)


def test_extreme_words_give_finite_normals(monkeypatch):
    words = np.array([0, 0, WORD, WORD, 0, WORD, WORD, 0, 2**63, 2**62, 2**63, 3 * 2**62], dtype=np.uint64)
    monkeypatch.setattr("icportrait.diffusion.randomness.raw_bits", lambda seed, stream, count: words[:count])
    normals = unit_normal(0, Stream.NOISE, (12,))
    farthest = math.sqrt(2 * 53 * math.log(2))
    np.testing.assert_allclose(normals[:4], [farthest, 0, 0, 0], atol=1e-6)
    half = math.sqrt(2 * math.log(2))
    np.testing.assert_allclose(normals[8:], [0, half, 0, -half], atol=1e-6)
    assert np.isfinite(normals).all()


@pytest.mark.parametrize("count", [1, 2, 7, 8])
def test_a_shorter_draw_is_the_beginning_of_a_longer_one(count):
    assert unit_normal(3, Stream.NOISE, (count,)).tolist() == unit_normal(3, Stream.NOISE, (9,))[:count].tolist()


def test_noise_keeps_its_values():
    noise = canvas_noise(DEMO_128, 42)
    assert [value.hex() for value in noise.reshape(-1)[:4].astype(float).tolist()] == [
        "0x1.6fb8480000000p-1",
        "-0x1.16da4a0000000p+0",
        "0x1.e42c260000000p-1",
        "-0x1.f0852a0000000p-4",
    ]
    assert hashlib.sha256(noise.astype("<f4").tobytes()).hexdigest() == (
        "35d5246452ffe9eeaedf60fafee495a9ea0ceed139f5f7dad7a628a76c076e82"
    )


@pytest.mark.parametrize("preset", [DEMO_128, SD15_512], ids=lambda preset: preset.name)
def test_noise_covers_the_canvas(preset):
    noise = canvas_noise(preset, 5)
    assert noise.shape == (4, preset.latent_size, 2 * preset.latent_size)
    assert noise.dtype == np.float32


@pytest.mark.parametrize("seed", [0, 1, 2**63 - 1, 2**63 + 6])
def test_noise_is_unit_normal(seed):
    noise = canvas_noise(SD15_512, seed).astype(np.float64).reshape(-1)
    n = noise.size
    assert abs(noise.mean()) < 4 / math.sqrt(n)
    assert abs(noise.var() - 1) < 4 * math.sqrt(2 / n)
    assert abs((noise**3).mean()) < 4 * math.sqrt(15 / n)
    assert abs((noise**4).mean() - 3) < 4 * math.sqrt(96 / n)
    for limit, inside in ((1, 0.682689), (2, 0.954500), (3, 0.997300)):
        assert abs((np.abs(noise) < limit).mean() - inside) < 4 * math.sqrt(inside * (1 - inside) / n)
    for lag in (1, 2, 3, 128):
        assert abs((noise[lag:] * noise[:-lag]).mean()) < 4 / math.sqrt(n - lag)


@pytest.mark.parametrize("first", [0, 12345, 2**32 - 4, 2**63 - 1])
def test_noises_of_consecutive_seeds_are_independent(first):
    noises = np.stack([canvas_noise(SD15_512, first + step).reshape(-1) for step in range(8)])
    correlations = np.corrcoef(noises)[np.triu_indices(8, k=1)]
    assert np.abs(correlations).max() < 5 / math.sqrt(noises.shape[1])


def test_streams_of_a_seed_are_independent():
    mask, noise = unit_normal(1, Stream.MASK, (32768,)), unit_normal(1, Stream.NOISE, (32768,))
    assert abs(np.corrcoef(mask, noise)[0, 1]) < 4 / math.sqrt(mask.size)
