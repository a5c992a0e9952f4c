"""Cases for gRPC: good and wrong requests, damaged messages, foreign methods, metadata, HTTP/2 by hand."""

from __future__ import annotations

import gzip
import random
import struct
from collections.abc import Callable, Sequence
from typing import Any

import hpack
import numpy as np
from h2.settings import Settings
from hyperframe.frame import DataFrame, Frame, HeadersFrame, PingFrame, RstStreamFrame, SettingsFrame, WindowUpdateFrame
from tritonclient.grpc import service_pb2

from tests.fuzz.cases import GRPC_REFUSALS, GRPC_VERDICTS, Case
from tests.fuzz.corpus import Corpus, mutated
from tests.fuzz.keys import limited
from tests.fuzz.wishes import FIELDS, Wish, good, plain, wish

SERVICE = "/inference.GRPCInferenceService/"
INFER, STREAM = SERVICE + "ModelInfer", SERVICE + "ModelStreamInfer"
HEALTH = "/grpc.health.v1.Health/Check"
SMALL_METHODS = (
    "ServerLive", "ServerReady", "ModelReady", 
    "ServerMetadata", "ModelMetadata", "ModelConfig", "ModelStatistics",
)  # fmt: skip
FOREIGN_METHODS = (
    "RepositoryIndex", "RepositoryModelLoad", "RepositoryModelUnload", "SystemSharedMemoryStatus",
    "SystemSharedMemoryRegister", "SystemSharedMemoryUnregister", "CudaSharedMemoryStatus", "TraceSetting",
    "LogSettings", "modelinfer", "", "ModelInfer/", "ModelInfer%00", "../ModelInfer",
)  # fmt: skip
ANY = ("OK", *GRPC_REFUSALS)
BY_REFUSAL = {"": ("OK",), "exhausted": ("OK", "RESOURCE_EXHAUSTED"), "denied": ("PERMISSION_DENIED",)}
CONTENTS = {"BYTES": "bytes_contents", "FP32": "fp32_contents", "INT32": "int_contents", "INT64": "int64_contents"}
PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
Headers = tuple[tuple[str, str], ...]
BOMB = gzip.compress(bytes(50 << 20))
"""50 MB in 51 KB, which fits into HTTP/2's first window."""


def message(wanted: Wish, model: str, rng: random.Random | None = None, request_id: str = "") -> Any:
    """Make a ``ModelInferRequest``, with typed contents now and then."""
    made = service_pb2.ModelInferRequest(model_name=model, id=request_id)
    is_typed = rng is not None and rng.random() < 0.2
    for name, value in wanted.values.items():
        kind = FIELDS[name].dtype.triton if name in FIELDS else "INT32" if isinstance(value, int) else "BYTES"
        values = value if isinstance(value, list) else [value]
        tensor = made.inputs.add(name=name, datatype=kind, shape=[len(values)])
        if is_typed:
            getattr(tensor.contents, CONTENTS[kind]).extend(_plain(kind, values))
        else:
            made.raw_input_contents.append(raw(kind, values))
    return made


def raw(kind: str, values: Sequence[Any]) -> bytes:
    """Write a tensor's elements."""
    if kind == "BYTES":
        encoded = [value.encode() if isinstance(value, str) else value for value in values]
        return b"".join(struct.pack("<I", len(each)) + each for each in encoded)
    with np.errstate(over="ignore"):
        return np.array(values, {"FP32": "<f4", "INT32": "<i4", "INT64": "<i8"}[kind]).tobytes()


def _plain(kind: str, values: Sequence[Any]) -> list[Any]:
    if kind == "BYTES":
        return [value.encode() if isinstance(value, str) else value for value in values]
    return [float(np.float32(value)) for value in values] if kind == "FP32" else list(values)


