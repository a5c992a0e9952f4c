"""The public models' tensors: what is read from a message, and what is refused before it is."""

from __future__ import annotations

import json
import struct
from typing import Any

import numpy as np
import pytest
from google.protobuf import json_format
from tritonclient.utils import serialize_byte_tensor

from icportrait.errors import InvalidRequest, NotFound
from icportrait.gateway.api import Event, Portraits, Statistics
from icportrait.gateway.kserve import (
    KserveModels,
    answer_tensors,
    event_tensors,
    raw_of,
    tensor_of_raw,
    tensor_of_values,
    to_json,
    wanted_outputs,
)
from icportrait.policy import ServingPolicy
from icportrait.request import parse_request

ALL = ["image", "metadata", "step", "total_steps"]


@pytest.fixture
def models() -> KserveModels:
    return KserveModels(ServingPolicy(slots=4))


def element(data: bytes) -> bytes:
    return struct.pack("<I", len(data)) + data


def test_raw_tensors_are_what_numpy_says() -> None:
    assert tensor_of_raw("seed", "INT64", [1], np.array([2**62]).tobytes()).tolist() == [2**62]
    box = tensor_of_raw("profile_box", "FP32", [4], memoryview(np.array([0, 0.25, 0.5, 1], np.float32).tobytes()))
    assert (box.dtype, box.tolist()) == (np.float32, [0, 0.25, 0.5, 1])
    picture = tensor_of_raw("profile", "BYTES", [1], element(b"a picture\0"))
    assert (picture.dtype, picture.shape, picture[0]) == (object, (1,), b"a picture\0")


def test_what_was_read_passes_the_request_check() -> None:
    tensors = {
        "profile": tensor_of_raw("profile", "BYTES", [1], element(b"p")),
        "reference": tensor_of_values("reference", "BYTES", [1], ["r"]),
        "num_portraits": tensor_of_values("num_portraits", "INT32", [1], [2]),
        "mask_ratio": tensor_of_values("mask_ratio", "FP32", [1], [0.5]),
        "scheduler": tensor_of_values("scheduler", "BYTES", [1], ["euler"]),
    }
    defaults = {"num_inference_steps": 3, "guidance_scale": 1.0}
    request, profile, reference = parse_request(tensors, defaults)
    assert (profile, reference) == (b"p", b"r")
    assert (request.num_portraits, request.mask_ratio, request.scheduler) == (2, 0.5, "euler")


@pytest.mark.parametrize(
    ("name", "datatype", "shape", "data", "message"),
    [
        ("colour", "INT32", [1], b"\0" * 4, "colour: no such input, expected some of profile, reference"),
        ("seed", "INT32", [1], b"\0" * 4, "seed: type is INT32, expected INT64"),
        ("seed", "INT64", [2], b"\0" * 16, r"seed: shape is \[2\], expected \[1\]"),
        ("seed", "INT64", [], b"\0" * 8, r"seed: shape is \[\], expected \[1\]"),
        ("seed", "INT64", [-1], b"\0" * 8, r"seed: shape is \[-1\], expected \[1\]"),
        ("seed", "INT64", [1], b"\0" * 7, "seed: 7 bytes, expected 8"),
        ("profile", "BYTES", [1], b"", "profile: ends within an element"),
        ("profile", "BYTES", [1], b"\1\0", "profile: ends within an element"),
        ("profile", "BYTES", [1], b"\xff\xff\xff\xff", "profile: ends within an element"),
        ("profile", "BYTES", [1], element(b"a") + b"bc", "profile: 2 bytes follow its last element"),
    ],
)
def test_wrong_raw_tensors_are_named(name: str, datatype: str, shape: list[int], data: bytes, message: str) -> None:
    with pytest.raises(InvalidRequest, match=message):
        tensor_of_raw(name, datatype, shape, data)


@pytest.mark.parametrize(
    ("name", "datatype", "values", "message"),
    [
        ("num_portraits", "INT32", [2**32 + 1], "num_portraits: 4294967297, expected 1..8"),
        ("num_portraits", "INT32", [10**5000], "num_portraits: a number of more than 30 digits, expected 1..8"),
        ("num_portraits", "INT32", [1.0], "num_portraits: 1.0, expected elements of type INT32"),
        ("num_portraits", "INT32", [True], "num_portraits: True, expected elements of type INT32"),
        ("num_portraits", "INT32", ["1"], "num_portraits: '1', expected elements of type INT32"),
        ("num_portraits", "INT32", [[1]], "num_portraits: a list, expected elements of type INT32"),
        ("num_portraits", "INT32", [], "num_portraits: 0 elements, expected 1"),
        ("mask_ratio", "FP32", [None], "mask_ratio: None, expected elements of type FP32"),
        ("scheduler", "BYTES", [3], "scheduler: 3, expected elements of type BYTES"),
    ],
)
def test_wrong_elements_are_named_and_integers_never_wrap(
    name: str, datatype: str, values: list[Any], message: str
) -> None:
    with pytest.raises(InvalidRequest, match=message):
        tensor_of_values(name, datatype, [1], values)


