"""A page to try a server with, for a browser on this machine.

The page is one file without anything from elsewhere. Pictures come as bytes of a request's body: no name or path from
the browser is ever opened. Requests of other sites' pages are refused, by ``Host`` and ``Origin``.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import AsyncIterator, Sequence
from contextlib import aclosing, asynccontextmanager
from importlib import resources
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from icportrait_client.aio import AsyncPortraitClient
from icportrait_client.contract import load_contract
from icportrait_client.errors import InvalidRequest, PortraitError
from icportrait_client.options import PortraitOptions
from icportrait_client.portraits import Portrait, Preview
from icportrait_client.settings import ClientOptions

MAX_BODY_BYTES = 100_000_000
"""Two pictures of a phone's camera; what is larger than the server takes is shrunk here."""
MAX_HEAD_BYTES = 10_000
LOOPBACK = ("127.0.0.1", "localhost", "[::1]")
_HEADERS = {"cache-control": "no-store", "x-content-type-options": "nosniff", "referrer-policy": "no-referrer"}


def make_app(servers: str | Sequence[str], options: ClientOptions, hosts: Sequence[str] = LOOPBACK) -> Starlette:
    """Make the page's server, an ASGI application.

    Args:
        servers: as for a client.
        options: as for a client.
        hosts: names by which the page may be reached, without a port.

    Raises:
        InvalidRequest: an argument isn't of its form.
    """
    client = AsyncPortraitClient(servers, **options)
    named = [servers] if isinstance(servers, str) else list(servers)
    page, policy = _page()

    @asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        async with client:
            yield

    def check(request: Request) -> None:
        host = request.headers.get("host", "")
        if re.sub(r":\d+$", "", host) not in hosts:
            raise HTTPException(403, f"Host: {host[:80]!r}, expected one of {', '.join(hosts)}")
        origin = request.headers.get("origin")
        if request.method == "POST" and origin != f"{request.url.scheme}://{host}":
            raise HTTPException(403, f"Origin: {(origin or '')[:80]!r}, expected this page's own")

    async def show(request: Request) -> Response:
        check(request)
        return Response(page, media_type="text/html", headers={**_HEADERS, "content-security-policy": policy})

    async def describe(request: Request) -> Response:
        check(request)
        inputs = load_contract().inputs
        specs = {name: _spec(inputs[name]) for name in (*PortraitOptions.__annotations__, "preview_every")}
        return JSONResponse({"options": specs, "servers": named}, headers=_HEADERS)

    async def make(request: Request) -> Response:
        check(request)
        profile, reference, values = _read(await _body(request))
        events = _told(client, profile, reference, values)
        return StreamingResponse(events, media_type="application/x-ndjson", headers=_HEADERS)

    async def refuse(_: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        return JSONResponse({"error": error.detail}, error.status_code, headers=_HEADERS)

    routes = [Route("/", show), Route("/options", describe), Route("/portraits", make, methods=["POST"])]
    return Starlette(routes=routes, lifespan=lifespan, exception_handlers={HTTPException: refuse})


def serve(servers: str | Sequence[str], options: ClientOptions, host: str, port: int) -> None:
    """Serve the page until it is interrupted.

    Raises:
        InvalidRequest: an argument isn't of its form.
        OSError: the port is taken.
    """
    import socket

    import uvicorn

    if host in ("", "0.0.0.0", "::"):
        raise InvalidRequest(
            f"host: {host!r}, expected one address or name of this machine, because the page answers under that alone"
        )
    name = f"[{host}]" if ":" in host else host
    app = make_app(servers, options, (*LOOPBACK, name))
    with socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET) as listening:
        print(f"http://{name}:{listening.getsockname()[1]}", flush=True)
        config = uvicorn.Config(app, log_level="warning", access_log=False, timeout_graceful_shutdown=1)
        uvicorn.Server(config).run([listening])


def _page() -> tuple[bytes, str]:
    """Return the page, and the policy that lets a browser run this page's own script and nothing else."""
    page = (resources.files("icportrait_client") / "playground.html").read_bytes()

    def hashed(tag: bytes) -> str:
        found = re.search(rb"<" + tag + rb">(.*?)</" + tag + rb">", page, re.DOTALL)
        assert found
        return f"'sha256-{base64.b64encode(hashlib.sha256(found[1]).digest()).decode()}'"

    policy = (
        f"default-src 'none'; script-src {hashed(b'script')}; style-src {hashed(b'style')}; connect-src 'self'; "
        "img-src blob: data:; media-src blob:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    return page, policy


def _spec(spec: Any) -> dict[str, Any]:
    return {name: getattr(spec, name) for name in ("dtype", "default", "minimum", "maximum", "choices")}


async def _body(request: Request) -> bytes:
    too_large = HTTPException(
        413, f"the pictures have over {MAX_BODY_BYTES / 1e6:.0f} MB together; choose smaller ones"
    )
    told = request.headers.get("content-length", "")
    if told.isdecimal() and int(told) > MAX_BODY_BYTES:
        raise too_large
    parts, size = [], 0
    async for part in request.stream():
        size += len(part)
        if size > MAX_BODY_BYTES:
            raise too_large
        parts.append(part)
    return b"".join(parts)


def _read(body: bytes) -> tuple[bytes, bytes, dict[str, Any]]:
    """Read a line of JSON, with the options and the profile's length, and the two pictures behind it."""
    line, _, pictures = body.partition(b"\n")
    try:
        head = json.loads(line[:MAX_HEAD_BYTES])
        size, values = head["profile_bytes"], dict(head["options"])
    except (KeyError, TypeError, ValueError):
        raise HTTPException(400, "the request isn't this page's") from None
    known = {*PortraitOptions.__annotations__, "preview_every"}
    if type(size) is not int or not 0 < size < len(pictures) or values.keys() - known:
        raise HTTPException(400, "the request isn't this page's")
    return pictures[:size], pictures[size:], values


async def _told(
    client: AsyncPortraitClient, profile: bytes, reference: bytes, values: dict[str, Any]
) -> AsyncIterator[str]:
    """Yield a line of JSON for each event. A browser that goes cancels the request on the server."""
    try:
        async with aclosing(client.stream(profile=profile, reference=reference, **values)) as events:
            async for event in events:
                said: dict[str, Any] = {}
                if isinstance(event, (Preview, Portrait)):
                    said["pictures"] = [base64.b64encode(data).decode() for data in event.files]
                if isinstance(event, Portrait):
                    said["metadata"] = event.metadata.raw
                else:
                    said |= {"step": event.step, "total_steps": event.total_steps}
                yield json.dumps(said) + "\n"
    except PortraitError as error:
        kind = "request" if isinstance(error, InvalidRequest) else "server"
        yield json.dumps({"error": " ".join(str(error).split()), "kind": kind}) + "\n"
