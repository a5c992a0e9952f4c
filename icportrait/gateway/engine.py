"""The way to one engine: a private Triton, and the denoising loop in it.

Crops go through Triton and pixels come back; all else goes over the control line (``control``). A call to Triton is
never cut short, because Triton 2.51 keeps the data of such a call for ever, and sometimes crashes. Each call runs in
a task of its own to its end, even if no request waits for it any more. The loop ends a request early.
"""

from __future__ import annotations

import asyncio
import base64
import itertools
import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import grpc
import grpc.aio
import numpy as np
from tritonclient.grpc import service_pb2, service_pb2_grpc

from icportrait.contract import ENSEMBLE, PARTITION_PARAMETER, Array
from icportrait.errors import DeadlineMissed, IcPortraitError, Unavailable, from_wire
from icportrait.serving.control import LENGTH, VERSION, Demand, Hello, frame

logger = logging.getLogger(__name__)
LEASE_TIMEOUT_S = 10.0
"""Long, because a loop on a busy machine may answer late; probes find one that hangs sooner (``host``)."""
CONNECT_TIMEOUT_S = 10.0
LINE_BYTES = 2**26
"""The longest message from the loop: a preview of all portraits of a request is less."""
TYPES = {"UINT8": np.uint8, "FP32": np.float32}
DYING = ("is stopping", "is not ready", "not healthy", "unavailable")
"""Parts of Triton's error texts while Triton stops or has lost a model's process."""
ENDED = "the denoising loop has ended"


class EngineLostError(Exception):
    """The engine ended under the call, or is about to: another may do it."""


@dataclass(frozen=True)
class Pong:
    """The loop's progress."""

    is_busy: bool
    step_age_ms: float
    """Time since the running step or warping has begun."""
    expected_ms: float
    """Expected time of that step or warping; 0 where nothing was measured."""


class Listener(Protocol):
    """Takes what the loop says of one request on its way."""

    def on_step(self, step: int, total_steps: int) -> None: ...

    def on_preview(self, step: int, total_steps: int, latent: Array) -> None: ...


