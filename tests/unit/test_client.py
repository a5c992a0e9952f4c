"""The client against a real gRPC server that answers as the served model does, without Triton."""

from __future__ import annotations

import inspect
import io
import json
import os
import socket
import struct
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent import futures
from contextlib import contextmanager
from dataclasses import FrozenInstanceError
from fractions import Fraction
from pathlib import Path
from typing import Any

import grpc
import icportrait_client
import numpy as np
import pytest
from icportrait_client import (
    DeadlineExceeded,
    InvalidRequest,
    Metadata,
    Portrait,
    PortraitClient,
    PortraitError,
    PortraitOptions,
    RequestCancelled,
    ServerError,
    ServerOverloaded,
    ServerUnavailable,
)
from icportrait_client.cli import main
from PIL import Image
from tritonclient.grpc import service_pb2, service_pb2_grpc

from icportrait.errors import InvalidRequest as ServerInvalidRequest
from icportrait.gateway.kserve import KserveModels
from icportrait.policy import ServingPolicy
from icportrait.request import INPUTS, MAX_SEED, client_contract_text

PROFILE, REFERENCE = b"\xff\xd8\xff a profile", b"\xff\xd8\xff a reference"
"""Bytes that the client takes for JPEGs, and can't read."""
PICTURES: Any = {"profile": PROFILE, "reference": REFERENCE}
STAGE_MS = {"preprocess": 12.34, "conditioning": 50.0, "denoise": 1800.25, "decode": 90.0, "postprocess": 7.5}
METADATA = {"seed": 7, "steps": 20, "stage_ms": STAGE_MS, "versions": {"preset": "demo-128"}}


def png(color: tuple[int, int, int] = (200, 100, 50)) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (4, 4), color).save(buffer, format="PNG")
    return buffer.getvalue()


def decoded(data: bytes) -> Image.Image:
    picture = Image.open(io.BytesIO(data))
    picture.load()
    return picture


def bytes_tensor(*values: bytes) -> bytes:
    return b"".join(struct.pack("<I", len(value)) + value for value in values)


