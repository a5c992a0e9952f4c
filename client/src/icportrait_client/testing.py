"""A server for tests of code that uses this client: real gRPC, no model.

``FakePortraitServer`` speaks as much of KServe's v2 protocol as an IC-Portrait Server's callers need. A portrait is one
colour, which the seed decides. Errors, delays and cut streams come as they are asked for.
"""

from __future__ import annotations

import hashlib
import io
import json
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from types import TracebackType
from typing import Any

from icportrait_client import __version__, wire
from icportrait_client.contract import load_contract

SIDE_PX = 64
THREADS = 64
"""Calls answered at once."""


@dataclass(frozen=True)
class Call:
    """A request that the server got.

    >>> portrait = client.generate(profile=profile, reference=reference, seed=7)
    >>> server.calls[-1].model, server.calls[-1].inputs["seed"]
    ('ic_portrait', 7)
    """

    model: str
    inputs: dict[str, Any]
    """Values by name: numbers, texts, tuples of numbers, and bytes of pictures."""
    headers: dict[str, str]


@dataclass
class _Failure:
    code: str
    text: str
    times: int
    after_steps: int


class FakePortraitServer:
    """A server on a free port of this machine; a context manager.

    >>> from icportrait_client import PortraitClient
    >>> with FakePortraitServer() as server, PortraitClient(server.address) as client:
    ...     server.fail("UNAVAILABLE", "UNAVAILABLE: the queue is full; retry_after_ms: 20")
    ...     portrait = client.generate(profile=profile, reference=reference, seed=7)
    ...     print(portrait.metadata.seed, len(server.calls))
    7 2
    """

    def __init__(self, *, numerics_id: str | None = "fake", steps: int = 20, lacks: str = "") -> None:
        """Prepare the server.

        Args:
            numerics_id: of its answers.
            steps: of a request that names none.
            lacks: an input or output that its model hasn't, as one of another version.
        """
        self.numerics_id, self.steps, self.lacks = numerics_id, steps, lacks
        self.calls: list[Call] = []
        """Requests in the order of their coming, refused ones too."""
        self.cancelled = 0
        """Calls that their caller cancelled."""
        self.delay_s = 0.0
        """Time before an answer."""
        self.step_s = 0.0
        """Time of each step."""
        self.is_ready = True
        self.address = ""
        self.answer: Callable[[Call], bytes] | None = None
        """Gives the portrait's file in place of a coloured square."""
        self._failures: list[_Failure] = []
        self._ending = threading.Event()
        self._lock = threading.Lock()
        self._server: Any = None
        self._pool: ThreadPoolExecutor | None = None

    def __enter__(self) -> FakePortraitServer:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.stop()

    def start(self, credentials: Any = None) -> None:
        """Start to listen; on the same port as before, if it was started before.

        Args:
            credentials: of ``grpc.ssl_server_credentials``, where it is to speak TLS.
        """
        import grpc

        self._ending.clear()
        self._pool = ThreadPoolExecutor(THREADS, "fake-portrait-server")
        options = [
            ("grpc.max_receive_message_length", -1),
            ("grpc.max_send_message_length", -1),
            ("grpc.so_reuseport", 0),
            # Else calls beyond a thousand that wait for a thread are cancelled at random.
            ("grpc.server.max_pending_requests", 1_000_000),
            ("grpc.server.max_pending_requests_hard_limit", 1_000_000),
            # As the gateway: no ping is one too many.
            ("grpc.http2.max_ping_strikes", 0),
            ("grpc.http2.min_recv_ping_interval_without_data_ms", 1000),
        ]
        self._server = grpc.server(self._pool, [_handler(self)], options=options)
        address = self.address or "127.0.0.1:0"
        if credentials is None:
            port = self._server.add_insecure_port(address)
        else:
            port = self._server.add_secure_port(address, credentials)
        self.address = f"127.0.0.1:{port}"
        self._server.start()

    def stop(self) -> None:
        """Cut all connections."""
        self._ending.set()
        if self._server:
            self._server.stop(None).wait()
        if self._pool:
            self._pool.shutdown()

    def fail(self, code: str, text: str, *, times: int = 1, after_steps: int = 0) -> None:
        """Let the next requests fail.

        Args:
            code: the name of a gRPC status code.
            text: of the error; the real server's begin with the code, except for INVALID_ARGUMENT.
            times: how many requests.
            after_steps: steps that a stream tells before.
        """
        with self._lock:
            self._failures.append(_Failure(code, text, times, after_steps))

    # The service, as ``_handler`` finds it.

    def _ready(self, message: bytes, context: Any) -> bytes:
        return wire.flag(self.is_ready)

    def _live(self, message: bytes, context: Any) -> bytes:
        return wire.flag(True)

    def _metadata(self, message: bytes, context: Any) -> bytes:
        contract = load_contract()
        inputs = [wire.Tensor(spec.name, spec.dtype, (spec.size,)) for spec in contract.inputs.values()]
        outputs = [wire.Tensor(name, dtype, (size,)) for name, (dtype, size) in contract.outputs.items()]
        served = [tuple(each for each in tensors if each.name != self.lacks) for tensors in (inputs, outputs)]
        return wire.model_metadata(wire.ModelMetadata(wire.read_name(message), *served))

    def _server_metadata(self, message: bytes, context: Any) -> bytes:
        return wire.server_metadata("fake", __version__)

    def _config(self, message: bytes, context: Any) -> bytes:
        return wire.model_config(wire.read_name(message), {"slots": str(THREADS)})

    def _infer(self, message: bytes, context: Any) -> bytes:
        call = self._received(message, context)
        failure = self._next_failure()
        self._wait(self.delay_s, context)
        if failure:
            _abort(context, failure)
        self._wait(self.step_s * self._steps(call), context)
        context.is_answered = True
        return wire.infer_response(call.model, self._portrait(call))

    def _stream(self, messages: Iterator[bytes], context: Any) -> Iterator[bytes]:
        call = self._received(next(messages), context)
        failure, steps = self._next_failure(), self._steps(call)
        every = call.inputs.get("preview_every", 0)
        self._wait(self.delay_s, context)
        for step in range(1, steps + 1):
            if failure and step > failure.after_steps:
                _abort(context, failure)
            self._wait(self.step_s, context)
            counts = [_int32("step", step), _int32("total_steps", steps)]
            if step == steps:
                context.is_answered = True
                yield wire.stream_answer(call.model, [*self._portrait(call), *counts], is_final=True)
            elif every and step % every == 0:
                yield wire.stream_answer(call.model, [self._images(call), *counts])
            else:
                yield wire.stream_answer(call.model, counts)

    def _received(self, message: bytes, context: Any) -> Call:
        model, tensors = wire.read_infer_request(message)
        specs = load_contract().inputs
        inputs = {name: specs[name].read(tensor.data) for name, tensor in tensors.items()}
        call = Call(model, inputs, dict(context.invocation_metadata()))
        with self._lock:
            self.calls.append(call)
        context.ended, context.is_answered = threading.Event(), False

        def end() -> None:
            with self._lock:
                self.cancelled += not context.is_answered
            context.ended.set()

        context.add_callback(end)
        return call

    def _next_failure(self) -> _Failure | None:
        with self._lock:
            if not self._failures:
                return None
            failure = self._failures[0]
            failure.times -= 1
            if not failure.times:
                self._failures.pop(0)
            return failure

    def _wait(self, seconds: float, context: Any) -> None:
        """Wait, unless the caller goes first."""
        if seconds and context.ended.wait(seconds):
            raise ConnectionAbortedError("the caller has gone")

    def _steps(self, call: Call) -> int:
        return int(call.inputs.get("num_inference_steps", self.steps))

    def _portrait(self, call: Call) -> list[wire.Tensor]:
        steps = self._steps(call)
        metadata = {
            "seed": call.inputs.get("seed", 0),
            "num_portraits": call.inputs.get("num_portraits", 1),
            "steps": steps,
            "scheduler": call.inputs.get("scheduler", "dpmpp_2m"),
            "guidance_scale": call.inputs.get("guidance_scale", 1.0),
            "guidance_interval": call.inputs.get("guidance_interval", [0.0, 1.0]),
            "mask_ratio": call.inputs.get("mask_ratio", 0.8),
            "size": [SIDE_PX, SIDE_PX],
            "output_format": call.inputs.get("output_format", "png"),
            "crops": {name: {"source": "centre", "box": [0.0, 0.0, 1.0, 1.0]} for name in ("profile", "reference")},
            "match_confidence": 0.5,
            "stage_ms": {"preprocess": 1.0, "conditioning": 2.0, "denoise": 10.0 * steps, "decode": 1.0},
            "queue_ms": 0.0,
            "encode_ms": 1.0,
            "warp_ms": 1.0,
            "rows_shared": 1.0,
            "engine_ms": 10.0 * steps,
            "numerics_id": self.numerics_id,
            "versions": {"preset": "fake-64", "precision": "fp32", "weights": "random", "engine": "fake"},
            "simulated": True,
        }
        report = wire.Tensor("metadata", "BYTES", (1,), wire.bytes_elements([json.dumps(metadata).encode()]))
        return [self._images(call), report]

    def _images(self, call: Call) -> wire.Tensor:
        count = int(call.inputs.get("num_portraits", 1))
        if self.answer:
            files = [self.answer(call)] * count
        else:
            seed, file_format = int(call.inputs.get("seed", 0)), str(call.inputs.get("output_format", "png"))
            files = [_square(seed + number, file_format) for number in range(count)]
        return wire.Tensor("image", "BYTES", (count,), wire.bytes_elements(files))