class Engine:
    """An engine that is up, until ``lost`` is done. Of the event loop that connected it."""

    def __init__(
        self,
        channel: grpc.aio.Channel,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        latent_shape: tuple[int, int, int],
    ) -> None:
        self.lost: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._channel, self._reader, self._writer, self._latent_shape = channel, reader, writer, latent_shape
        self._triton = service_pb2_grpc.GRPCInferenceServiceStub(channel)
        self._leases: dict[str, asyncio.Future[str]] = {}
        self._rows: dict[str, int] = {}
        """The most rows of each request that has a lease, or asks for one."""
        self._pings: dict[int, asyncio.Future[Pong]] = {}
        self._ping_ids = itertools.count()
        self._listeners: dict[str, Listener] = {}
        self._calls: set[asyncio.Task[Any]] = set()
        self._unsent: list[bytes] = []
        self._receiving = asyncio.create_task(self._receive())

    @classmethod
    async def connect(cls, grpc_address: str, loop_path: Path, latent_shape: tuple[int, int, int]) -> Engine:
        """Connect to an engine that is ready.

        Args:
            grpc_address: of Triton, such as ``unix:/directory/t:1``.
            loop_path: the control line's socket.
            latent_shape: of one picture: channels, height, width.

        Raises:
            IcPortraitError: the loop isn't there, or speaks another version of the protocol.
        """
        try:
            async with asyncio.timeout(CONNECT_TIMEOUT_S):
                reader, writer = await asyncio.open_unix_connection(loop_path, limit=LINE_BYTES)
                writer.write(frame(Hello(version=VERSION)))
                greeting = await _next(reader)
        except (OSError, EOFError, TimeoutError) as error:
            raise IcPortraitError(f"the denoising loop can't be reached ({error!r})") from error
        if greeting.get("version") != VERSION:
            writer.close()
            raise IcPortraitError(
                f"the denoising loop speaks version {greeting.get('version')} of the control line, expected "
                f"{VERSION}; gateway and loop must be of one release"
            )
        unlimited = [("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1)]
        # A pool of its own: what is kept of an engine that has ended must not delay the next at the same address.
        channel = grpc.aio.insecure_channel(
            grpc_address, [*unlimited, ("grpc.use_local_subchannel_pool", 1), ("grpc.enable_http_proxy", 0)]
        )
        return cls(channel, reader, writer, latent_shape)

    async def close(self) -> None:
        """Let go of it, once its Triton has ended: until then, this would cut calls short."""
        self.lose()
        await asyncio.gather(*self._calls, self._receiving, return_exceptions=True)
        await self._channel.close()

    @property
    def rows(self) -> int:
        """Return the rows that are asked for by requests with a lease, running or waiting."""
        return sum(self._rows.values())

    # The control line.

    async def lease(self, key: str, demand: Demand, replayed: bool = False) -> None:
        """Ask whether a request may run.

        Args:
            key: the request's.
            demand: what it will take.
            replayed: another engine has let it in, and has ended.

        Raises:
            Unavailable: it may not, or the loop doesn't answer.
            EngineLostError: the loop has ended.
        """
        reply = self._leases[key] = self._reply()
        self._rows[key] = demand.rows
        try:
            self._send({"op": "lease", "key": key, **vars(demand), "replayed": replayed})
            try:
                async with asyncio.timeout(LEASE_TIMEOUT_S):
                    refusal = await reply
            except TimeoutError:
                raise Unavailable("the denoising loop doesn't answer; retry_after_ms: 1000") from None
        except BaseException:
            # Its reply may be on the way, and nobody would give the lease back.
            self.release(key)
            raise
        finally:
            del self._leases[key]
        if refusal:
            del self._rows[key]
            raise from_wire(refusal) or Unavailable(refusal)

    def cancel(self, key: str) -> None:
        """Say that a request's caller has gone."""
        self._send({"op": "cancel", "key": key})

    def seen(self, key: str) -> None:
        """Say that a request's last preview has been taken."""
        self._send({"op": "seen", "key": key})

    def release(self, key: str, stage_ms: Mapping[str, float] | None = None) -> None:
        """Give a lease back.

        Args:
            key: the request's.
            stage_ms: milliseconds by stage where there are portraits.
        """
        self._rows.pop(key, None)
        self._send({"op": "release", "key": key, "stage_ms": stage_ms})

    def listen(self, key: str, listener: Listener | None) -> None:
        """Say where a request's steps and previews go; None ends it."""
        if listener:
            self._listeners[key] = listener
        else:
            self._listeners.pop(key, None)

    async def ping(self) -> Pong:
        """Ask the loop how it gets on."""
        number = next(self._ping_ids)
        reply = self._pings[number] = self._reply()
        try:
            self._send({"op": "ping", "id": number})
            pong: Pong = await reply
            return pong
        finally:
            del self._pings[number]

    # Triton.

    async def is_live(self) -> bool:
        """Tell whether Triton says that it is live. Wait for as long as Triton takes to answer."""
        answer = await self._call(self._triton.ServerLive(service_pb2.ServerLiveRequest()))
        return bool(answer.live)

    async def portraits(
        self, profile_pixels: Array, reference_pixels: Array, visibility: Array, request: bytes, partition: str
    ) -> tuple[Array, dict[str, Any]]:
        """Run the private pipeline; see ``contract.pipeline_spec``.

        Args:
            profile_pixels: [1, S, S, 3] uint8.
            reference_pixels: likewise, hidden already.
            visibility: [1, 1, s, s] float32.
            request: ``PortraitRequest`` as JSON.
            partition: whose latents may be used again, and by whom.

        Returns:
            The portraits' pixels, [n, S, S, 3] uint8, and the report of ``denoise``.

        Raises:
            IcPortraitError: the request failed, by its code.
            EngineLostError: the engine did.
        """
        message = _request(
            ENSEMBLE,
            {"profile_pixels": profile_pixels, "reference_pixels": reference_pixels, "visibility": visibility},
            ("portrait_pixels", "denoise_report"),
        )
        message.parameters[PARTITION_PARAMETER].string_param = partition
        message.inputs.add(name="request", datatype="BYTES", shape=[1])
        message.raw_input_contents.append(len(request).to_bytes(4, "little") + request)
        outputs = _outputs(await self._infer(message))
        return outputs["portrait_pixels"], json.loads(outputs["denoise_report"])

    async def decode(self, latent: Array) -> Array:
        """Decode a latent for previews: [n, channels, s, s] float32 -> [n, S, S, 3] uint8; errors as above."""
        message = _request("vae_decoder", {"portrait_latent": latent}, ("portrait_pixels",))
        pixels: Array = _outputs(await self._infer(message))["portrait_pixels"]
        return pixels

    async def _infer(self, message: Any) -> Any:
        if self.lost.done():
            raise EngineLostError(ENDED)
        try:
            return await self._call(self._triton.ModelInfer(message))
        except grpc.RpcError as error:
            text = error.details() or ""
            known = from_wire(text)
            if self.lost.done() or (isinstance(known, Unavailable) and not isinstance(known, DeadlineMissed)):
                # A loop that ends, or shared memory that is full: another engine, or a later try, may do it.
                raise EngineLostError(text) from known or error
            if known:
                raise known from error
            if error.code() is grpc.StatusCode.UNAVAILABLE or any(sign in text for sign in DYING):
                raise EngineLostError(text) from error
            logger.error("%s failed: %s", message.model_name, text)
            raise IcPortraitError("the pipeline failed on this server; its log has the cause") from error

    async def _call(self, call: Any) -> Any:
        """Return the answer of a call to Triton. The call goes on where no request waits for it any more."""
        task = asyncio.ensure_future(_end(call))
        self._calls.add(task)
        task.add_done_callback(self._forget)
        await asyncio.wait({task, self.lost}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise EngineLostError(ENDED)

    def _forget(self, task: asyncio.Task[Any]) -> None:
        self._calls.discard(task)
        if not task.cancelled():
            task.exception()  # where nobody waited, nobody asks for it

    def _reply(self) -> asyncio.Future[Any]:
        """Make the future of a reply; ``lose`` ends it without one."""
        if self.lost.done():
            raise EngineLostError(ENDED)
        return asyncio.get_running_loop().create_future()

    def _send(self, message: dict[str, Any]) -> None:
        if not self._unsent:
            asyncio.get_running_loop().call_soon(self._flush)
        self._unsent.append(frame(message))

    def _flush(self) -> None:
        """Send one turn's messages at once, because each call of the system also wakes the loop's process."""
        if not self.lost.done():
            self._writer.write(b"".join(self._unsent))
        self._unsent.clear()

    async def _receive(self) -> None:
        """Take the loop's messages until the line breaks, which tells that its process has ended."""
        try:
            while True:
                self._handle(await _next(self._reader))
        except (OSError, EOFError):
            pass
        except Exception:
            logger.exception("a message of the denoising loop isn't what it should be; the control line is closed")
        finally:
            self.lose()

    def _handle(self, message: dict[str, Any]) -> None:
        op = message["op"]
        if op == "pong":
            if (ping := self._pings.get(message["id"])) and not ping.done():
                ping.set_result(Pong(message["busy"], message["step_age_ms"], message["expected_ms"]))
            return
        key = message["key"]
        if op == "leased":
            if (lease := self._leases.get(key)) and not lease.done():
                lease.set_result(message["refusal"])
        elif listener := self._listeners.get(key):
            counts = message["step"], message["total_steps"]
            if op == "step":
                listener.on_step(*counts)
            elif op == "preview":
                latent = np.frombuffer(base64.b64decode(message["latent"]), np.float32)
                listener.on_preview(*counts, latent.reshape(-1, *self._latent_shape))

    def lose(self) -> None:
        """Take the engine for ended: what waits for it is told so."""
        if not self.lost.done():
            self.lost.set_result(None)
            self._writer.close()
            waiting: list[asyncio.Future[Any]] = [*self._leases.values(), *self._pings.values()]
            for reply in waiting:
                if not reply.done():
                    reply.set_exception(EngineLostError(ENDED))


async def _end(call: Any) -> Any:
    return await call


async def _next(reader: asyncio.StreamReader) -> dict[str, Any]:
    (length,) = LENGTH.unpack(await reader.readexactly(LENGTH.size))
    if length > LINE_BYTES:
        raise ValueError(f"a message of {length} bytes, expected at most {LINE_BYTES}")
    message: dict[str, Any] = json.loads(await reader.readexactly(length))
    return message


def _request(model: str, tensors: Mapping[str, Array], outputs: tuple[str, ...]) -> Any:
    message = service_pb2.ModelInferRequest(model_name=model)
    for name, array in tensors.items():
        kind = "UINT8" if array.dtype == np.uint8 else "FP32"
        message.inputs.add(name=name, datatype=kind, shape=array.shape)
        message.raw_input_contents.append(np.ascontiguousarray(array).tobytes())
    for name in outputs:
        message.outputs.add(name=name)
    return message


def _outputs(answer: Any) -> dict[str, Any]:
    """Return an answer's tensors; of type BYTES the one element."""
    found: dict[str, Any] = {}
    for output, raw in zip(answer.outputs, answer.raw_output_contents, strict=True):
        if output.datatype == "BYTES":
            found[output.name] = raw[4:]
        else:
            found[output.name] = np.frombuffer(raw, TYPES[output.datatype]).reshape(output.shape)
    return found