class FakeTriton(service_pb2_grpc.GRPCInferenceServiceServicer):  # type: ignore[misc]
    """Records what arrives and answers with ``images``, or fails with ``failure``."""

    url = ""

    def __init__(self) -> None:
        self.requests: list[Any] = []
        self.images: tuple[bytes, ...] = (png(),)
        self.metadata = json.dumps(METADATA).encode()
        self.failure: tuple[grpc.StatusCode, str] | None = None
        self.release = threading.Event()
        self.release.set()

    def ModelMetadata(self, request: Any, context: Any) -> Any:  # noqa: N802 - the service's own name
        return KserveModels(ServingPolicy()).metadata(request.name)

    def ModelInfer(self, request: Any, context: Any) -> Any:  # noqa: N802 - the service's own name
        self.requests.append(request)
        self.release.wait(30)
        if self.failure:
            context.abort(*self.failure)
        answer = service_pb2.ModelInferResponse(model_name=request.model_name)
        for name, values in (("image", self.images), ("metadata", (self.metadata,))):
            answer.outputs.add(name=name, datatype="BYTES", shape=[len(values)])
            answer.raw_output_contents.append(bytes_tensor(*values))
        return answer

    @property
    def sent(self) -> dict[str, tuple[str, list[int], bytes]]:
        """Return the only request's inputs by name: type, shape, raw bytes."""
        (request,) = self.requests
        assert len(request.inputs) == len(request.raw_input_contents)
        pairs = zip(request.inputs, request.raw_input_contents, strict=True)
        return {tensor.name: (tensor.datatype, list(tensor.shape), raw) for tensor, raw in pairs}

    def sent_picture(self, name: str) -> bytes:
        datatype, shape, raw = self.sent[name]
        assert (datatype, shape) == ("BYTES", [1])
        assert struct.unpack("<I", raw[:4]) == (len(raw) - 4,)
        return raw[4:]


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep gRPC from asking a configured proxy for a loopback address."""
    monkeypatch.setenv("no_grpc_proxy", "127.0.0.1")


@contextmanager
def serving(servicer: FakeTriton) -> Iterator[None]:
    unlimited = [("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1)]
    server = grpc.server(futures.ThreadPoolExecutor(4), options=unlimited)
    service_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(servicer, server)
    servicer.url = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    server.start()
    yield
    servicer.release.set()
    server.stop(None).wait()


@pytest.fixture
def triton() -> Iterator[FakeTriton]:
    servicer = FakeTriton()
    with serving(servicer):
        yield servicer


@pytest.fixture
def client(triton: FakeTriton) -> Iterator[PortraitClient]:
    with PortraitClient(triton.url, timeout_s=30, attempts=1) as client:
        yield client


@pytest.fixture
def free_url() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{probe.getsockname()[1]}"


# The contract


def test_contract_is_what_the_server_generates() -> None:
    packaged = Path(icportrait_client.__file__).with_name("contract.json")
    assert packaged.read_text("utf-8") == client_contract_text(), 'run "make configs"'


@pytest.mark.parametrize(("call", "lacks"), [("generate", {"encoding", "preview_every"}), ("stream", {"encoding"})])
def test_a_call_takes_every_input_of_the_contract(call: str, lacks: set[str]) -> None:
    parameters = set(inspect.signature(getattr(PortraitClient, call)).parameters) - {"self", "options", "timeout_s"}
    assert parameters | set(PortraitOptions.__annotations__) == {field.name for field in INPUTS} - lacks


@pytest.mark.parametrize("name", ["preview_every", "encoding", "colour"])
def test_generate_takes_nothing_else(triton: FakeTriton, client: PortraitClient, name: str) -> None:
    with pytest.raises(TypeError, match=f"unexpected keyword argument '{name}'"):
        client.generate(**PICTURES, **{name: None})  # type: ignore[arg-type]
    assert not triton.requests


# Pictures


def test_files_and_bytes_are_sent_as_they_are(triton: FakeTriton, client: PortraitClient, tmp_path: Path) -> None:
    path = tmp_path / "a.jpg"
    path.write_bytes(b"\xff\xd8\xff not decoded here \x00")
    data = path.read_bytes()
    for source in (path, str(path), data, bytearray(data), memoryview(data), io.BytesIO(data), path.open("rb")):
        triton.requests.clear()
        client.generate(profile=source, reference=REFERENCE)
        assert triton.sent_picture("profile") == data
        assert triton.sent_picture("reference") == REFERENCE
        if isinstance(source, io.BufferedReader):
            source.close()
    assert triton.requests[0].model_name == "ic_portrait"


@pytest.mark.parametrize("shape", [(5, 7, 3), (5, 7, 4), (5, 7)])
def test_array_arrives_without_loss(triton: FakeTriton, client: PortraitClient, shape: tuple[int, ...]) -> None:
    array = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    client.generate(profile=array, reference=array[:, ::-1])
    profile, reference = decoded(triton.sent_picture("profile")), decoded(triton.sent_picture("reference"))
    assert profile.format == "PNG"
    np.testing.assert_array_equal(np.asarray(profile), array)
    np.testing.assert_array_equal(np.asarray(reference), array[:, ::-1])


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA"])
def test_image_arrives_without_loss(triton: FakeTriton, client: PortraitClient, mode: str) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    image = Image.fromarray(pixels).convert(mode)
    client.generate(profile=image, reference=REFERENCE)
    arrived = decoded(triton.sent_picture("profile"))
    assert (arrived.format, arrived.mode) == ("PNG", mode)
    assert arrived.convert("RGBA").tobytes() == image.convert("RGBA").tobytes()


@pytest.mark.parametrize(
    ("mode", "expected"), [("CMYK", "RGB"), ("YCbCr", "RGB"), ("HSV", "RGB"), ("PA", "RGBA"), ("RGBa", "RGBA")]
)
def test_image_of_a_mode_png_lacks_is_converted(
    triton: FakeTriton, client: PortraitClient, mode: str, expected: str
) -> None:
    image = Image.new("RGB", (3, 2), (200, 100, 50)).convert({"PA": "P", "RGBa": "RGBA"}.get(mode, mode)).convert(mode)
    image.info["icc_profile"] = b"of the old channels"
    client.generate(profile=image, reference=REFERENCE)
    arrived = decoded(triton.sent_picture("profile"))
    assert arrived.mode == expected
    assert arrived.tobytes() == image.convert(expected).tobytes()
    assert "icc_profile" not in arrived.info
    assert "icc_profile" in image.info, "the caller's image is left alone"


def test_image_is_sent_upright_and_without_its_exif(triton: FakeTriton, client: PortraitClient, tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (4, 6, 3), dtype=np.uint8)
    exif = Image.Exif()
    exif[0x0112] = 6  # orientation: turn a quarter clockwise to show
    exif[0x010F] = "maker"
    Image.fromarray(pixels).save(tmp_path / "a.png", exif=exif)
    with Image.open(tmp_path / "a.png") as image:
        client.generate(profile=image, reference=REFERENCE)
    arrived = decoded(triton.sent_picture("profile"))
    np.testing.assert_array_equal(np.asarray(arrived), np.rot90(pixels, -1))
    assert not dict(arrived.getexif())


def damaged_image() -> Image.Image:
    return Image.open(io.BytesIO(png()[:50]))


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (np.zeros((4, 4, 3), np.float32), "profile: type is float32, expected uint8; scale"),
        (np.zeros((4, 4, 3), np.int64), "profile: type is int64, expected uint8"),
        (np.zeros((4, 4, 2), np.uint8), r"profile: shape is \[4, 4, 2\], expected \[H, W\], \[H, W, 3\] or"),
        (np.zeros((1, 4, 4, 3), np.uint8), r"profile: shape is \[1, 4, 4, 3\], expected"),
        (np.zeros((0, 4, 3), np.uint8), "profile: size is 4x0, expected at least one pixel"),
        (Image.new("RGB", (0, 4)), "profile: size is 0x4, expected at least one pixel"),
        (Image.new("I;16", (4, 4)), "profile: mode is I;16, expected 8 bits a channel"),
        (Image.new("F", (4, 4)), "profile: mode is F, expected 8 bits a channel"),
        (Image.new("La", (4, 4)), "profile: the PIL image of mode La can't be read"),
        (damaged_image(), "profile: the PIL image of mode RGB can't be read"),
        (
            "no/such.jpg",
            r"profile: 'no/such.jpg' can't be read \(No such file or directory\), expected a picture's path",
        ),
        ("a\0b", "profile: .* can't be read"),
        (Path(), r"profile: '\.' can't be read \(Is a directory\)"),
        (b"", "profile: empty, expected the bytes of a JPEG, PNG, WebP, AVIF or HEIC picture"),
        (None, "profile: type is NoneType, expected a path, encoded bytes, a file opened with 'rb', a PIL image or"),
        (io.StringIO("text"), "profile: the file gives str, expected bytes; open it with 'rb'"),
        (b"GIF89a", "profile: it is a GIF, expected a JPEG, PNG, WebP, AVIF or HEIC picture"),
        (b"/9j/4AAQ", "profile: it is base64 text; decode it first, expected a JPEG"),
        (b"nothing", "profile: 7 bytes that begin with b'nothing', expected a JPEG"),
        (PROFILE + bytes(20_000_000), "profile: 20,000,013 bytes, expected at most 20,000,000; scale"),
        ([1, 2], "profile: type is list, expected a path"),
    ],
)
def test_what_is_no_picture_is_refused_and_not_sent(
    triton: FakeTriton, client: PortraitClient, source: Any, message: str
) -> None:
    with pytest.raises(InvalidRequest, match=f"^{message}"):
        client.generate(profile=source, reference=REFERENCE)
    with pytest.raises(InvalidRequest, match=f"^{message.replace('profile:', 'reference:', 1)}"):
        client.generate(profile=PROFILE, reference=source)
    assert not triton.requests


def test_large_pictures_pass_both_ways(triton: FakeTriton, client: PortraitClient) -> None:
    large = PROFILE + bytes(20_000_000 - len(PROFILE))
    triton.images = (large, large)
    portraits = client.generate(profile=large, reference=large)
    assert triton.sent_picture("reference") == large
    assert portraits.files == (large, large)


# Options


def test_only_given_options_are_sent(triton: FakeTriton, client: PortraitClient) -> None:
    client.generate(**PICTURES)
    assert list(triton.sent) == ["profile", "reference", "seed"]
    triton.requests.clear()
    client.generate(**PICTURES, seed=0, mask_ratio=0)
    assert list(triton.sent) == ["profile", "reference", "seed", "mask_ratio"]
    assert triton.sent["seed"] == ("INT64", [1], bytes(8))


def test_a_seed_is_drawn_for_each_request_that_names_none(triton: FakeTriton, client: PortraitClient) -> None:
    """Draw as the server would, because a second attempt has to be the same request."""
    seeds = []
    for _ in range(20):
        client.generate(**PICTURES, seed=None)
        seeds.append(struct.unpack("<q", triton.sent["seed"][2])[0])
        triton.requests.clear()
    assert len(set(seeds)) > 15
    assert all(0 <= seed < 2**31 for seed in seeds)


def test_every_option_arrives_in_the_contracts_type(triton: FakeTriton, client: PortraitClient) -> None:
    client.generate(
        profile=PROFILE,
        reference=REFERENCE,
        seed=MAX_SEED,
        num_portraits=8,
        num_inference_steps=np.int64(150),  # type: ignore[arg-type]
        guidance_scale=Fraction(5, 2),  # type: ignore[arg-type]
        guidance_interval=(np.float32(0.1), 0.7),
        mask_ratio=np.float32(0.98),  # type: ignore[arg-type]
        scheduler="euler",
        priority=0,
        deadline_ms=1_500_000,
        profile_box=(0, 0.25, 0.5, 1),
        reference_box=np.array([0, 0, 1, 1]),  # type: ignore[arg-type]
        output_format="webp",
    )
    sent = triton.sent
    assert {name: (datatype, shape) for name, (datatype, shape, _) in sent.items()} == {
        field.name: (field.dtype.triton, [field.size])
        for field in INPUTS
        if field.name not in ("encoding", "preview_every")
    }
    (deadline_ms,) = struct.unpack("<i", sent["deadline_ms"][2])
    assert 1_490_000 < deadline_ms <= 1_500_000, "what is left of it"
    skipped = ("profile", "reference", "deadline_ms")
    assert {name: raw for name, (_, _, raw) in sent.items() if name not in skipped} == {
        "seed": struct.pack("<q", MAX_SEED),
        "num_portraits": struct.pack("<i", 8),
        "num_inference_steps": struct.pack("<i", 150),
        "guidance_scale": struct.pack("<f", 2.5),
        "guidance_interval": struct.pack("<2f", 0.1, 0.7),
        "mask_ratio": struct.pack("<f", 0.98),
        "scheduler": bytes_tensor(b"euler"),
        "priority": struct.pack("<i", 0),
        "profile_box": struct.pack("<4f", 0, 0.25, 0.5, 1),
        "reference_box": struct.pack("<4f", 0, 0, 1, 1),
        "output_format": bytes_tensor(b"webp"),
    }


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("num_inference_steps", 500, "500, expected 1..150"),
        ("num_inference_steps", 0, "0, expected 1..150"),
        ("num_inference_steps", 20.0, "20.0, expected a whole number of 1..150"),
        ("num_portraits", True, "True, expected a whole number of 1..8"),
        ("num_portraits", 9, "9, expected 1..8"),
        ("seed", -1, f"-1, expected 0..{MAX_SEED}"),
        ("seed", MAX_SEED + 1, f"{MAX_SEED + 1}, expected 0..{MAX_SEED}"),
        ("seed", "7", f"'7', expected a whole number of 0..{MAX_SEED}"),
        ("guidance_scale", 0.5, "0.5, expected 1.0..20.0"),
        ("guidance_scale", 10**400, f"1{'0' * 400}, expected 1.0..20.0"),
        ("mask_ratio", float("nan"), "nan, expected 0.0..0.98"),
        ("guidance_interval", (0.6, 0.4), "[0.6, 0.4], expected a begin that isn't after its end"),
        ("guidance_interval", (0.6, float("nan")), "nan, expected 0.0..1.0"),
        ("guidance_interval", (0.6, 1.4), "1.4, expected 0.0..1.0"),
        ("guidance_interval", (0.2, 0.5, 0.7), "3 values, expected 2 numbers"),
        ("guidance_interval", 0.5, "0.5, expected 2 numbers"),
        ("mask_ratio", "much", "'much', expected a number of 0.0..0.98"),
        ("scheduler", "heun", "'heun', expected one of ddim, euler, dpmpp_2m"),
        ("scheduler", np.zeros(2), "array([0., 0.]), expected one of ddim, euler, dpmpp_2m"),
        ("output_format", "gif" * 20, "'gifgifgifgifgifgifgifgifgifgifgifgif..., expected one of png, jpeg, webp"),
        ("profile_box", (0, 0, 1, 1.5), "1.5, expected 0.0..1.0"),
        ("profile_box", (0, 0, 1), "3 values, expected 4 numbers"),
        ("reference_box", 0.5, "0.5, expected 4 numbers"),
        ("reference_box", (0, 0, "1", 1), "'1', expected a number of 0.0..1.0"),
    ],
)
def test_value_out_of_the_contract_is_refused_and_not_sent(
    triton: FakeTriton, client: PortraitClient, option: str, value: Any, message: str
) -> None:
    with pytest.raises(InvalidRequest) as caught:
        client.generate(**PICTURES, **{option: value})
    assert str(caught.value) == f"{option}: {message}"
    assert not triton.requests


@pytest.mark.parametrize(
    ("option", "value"), [("num_portraits", 9), ("guidance_scale", 0.5), ("mask_ratio", float("nan")), ("seed", -1)]
)
def test_a_refusal_is_worded_as_the_servers(client: PortraitClient, option: str, value: float) -> None:
    field = next(field for field in INPUTS if field.name == option)
    with pytest.raises(ServerInvalidRequest) as servers:
        field.parse(np.array([value], field.dtype.numpy))
    with pytest.raises(InvalidRequest) as ours:
        client.generate(**PICTURES, **{option: value})  # type: ignore[arg-type]
    assert str(ours.value) == str(servers.value)


# Errors


@pytest.mark.parametrize(
    ("code", "error", "message"),
    [
        ("INVALID_ARGUMENT", InvalidRequest, "what the server says"),
        ("UNAVAILABLE", ServerUnavailable, '{url}: no server answers (what the server says); "make serve" starts one'),
        ("CANCELLED", RequestCancelled, "{url}: what the server says"),
        ("INTERNAL", ServerError, "{url}: INTERNAL: what the server says"),
        ("NOT_FOUND", ServerError, "{url}: NOT_FOUND: what the server says"),
    ],
)
def test_codes_become_exceptions(
    triton: FakeTriton, client: PortraitClient, code: str, error: type[PortraitError], message: str
) -> None:
    triton.failure = (grpc.StatusCode[code], "what the server says")
    with pytest.raises(PortraitError) as caught:
        client.generate(**PICTURES)
    assert type(caught.value) is error
    assert str(caught.value) == message.format(url=triton.url)


def test_a_full_server_says_when_to_try_again(triton: FakeTriton, client: PortraitClient) -> None:
    text = "UNAVAILABLE: the queue is full (64 of 64 slots); retry_after_ms: 340"
    triton.failure = (grpc.StatusCode.UNAVAILABLE, text)
    with pytest.raises(ServerOverloaded) as caught:
        client.generate(**PICTURES)
    assert (caught.value.retry_after_ms, caught.value.has_answered) == (340, True)
    assert str(caught.value) == f"{triton.url}: {text}"


@pytest.mark.parametrize("text", ["the server is stopping", "retry_after_ms: soon", "retry_after_ms: 3 or more"])
def test_without_a_hint_there_is_none(triton: FakeTriton, client: PortraitClient, text: str) -> None:
    triton.failure = (grpc.StatusCode.UNAVAILABLE, text)
    with pytest.raises(ServerUnavailable) as caught:
        client.generate(**PICTURES)
    assert caught.value.retry_after_ms is None


def test_refused_connection_names_the_url_and_the_way_out(free_url: str) -> None:
    with PortraitClient(free_url, attempts=1) as client, pytest.raises(ServerUnavailable) as caught:
        client.generate(**PICTURES)
    assert str(caught.value).startswith(f"{free_url}: no server answers (")
    assert str(caught.value).endswith('"make serve" starts one')
    assert caught.value.retry_after_ms is None


def test_deadline(triton: FakeTriton) -> None:
    triton.release.clear()
    with PortraitClient(triton.url, timeout_s=0.5) as client, pytest.raises(DeadlineExceeded) as caught:
        client.generate(**PICTURES)
    assert str(caught.value) == f"{triton.url}: no answer within 0.5 s; allow more with timeout_s"


def test_close_cancels_what_is_under_way(triton: FakeTriton) -> None:
    triton.release.clear()
    with PortraitClient(triton.url) as client, futures.ThreadPoolExecutor(1) as pool:
        call = pool.submit(client.generate, **PICTURES)
        while not triton.requests:
            assert not call.done(), call.exception()
        client.close()
        with pytest.raises(RequestCancelled):
            call.result(10)


def test_closed_client_says_so(triton: FakeTriton) -> None:
    with PortraitClient(triton.url) as client:
        pass
    with pytest.raises(PortraitError, match="the client is closed"):
        client.generate(**PICTURES)


@pytest.mark.parametrize("url", ["http://localhost:8001", "localhost", "a b:1", "host:port", "dns:///name", ""])
def test_what_is_no_address_is_refused(url: str) -> None:
    with pytest.raises(InvalidRequest, match=r"^url: .*, expected host:port of gRPC, such as localhost:8001 or https:"):
        PortraitClient(url)


@pytest.mark.parametrize("timeout_s", [0, -1, float("nan"), float("inf")])
def test_timeout_must_be_above_zero(timeout_s: float) -> None:
    with pytest.raises(InvalidRequest, match=r"^timeout_s: .*, expected a number of seconds above 0$"):
        PortraitClient(timeout_s=timeout_s)


@pytest.mark.parametrize(("images", "metadata"), [((), b"{}"), ((b"i",), b"not JSON"), ((b"i",), b"3")])
def test_answer_that_is_none_of_ours(
    triton: FakeTriton, client: PortraitClient, images: tuple[bytes, ...], metadata: bytes
) -> None:
    triton.images, triton.metadata = images, metadata
    with pytest.raises(ServerError, match="the answer has no portraits; is this an IC-Portrait Server"):
        client.generate(**PICTURES)


# Portraits


def test_portraits_hold_the_answer(triton: FakeTriton, client: PortraitClient) -> None:
    triton.images = (png(), png((1, 2, 3)))
    portraits = client.generate(**PICTURES)
    assert (portraits.files, portraits.bytes) == (triton.images, triton.images[0])
    assert portraits.image.getpixel((0, 0)) == (200, 100, 50)
    assert [image.getpixel((0, 0)) for image in portraits.images] == [(200, 100, 50), (1, 2, 3)]
    metadata = portraits.metadata
    assert (metadata.seed, metadata.steps, metadata.stage_ms, metadata.raw) == (7, 20, STAGE_MS, METADATA)
    assert (metadata.versions.preset, metadata.versions.engine, metadata.numerics_id) == ("demo-128", "", None)


@pytest.mark.parametrize(
    "wrong", [{"steps": "many"}, {"stage_ms": 3}, {"crops": {"profile": 1}}, {"versions": []}, {"queue_ms": "soon"}]
)
def test_metadata_of_other_types_are_an_error(triton: FakeTriton, client: PortraitClient, wrong: Any) -> None:
    triton.metadata = json.dumps({**METADATA, **wrong}).encode()
    with pytest.raises(ServerError, match="the answer's metadata can't be read"):
        client.generate(**PICTURES)


def test_portraits_are_frozen_and_print_short() -> None:
    portraits = Portrait((bytes(10_000),), Metadata.read({"seed": 7}))
    assert len(repr(portraits)) < 600
    with pytest.raises(FrozenInstanceError):
        portraits.files = ()  # type: ignore[misc]


def test_save_numbers_several(tmp_path: Path) -> None:
    assert Portrait((b"a",), Metadata({})).save(tmp_path / "one.png") == [tmp_path / "one.png"]
    paths = Portrait((b"a", b"b"), Metadata({})).save(str(tmp_path / "two.v1.png"))
    assert paths == [tmp_path / "two.v1-1.png", tmp_path / "two.v1-2.png"]
    assert [path.read_bytes() for path in paths] == [b"a", b"b"]
    assert len(list(tmp_path.iterdir())) == 3


# The command


@pytest.fixture
def command(triton: FakeTriton, tmp_path: Path) -> list[str]:
    """Return the command up to OUT."""
    for name in ("profile", "reference"):
        (tmp_path / f"{name}.jpg").write_bytes(PICTURES[name])
    pictures = [f"--{name}={tmp_path / name}.jpg" for name in ("profile", "reference")]
    return ["generate", *pictures, "--url", triton.url, "-o"]


def test_command_writes_files_and_prints_a_table(
    triton: FakeTriton, command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    triton.images = (bytes(1500), bytes(123_456))
    out = tmp_path / "out.png"
    assert main([*command, str(out)]) == 0
    assert [(tmp_path / f"out-{number}.png").stat().st_size for number in (1, 2)] == [1500, 123_456]
    assert triton.sent_picture("profile") == PROFILE
    assert triton.sent_picture("reference") == REFERENCE
    width = len(str(out)) + 2
    assert capsys.readouterr().out.splitlines() == [
        f"{tmp_path / 'out-1.png'}     1.5 kB",
        f"{tmp_path / 'out-2.png'}   123.5 kB",
        f"{'preprocess':<{width}}    12.3 ms",
        f"{'conditioning':<{width}}    50.0 ms",
        f"{'denoise':<{width}}  1800.2 ms",
        f"{'decode':<{width}}    90.0 ms",
        f"{'postprocess':<{width}}     7.5 ms",
        f"{'total':<{width}}  1960.1 ms",
    ]


def test_command_prints_metadata_as_json(
    command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out.png"
    assert main([*command, str(out), "--json"]) == 0
    assert out.read_bytes() == png()
    assert json.loads(capsys.readouterr().out) == {"files": [str(out)], **METADATA}


def test_command_passes_every_option(triton: FakeTriton, command: list[str], tmp_path: Path) -> None:
    options = (
        "--seed 7 --num-portraits 2 --steps 30 --guidance-scale 2.5 --mask-ratio 0.5 --scheduler ddim "
        "--priority 2 --guidance-interval 0.2 0.5 "
        "--profile-box 0 0 0.5 1 --reference-box 0.25 0 1 1 --format jpeg"
    )
    assert main([*command, str(tmp_path / "out.png"), *options.split()]) == 0
    assert {name: raw for name, (_, _, raw) in triton.sent.items() if name not in ("profile", "reference")} == {
        "seed": struct.pack("<q", 7),
        "num_portraits": struct.pack("<i", 2),
        "num_inference_steps": struct.pack("<i", 30),
        "guidance_scale": struct.pack("<f", 2.5),
        "guidance_interval": struct.pack("<2f", 0.2, 0.5),
        "mask_ratio": struct.pack("<f", 0.5),
        "scheduler": bytes_tensor(b"ddim"),
        "priority": struct.pack("<i", 2),
        "profile_box": struct.pack("<4f", 0, 0, 0.5, 1),
        "reference_box": struct.pack("<4f", 0.25, 0, 1, 1),
        "output_format": bytes_tensor(b"jpeg"),
    }


@pytest.mark.parametrize(
    ("name", "expected"), [("o.png", "png"), ("o.jpg", "jpeg"), ("o.JPEG", "jpeg"), ("o.webp", "webp"), ("o", None)]
)
def test_command_takes_the_format_from_the_suffix(
    triton: FakeTriton, command: list[str], tmp_path: Path, name: str, expected: str | None
) -> None:
    assert main([*command, str(tmp_path / name)]) == 0
    asked = triton.sent.get("output_format")
    assert (asked and asked[2]) == (expected and bytes_tensor(expected.encode()))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["o.png", "--steps", "500"], "num_inference_steps: 500, expected 1..150"),
        (["o.png", "--profile", "no/such.jpg"], "profile: 'no/such.jpg' can't be read (No such file or directory)"),
        (["no/such/o.png"], "--output: 'no/such/o.png', expected a file's path in a directory that exists"),
        (["."], "--output: '.', expected a file's path in a directory that exists"),
        (["o.png", "--url", "http://localhost:8001"], "url: 'http://localhost:8001', expected host:port"),
        (["o.png", "--timeout", "0"], "timeout_s: 0, expected a number of seconds above 0"),
    ],
)
def test_command_reports_a_mistake_in_one_line(
    triton: FakeTriton,
    command: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main([*command, *arguments]) == 1
    out, err = capsys.readouterr()
    assert not out
    assert err.startswith(f"error: {message}")
    assert err.count("\n") == 1
    assert not triton.requests
    assert not Path("o.png").exists()


def test_command_reports_a_servers_error_in_one_line(
    triton: FakeTriton, command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    triton.failure = (grpc.StatusCode.INTERNAL, "two\nlines")
    assert main([*command, str(tmp_path / "o.png")]) == 1
    assert capsys.readouterr().err == f"error: {triton.url}: INTERNAL: two lines\n"


def test_command_reports_a_file_that_cannot_be_written(
    command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*command, str(tmp_path / ("o" * 300 + ".png"))]) == 1
    assert "error: [Errno" in capsys.readouterr().err


def test_command_has_its_own_timeout(
    triton: FakeTriton, command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    triton.release.clear()
    assert main([*command, str(tmp_path / "o.png"), "--timeout", "0.5"]) == 1
    assert "no answer within 0.5 s" in capsys.readouterr().err


def test_command_ends_quietly_when_interrupted(
    command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(PortraitClient, "generate", interrupted)
    assert main([*command, str(tmp_path / "o.png")]) == 130
    assert capsys.readouterr().err == "error: interrupted\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "error: the following arguments are required: command"),
        (["generate", "--profile", "a"], "error: the following arguments are required: --reference, -o/--output"),
        (["generate", "--profile=a", "--reference=b", "-o", "o.png", "--scheduler", "heun"], "error: argument --sched"),
        (["generate", "--profile=a", "--reference=b", "-o", "o.png", "--steps", "many"], "error: argument --steps:"),
        (
            ["generate", "--profile=a", "--reference=b", "-o", "o.gif"],
            "error: --output: suffix is .gif, expected one of png, jpeg, webp, or the format with --format",
        ),
    ],
)
def test_wrong_command_line_exits_with_2(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    err = capsys.readouterr().err
    assert err.startswith(message)
    assert err.count("\n") == 1


def test_version_is_the_packages(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["--version"])
    assert caught.value.code == 0
    assert capsys.readouterr().out == f"icportrait {icportrait_client.__version__}\n"


def test_help_tells_the_contract_and_loads_nothing_heavy() -> None:
    script = (
        "import sys\n"
        "from icportrait_client.cli import main\n"
        "try: main(['generate', '--help'])\n"
        "finally: print(sorted({'numpy', 'PIL', 'grpc', 'tritonclient'} & set(sys.modules)))\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "COLUMNS": "200"}
    done = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stdout.endswith("[]\n")
    for field in INPUTS:
        if field.default is not None and not field.choices:
            default = " ".join(map(str, field.default)) if field.size > 1 else field.default
            assert f"{field.minimum}..{field.maximum} (default: {default})" in done.stdout
        if field.choices and field.name != "encoding":
            assert f"{{{','.join(field.choices)}}}" in done.stdout
    assert "by OUT's suffix, else png" in done.stdout
    assert "(default: localhost:8001)" in done.stdout


def test_package_offers_nothing_unknown() -> None:
    assert all(getattr(icportrait_client, name) is not None for name in icportrait_client.__all__)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = icportrait_client.nothing