def unary(name: str, rng: random.Random, corpus: Corpus, headers: Headers) -> Case:
    """Ask for a portrait."""
    wanted = wish(rng, corpus)
    sent = message(wanted, "ic_portrait", rng).SerializeToString()
    return Case(
        name, "grpc", wanted.kind, GRPC_VERDICTS[wanted.verdict], INFER, headers, (sent,),
        names="deadline_ms" if wanted.verdict == "deadline" else wanted.names, same_as=wanted.same_as,
        seeds=(wanted.seed,),
        portraits=wanted.portraits if wanted.verdict == "good" else 0,
        output_format=wanted.output_format if wanted.verdict == "good" else "",
        compression="gzip" if rng.random() < 0.03 else "",
    )  # fmt: skip


def wrong_tensor(name: str, rng: random.Random, corpus: Corpus, headers: Headers) -> Case:
    """Send a good request with one tensor that isn't as the model describes it."""
    made = message(good(rng, corpus), "ic_portrait")
    index = rng.randrange(len(made.inputs))
    tensor, contents = made.inputs[index], made.raw_input_contents
    names = tensor.name
    kind = rng.randrange(12)
    if kind == 0:
        tensor.datatype = rng.choice(("FP16", "UINT8", "", "bytes", "BOOL", "x" * 3000))
    elif kind == 1:
        wrong = [0] if list(tensor.shape) == [2] else [2]
        tensor.shape[:] = rng.choice(([], [0], wrong, [1, 1], [-1], [2**62], [2**62, 2**62], [1] * 300))
    elif kind == 2:
        contents[index] = contents[index][:-1]
    elif kind == 3:
        contents[index] += b"\0"
    elif kind == 4:
        contents.append(b""), made.inputs.append(tensor)
    elif kind == 5:
        names = ""
        contents.append(b"")
    elif kind == 6:
        tensor.contents.bytes_contents.append(b"x")
    elif kind == 7:
        tensor.parameters["shared_memory_region"].string_param = "region"
    elif kind == 8:
        names = ""
        made.outputs.add(name=rng.choice(("portrait", "", "image\0", "é")))
    elif kind == 9:
        names = "image"
        made.outputs.add(name="image").parameters["classification"].int64_param = 3
    elif kind == 10:
        # Eight bytes of an integer would be another integer.
        names = made.inputs[0].name
        contents[0] = rng.choice((b"", b"\xff\xff\xff\xff", b"\xff\xff\xff\xff" + contents[0][4:]))
    else:
        names = ""
        del contents[:]
        for each in made.inputs:
            each.contents.fp64_contents.extend([1.0] * 5000)
    return Case(
        name, "grpc", "a wrong tensor", ("INVALID_ARGUMENT",), INFER, headers, (made.SerializeToString(),), names
    )


def ignored(name: str, rng: random.Random, corpus: Corpus, headers: Headers) -> Case:
    """Send what a server must ignore: unknown parameters, outputs asked for by name, an id of any length."""
    wanted = Wish(plain(rng, corpus), "parameters")
    made = message(wanted, "ic_portrait", request_id=rng.choice(("", "7", "é" * 100, "x" * 9000)))
    for _ in range(rng.randrange(4)):
        key = rng.choice(("a", "é", "priority", "timeout", "sequence_id", "x" * 500, "__proto__"))
        values = {"string_param": "x" * 400, "int64_param": -(2**63), "bool_param": True, "double_param": float("nan")}
        which = rng.choice(list(values))
        setattr(made.parameters[key], which, values[which])
    made.inputs[0].parameters["unknown"].bool_param = True
    return Case(name, "grpc", "parameters", ("OK",), INFER, headers, (made.SerializeToString(),))


def damaged_message(name: str, rng: random.Random, corpus: Corpus, headers: Headers) -> Case:
    """Send a message with changed, lost or random bytes."""
    path = rng.choice((INFER, STREAM))
    if rng.random() < 0.15:
        sent = rng.randbytes(rng.choice((1, 10, 300, 5000)))
    else:
        sent = message(good(rng, corpus), rng.choice(("ic_portrait", "ic_portrait_stream")), rng).SerializeToString()
        if len(sent) > 200_000:
            return damaged_message(name, rng, corpus, headers)
        head = rng.randrange(400)
        sent = mutated(rng, sent[:head]) + sent[head:] if rng.random() < 0.7 else mutated(rng, sent)
    return Case(name, "grpc", "a damaged message", ANY, path, headers, (sent,))