def test_a_number_too_large_for_a_float_is_refused_by_the_range() -> None:
    assert tensor_of_values("mask_ratio", "FP32", [1], [10**400]).tolist() == [np.inf]


def test_outputs_of_the_last_answer_and_of_those_before() -> None:
    last = answer_tensors(Portraits((b"one", b"two"), b"{}", 5), ALL)
    assert list(last) == ALL
    assert [last["image"].tolist(), last["metadata"].tolist()] == [[b"one", b"two"], [b"{}"]]
    assert [last["step"].tolist(), last["total_steps"].tolist()] == [[5], [5]]
    assert set(event_tensors(Event(2, 5), ALL)) == {"step", "total_steps"}
    assert set(event_tensors(Event(2, 5, (b"preview",)), ALL)) == {"image", "step", "total_steps"}
    assert set(answer_tensors(Portraits((b"one",), b"{}", 5), {"metadata"})) == {"metadata"}


def test_raw_outputs_are_what_tritonclient_would_write() -> None:
    images = answer_tensors(Portraits((b"one", b""), b"{}", 5), ALL)["image"]
    assert raw_of(images) == serialize_byte_tensor(images).item()
    assert raw_of(np.array([7], np.int32)) == b"\7\0\0\0"


def test_all_outputs_are_wanted_unless_some_are() -> None:
    assert wanted_outputs([]) == set(ALL)
    assert wanted_outputs([("image", ["binary_data", "anything"])]) == {"image"}


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ([("pixels", [])], "pixels: no such output, expected some of image, metadata"),
        ([("image", ["classification"])], "image: classification is not offered"),
        ([("image", ["shared_memory_region"])], "image: shared memory is not offered"),
    ],
)
def test_what_outputs_do_not_offer_is_refused_by_name(asked: list[Any], message: str) -> None:
    with pytest.raises(InvalidRequest, match=message):
        wanted_outputs(asked)


def test_models_are_found_by_name_and_version(models: KserveModels) -> None:
    assert not models.find("ic_portrait").is_stream
    assert models.find("ic_portrait_stream", "1").is_stream
    with pytest.raises(NotFound, match=r"^Request for unknown model: 'denoise' is not found$"):
        models.find("denoise")
    with pytest.raises(NotFound, match="version 2 is not found"):
        models.config("ic_portrait", "2")


def test_a_config_says_what_clients_read_of_it(models: KserveModels) -> None:
    config = models.config("ic_portrait_stream")
    assert config.model_transaction_policy.decoupled
    assert config.max_batch_size == 0
    assert {field.name for field in config.input if not field.optional} == {"profile", "reference"}
    assert config.parameters["slots"].string_value == "4"
    assert not models.config("ic_portrait").model_transaction_policy.decoupled


def test_statistics_add_up(models: KserveModels) -> None:
    counted = {"ic_portrait": Statistics(3, 300, 2, 20, queued_ns=100, last_ms=9)}
    (model,) = models.statistics(counted, "ic_portrait").model_stats
    stats = model.inference_stats
    assert (model.inference_count, model.execution_count, model.last_inference) == (3, 3, 9)
    assert (stats.success.count, stats.success.ns, stats.fail.count, stats.fail.ns) == (3, 300, 2, 20)
    assert (stats.queue.ns, stats.compute_infer.ns) == (100, 200)
    assert [each.name for each in models.statistics(counted).model_stats] == ["ic_portrait", "ic_portrait_stream"]


def test_json_has_numbers_and_defaults_and_is_read_back(models: KserveModels) -> None:
    metadata = to_json(models.metadata("ic_portrait"))
    assert metadata["inputs"][2] == {"name": "seed", "datatype": "INT64", "shape": [1]}
    config = to_json(models.config("ic_portrait"))
    assert config["input"][0]["dims"] == [1]
    assert config["max_batch_size"] == 0
    assert config["parameters"]["slots"] == {"string_value": "4"}
    expected = models.config("ic_portrait")
    assert json_format.Parse(json.dumps(config), type(expected)()) == expected