def _handler(server: FakePortraitServer) -> Any:
    import grpc

    unary = {
        "ServerReady": server._ready,
        "ServerLive": server._live,
        "ServerMetadata": server._server_metadata,
        "ModelMetadata": server._metadata,
        "ModelConfig": server._config,
        "ModelInfer": server._infer,
    }
    handlers = {name: grpc.unary_unary_rpc_method_handler(method) for name, method in unary.items()}
    handlers["ModelStreamInfer"] = grpc.stream_stream_rpc_method_handler(server._stream)
    return grpc.method_handlers_generic_handler(wire.SERVICE, handlers)


def _abort(context: Any, failure: _Failure) -> None:
    import grpc

    context.is_answered = True
    context.abort(grpc.StatusCode[failure.code], failure.text)


def _int32(name: str, value: int) -> wire.Tensor:
    return wire.Tensor(name, "INT32", (1,), value.to_bytes(4, "little", signed=True))


def _square(seed: int, file_format: str) -> bytes:
    from PIL import Image

    buffer = io.BytesIO()
    red, green, blue = hashlib.sha256(seed.to_bytes(8, "little")).digest()[:3]
    Image.new("RGB", (SIDE_PX, SIDE_PX), (red, green, blue)).save(buffer, file_format)
    return buffer.getvalue()
