"""The HTTP door: KServe's v2 protocol, Triton's ``generate``, and forms, before a portrait service.

    GET  /v2/health/live, /v2/health/ready                     200, or 503
    GET  /v2, /v2/models/stats, /v2/models/M[/versions/V][/ready, /config, /stats]
    POST /v2/models/M[/versions/V]/infer                       JSON, or JSON with tensors' bytes behind it
    POST /v2/models/M[/versions/V]/generate[_stream]           JSON; server-sent events
    POST /v1/portraits[?stream=1]                              a form with two files; a picture, JSON or events
    GET  /docs, /openapi.json                                  what there is

Of what a request needs, the cheapest is asked first: its key, whether the service takes any, its length, its rate. All
that comes before any of its body is read. Every error is ``{"error": text}``, with a status that tells the fault.
"""

from __future__ import annotations

import asyncio
import base64
import json
import logging
import math
import os
import re
from collections.abc import Awaitable, Callable, Iterable
from typing import Any, Protocol, TypeVar

from starlette.exceptions import HTTPException
from starlette.routing import BaseRoute, Route, Router
from starlette.types import Receive, Scope, Send

from icportrait.contract import Array
from icportrait.errors import IcPortraitError, InvalidRequest, Unavailable
from icportrait.gateway import kserve, openapi, v2_json
from icportrait.gateway.access import HEADER, Access
from icportrait.gateway.api import Caller, Event, OnEvent, Portraits, PortraitService, ServerLimits, Unread
from icportrait.gateway.http_exchange import JSON, CallerGone, Exchange
from icportrait.gateway.http_server import HttpServer
from icportrait.gateway.kserve import KserveModels
from icportrait.gateway.portraits_form import PortraitsForm
from icportrait.gateway.records import CURRENT, Records
from icportrait.gateway.tls import TlsSettings, server_context

logger = logging.getLogger(__name__)

T = TypeVar("T")
GONE = "499"
"""Code of a request whose caller left before the answer."""


class HttpSettings(TlsSettings, Protocol):
    """The settings that this door reads."""

    @property
    def host(self) -> str:
        """Return the address to listen on."""

    @property
    def http_port(self) -> int:
        """Return the port to listen at; 0 takes any."""

    @property
    def limits(self) -> ServerLimits:
        """Return the limits of the door's callers."""


class HttpDoor:
    """An HTTP door that is open."""

    def __init__(self, app: HttpApp, server: HttpServer, served: asyncio.Task[None], port: int) -> None:
        self.app, self.port = app, port
        self._server, self._served = server, served

    @property
    def connections(self) -> int:
        """Open now."""
        return len(self._server.server_state.connections)

    @property
    def listens(self) -> bool:
        """Tell whether the door takes new connections."""
        return any(server.is_serving() for server in self._server.servers)

    async def close(self, grace_s: float) -> None:
        """Stop listening at once, and end.

        Args:
            grace_s: that calls on their way have; then they are cancelled.
        """
        self._server.config.timeout_graceful_shutdown = math.ceil(grace_s)
        for listening in self._server.servers:
            listening.close()
        self._server.should_exit = True
        await self._served
        await self._server.end_connections()


async def serve_http(
    service: PortraitService,
    settings: HttpSettings,
    access: Access,
    models: KserveModels,
    unread: Unread,
    records: Records | None = None,
) -> HttpDoor:
    """Open the door in the running loop.

    Args:
        service: behind it.
        settings: its address, limits and TLS.
        access: who may call.
        models: that callers see.
        unread: answers on their way, of all doors.
        records: where answers are counted, of all doors.

    Raises:
        IcPortraitError: the address can't be had, or a file of TLS isn't what it should be.
    """
    tls = server_context(settings, ["http/1.1"])
    records = records or Records()
    app = HttpApp(service, settings.limits, access, models, unread, records)
    server = HttpServer(app, settings.limits, records)
    try:
        port = await server.listen(settings.host, settings.http_port, tls)
    except OSError as error:
        reason = os.strerror(error.errno) if error.errno and error.errno > 0 else error.strerror
        raise IcPortraitError(f"http_port: {settings.host}:{settings.http_port}: {reason}") from error
    served = asyncio.create_task(server.serve(), name="http")
    return HttpDoor(app, server, served, port)