def model(name: str, rng: random.Random, corpus: Corpus, headers: Headers) -> Case:
    """Name a model or a version that there isn't, or one that the method doesn't take."""
    other = rng.choice(
        ("", "denoise", "vae_decoder", "portrait_pipeline", "IC_PORTRAIT", "../x", "é" * 200, "x" * 5000)
    )
    made = message(Wish(plain(rng, corpus), "a model"), other)
    expects = "NOT_FOUND"
    if rng.random() < 0.3:
        made.model_name, made.model_version = "ic_portrait", rng.choice(("2", "-1", "latest", "x" * 1000))
    elif rng.random() < 0.3:
        made.model_name, expects = "ic_portrait_stream", "UNIMPLEMENTED"
    return Case(name, "grpc", "another model", (expects,), INFER, headers, (made.SerializeToString(),))


def method(name: str, rng: random.Random, corpus: Corpus, headers: Headers) -> Case:
    """Call another method with a small message, or one that there isn't."""
    if rng.random() < 0.4:
        path = rng.choice((SERVICE + rng.choice(FOREIGN_METHODS), "/x", "/", "/grpc.reflection.v1.ServerReflection/X"))
        return Case(name, "grpc", "another method", ("UNIMPLEMENTED",), path, headers, (rng.randbytes(20),))
    path = rng.choice((HEALTH, *(SERVICE + each for each in SMALL_METHODS)))
    made = service_pb2.ModelMetadataRequest(
        name=rng.choice(("ic_portrait", "ic_portrait_stream", "", "x" * 1000)), version=rng.choice(("", "1", "9"))
    )
    is_right = made.name.startswith("ic_portrait") and made.version in ("", "1")
    sent = made.SerializeToString()
    if rng.random() < 0.5:
        sent, is_right = mutated(rng, sent), False
    return Case(name, "grpc", "another method", ("OK",) if is_right else ANY, path, headers, (sent,))


def stream(name: str, rng: random.Random, corpus: Corpus, headers: Headers) -> Case:
    """Send several requests on a stream, good and wrong ones; each is answered under its own id."""
    count = rng.choice((1, 1, 2, 4))
    wanted = [wish(rng, corpus) for _ in range(count)]
    for each in wanted:
        if each.verdict == "good" and rng.random() < 0.3:
            each.values["preview_every"], each.values["num_inference_steps"], each.same_as = 1, 3, ""
    sent = tuple(
        message(
            each,
            "ic_portrait_stream" if "preview_every" in each.values or rng.random() < 0.5 else "ic_portrait",
            rng,
            str(index),
        ).SerializeToString()
        for index, each in enumerate(wanted)
    )
    verdicts = tuple(each.verdict for each in wanted)
    names, same_as = (wanted[0].names, wanted[0].same_as) if count == 1 else ("", "")
    if verdicts == ("deadline",):
        names = "deadline_ms"
    return Case(
        name, "grpc", "a stream", ("OK",), STREAM, headers, sent, names=names, same_as=same_as, verdicts=verdicts,
        seeds=tuple(each.seed for each in wanted),
    )  # fmt: skip


def largest(name: str, corpus: Corpus, headers: Headers) -> Case:
    """Ask for as many portraits as a request may, for some steps."""
    options = {"seed": 0, "num_portraits": 8, "num_inference_steps": 20}
    made = message(Wish(plain(random.Random(name), corpus) | options, "the largest"), "ic_portrait")
    return Case(
        name, "grpc", "the largest", ("OK",), INFER, headers, (made.SerializeToString(),), seeds=(0,), portraits=8
    )


