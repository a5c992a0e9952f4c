"""The public inputs: ranges, defaults and refusals."""

from __future__ import annotations

import json
import math
import re
import time

import numpy as np
import pytest

from icportrait.errors import InvalidRequest
from icportrait.request import INPUTS, MAX_SEED, PortraitRequest, parse_request

PICTURES = {name: np.array([b"picture"], dtype=object) for name in ("profile", "reference")}
DEFAULTS = {"guidance_scale": 1.5, "num_inference_steps": 12}


def parse(**tensors: np.ndarray) -> PortraitRequest:
    return parse_request({**PICTURES, **tensors}, DEFAULTS)[0]


def test_defaults() -> None:
    request = parse()
    assert (request.num_portraits, request.num_inference_steps, request.mask_ratio) == (1, 12, 0.8)
    assert (request.scheduler, request.output_format, request.encoding) == ("dpmpp_2m", "png", "binary")
    assert (request.guidance_scale, request.guidance_interval) == (1.5, (0.0, 1.0))
    assert request.profile_box is None


def test_an_absent_seed_is_drawn_anew_each_time() -> None:
    seeds = {parse().seed for _ in range(8)}
    assert len(seeds) > 1
    assert all(0 <= seed <= MAX_SEED for seed in seeds)


def test_pictures_come_back_as_they_were_sent() -> None:
    _, profile, reference = parse_request({**PICTURES, "profile": np.array([b"\x00\xff"], dtype=object)}, DEFAULTS)
    assert (profile, reference) == (b"\x00\xff", b"picture")


@pytest.mark.parametrize(
    ("name", "values", "dtype", "message"),
    [
        ("seed", [-1], np.int64, "seed: -1, expected 0..9223372036854775807"),
        ("num_portraits", [0], np.int32, "num_portraits: 0, expected 1..8"),
        ("num_portraits", [9], np.int32, "num_portraits: 9, expected 1..8"),
        ("num_inference_steps", [500], np.int32, "num_inference_steps: 500, expected 1..150"),
        ("guidance_scale", [0.5], np.float32, "guidance_scale: 0.5, expected 1.0..20.0"),
        ("guidance_scale", [np.nan], np.float32, "guidance_scale: nan, expected 1.0..20.0"),
        (
            "guidance_interval",
            [0.6, 0.4],
            np.float32,
            r"guidance_interval: \[0.6, 0.4\], expected a begin that isn't after",
        ),
        ("guidance_interval", [-0.1, 0.4], np.float32, "guidance_interval: -0.1, expected 0.0..1.0"),
        ("guidance_interval", [0.4, 1.1], np.float32, "guidance_interval: 1.1, expected 0.0..1.0"),
        ("guidance_interval", [0.4, np.nan], np.float32, "guidance_interval: nan, expected 0.0..1.0"),
        ("guidance_interval", [0.4], np.float32, r"guidance_interval: shape is \[1\], expected \[2\]"),
        ("mask_ratio", [0.99], np.float32, "mask_ratio: 0.99, expected 0.0..0.98"),
        ("profile_box", [0, 0, 1, 1.5], np.float32, "profile_box: 1.5, expected 0.0..1.0"),
        ("scheduler", [b"heun"], object, "scheduler: 'heun', expected one of ddim, euler, dpmpp_2m"),
        ("output_format", [b"\xff"], object, "output_format: .*, expected one of png, jpeg, webp"),
        ("seed", [1], np.int32, "seed: type is int32, expected INT64"),
        ("seed", [1, 2], np.int64, r"seed: shape is \[2\], expected \[1\]"),
        ("colour", [1], np.int64, "colour: no such input, expected some of profile"),
    ],
)
def test_bad_values_are_refused_with_what_was_expected(name: str, values: list, dtype: type, message: str) -> None:
    with pytest.raises(InvalidRequest, match=message):
        parse(**{name: np.array(values, dtype=dtype)})


@pytest.mark.parametrize(
    "field", [field for field in INPUTS if field.maximum is not None], ids=lambda field: field.name
)
def test_both_ends_of_every_range_are_accepted(field) -> None:
    for end in (field.minimum, field.maximum):
        value = np.full(field.size, end, dtype=field.dtype.numpy)
        assert field.parse(value) == pytest.approx(end if field.size == 1 else (end,) * field.size)


def test_a_missing_picture_is_named() -> None:
    with pytest.raises(InvalidRequest, match="reference: missing, expected a picture's bytes"):
        parse_request({"profile": PICTURES["profile"]}, DEFAULTS)


def test_metadata_gets_the_decimal_the_caller_wrote() -> None:
    assert parse(mask_ratio=np.array([0.3], np.float32)).mask_ratio == 0.3


def test_a_request_survives_json() -> None:
    request = parse(
        profile_box=np.array([0, 0.25, 0.5, 1], np.float32),
        guidance_interval=np.array([0.1, 0.7], np.float32),
        seed=np.array([MAX_SEED]),
    )
    assert request.guidance_interval == (0.1, 0.7)
    assert PortraitRequest.from_json(request.to_json()) == request


@pytest.mark.parametrize(
    ("interval", "message"),
    [
        ([0.6, 0.4], "guidance_interval: [0.6, 0.4], expected a begin that isn't after its end"),
        ([0.6, 1.4], "guidance_interval: 1.4, expected 0.0..1.0"),
        ([0.6], "guidance_interval"),
        (None, "guidance_interval"),
    ],
)
def test_an_interval_is_checked_again_within_the_server(interval: object, message: str) -> None:
    changed = json.loads(parse().to_json()) | {"guidance_interval": interval}
    with pytest.raises(InvalidRequest, match=f"^{re.escape(message)}"):
        PortraitRequest.from_json(json.dumps(changed))


@pytest.mark.parametrize(("guidance", "rows"), [(1.0, 3), (1.01, 6)])
def test_guidance_of_one_costs_one_row(guidance: float, rows: int) -> None:
    request = parse(num_portraits=np.array([3], np.int32), guidance_scale=np.array([guidance], np.float32))
    assert request.rows == rows


def test_a_deadline_counts_from_the_requests_arrival() -> None:
    before = time.monotonic()
    request = parse(deadline_ms=np.array([1500], np.int32), priority=np.array([0], np.int32))
    assert before + 1.5 <= request.deadline_s <= time.monotonic() + 1.5
    assert request.priority == 0
    assert PortraitRequest.from_json(request.to_json()).deadline_s == request.deadline_s
    assert (parse().priority, parse().deadline_s) == (1, math.inf)


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("priority", -1, "priority: -1, expected 0..9"),
        ("priority", 10, "priority: 10, expected 0..9"),
        ("deadline_ms", 0, "deadline_ms: 0, expected 1..3600000"),
    ],
)
def test_an_order_that_cant_be_is_refused(name: str, value: int, expected: str) -> None:
    with pytest.raises(InvalidRequest, match=f"^{re.escape(expected)}$"):
        parse(**{name: np.array([value], np.int32)})
