"""Cases for HTTP: v2's JSON and binary tensors, generate, forms, damaged bodies, headers and requests."""

from __future__ import annotations

import base64
import json
import random
from collections.abc import Callable
from typing import Any

from tests.fuzz.cases import HTTP_REFUSALS, Case
from tests.fuzz.corpus import Corpus, mutated
from tests.fuzz.grpc_cases import raw
from tests.fuzz.keys import limited
from tests.fuzz.wishes import FIELDS, Wish, good, plain, wish

MODEL = "/v2/models/ic_portrait"
STREAM = "/v2/models/ic_portrait_stream"
BY_VERDICT = {"good": ("200",), "wrong": ("400",), "either": ("200", "400"), "deadline": ("200", "503", "504")}
ANY = ("200", *HTTP_REFUSALS)
BY_REFUSAL = {"": ("200",), "exhausted": ("200", "429"), "denied": ("403",)}
HOSTILE_JSON = (
    "", "{}", "[]", "null", "1", '"x"', "{", '{"inputs": null}', '{"inputs": {}}', '{"inputs": [1]}',
    '{"inputs": [[]]}',
    "[" * 100_000, '{"a":' * 5000, '{"profile": ' + "[" * 900 + "]" * 900 + "}", '{"profile": 1e999}',
    '{"seed": ' + "9" * 5000 + "}",
    '{"profile": "\\ud800", "reference": "\\udfff"}', '{"id": {"a": 1}}', '{"id": "' + "x" * 2000 + '"}',
    '{"profile": null, "reference": null}', '{"profile": [], "reference": []}', '{"parameters": []}',
    '{"inputs": [{"name": "seed", "shape": ["' + "x" * 100_000 + '"], "datatype": "INT64", "data": [1]}]}',
    '{"inputs": [{"name": "seed", "shape": [[[[1]]]], "datatype": "INT64", "data": [1]}]}',
    '{"inputs": [{"name": "' + "é" * 50_000 + '", "shape": [1], "datatype": "INT64", "data": [1]}]}',
    '{"inputs": [{"name": "seed", "shape": [1], "datatype": "INT64", "parameters": {"binary_data_size": true}}]}',
    '{"inputs": [{"name": "seed", "shape": [1], "datatype": "INT64", "parameters": {"binary_data_size": -1}}]}',
    '{"inputs": [{"name": "seed", "shape": [1], "datatype": "' + "I" * 90_000 + '", "data": [1]}]}',
    '{"profile": {"a": "' + "x" * 100_000 + '"}}', "\ufeff{}", "{'profile': 1}", '{"a": 1}{"a": 1}', "\0",
    '{"' + "k" * 100_000 + '": 1}', '{"seed": true}', '{"seed": 1.5}', '{"seed": "7"}', '{"seed": [[1], 2]}',
)  # fmt: skip
Headers = tuple[tuple[str, str], ...]


def request(path: str, headers: Headers, body: bytes, method: str = "POST", more: Headers = ()) -> bytes:
    """Write a request."""
    lines = [f"{method} {path} HTTP/1.1", "host: x"]
    named = {name.lower() for name, _ in more}
    if "content-length" not in named and "transfer-encoding" not in named:
        lines.append(f"content-length: {len(body)}")
    lines += [f"{name}: {value}" for name, value in (*headers, *more)]
    return ("\r\n".join(lines) + "\r\n\r\n").encode("latin-1", errors="replace") + body


def infer_json(wanted: Wish, rng: random.Random) -> tuple[str, Headers, bytes]:
    """Write ``infer`` with pictures in base64."""
    inputs = []
    for name, value in {**wanted.values, "encoding": wanted.values.get("encoding", "base64")}.items():
        values = [_text(each) for each in (value if isinstance(value, list) else [value])]
        inputs.append({"name": name, "shape": [len(values)], "datatype": _kind(name, value), "data": values})
    return f"{MODEL}/infer", (), json.dumps({"id": "1", "inputs": inputs}).encode()


def infer_binary(wanted: Wish, rng: random.Random) -> tuple[str, Headers, bytes]:
    """Write ``infer`` with tensors behind its JSON."""
    inputs, behind = [], []
    for name, value in wanted.values.items():
        values = value if isinstance(value, list) else [value]
        data = raw(_kind(name, value), values)
        parameters = {"binary_data_size": len(data)}
        inputs.append({"name": name, "shape": [len(values)], "datatype": _kind(name, value), "parameters": parameters})
        behind.append(data)
    head = json.dumps({"inputs": inputs, "parameters": {"binary_data_output": True}}).encode()
    return f"{MODEL}/infer", (("Inference-Header-Content-Length", str(len(head))),), head + b"".join(behind)