def leaver(name: str, rng: random.Random, corpus: Corpus, headers: Headers) -> Case:
    """Hang up on the way."""
    values = plain(rng, corpus) | {"num_inference_steps": 150, "preview_every": 0}
    path, which = rng.choice(((INFER, "ic_portrait"), (STREAM, "ic_portrait_stream")))
    sent = message(Wish(values, "a leaver"), which).SerializeToString()
    return Case(
        name,
        "grpc",
        "a leaver",
        ("GONE", "OK"),
        path,
        headers,
        (sent,),
        leaves_after_s=rng.choice((0, 0.01, 0.05, 0.15)),
    )


def in_a_hurry(name: str, rng: random.Random, corpus: Corpus, headers: Headers) -> Case:
    """Make a call with a deadline of its own."""
    values = plain(rng, corpus) | {"num_inference_steps": 100}
    sent = message(Wish(values, "a call's deadline"), "ic_portrait").SerializeToString()
    expects = ("DEADLINE_EXCEEDED", "UNAVAILABLE", "OK")
    return Case(name, "grpc", "a call's deadline", expects, INFER, headers, (sent,), timeout_s=rng.uniform(0.001, 0.1))


def metadata(name: str, rng: random.Random, corpus: Corpus, headers: Headers) -> Case:
    """Send strange metadata beside a good request."""
    more = []
    for _ in range(rng.choice((1, 1, 3, 30))):
        key = rng.choice((
            "traceparent", "x-request-id", "triton_grpc_error", "triton_enable_empty_final_response", "accept-language",
            "x-forwarded-for", "cookie", "te2", "x" * 200, "a.b_c-d", "content-length2",
        ))  # fmt: skip
        value = rng.choice((
            "", "true", "x" * rng.choice((1, 129, 4000)), "00-" + "a" * 32 + "-" + "b" * 16 + "-01",
            "00-zz-1-1", "%00%0a",
            "".join(chr(rng.randrange(32, 127)) for _ in range(rng.randrange(60))),
        ))  # fmt: skip
        more.append((key, value.strip()))
    total = sum(len(key) + len(value) for key, value in more)
    sent = message(Wish(plain(rng, corpus), "metadata"), "ic_portrait").SerializeToString()
    if total > 6000:
        more = more[:1]
    return Case(name, "grpc", "metadata", ("OK",), INFER, (*headers, *more), (sent,))


def key(name: str, rng: random.Random, corpus: Corpus, headers: Headers) -> Case:
    """Call with no key, a wrong one, or one that has a limit."""
    if headers and rng.random() < 0.5:
        asked = limited(rng)
        sent = message(Wish(plain(rng, corpus) | {"priority": asked.priority}, asked.kind), "ic_portrait")
        return Case(
            name, "grpc", asked.kind, BY_REFUSAL[asked.refusal], INFER, (asked.header,), (sent.SerializeToString(),),
            names=asked.names, at_most=asked.at_most,
        )  # fmt: skip
    wrong = rng.choice((None, "", "Bearer", "Bearer x", "Basic " + "x" * 40, "Bearer " + "y" * 3000, "bearer"))
    others = tuple(pair for pair in headers if pair[0] != "authorization")
    given = others if wrong is None else (*others, ("authorization", wrong))
    expects = ("UNAUTHENTICATED",) if len(others) < len(headers) else ("OK",)
    sent = message(Wish(plain(rng, corpus), "a wrong key"), "ic_portrait").SerializeToString()
    return Case(name, "grpc", "a wrong key", expects, INFER, given, (sent,))


