"""The gRPC door: KServe's v2 protocol and ``grpc.health.v1`` before the service.

A call is refused before its body is read where that can be: by its key, by a full queue, by the length of its message.
The parts of the protocol that this door lacks (shared memory, the repository, log and trace settings) are
UNIMPLEMENTED.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Collection, Coroutine, Mapping
from dataclasses import dataclass, replace
from typing import Any, Protocol

from google.protobuf.message import DecodeError
from grpclib.health.v1.health_pb2 import HealthCheckRequest, HealthCheckResponse
from tritonclient.grpc import service_pb2

from icportrait.contract import Array
from icportrait.errors import IcPortraitError, InvalidRequest, NotFound, Unsupported
from icportrait.gateway.access import HEADER, Access
from icportrait.gateway.api import Caller, Event, OnEvent, Portraits, PortraitService, ServerLimits, Unread
from icportrait.gateway.grpc_calls import Call, CallError, Method, end_of
from icportrait.gateway.grpc_connections import Calls
from icportrait.gateway.kserve import (
    MODEL_VERSION,
    MODELS,
    KserveModels,
    PublicModel,
    answer_tensors,
    event_tensors,
    output_datatype,
    raw_of,
    wanted_outputs,
)
from icportrait.gateway.records import CURRENT, Record, Records
from icportrait.gateway.tls import Handshakes, TlsSettings, server_context
from icportrait.gateway.wire import InferRequest, read_infer_request, receive_infer_request

logger = logging.getLogger(__name__)

KSERVE = "inference.GRPCInferenceService"
HEALTH = "grpc.health.v1.Health"
CODES_HEADER = "triton_grpc_error"
"""Header of a stream. If ``true``, the stream ends with its first error's code; else errors are texts among answers."""
EMPTY_FINAL = "triton_enable_empty_final_response"
FINAL = "triton_final_response"
BACKLOG = 1024
LOOK_AGAIN_S = 0.2
"""Seconds between two looks whether the service is ready, while a caller watches."""


class GrpcSettings(TlsSettings, Protocol):
    """The settings that this door reads."""

    @property
    def host(self) -> str: ...
    @property
    def grpc_port(self) -> int: ...
    @property
    def limits(self) -> ServerLimits: ...


async def serve_grpc(
    service: PortraitService,
    settings: GrpcSettings,
    access: Access,
    models: KserveModels,
    unread: Unread,
    records: Records | None = None,
) -> GrpcDoor:
    """Open the door.

    Args:
        service: makes the portraits.
        settings: where to listen; port 0 takes any that is free.
        access: who may call.
        models: what the public models are.
        unread: shared with the other doors.
        records: where answers are counted, shared with the other doors.

    Raises:
        IcPortraitError: a file of TLS isn't what it should be.
        OSError: the address can't be listened at.
    """
    door = GrpcDoor(service, access, models, settings.limits, unread, records or Records())
    protocol: Callable[[], asyncio.Protocol] = door.calls.protocol
    if context := server_context(settings, ["h2"]):
        protocol = Handshakes(context, protocol, settings.limits.header_timeout_s, settings.limits.connections).protocol
    server = await asyncio.get_running_loop().create_server(
        protocol, settings.host, settings.grpc_port, backlog=BACKLOG
    )
    door.listen(server)
    return door


@dataclass(frozen=True)
class _Inference:
    """The fields of a request that its answers need. The pictures aren't kept for that."""

    model: PublicModel
    id: str
    wanted: Collection[str]
    wants_empty_final: bool


