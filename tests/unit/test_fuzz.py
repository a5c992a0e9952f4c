"""Property-based tests of all that reads what others wrote: it is read, or refused in a sentence, and nothing else.

``make fuzz`` runs them with more examples, from its own seed.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import hashlib
import json
import os
import random
import re
import shutil
import socket
from collections.abc import Callable, Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from icportrait.errors import (
    CheckpointError,
    IcPortraitError,
    InvalidRequest,
    LatencyTableError,
    TooMuch,
    Unauthenticated,
)
from icportrait.gateway.access import Access, ApiKey, new_key, read_keys
from icportrait.gateway.portraits_form import FIELDS as FORM_FIELDS
from icportrait.gateway.portraits_form import PortraitsForm
from icportrait.gateway.settings import FIELDS, PREFIX, add_flags, read_settings
from icportrait.gateway.v2_json import read_generate, read_infer
from icportrait.gateway.wire import read_infer_request
from icportrait.manifest import MANIFEST_NAME, Manifest
from icportrait.pictures.prepare import prepare
from icportrait.presets import DEMO_128
from icportrait.request import INPUTS, PortraitRequest, parse_options, parse_request
from icportrait.runtime.latency_table import LatencyTable
from icportrait.server import main
from icportrait.serving.control import VERSION, Asked, ControlServer, Peer, Ping, frame
from tests.fuzz.control_cases import control
from tests.fuzz.corpus import Corpus, mutated
from tests.fuzz.grpc_cases import message
from tests.fuzz.judge import INTERNALS, MAX_TEXT
from tests.fuzz.wishes import wish
from tests.private_client import Line

EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", "30"))


def fuzzed(part: float = 1.0) -> Callable[[Any], Any]:
    """Run a test on many examples; without ``FUZZ_EXAMPLES`` on the same ones each time."""
    return settings(
        max_examples=max(5, int(EXAMPLES * part)),
        deadline=None,
        database=None,
        derandomize="FUZZ_EXAMPLES" not in os.environ,
        suppress_health_check=list(HealthCheck),
    )


RANDOM = st.randoms(use_true_random=False)
JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=20)
    | st.sampled_from([2**63, -(2**31), 1e308]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)
DEEP = "[" * 100_000
NAMES = st.sampled_from([each.name for each in INPUTS]) | st.text(max_size=12)


@functools.cache
def corpus() -> Corpus:
    return Corpus(1, count=24)


def check_text(error: IcPortraitError, sent: str = "") -> None:
    """Look at a refusal as its reader does; it may quote the text that was sent, such as ``.py``."""
    text = str(error)
    assert text and len(text) <= MAX_TEXT, text[:1000]
    assert not [found for found in INTERNALS.finditer(text) if found[0] not in sent], text


# Requests.


@fuzzed(4)
@given(st.binary(max_size=200) | JSON.map(lambda value: json.dumps(value).encode()), st.none() | st.integers(0, 300))
def test_any_body_is_an_infer_request_or_refused(body: bytes, json_bytes: int | None) -> None:
    for read in (lambda: read_infer(body, json_bytes), lambda: read_generate(body)):
        with contextlib.suppress(InvalidRequest):
            try:
                read()
            except InvalidRequest as error:
                check_text(error, body.decode(errors="replace"))
                raise


@fuzzed(4)
@given(
    st.lists(
        st.fixed_dictionaries(
            {"name": NAMES | JSON, "datatype": st.sampled_from(["BYTES", "FP32", "INT32", "INT64", "x" * 5000]) | JSON},
            optional={"shape": st.lists(st.integers() | JSON, max_size=3) | JSON, "data": JSON, "parameters": JSON},
        ),
        max_size=4,
    ),
    st.dictionaries(st.sampled_from(["id", "outputs", "parameters", "x"]), JSON, max_size=3),
)
def test_any_tensors_in_json_are_read_or_refused(inputs: list[Any], more: dict[str, Any]) -> None:
    body = json.dumps({"inputs": inputs} | more).encode()
    try:
        parse_request(read_infer(body).inputs, {})
    except InvalidRequest as error:
        check_text(error, body.decode())


@fuzzed(4)
@given(st.dictionaries(NAMES, JSON, max_size=5))
@example({"seed": {".py": None}})
@example({"guidance_scale": 3.4028235677973366e38})
def test_any_options_are_parsed_or_refused(options: dict[str, Any]) -> None:
    text = json.dumps(options)
    for parse in (
        lambda: parse_request(read_generate(text.encode())[1], {}),
        lambda: parse_request(parse_options(text), {}),
        lambda: PortraitRequest.from_json(text),
    ):
        try:
            parse()
        except InvalidRequest as error:
            check_text(error, text)


@pytest.mark.parametrize(
    "text", [DEEP, '{"a":' * 100_000, '{"profile": ' + "9" * 5000 + "}"], ids=["lists", "objects", "digits"]
)
def test_json_that_is_nested_or_long_beyond_measure_is_refused(text: str) -> None:
    for parse in (lambda: read_infer(text.encode()), lambda: read_generate(text.encode()), lambda: parse_options(text)):
        with pytest.raises(InvalidRequest) as caught:
            parse()
        check_text(caught.value)


@fuzzed(4)
@given(RANDOM)
def test_any_message_is_a_request_or_refused(rng: random.Random) -> None:
    data = mutated(rng, message(wish(rng, corpus()), "ic_portrait", rng).SerializeToString()[:20_000])
    try:
        parse_request(read_infer_request(data).inputs(), {})
    except InvalidRequest as error:
        check_text(error)


@fuzzed(4)
@given(
    st.lists(
        st.tuples(
            st.sampled_from(sorted(FORM_FIELDS)) | st.text(max_size=8),
            st.binary(max_size=40) | st.sampled_from([b"7", b"nan", b"1e999", b"9" * 5000, b"0,0,1,1"]),
        ),
        max_size=5,
    ),
    RANDOM,
)
def test_a_form_is_read_alike_however_it_comes_and_refused_in_a_sentence(
    fields: list[tuple[str, bytes]], rng: random.Random
) -> None:
    parts = [
        b'--b\r\nContent-Disposition: form-data; name="%b"\r\n\r\n%b\r\n' % (name.encode(errors="replace"), value)
        for name, value in fields
    ]
    body = b"".join(parts) + b"--b--\r\n"
    if rng.random() < 0.5:
        body = mutated(rng, body)

    def read(sizes: int) -> Any:
        form = PortraitsForm("multipart/form-data; boundary=b")
        try:
            for at in range(0, len(body), sizes):
                form.feed(body[at : at + sizes])
            return {name: value.tolist() for name, value in form.inputs().items()}
        except InvalidRequest as error:
            check_text(error)
            return InvalidRequest

    whole, pieces = read(len(body) or 1), read(rng.randint(1, 50))
    # Of a damaged form, the whole may be refused for its end before a piece of it for its beginning.
    assert repr(whole) == repr(pieces) or InvalidRequest in (whole, pieces)


@fuzzed(2)
@given(RANDOM)
def test_any_picture_is_prepared_or_refused_by_the_inputs_name(rng: random.Random) -> None:
    data = corpus().hostile(rng) if rng.random() < 0.2 else corpus().damaged(rng)
    try:
        _, pixels = prepare(data, "profile", (0.0, 0.0, 1.0, 1.0), False, 64)
    except InvalidRequest as error:
        check_text(error)
        assert str(error).startswith("profile")
    else:
        assert pixels.shape == (64, 64, 3)


# Settings and keys.

VALUES = st.text(max_size=20) | st.integers() | st.floats() | st.booleans() | st.sampled_from(
    ["", "0", "1", "65535", "1e3", "nan", "inf", "/", "\0", "9" * 5000, "x" * 5000, "٣", [1, 2]]
)  # fmt: skip


def settings_or_error(arguments: list[str], environment: dict[str, str]) -> IcPortraitError | None:
    parser = argparse.ArgumentParser(exit_on_error=False)
    add_flags(parser)
    try:
        read_settings(parser.parse_args(arguments), environment)
    except IcPortraitError as error:
        assert str(error) and str(error).isprintable() and len(str(error)) < 1000, str(error)[:2000]
        return error
    return None


@fuzzed(4)
@given(st.sampled_from(sorted(FIELDS)), VALUES)
@example("api_keys", "\n")
def test_any_value_of_a_setting_is_taken_or_refused_by_its_name(name: str, value: Any) -> None:
    for error in (
        settings_or_error([], {PREFIX + name.upper(): str(value)}),
        settings_or_error([f"--{name.replace('_', '-')}={value}"], {}),
    ):
        assert error is None or name in str(error)


@fuzzed(4)
@given(st.binary(max_size=100) | st.dictionaries(st.sampled_from(sorted(FIELDS)), VALUES, max_size=4), RANDOM)
def test_any_file_of_settings_is_read_or_refused(
    tmp_path_factory: pytest.TempPathFactory, content: bytes | dict[str, Any], rng: random.Random
) -> None:
    config = tmp_path_factory.getbasetemp() / "server.toml"
    if isinstance(content, dict):
        content = "\n".join(f"{name} = {_toml(value)}" for name, value in content.items()).encode()
        if rng.random() < 0.5:
            content = mutated(rng, content)
    config.write_bytes(content)
    settings_or_error(["--config", str(config)], {})
    config.write_bytes(content)
    with contextlib.suppress(IcPortraitError):
        read_keys(config)


WORDS = st.text(max_size=12) | st.sampled_from(["a\nb", "x" * 5000])
KEY_SETTINGS = st.sampled_from([each.name for each in fields(ApiKey)]) | WORDS


@fuzzed(4)
@given(st.dictionaries(WORDS, VALUES | st.dictionaries(KEY_SETTINGS, VALUES, max_size=5), max_size=3))
@example({"a": {"requests_per_s": 10**400}})
@example({"a": {"requests_per_s": 1, "burst": 10**400}})
def test_any_file_of_keys_lets_callers_in_or_is_refused_in_a_line(
    tmp_path_factory: pytest.TempPathFactory, keys: dict[str, Any]
) -> None:
    path = tmp_path_factory.getbasetemp() / "keys.toml"
    secret, _ = new_key("a")
    known = {"sha256": hashlib.sha256(secret.encode()).hexdigest()}
    sections = [
        f"[keys.{json.dumps(name)}]\n"
        + "\n".join(f"{json.dumps(key)} = {_toml(value)}" for key, value in (known | section).items())
        if isinstance(section, dict)
        else f"keys.{json.dumps(name)} = {_toml(section)}"
        for name, section in keys.items()
    ]
    path.write_text("\n".join(sections), errors="replace")
    with contextlib.suppress(TooMuch, Unauthenticated):
        try:
            access = Access(path)
        except IcPortraitError as error:
            assert str(path) in str(error) and str(error).isprintable() and len(str(error)) < MAX_TEXT + len(str(path))
        else:
            for _ in range(3):
                access.enter(f"Bearer {secret}", "here")


def _toml(value: Any) -> str:
    return json.dumps(value) if isinstance(value, str | bool | list) else str(value)


@pytest.mark.parametrize(
    "content", ["a = " + DEEP, "a = " + "9" * 5000, "a = 1\na = 2", "\0", "[keys.a]\nsha256 = 1979-05-27"]
)
def test_a_file_beyond_measure_is_refused_by_its_name(
    tmp_path: Path, content: str, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / "server.toml"
    config.write_text(content)
    assert main(["config", "--config", str(config)]) == 1
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith(f"error: {config}: ") and len(lines[0]) < 1000
    with pytest.raises(IcPortraitError, match=re.escape(str(config))):
        read_keys(config)


@pytest.mark.parametrize("path", ["a\0b", "x" * 5000, "/dev/null/x", "/"], ids=["zero", "long", "no folder", "folder"])
def test_a_path_that_can_be_none_is_refused(path: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config", "--config", path]) == 1
    assert main(["config", "--api-keys", path]) == 1
    assert all(line.startswith("error: ") for line in capsys.readouterr().err.splitlines())
    assert settings_or_error([], {"ICPORTRAIT_CONFIG": path})


# The control line.


@fuzzed(0.5)
@given(st.lists(RANDOM, min_size=1, max_size=4))
def test_no_message_breaks_the_control_line_for_others(
    tmp_path_factory: pytest.TempPathFactory, draws: list[random.Random]
) -> None:
    heard: list[Asked] = []

    def note(peer: Peer, asked: Asked) -> None:
        heard.append(asked)
        if isinstance(asked, Ping):
            peer.send({"op": "pong", "id": asked.id})

    path = tmp_path_factory.mktemp("line", numbered=True) / "loop"
    server = ControlServer(path, note, lambda _: None)
    other = Line(str(path))
    try:
        for rng in draws:
            with socket.socket(socket.AF_UNIX) as stream, contextlib.suppress(OSError):
                stream.connect(str(path))
                for data in control("", rng, corpus(), ()).messages:
                    stream.sendall(data)
                stream.shutdown(socket.SHUT_WR)
                while stream.recv(1000):  # until the loop has read all, and closed
                    pass
            assert other.ping(3) == {"op": "pong", "id": 3}
    finally:
        other.close()
        server.close()
        shutil.rmtree(path.parent)
    assert all(isinstance(asked, Asked) for asked in heard)


def test_a_wrong_message_takes_one_line_of_the_log(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    server = ControlServer(tmp_path / "loop", lambda *_: None, lambda _: None)
    with socket.socket(socket.AF_UNIX) as stream:
        stream.connect(str(tmp_path / "loop"))
        stream.sendall(frame({"op": "hello", "version": VERSION}) + frame({"op": "cancel", "key": 1, "more": 2}))
        stream.settimeout(10)
        while stream.recv(1000):
            pass
    server.close()
    (line,) = [record.getMessage() for record in caplog.records]
    assert line.endswith("it is closed: cancel.key: Input should be a valid string")


# Exports and checkpoints.


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> str:
    from tests.trivial_engines import write_trivial_export

    folder = tmp_path_factory.mktemp("export")
    write_trivial_export(folder, DEMO_128)
    return (folder / MANIFEST_NAME).read_text()


def replaced(rng: random.Random, value: Any, new: Any) -> Any:
    """Put ``new`` somewhere into a JSON value."""
    if isinstance(value, dict) and value and rng.random() < 0.85:
        name = rng.choice(list(value))
        rest = {**value, name: replaced(rng, value[name], new)}
        if rng.random() < 0.1:
            del rest[name]
        return rest
    if isinstance(value, list) and value and rng.random() < 0.85:
        index = rng.randrange(len(value))
        return [*value[:index], replaced(rng, value[index], new), *value[index + 1 :]]
    return new


@fuzzed(4)
@given(RANDOM, JSON)
def test_any_manifest_is_read_or_refused(
    tmp_path_factory: pytest.TempPathFactory, manifest: str, rng: random.Random, new: Any
) -> None:
    folder = tmp_path_factory.getbasetemp()
    changed = json.dumps(replaced(rng, json.loads(manifest), new))
    (folder / MANIFEST_NAME).write_text(changed if rng.random() < 0.8 else _damaged_text(rng, manifest))
    with contextlib.suppress(CheckpointError):
        Manifest.read(folder)


@fuzzed(4)
@given(RANDOM, JSON)
def test_any_latency_table_is_read_or_refused(
    tmp_path_factory: pytest.TempPathFactory, rng: random.Random, new: Any
) -> None:
    path = tmp_path_factory.getbasetemp() / "table.json"
    whole = {
        "device": "x",
        "preset": "demo-128",
        "engines": {name: {"1": 10.0, "8": 20.0} for name in ("unet", "vae_encoder")},
    }
    path.write_text(
        json.dumps(replaced(rng, whole, new)) if rng.random() < 0.8 else _damaged_text(rng, json.dumps(whole))
    )
    with contextlib.suppress(LatencyTableError):
        LatencyTable.read(path)


@pytest.mark.parametrize("text", [DEEP, "9" * 5000, "\0", "", "[]"], ids=["lists", "digits", "zero", "empty", "list"])
def test_a_manifest_or_a_table_beyond_measure_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / MANIFEST_NAME).write_text(text)
    with pytest.raises(CheckpointError):
        Manifest.read(tmp_path)
    with pytest.raises(LatencyTableError):
        LatencyTable.read(tmp_path / MANIFEST_NAME)


def _damaged_text(rng: random.Random, text: str) -> str:
    return mutated(rng, text.encode()).decode(errors="replace")


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    from icportrait.nn import random_checkpoint, save_checkpoint
    from tests.tiny import TINY

    folder = tmp_path_factory.mktemp("checkpoint") / "saved"
    save_checkpoint(random_checkpoint(TINY), folder)
    yield folder
    shutil.rmtree(folder)


@fuzzed(0.5)
@given(RANDOM, JSON)
def test_any_checkpoint_is_read_or_refused(saved: Path, rng: random.Random, new: Any) -> None:
    from icportrait.nn import load_checkpoint

    path = rng.choice(sorted(path for path in saved.rglob("*") if path.is_file()))
    whole = path.read_bytes()
    try:
        if path.suffix == ".json" and rng.random() < 0.7:
            path.write_text(json.dumps(replaced(rng, json.loads(whole), new)))
        else:
            # The header of a safetensors file is JSON behind its length.
            head = min(len(whole), 2000)
            path.write_bytes(mutated(rng, whole[:head]) + whole[head:])
        with contextlib.suppress(CheckpointError):
            load_checkpoint(saved)
    finally:
        path.write_bytes(whole)


@pytest.mark.parametrize("part", ["unet", "vae"])
def test_a_network_of_other_sizes_is_refused_without_its_memory(saved: Path, tmp_path: Path, part: str) -> None:
    from safetensors.numpy import save_file

    from icportrait.nn import load_checkpoint

    folder = shutil.copytree(saved, tmp_path / "saved")
    index, config = folder / "model_index.json", folder / part / "config.json"
    index.write_text(json.dumps(json.loads(index.read_text()) | {"preset": "custom"}))
    content = json.loads(config.read_text())
    channels = [*content["block_out_channels"][:-1], 2**19]
    # diffusers doesn't read this one.
    name = "conv_in.bias" if part == "unet" else "encoder.conv_in.bias"
    save_file({name: np.zeros(1, np.float32)}, folder / part / "diffusion_pytorch_model.old.safetensors")
    load_checkpoint(folder)
    config.write_text(json.dumps(content | {"block_out_channels": channels}))
    with pytest.raises(CheckpointError, match=r"is \[.*\], expected \[.*524288.*\] by config.json"):
        load_checkpoint(folder)


@fuzzed()
@given(RANDOM, JSON)
def test_any_geometry_is_read_or_refused(rng: random.Random, new: Any) -> None:
    from icportrait.nn.geometry import preset_from_configs, unet_config, vae_config
    from tests.tiny import TINY

    configs = [json.loads(json.dumps(config(TINY))) for config in (unet_config, vae_config)]
    config = rng.choice(configs)
    name = rng.choice(sorted(config))
    config[name] = replaced(rng, config[name], new)
    with contextlib.suppress(CheckpointError):
        preset_from_configs(*configs, prompt_tokens=4)


def test_refusals_tell_neither_of_a_parsers_inside_nor_all_that_came() -> None:
    form = PortraitsForm("multipart/form-data; boundary=b")
    with pytest.raises(InvalidRequest, match=r"can't be read: Segment header failed to decode$"):
        form.feed(b'--b\r\nContent-Disposition: form-data; name="\xff"\r\n\r\n1\r\n--b--\r\n')
    tensor = {"name": "seed", "shape": ["x" * 100_000], "datatype": "INT64", "data": [1]}
    with pytest.raises(InvalidRequest) as caught:
        read_infer(json.dumps({"inputs": [tensor]}).encode())
    check_text(caught.value)