def _too_much() -> Unavailable:
    # Another each time: one that is raised again keeps all frames that it has ever passed, and their bodies.
    return Unavailable("too much is being sent to this server at once; retry_after_ms: 1000")


class HttpApp:
    """The door as an ASGI application."""

    def __init__(
        self,
        service: PortraitService,
        limits: ServerLimits,
        access: Access,
        models: KserveModels,
        unread: Unread,
        records: Records,
    ) -> None:
        self.service, self.limits, self.access, self.models, self.unread = service, limits, access, models, unread
        self.records = records
        self.incoming_bytes = 0
        self._reading: dict[asyncio.Timeout, None] = {}
        """Bodies on their way, the slowest first."""
        self._router = Router(routes=self._routes(), redirect_slashes=False)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        exchange = Exchange(scope, receive, send, self.unread)
        scope["exchange"] = exchange
        # Starlette raises for what it can't route where it finds an application in the scope.
        scope["app"] = self
        CURRENT.set(exchange.record)
        try:
            await self._answer(exchange, scope, receive, send)
        finally:
            exchange.record.code = exchange.record.code or GONE
            self.records.add(exchange.record)

    async def _answer(self, exchange: Exchange, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await self._router(scope, receive, send)
        except CallerGone:
            exchange.record.code = GONE
        except asyncio.CancelledError:
            # The server stops and has waited for long enough.
            await exchange.fail(Unavailable("the server is stopping; try again later"))
        except HTTPException as error:
            await exchange.refuse(error.status_code, f"{scope['path'][:80]}: {error.detail}", error.headers or {})
        except IcPortraitError as error:
            await exchange.fail(error)
        except Exception:
            logger.exception("%s failed", scope["path"][:80])
            await exchange.fail(IcPortraitError("the server made a mistake; its log says which"))

    def _routes(self) -> list[BaseRoute]:
        of_model = "/v2/models/{model}"
        with_version = f"{of_model}/versions/{{version}}"
        routes: list[BaseRoute] = [
            _route("GET", "/", self._page),
            _route("GET", "/docs", self._page),
            _route("GET", "/openapi.json", self._openapi),
            _route("GET", "/v2/health/live", self._live),
            _route("GET", "/v2/health/ready", self._ready),
            _route("GET", "/v2", self._server_metadata),
            _route("GET", "/v2/", self._server_metadata),
            _route("GET", "/v2/models/stats", self._statistics),
            _route("POST", "/v1/portraits", self._portraits),
        ]
        for path in (of_model, with_version):
            routes += [
                _route("GET", path, self._metadata),
                _route("GET", f"{path}/ready", self._model_ready),
                _route("GET", f"{path}/config", self._config),
                _route("GET", f"{path}/stats", self._statistics),
                _route("POST", f"{path}/infer", self._infer),
                _route("POST", f"{path}/generate", self._generate),
                _route("POST", f"{path}/generate_stream", self._generate_stream),
            ]
        return routes

    async def _page(self, exchange: Exchange) -> None:
        await exchange.answer([openapi.PAGE], [(b"content-type", b"text/html; charset=utf-8")])

    async def _openapi(self, exchange: Exchange) -> None:
        await exchange.answer([openapi.DOCUMENT], [JSON])

    async def _live(self, exchange: Exchange) -> None:
        await exchange.answer([])

    async def _ready(self, exchange: Exchange) -> None:
        if not self.service.is_ready:
            raise Unavailable("the server isn't ready; retry_after_ms: 1000")
        await exchange.answer([])

    async def _model_ready(self, exchange: Exchange) -> None:
        self.models.find(*exchange.model)
        await self._ready(exchange)

    async def _server_metadata(self, exchange: Exchange) -> None:
        await self._tell(exchange, self.models.server_metadata)

    async def _metadata(self, exchange: Exchange) -> None:
        await self._tell(exchange, lambda: self.models.metadata(*exchange.model))

    async def _config(self, exchange: Exchange) -> None:
        await self._tell(exchange, lambda: self.models.config(*exchange.model))

    async def _statistics(self, exchange: Exchange) -> None:
        await self._tell(exchange, lambda: self.models.statistics(self.service.statistics, *exchange.model))

    async def _tell(self, exchange: Exchange, find: Callable[[], Any]) -> None:
        exchange.record.key = self.access.identify(exchange.header(HEADER), exchange.peer).name
        await exchange.answer([json.dumps(kserve.to_json(find())).encode()], [JSON])

    async def _infer(self, exchange: Exchange) -> None:
        model = self.models.find(*exchange.model)
        if model.is_stream:
            raise InvalidRequest(f"{model.name}: tells of steps, which infer can't; generate_stream can")
        caller = self._enter(exchange)
        json_bytes = _whole_number(
            "Inference-Header-Content-Length", exchange.header("inference-header-content-length")
        )
        call = await self._body(exchange, lambda body: v2_json.read_infer(body, json_bytes))
        portraits = await self._make(exchange, call.inputs, caller)
        tensors = kserve.answer_tensors(portraits, call.wanted)
        parts, json_bytes = v2_json.write_infer(model.name, call.request_id, tensors, call.binary)
        headers = [JSON]
        if json_bytes is not None:
            headers = [
                (b"content-type", b"application/octet-stream"),
                (b"inference-header-content-length", str(json_bytes).encode()),
            ]
        await exchange.answer(parts, headers)

    async def _generate(self, exchange: Exchange) -> None:
        model = self.models.find(*exchange.model)
        caller = self._enter(exchange)
        request_id, inputs = await self._body(exchange, v2_json.read_generate)
        portraits = await self._make(exchange, inputs, caller)
        tensors = kserve.answer_tensors(portraits, kserve.wanted_outputs([]))
        await exchange.answer([v2_json.write_generate(model.name, request_id, tensors)], [JSON])

    async def _generate_stream(self, exchange: Exchange) -> None:
        model = self.models.find(*exchange.model)
        caller = self._enter(exchange)
        request_id, inputs = await self._body(exchange, v2_json.read_generate)
        wanted = kserve.wanted_outputs([])

        async def tell(event: Event) -> None:
            await exchange.event(v2_json.write_generate(model.name, request_id, kserve.event_tensors(event, wanted)))

        portraits = await self._make(exchange, inputs, caller, tell if model.is_stream else None)
        tensors = kserve.answer_tensors(portraits, wanted)
        await exchange.event(v2_json.write_generate(model.name, request_id, tensors))
        await exchange.end_events()

    async def _portraits(self, exchange: Exchange) -> None:
        is_stream = exchange.query.get("stream", ["0"])[-1] not in ("", "0", "false")
        caller = self._enter(exchange)
        form = PortraitsForm(exchange.header("content-type") or "")
        held = await self._read(exchange, form.feed)
        try:
            inputs = form.inputs()
        finally:
            self.incoming_bytes -= held
        output_format = inputs["output_format"][0].decode() if "output_format" in inputs else "png"
        if is_stream:
            await self._stream_portraits(exchange, inputs, caller)
            return
        portraits = await self._make(exchange, inputs, caller)
        metadata = json.loads(portraits.metadata)
        if len(portraits.images) == 1 and "application/json" not in (exchange.header("accept") or ""):
            headers = [
                (b"content-type", f"image/{output_format}".encode()),
                (b"icportrait-metadata", json.dumps(metadata).encode()),
            ]
            await exchange.answer(portraits.images, headers)
        else:
            answer = {"images": _base64(portraits.images), "metadata": metadata}
            await exchange.answer([json.dumps(answer).encode()], [JSON])

    async def _stream_portraits(self, exchange: Exchange, inputs: dict[str, Array], caller: Caller) -> None:
        async def tell(event: Event) -> None:
            step = {"step": event.step, "total_steps": event.total_steps}
            preview = {"images": _base64(event.images)} if event.images else {}
            await exchange.event(json.dumps(step | preview).encode(), "step")

        exchange.error_event = "error"
        portraits = await self._make(exchange, inputs, caller, tell)
        answer = {"images": _base64(portraits.images), "metadata": json.loads(portraits.metadata)}
        await exchange.event(json.dumps(answer).encode(), "portraits")
        await exchange.end_events()

    def _enter(self, exchange: Exchange) -> Caller:
        """Ask for all that can be known of a request without its body.

        Raises:
            IcPortraitError: it won't be served.
            HTTPException: its body won't be read.
        """
        caller = self.access.identify(exchange.header(HEADER), exchange.peer)
        exchange.record.key = caller.name
        if refusal := self.service.refusal():
            raise refusal
        encoding = exchange.header("content-encoding") or "identity"
        if encoding.lower() != "identity":
            raise HTTPException(415, f"Content-Encoding {encoding[:20]!r}, expected identity: pictures are compressed")
        length = _whole_number("Content-Length", exchange.header("content-length"))
        if length is not None and length > self.limits.message_bytes:
            raise self._too_large()
        self.access.count(caller)
        return caller

    def _too_large(self) -> HTTPException:
        return HTTPException(413, f"a request may have {self.limits.message_bytes} bytes")

    async def _body(self, exchange: Exchange, parse: Callable[[bytearray], T]) -> T:
        body = bytearray()
        held = await self._read(exchange, body.extend)
        try:
            return parse(body)
        finally:
            self.incoming_bytes -= held

    async def _read(self, exchange: Exchange, take: Callable[[bytes], None]) -> int:
        """Hand on a body as it comes.

        Returns:
            How long it was; ``incoming_bytes`` has it until the caller takes it away.
        """
        held = 0
        time_limit = asyncio.timeout(self.limits.body_timeout_s)
        self._reading[time_limit] = None
        try:
            async with time_limit:
                while data := await exchange.read():
                    held += len(data)
                    self.incoming_bytes += len(data)
                    if held > self.limits.message_bytes:
                        raise self._too_large()
                    if self.incoming_bytes > self.limits.incoming_bytes:
                        self._make_room(time_limit)
                    take(data)
        except TimeoutError:
            self.incoming_bytes -= held
            if time_limit not in self._reading:
                raise _too_much() from None
            raise HTTPException(408, f"the body took longer than {self.limits.body_timeout_s:g} s") from None
        except BaseException:
            self.incoming_bytes -= held
            raise
        finally:
            self._reading.pop(time_limit, None)
        return held

    def _make_room(self, asking: asyncio.Timeout) -> None:
        """End the body that takes longest, so that unfinished bodies keep no caller out."""
        longest = next(iter(self._reading))
        if longest is asking:
            raise _too_much()
        del self._reading[longest]
        longest.reschedule(asyncio.get_running_loop().time())

    async def _make(
        self, exchange: Exchange, inputs: dict[str, Array], caller: Caller, on_event: OnEvent | None = None
    ) -> Portraits:
        """Have portraits made, unless the caller leaves meanwhile."""
        made = asyncio.ensure_future(self.service.generate(inputs, caller, on_event))
        gone = asyncio.ensure_future(exchange.wait_gone())
        try:
            await asyncio.wait((made, gone), return_when=asyncio.FIRST_COMPLETED)
            if not made.done():
                raise CallerGone
            portraits = made.result()
            exchange.record.note(portraits)
            return portraits
        finally:
            for task in (made, gone):
                task.cancel()
            await asyncio.gather(made, gone, return_exceptions=True)


class _Endpoint:
    """Starlette takes what is no function for an ASGI application."""

    def __init__(self, name: str, serve: Callable[[Exchange], Awaitable[None]]) -> None:
        self._name, self._serve = name, serve

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        exchange: Exchange = scope["exchange"]
        exchange.record.method = self._name
        # All that is sent to this server asks for portraits.
        exchange.record.makes_portraits = self._name.startswith("POST ")
        await self._serve(exchange)


def _route(method: str, path: str, serve: Callable[[Exchange], Awaitable[None]]) -> Route:
    return Route(path, _Endpoint(f"{method} {path}", serve), methods=[method])


def _whole_number(name: str, text: str | None) -> int | None:
    if text is None:
        return None
    if not re.fullmatch(r"\d{1,18}", text, re.ASCII):
        raise InvalidRequest(f"{name}: {text[:40]!r}, expected a whole number")
    return int(text)


def _base64(images: Iterable[bytes]) -> list[str]:
    return [base64.b64encode(image).decode() for image in images]