def generate(wanted: Wish, rng: random.Random) -> tuple[str, Headers, bytes]:
    """Write ``generate`` or ``generate_stream``."""
    values = {name: _texts(value) for name, value in wanted.values.items()}
    body = json.dumps({"encoding": "base64", **values}).encode()
    return rng.choice((f"{MODEL}/generate", f"{MODEL}/generate_stream", f"{STREAM}/generate_stream")), (), body


def form(wanted: Wish, rng: random.Random) -> tuple[str, Headers, bytes]:
    """Write a form."""
    boundary = "x" * rng.choice((1, 20, 70)) + "-boundary"
    parts = []
    for name, value in wanted.values.items():
        text = ",".join(map(str, value)) if isinstance(value, list) else value
        data = text if isinstance(text, bytes) else str(text).encode()
        safe = name.replace('"', "%22")
        file = (
            f'; filename="{rng.choice(("a.jpg", "é.png", "../../etc/passwd", ""))}"' if isinstance(text, bytes) else ""
        )
        parts.append(f'--{boundary}\r\nContent-Disposition: form-data; name="{safe}"{file}\r\n\r\n'.encode() + data)
    body = b"\r\n".join([*parts, f"--{boundary}--\r\n".encode()])
    path = "/v1/portraits" + rng.choice(("", "", "?stream=1", "?stream=0&x=1"))
    return path, (("content-type", f"multipart/form-data; boundary={boundary}"),), body


WRITERS = (infer_json, infer_binary, generate, form)


def _kind(name: str, value: Any) -> str:
    return FIELDS[name].dtype.triton if name in FIELDS else "INT32" if isinstance(value, int) else "BYTES"


def _text(value: Any) -> Any:
    return base64.b64encode(value).decode() if isinstance(value, bytes) else value


def _texts(value: Any) -> Any:
    return [_text(each) for each in value] if isinstance(value, list) else _text(value)


def asked(name: str, rng: random.Random, corpus: Corpus, headers: Headers) -> Case:
    """Ask for a portrait over any route."""
    wanted = wish(rng, corpus)
    path, more, body = rng.choice(WRITERS)(wanted, rng)
    is_good = wanted.verdict == "good"
    return Case(
        name, "http", wanted.kind, BY_VERDICT[wanted.verdict], path,
        messages=_pieces(rng, request(path, headers, body, more=more)),
        names="deadline_ms" if wanted.verdict == "deadline" else wanted.names, same_as=wanted.same_as,
        seeds=(wanted.seed,), portraits=wanted.portraits if is_good else 0,
        output_format=wanted.output_format if is_good else "",
    )  # fmt: skip


def damaged_body(name: str, rng: random.Random, corpus: Corpus, headers: Headers) -> Case:
    """Send a body with changed, lost or more bytes."""
    path, more, body = rng.choice(WRITERS)(good(rng, corpus), rng)
    if len(body) > 200_000:
        return damaged_body(name, rng, corpus, headers)
    head = rng.randrange(600)
    body = mutated(rng, body[:head]) + body[head:] if rng.random() < 0.7 else mutated(rng, body)
    if rng.random() < 0.1:
        more = tuple((each, mutated(rng, value.encode()).decode("latin-1")) for each, value in more)
        more = tuple((each, "".join(c for c in value if c >= " " and c != "\x7f").strip()) for each, value in more)
    return Case(name, "http", "a damaged body", ANY, path, messages=(request(path, headers, body, more=more),))


def hostile_json(name: str, rng: random.Random, corpus: Corpus, headers: Headers) -> Case:
    """Send JSON that no client writes."""
    path = rng.choice((f"{MODEL}/infer", f"{MODEL}/generate", f"{STREAM}/generate_stream"))
    body = rng.choice(HOSTILE_JSON).encode(errors="surrogatepass")
    return Case(name, "http", "hostile JSON", ("400",), path, messages=(request(path, headers, body),))


