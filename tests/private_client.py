"""A gateway's side of the private pipeline, in threads: what a test asks of Triton and of the control line."""

from __future__ import annotations

import base64
import contextlib
import json
import queue
import secrets
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import grpc
import numpy as np
from tritonclient.grpc import service_pb2, service_pb2_grpc

from icportrait.contract import PARTITION_PARAMETER, Array, ModelSpec, bytes_tensor, engine_specs, pipeline_spec
from icportrait.deploy.triton_server import TritonServer
from icportrait.errors import IcPortraitError, Unavailable, from_wire
from icportrait.presets import Preset
from icportrait.request import PortraitRequest
from icportrait.serving.control import LENGTH, VERSION, frame, read_exactly

TIMEOUT_S = 60


class Line:
    """The gateway's end of a control line."""

    def __init__(self, path: str, version: int = VERSION) -> None:
        self._stream = socket.socket(socket.AF_UNIX)
        self._stream.settimeout(TIMEOUT_S)
        self._stream.connect(path)
        self.said: queue.SimpleQueue[dict[str, Any] | None] = queue.SimpleQueue()
        """Messages of the loop that nobody awaits; None is the line's end."""
        self._by_key: dict[str, queue.SimpleQueue[dict[str, Any] | None]] = {}
        self._sending = threading.Lock()
        self.say(op="hello", version=version)
        self._reader = threading.Thread(target=self._receive, daemon=True)
        self._reader.start()

    def say(self, **message: Any) -> None:
        self.send(frame(message))

    def send(self, data: bytes) -> None:
        with self._sending, contextlib.suppress(OSError):  # the loop's end is heard by who waits for what it says
            self._stream.sendall(data)

    def events(self, key: str) -> queue.SimpleQueue[dict[str, Any] | None]:
        """Return a queue of what is said of a request from now on."""
        return self._by_key.setdefault(key, queue.SimpleQueue())

    def lease(self, request: PortraitRequest, nbytes: int = 100_000, **fields: Any) -> IcPortraitError | None:
        """Ask for a lease; the refusal where there is one."""
        events = self.events(request.key)
        demand = {
            "phases": request.phases,
            "priority": request.priority,
            "deadline_ms": request.deadline_ms,
            "arrived_s": request.arrived_ns / 1e9,
            "nbytes": nbytes,
        }
        self.say(op="lease", key=request.key, **{**demand, **fields})
        reply = events.get(timeout=TIMEOUT_S)
        assert reply and reply["op"] == "leased", reply
        return from_wire(reply["refusal"])

    def ping(self, number: int = 1) -> dict[str, Any]:
        self.say(op="ping", id=number)
        while (message := self.said.get(timeout=TIMEOUT_S)) and message["op"] != "pong":
            pass
        assert message, "the line has ended"
        return message

    def release(self, key: str, stage_ms: Mapping[str, float] | None = None) -> None:
        self._by_key.pop(key, None)
        self.say(op="release", key=key, stage_ms=stage_ms)

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._stream.shutdown(socket.SHUT_RDWR)
        self._reader.join()
        self._stream.close()

    def _receive(self) -> None:
        with contextlib.suppress(EOFError, OSError), self._stream.makefile("rb") as came:
            while True:
                (length,) = LENGTH.unpack(read_exactly(came, LENGTH.size))
                message = json.loads(read_exactly(came, length))
                self._by_key.get(message.get("key"), self.said).put(message)
        for waiting in [self.said, *self._by_key.values()]:
            waiting.put(None)