class GrpcDoor:
    """An open door."""

    def __init__(
        self,
        service: PortraitService,
        access: Access,
        models: KserveModels,
        limits: ServerLimits,
        unread: Unread,
        records: Records,
    ) -> None:
        self._service, self._access, self._models, self._limits = service, access, models, limits
        self._records = records
        self.calls = Calls(self._methods(), limits, unread, records)
        self._server: asyncio.Server | None = None
        self._health = asyncio.Condition()
        self._watchers = 0
        self._was_ready = False
        """The readiness that the watchers were told last."""
        self._poller: asyncio.Task[None] | None = None
        self._closing = False

    @property
    def port(self) -> int:
        """Return the port that the door listens at."""
        assert self._server is not None
        return int(self._server.sockets[0].getsockname()[1])

    def listen(self, server: asyncio.Server) -> None:
        """Take the calls that come to ``server``."""
        self._server = server

    async def close(self, grace_s: float) -> None:
        """Take no connections and no requests more, wait for the answers of those under way, and end all.

        Args:
            grace_s: how long to wait; what is unanswered then ends with UNAVAILABLE.
        """
        assert self._server is not None
        self._closing = True
        self._server.close()
        if self._poller:
            self._poller.cancel()
        async with self._health:
            self._health.notify_all()
        await self.calls.close(grace_s)

    def _methods(self) -> dict[str, Method]:
        pb = service_pb2
        methods: dict[str, Method] = {
            f"/{KSERVE}/ModelInfer": self._infer,
            f"/{KSERVE}/ModelStreamInfer": self._infer_stream,
            f"/{HEALTH}/Check": self._check,
            f"/{HEALTH}/Watch": self._watch,
        }
        for name, request, answer, needs_key in (
            ("ServerLive", pb.ServerLiveRequest, lambda r: pb.ServerLiveResponse(live=True), False),
            ("ServerReady", pb.ServerReadyRequest, self._server_ready, False),
            ("ModelReady", pb.ModelReadyRequest, self._model_ready, False),
            ("ServerMetadata", pb.ServerMetadataRequest, lambda r: self._models.server_metadata(), True),
            ("ModelMetadata", pb.ModelMetadataRequest, lambda r: self._models.metadata(r.name, r.version), True),
            ("ModelConfig", pb.ModelConfigRequest, self._model_config, True),
            ("ModelStatistics", pb.ModelStatisticsRequest, self._model_statistics, True),
        ):
            methods[f"/{KSERVE}/{name}"] = self._simple(request, answer, needs_key)
        return methods

    def _simple(self, request: Any, answer: Any, needs_key: bool) -> Method:
        """Make a method of one small message each way."""

        async def method(call: Call) -> None:
            call.gives_way = not needs_key
            if needs_key:
                call.record.key = self._access.identify(call.headers.get(HEADER), call.peer).name
            await call.send(answer(_parsed(request, await call.read())).SerializeToString())

        return method

    def _server_ready(self, request: Any) -> Any:
        return service_pb2.ServerReadyResponse(ready=self._service.is_ready)

    def _model_ready(self, request: Any) -> Any:
        is_served = request.name in MODELS and request.version in ("", MODEL_VERSION)
        return service_pb2.ModelReadyResponse(ready=is_served and self._service.is_ready)

    def _model_config(self, request: Any) -> Any:
        return service_pb2.ModelConfigResponse(config=self._models.config(request.name, request.version))

    def _model_statistics(self, request: Any) -> Any:
        return self._models.statistics(self._service.statistics, request.name, request.version)

    async def _infer(self, call: Call) -> None:
        call.record.makes_portraits = True
        caller = self._enter(call, call.record)
        received = await call.receive(self._limits.message_bytes, receive_infer_request, read_infer_request)
        if received is None:
            raise InvalidRequest("the call has no message")
        request, inputs = _checked(self._models, received)
        if request.model.is_stream:
            raise Unsupported("ModelInfer RPC doesn't support models with decoupled transaction policy")
        generating = self._service.generate(inputs, replace(caller, deadline_ms=call.deadline_ms))
        # The service knows how long it needs the pictures.
        del received, inputs
        portraits = await generating
        call.record.note(portraits)
        answer = _response(request, answer_tensors(portraits, request.wanted))
        await call.send(answer.SerializeToString())

    async def _infer_stream(self, call: Call) -> None:
        """Take many requests at once, and answer each as it goes, under its own id."""
        call.record.makes_portraits = call.answers_many = True
        call.record.key = self._access.identify(call.headers.get(HEADER), call.peer).name
        async with asyncio.TaskGroup() as requests:
            try:
                while True:
                    before = call.received_bytes
                    received = await call.receive(
                        self._limits.message_bytes, receive_infer_request, read_infer_request, waits=True
                    )
                    if received is None:
                        break
                    record = call.new_record()
                    record.makes_portraits, record.received_bytes = True, call.received_bytes - before
                    requests.create_task(self._recorded(call, record, self._begin(call, record, received)))
                    del received
                    await call.has_room()
            except (IcPortraitError, CallError) as error:
                # A message that can't be read to its end leaves nothing to be read after it.
                call.fail(error)

    async def _recorded(self, call: Call, record: Record, answering: Coroutine[Any, Any, None]) -> None:
        """Answer a request of a stream, and count the answer. Where the stream fails, the stream is counted."""
        CURRENT.set(record)
        try:
            await answering
        finally:
            if call.failure is None or record.code:
                record.code = record.code or "CANCELLED"
                self._records.add(record)

    def _begin(self, call: Call, record: Record, received: InferRequest) -> Coroutine[Any, Any, None]:
        """Check a request, and return the coroutine that answers the request."""
        try:
            caller = self._enter(call, record)
            request, inputs = _checked(self._models, received)
            on_event = self._on_event(call, request) if request.model.is_stream else None
            generating = self._service.generate(inputs, replace(caller, deadline_ms=call.deadline_ms), on_event)
            return self._answer(call, record, request, generating)
        except IcPortraitError as error:
            return self._fail(call, record, received.head.model_name, received.head.id, error)

    def _on_event(self, call: Call, request: _Inference) -> OnEvent:
        async def on_event(event: Event) -> None:
            await self._send(call, request, event_tensors(event, request.wanted), is_final=False)

        return on_event

    async def _answer(self, call: Call, record: Record, request: _Inference, generating: Awaitable[Portraits]) -> None:
        try:
            portraits = await generating
        except IcPortraitError as error:
            await self._fail(call, record, request.model.name, request.id, error)
        except Exception:
            logger.exception("a request of a stream failed")
            failed = IcPortraitError("the server failed; its log says how")
            await self._fail(call, record, request.model.name, request.id, failed)
        else:
            record.note(portraits)
            await self._send_portraits(call, request, portraits)
            if call.failure is None:
                record.code = "OK"

    async def _send_portraits(self, call: Call, request: _Inference, portraits: Portraits) -> None:
        tensors = answer_tensors(portraits, request.wanted)
        await self._send(call, request, tensors, is_final=not request.wants_empty_final)
        if request.wants_empty_final:
            await self._send(call, request, {}, is_final=True)

    async def _send(self, call: Call, request: _Inference, tensors: Mapping[str, Array], is_final: bool) -> None:
        response = _response(request, tensors)
        response.parameters[FINAL].bool_param = is_final
        try:
            await call.send(service_pb2.ModelStreamInferResponse(infer_response=response).SerializeToString())
        except IcPortraitError as error:
            call.fail(error)

    async def _fail(self, call: Call, record: Record, model: str, key: str, error: IcPortraitError) -> None:
        status, record.error = end_of(error)
        record.code = status.name
        if call.headers.get(CODES_HEADER, "").lower() == "true":
            call.is_counted = True
            call.fail(error)
            return
        answer = service_pb2.ModelStreamInferResponse(error_message=record.error)
        answer.infer_response.model_name, answer.infer_response.id = model, key
        answer.infer_response.parameters[FINAL].bool_param = True
        try:
            await call.send(answer.SerializeToString())
        except IcPortraitError as unread:
            call.fail(unread)

    async def _check(self, call: Call) -> None:
        call.gives_way = True
        request = _parsed(HealthCheckRequest, await call.read())
        if (
            status := self._serving_status(request.service, self._service.is_ready)
        ) == HealthCheckResponse.SERVICE_UNKNOWN:
            raise NotFound(f"{request.service[:80]}: no such service")
        await call.send(HealthCheckResponse(status=status).SerializeToString())

    async def _watch(self, call: Call) -> None:
        """Send the status now, and again whenever it changes."""
        call.gives_way = True
        service = _parsed(HealthCheckRequest, await call.read()).service
        self._watchers += 1
        if self._poller is None:
            self._was_ready = self._service.is_ready
            self._poller = asyncio.create_task(self._poll())
        try:
            while not self._closing:
                was_ready = self._was_ready
                await call.send(
                    HealthCheckResponse(status=self._serving_status(service, was_ready)).SerializeToString()
                )
                async with self._health:
                    while not self._closing and self._was_ready == was_ready:
                        await self._health.wait()
        finally:
            self._watchers -= 1

    async def _poll(self) -> None:
        """Wake the watchers when the service becomes ready or stops being so; ends with the last of them."""
        while self._watchers:
            if (is_ready := self._service.is_ready) != self._was_ready:
                self._was_ready = is_ready
                async with self._health:
                    self._health.notify_all()
            await asyncio.sleep(LOOK_AGAIN_S)
        self._poller = None

    def _serving_status(self, service: str, is_ready: bool) -> Any:
        if service not in ("", KSERVE, *MODELS):
            return HealthCheckResponse.SERVICE_UNKNOWN
        return HealthCheckResponse.SERVING if is_ready else HealthCheckResponse.NOT_SERVING

    def _enter(self, call: Call, record: Record) -> Caller:
        """Let a request in. A refusal that every caller would get isn't counted against a key's rate and quota.

        Raises:
            IcPortraitError: it won't be served.
        """
        caller = self._access.identify(call.headers.get(HEADER), call.peer)
        record.key = caller.name
        if refusal := self._service.refusal():
            raise refusal
        self._access.count(caller)
        return caller


def _checked(models: KserveModels, request: InferRequest) -> tuple[_Inference, dict[str, Array]]:
    """Find a request's model and outputs, and read its inputs by name."""
    head = request.head
    model = models.find(head.model_name, head.model_version)
    wanted = wanted_outputs((output.name, output.parameters) for output in head.outputs)
    wants_empty_final = EMPTY_FINAL in head.parameters and head.parameters[EMPTY_FINAL].bool_param
    return _Inference(model, head.id, wanted, wants_empty_final), request.inputs()


def _response(request: _Inference, tensors: Mapping[str, Array]) -> Any:
    response = service_pb2.ModelInferResponse(model_name=request.model.name, model_version=MODEL_VERSION, id=request.id)
    for name, tensor in tensors.items():
        response.outputs.add(name=name, datatype=output_datatype(name), shape=tensor.shape)
        response.raw_output_contents.append(raw_of(tensor))
    return response


def _parsed(request: Any, message: bytes) -> Any:
    try:
        return request.FromString(message)
    except DecodeError:
        raise InvalidRequest(f"the message is no {request.DESCRIPTOR.name}") from None