def wrong_form(name: str, rng: random.Random, corpus: Corpus, headers: Headers) -> Case:
    """Send a form that isn't one, or has too much."""
    _, more, body = form(Wish(plain(rng, corpus), "a wrong form"), rng)
    kind = rng.randrange(8)
    boundary = more[0][1].partition("boundary=")[2]
    first = body.partition(b"\r\n\r\n")[0]
    if kind == 0:
        types = (
            "",
            "text/plain",
            "multipart/form-data",
            "multipart/form-data; boundary=",
            "multipart/mixed; boundary=x",
        )
        more = (("content-type", rng.choice((*types, "multipart/form-data; boundary=" + "b" * 5000))),)
    elif kind == 1:
        body = body[: rng.randrange(len(body))]
    elif kind == 2:
        body = first + b"\r\n\r\nx\r\n" + body
    elif kind == 3:
        body = (first + b"\r\n\r\nx\r\n") * 60 + body
    elif kind == 4:
        body = (
            b"--"
            + boundary.encode()
            + b'\r\nContent-Disposition: form-data; name="seed"\r\n\r\n'
            + b"1" * 300
            + b"\r\n"
            + body
        )
    elif kind == 5:
        body = body.replace(
            b"form-data; name=", rng.choice((b"form-data; nam=", b"attachment; name=", b"name=", b"")), 1
        )
    elif kind == 6:
        body = b"--" + boundary.encode() + b"\r\n" + b"a: " + b"x" * 20_000 + b"\r\n\r\n" + body
    else:
        body = body.replace(b"--" + boundary.encode(), b"--another")
    return Case(name, "http", "a wrong form", ("400",), "/v1/portraits",
                messages=(request("/v1/portraits", headers, body, more=more),))  # fmt: skip


def route(name: str, rng: random.Random, corpus: Corpus, headers: Headers) -> Case:
    """Ask for another path, or in another way."""
    paths = (
        ("/v2", ("200",)), ("/v2/health/ready", ("200",)), ("/v2/health/live", ("200",)), (MODEL, ("200",)),
        (f"{MODEL}/config", ("200",)), (f"{STREAM}/stats", ("200",)), ("/openapi.json", ("200",)), ("/docs", ("200",)),
        (f"{MODEL}/versions/1/ready", ("200",)), (f"{MODEL}/versions/9", ("404",)), ("/v2/models/x", ("404",)),
        ("/v2/models/%00", ("404",)), ("/v2/models/..%2f..", ("404",)), ("/../../etc/passwd", ("404",)),
        ("//", ("404",)),
        ("/v1/portraits/", ("404",)), (f"{MODEL}/infer", ("405",)), ("/v2/models/" + "x" * 5000, ("404",)),
        ("/v2/repository/index", ("404",)), ("/%ff%fe", ("404",)), ("/v2/models/é", ("404", "400")),
        ("*", ("404", "400")),
        ("/x?" + "a=1&" * 50, ("404",)), ("http://y/v2", ("200", "404", "400")),
    )  # fmt: skip
    path, expects = rng.choice(paths)
    method = "GET"
    if rng.random() < 0.2:
        method = rng.choice(("PUT", "DELETE", "OPTIONS", "TRACE", "PATCH", "HEAD", "BREW", "get"))
        expects = ("200", "404", "405", "400", "GONE")
    elif rng.random() < 0.1:
        path, method, expects = "/v1/portraits?" + "a=1&" * 50, "POST", ("400",)
    return Case(name, "http", "another route", expects, path, messages=(request(path, headers, b"", method),))


def strange_headers(name: str, rng: random.Random, corpus: Corpus, headers: Headers) -> Case:
    """Send strange headers beside a good request."""
    path, more, body = infer_binary(Wish(plain(rng, corpus), "headers"), rng)
    pairs = (
        ("content-encoding", "gzip", ("415",)), ("content-encoding", "identity", ("200",)),
        ("Inference-Header-Content-Length", "x", ("400", "200")), ("x-request-id", "\xff" * 100, ("200",)),
        ("x-request-id", "a" * 200, ("200",)), ("traceparent", "00-" + "a" * 32 + "-" + "b" * 16 + "-01", ("200",)),
        ("traceparent", "x", ("200",)), ("accept", "x" * 5000, ("200",)), ("cookie", "a=b; " * 500, ("200",)),
        ("expect", "100-continue", ("200",)), ("upgrade", "h2c", ("200", "400")),
        ("connection", "upgrade", ("200", "400")),
        ("connection", "close", ("200",)), ("a", "x" * 70_000, ("431",)),
        ("transfer-encoding", "gzip", ("400", "200", "501")),
        ("content-length", "-1", ("400",)), ("content-length", "1e3", ("400",)),
        ("content-length", "99999999999", ("413",)),
        ("content-length", "9" * 40, ("400",)), ("host", "y", ("200", "400")), ("a b", "1", ("400",)),
        ("", "1", ("400",)),
        ("x", "a\r\n b", ("200", "400")), ("x", "a\0b", ("400",)), ("x", "a\nb", ("400", "200")),
    )  # fmt: skip
    one, value, expects = rng.choice(pairs)
    return Case(
        name, "http", "headers", expects, path, messages=(request(path, headers, body, more=(*more, (one, value))),)
    )