def frames(name: str, rng: random.Random, corpus: Corpus, headers: Headers) -> Case:
    """Write HTTP/2 by hand: messages cut and compressed wrongly, wrong sizes, odd headers and frames."""
    # Within HTTP/2's first window, because nothing here waits for a larger one.
    values = plain(rng, corpus) | {name: corpus.small(rng, 15_000) for name in ("profile", "reference")}
    body = message(Wish(values, "HTTP/2 by hand"), "ic_portrait").SerializeToString()
    pseudo = [(":method", "POST"), (":scheme", "http"), (":path", INFER), (":authority", "x")]
    more = [("content-type", "application/grpc"), ("te", "trailers"), *headers]
    data, expects = b"\0" + struct.pack(">I", len(body)) + body, ("OK",)
    kind = rng.randrange(11)
    if kind == 0:
        data, expects = data[: rng.randrange(1, len(data))], ("INVALID_ARGUMENT",)
    elif kind == 1:
        data, expects = b"\0" + struct.pack(">I", rng.choice((49 << 20, 2**32 - 1))) + body, ("RESOURCE_EXHAUSTED",)
    elif kind == 2:
        more.append(("grpc-encoding", "gzip"))
        packed = rng.choice((body, gzip.compress(body)[:-9], rng.randbytes(50)))
        data, expects = b"\1" + struct.pack(">I", len(packed)) + packed, ("INVALID_ARGUMENT",)
    elif kind == 3:
        packed = BOMB
        more.append(("grpc-encoding", "gzip"))
        data, expects = b"\1" + struct.pack(">I", len(packed)) + packed, ("RESOURCE_EXHAUSTED",)
    elif kind == 4:
        more.append(("grpc-encoding", rng.choice(("snappy", "", "gzip, deflate", "x" * 1000))))
        data, expects = b"\1" + data[1:], ("UNIMPLEMENTED",)
    elif kind == 5:
        more.append(
            ("grpc-timeout", rng.choice(("", "x", "1", "-1S", "99999999H", "1S1S", "0n", "٣S", "9" * 30 + "S")))
        )
        expects = ("OK", "DEADLINE_EXCEEDED", "INVALID_ARGUMENT", "UNAVAILABLE", "GONE")
    elif kind == 6:
        more[0] = ("content-type", rng.choice(("", "text/html", "application/json", "application")))
        expects = ("INVALID_ARGUMENT", "GONE")
    elif kind == 7:
        pseudo[0] = (":method", rng.choice(("GET", "PUT", "post", "")))
        expects = ("OK", *GRPC_REFUSALS, "GONE")
    elif kind == 8:
        more.append(
            rng.choice((("Upper", "1"), ("a b", "1"), (":late", "1"), ("connection", "close"), ("x", "a\r\nb: c")))
        )
        expects = ("OK", *GRPC_REFUSALS, "GONE")
    elif kind == 9:
        data, expects = b"", ("INVALID_ARGUMENT",)
    opened = HeadersFrame(1, hpack.Encoder().encode([*pseudo, *more]), flags=["END_HEADERS"])
    pieces = [PREFACE + SettingsFrame(0).serialize() + opened.serialize()]
    size = Settings().max_frame_size
    for at in range(0, max(len(data), 1), size):
        flags = ["END_STREAM"] if at + size >= len(data) else []
        pieces.append(DataFrame(1, data[at : at + size], flags=flags).serialize())
    if kind == 10:
        strange: tuple[Frame, ...] = (
            PingFrame(0, b"12345678"), WindowUpdateFrame(0, window_increment=2**31 - 1), RstStreamFrame(1, 8),
            DataFrame(5, b"x"), SettingsFrame(0, {4: 2**31 - 1, 99: 1}), WindowUpdateFrame(1, window_increment=5),
        )  # fmt: skip
        frame = rng.choice((*(each.serialize() for each in strange), rng.randbytes(40), mutated(rng, pieces[0])))
        pieces.insert(rng.randrange(len(pieces) + 1), frame)
        expects = ("OK", *GRPC_REFUSALS, "DEADLINE_EXCEEDED", "GONE")
    return Case(name, "frames", "HTTP/2 by hand", expects, INFER, (), tuple(pieces))


Maker = Callable[[str, random.Random, Corpus, Headers], Case]
MAKERS: tuple[tuple[Maker, int], ...] = (
    (unary, 60), (wrong_tensor, 10), (ignored, 2), (damaged_message, 12), (model, 3), (method, 5), (stream, 14),
    (leaver, 2), (in_a_hurry, 1), (metadata, 3), (key, 3), (frames, 6),
)  # fmt: skip