class PrivateClient:
    """Calls of the models behind a server's socket."""

    def __init__(self, address: str, preset: Preset) -> None:
        options = [("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1)]
        self._channel = grpc.insecure_channel(address, options)
        self._stub = service_pb2_grpc.GRPCInferenceServiceStub(self._channel)
        self._pipeline, self._decoder = pipeline_spec(preset), engine_specs(preset)["vae_decoder"]

    def close(self) -> None:
        self._channel.close()

    def pipeline(
        self, request: PortraitRequest, profile: Array, reference: Array, visibility: Array, partition: str = ""
    ) -> tuple[Array, dict[str, Any]]:
        """Run the pipeline to portraits and the report; raise the pipeline's own error."""
        tensors = {
            "profile_pixels": profile,
            "reference_pixels": reference,
            "visibility": visibility,
            "request": bytes_tensor(request.to_json()),
        }
        outputs = self.infer(self._pipeline, tensors, partition)
        return outputs["portrait_pixels"], json.loads(outputs["denoise_report"][0])

    def decode(self, latent: Array) -> Array:
        """Decode a preview's latent to pixels."""
        return self.infer(self._decoder, {"portrait_latent": latent})["portrait_pixels"]

    def infer(self, spec: ModelSpec, tensors: Mapping[str, Array], partition: str = "") -> dict[str, Array]:
        message = service_pb2.ModelInferRequest(model_name=spec.name)
        if partition:
            message.parameters[PARTITION_PARAMETER].string_param = partition
        kinds = {tensor.name: tensor.dtype.triton for tensor in spec.inputs}
        for name, array in tensors.items():
            message.inputs.add(name=name, datatype=kinds[name], shape=array.shape)
            message.raw_input_contents.append(_raw(array))
        try:
            answer = self._stub.ModelInfer(message)
        except grpc.RpcError as error:
            raise from_wire(error.details()) or Unavailable(f"{error.code()}: {error.details()}") from error
        types = {tensor.name: tensor.dtype for tensor in spec.outputs}
        return {
            output.name: bytes_tensor(raw[4:])
            if output.datatype == "BYTES"
            else np.frombuffer(raw, types[output.name].numpy).reshape(output.shape)
            for output, raw in zip(answer.outputs, answer.raw_output_contents, strict=True)
        }


def _raw(array: Array) -> bytes:
    if array.dtype != object:
        return np.ascontiguousarray(array).tobytes()
    return b"".join(len(item).to_bytes(4, "little") + item for item in array)


class Gateway:
    """Requests with random crops, from lease to release."""

    def __init__(self, server: TritonServer, preset: Preset) -> None:
        self.preset = preset
        self.line, self.client = Line(str(server.loop_path)), PrivateClient(server.grpc_address, preset)
        size = preset.image_size
        generator = np.random.default_rng(0)
        self.profile, self.reference = generator.integers(0, 256, (2, 1, size, size, 3), np.uint8)
        self.visibility = np.ones((1, 1, preset.latent_size, preset.latent_size), np.float32)
        self.partition = ""

    def run(
        self,
        request: PortraitRequest,
        on_preview: Callable[[int, Array], None] | None = None,
        on_leased: Callable[[PortraitRequest], None] = lambda _: None,
    ) -> tuple[Array, dict[str, Any], list[int]]:
        """Run a request to portraits, the report, and the steps told on the way; raise the refusal or the error."""
        request = replace(request, key=request.key or secrets.token_hex(16), arrived_ns=time.monotonic_ns())
        events = self.line.events(request.key)
        if refusal := self.line.lease(request):
            raise refusal
        steps: list[int] = []

        def watch() -> None:
            while event := events.get():
                steps.append(event["step"])
                if event["op"] == "preview":
                    latent = np.frombuffer(base64.b64decode(event["latent"]), np.float32)
                    side = self.preset.latent_size
                    pixels = self.client.decode(latent.reshape(-1, self.preset.latent_channels, side, side))
                    if on_preview:
                        on_preview(event["step"], pixels)
                    self.line.say(op="seen", key=request.key)

        watcher = threading.Thread(target=watch)
        watcher.start()
        try:
            on_leased(request)
            portraits, report = self.client.pipeline(
                request, self.profile, self.reference, self.visibility, self.partition
            )
        except BaseException:
            self.line.release(request.key)
            raise
        finally:
            events.put(None)
            watcher.join()
        self.line.release(request.key, {"denoise": 1.0})
        return portraits, report, steps

    def close(self) -> None:
        self.line.close()
        self.client.close()


@contextmanager
def gateway(server: TritonServer, preset: Preset) -> Iterator[Gateway]:
    opened = Gateway(server, preset)
    try:
        yield opened
    finally:
        opened.close()


def metrics(server: TritonServer) -> dict[str, float]:
    """Read this project's own series from the server's socket."""
    with socket.socket(socket.AF_UNIX) as stream:
        stream.connect(str(server.metrics_path))
        stream.sendall(b"GET /metrics HTTP/1.0\r\n\r\n")
        data = b""
        while part := stream.recv(1 << 16):
            data += part
    lines = [line for line in data.decode().splitlines() if line.startswith("icportrait_")]
    return {name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines)}