def chunked(name: str, rng: random.Random, corpus: Corpus, headers: Headers) -> Case:
    """Send a body in chunks, good and bad ones."""
    path, more, body = rng.choice(WRITERS)(Wish(plain(rng, corpus), "chunks"), rng)
    size = rng.choice((1000, 5000, 70_000))
    pieces = [body[at : at + size] for at in range(0, len(body), size)]
    coded = [f"{len(piece):x}\r\n".encode() + piece + b"\r\n" for piece in pieces] + [b"0\r\n\r\n"]
    expects: tuple[str, ...] = ("200",)
    kind = rng.randrange(4)
    if kind == 0:
        bad = rng.choice(
            (b"zz\r\n", b"-1\r\nx\r\n", b"ffffffffffffffffff\r\n", b"\r\n", b"5\r\nab\r\n", rng.randbytes(9))
        )
        coded.insert(rng.randrange(len(coded)), bad)
        expects = ("200", "400", "413", "GONE")
    elif kind == 1:
        coded, expects = [b"1\r\nx\r\n"] * 3000, ("400",)
    head = request(path, headers, b"", more=(*more, ("transfer-encoding", "chunked")))
    return Case(name, "http", "chunks", expects, path, messages=_pieces(rng, head + b"".join(coded)))


def damaged_request(name: str, rng: random.Random, corpus: Corpus, headers: Headers) -> Case:
    """Change a request's own lines."""
    path, more, body = infer_binary(Wish(plain(rng, corpus), "request"), rng)
    whole = request(path, headers, body, more=more)
    end = whole.index(b"\r\n\r\n") + 4
    start = whole.index(b"host")
    sent = (
        mutated(rng, whole[:start]) + whole[start:end]
        if rng.random() < 0.4
        else whole[:start] + mutated(rng, whole[start:end])
    )
    sent += body
    if rng.random() < 0.1:
        sent = rng.choice(
            (
                rng.randbytes(300),
                b"\x16\x03\x01\x02\x00\x01" + bytes(50),
                b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
                b"\r\n" * 50,
            )
        )
    return Case(name, "http", "a damaged request", (*ANY, "GONE"), path, messages=(sent,), leaves_after_s=1.0)


def leaver(name: str, rng: random.Random, corpus: Corpus, headers: Headers) -> Case:
    """Hang up within the body, or while the portrait is made."""
    wanted = Wish(plain(rng, corpus) | {"num_inference_steps": 150}, "a leaver")
    path, more, body = rng.choice(WRITERS)(wanted, rng)
    whole = request(path, headers, body, more=more)
    sent = whole[: rng.randrange(len(whole))] if rng.random() < 0.5 else whole
    leaves = rng.choice((0.0, 0.01, 0.05, 0.15))
    return Case(name, "http", "a leaver", (*ANY, "GONE"), path, messages=(sent,), leaves_after_s=leaves)


def key(name: str, rng: random.Random, corpus: Corpus, headers: Headers) -> Case:
    """Call without a key, with a wrong one, or with one that has a limit."""
    if headers and rng.random() < 0.5:
        asked = limited(rng)
        path, more, body = rng.choice(WRITERS)(Wish(plain(rng, corpus) | {"priority": asked.priority}, asked.kind), rng)
        return Case(
            name, "http", asked.kind, BY_REFUSAL[asked.refusal], path,
            messages=(request(path, (asked.header,), body, more=more),), names=asked.names, at_most=asked.at_most,
        )  # fmt: skip
    wrong = rng.choice((None, "", "Bearer", "Bearer x", "Basic " + "x" * 40, "Bearer " + "y" * 3000, "bearer \xff"))
    others = tuple(pair for pair in headers if pair[0] != "authorization")
    given = others if wrong is None else (*others, ("authorization", wrong))
    expects = ("401",) if len(others) < len(headers) else ("200",)
    path, more, body = rng.choice(WRITERS)(Wish(plain(rng, corpus), "a wrong key"), rng)
    return Case(name, "http", "a wrong key", expects, path, messages=(request(path, given, body, more=more),))


def _pieces(rng: random.Random, data: bytes) -> tuple[bytes, ...]:
    if rng.random() < 0.8:
        return (data,)
    at = sorted(rng.randrange(len(data)) for _ in range(rng.choice((1, 5))))
    return tuple(data[start:end] for start, end in zip([0, *at], [*at, len(data)], strict=True) if start < end)


Maker = Callable[[str, random.Random, Corpus, Headers], Case]
MAKERS: tuple[tuple[Maker, int], ...] = (
    (asked, 55), (damaged_body, 12), (hostile_json, 8), (wrong_form, 5), (route, 5), (strange_headers, 4), (chunked, 3),
    (damaged_request, 4), (leaver, 2), (key, 3),
)  # fmt: skip
