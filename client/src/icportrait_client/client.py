"""The client: one gRPC channel, a call that answers once and a call that answers as it goes."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Generator
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import grpc
import numpy as np
from tritonclient.grpc import InferResult, service_pb2, service_pb2_grpc
from tritonclient.utils import serialize_byte_tensor, triton_to_np_dtype

from icportrait_client import DEFAULT_TIMEOUT_S, DEFAULT_URL
from icportrait_client.contract import InputSpec, load_contract
from icportrait_client.errors import (
    DeadlineExceeded,
    InvalidRequest,
    NotAllowed,
    PortraitError,
    RequestCancelled,
    ServerError,
    ServerUnavailable,
)
from icportrait_client.options import PortraitOptions
from icportrait_client.pictures import PictureSource, picture_bytes
from icportrait_client.portraits import Portraits, Progress

if TYPE_CHECKING:
    from typing_extensions import Unpack

_PROBE_TIMEOUT_S = 1.0
_RETRY_AFTER = re.compile(r"\bretry_after_ms: (\d+)\s*$")
# An error on Triton's stream is a text without a code. (Its header triton_grpc_error would bring the code, but there
# an error after a first answer can crash Triton 2.51.) The server puts the code before whatever isn't the caller's
# mistake; the rest are Triton's own words.
_CODES_OF_TEXTS = (
    (re.compile(r"^UNAVAILABLE: |is stopping|has no available versions|is not ready|not healthy"), "UNAVAILABLE"),
    (re.compile(r"unknown model"), "NOT_FOUND"),
    *((re.compile(f"^{code.name}: "), code.name) for code in grpc.StatusCode),
)


class PortraitClient:
    """A connection to one IC-Portrait Server.

    Use as a context manager, or call ``close``. The connection is made at the first request and may be shared by
    threads.
    """

    def __init__(
        self,
        url: str = DEFAULT_URL,
        *,
        timeout_s: float = DEFAULT_TIMEOUT_S,
        api_key: str | None = None,
        tls: bool | str | os.PathLike[str] = False,
    ) -> None:
        """Prepare the connection.

        Args:
            url: the server's gRPC address, ``host:port``.
            timeout_s: how long one request may take, from sending to the whole answer.
            api_key: for a server that asks for one.
            tls: whether the server speaks TLS; a PEM file where its certificate is signed by an authority of your own.

        Raises:
            InvalidRequest: the url, the time or the key isn't of that form.
            OSError: the PEM file can't be read.
        """
        if not url or url.lower().startswith(("http:", "https:", "grpc:")):
            raise InvalidRequest(f"url: {url!r}, expected host:port without a scheme, such as {DEFAULT_URL}")
        if not (math.isfinite(timeout_s) and timeout_s > 0):
            raise InvalidRequest(f"timeout_s: {timeout_s:g}, expected a number of seconds above 0")
        if api_key is not None and not re.fullmatch(r"[!-~]+", api_key):
            raise InvalidRequest("api_key: has a character that no key has, such as a space")
        self._url = url
        self._metadata = None if api_key is None else [("authorization", f"Bearer {api_key}")]
        self._timeout_s = timeout_s
        self._contract = load_contract()
        # Triton's own client has one stream for all; its generated stub has one a call, so that each ends by itself.
        if tls is False:
            self._channel = grpc.insecure_channel(url, options=_channel_args(url))
        else:
            authority = None if tls is True else Path(tls).read_bytes()
            self._channel = grpc.secure_channel(
                url, grpc.ssl_channel_credentials(authority), options=_channel_args(url)
            )
        self._service = service_pb2_grpc.GRPCInferenceServiceStub(self._channel)
        self._closed = False

    def __enter__(self) -> PortraitClient:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the connection; what is under way is cancelled."""
        self._closed = True
        self._channel.close()

    def generate(
        self, *, profile: PictureSource, reference: PictureSource, **options: Unpack[PortraitOptions]
    ) -> Portraits:
        """The person of ``profile`` in the view and the light of ``reference``.

        Args:
            profile: who it is.
            reference: the view and the light.
            options: what ``PortraitOptions`` has.

        Raises:
            InvalidRequest: a picture or an option can't be served.
            ServerUnavailable: no server answers, or it takes no request now.
            NotAllowed: the server asks for an API key, or the key doesn't allow the request.
            RequestCancelled: the call was cancelled.
            DeadlineExceeded: ``timeout_s`` passed.
            ServerError: the server failed.
        """
        request = self._request(self._contract.model, profile, reference, options)
        try:
            answer = self._service.ModelInfer(request, timeout=self._timeout_s, metadata=self._metadata)
        except grpc.RpcError as error:
            raise self._translated(error) from error
        return self._portraits(InferResult(answer))

    def stream(
        self,
        *,
        profile: PictureSource,
        reference: PictureSource,
        preview_every: int | None = None,
        **options: Unpack[PortraitOptions],
    ) -> Generator[Progress, None, None]:
        """What ``generate`` does, with an item for each step; the last has the portraits.

        The request is sent when the first item is asked for. Closing the generator cancels the request on the server;
        ``contextlib.closing`` does so however its block is left. A loop that is left closes a generator that nothing
        else refers to. Several streams of one client don't disturb one another.

        Args:
            profile: who it is.
            reference: the view and the light.
            preview_every: steps between previews; each preview costs the server a decoding. None or 0 is without.
            options: what ``PortraitOptions`` has.

        Returns:
            A generator of what comes, as it comes. It raises what ``generate`` raises.

        Raises:
            InvalidRequest: a picture or an option can't be served, as far as that is found before sending.
        """
        return self._answers(
            self._request(self._contract.stream_model, profile, reference, options, preview_every=preview_every)
        )

    def _request(
        self,
        model: str,
        profile: PictureSource,
        reference: PictureSource,
        options: PortraitOptions,
        preview_every: int | None = None,
    ) -> service_pb2.ModelInferRequest:
        self._check_open()
        if unknown := options.keys() - PortraitOptions.__annotations__:
            raise TypeError(f"got an unexpected keyword argument {min(unknown)!r}")
        values = {
            "profile": picture_bytes(profile, "profile"),
            "reference": picture_bytes(reference, "reference"),
            **options,
            "preview_every": preview_every,
        }
        request = service_pb2.ModelInferRequest(model_name=model)
        for name, value in values.items():
            if value is not None:
                spec = self._contract.inputs[name]
                request.inputs.add(name=name, datatype=spec.dtype, shape=[spec.size])
                request.raw_input_contents.append(_raw(spec, value))
        return request

    def _answers(self, request: service_pb2.ModelInferRequest) -> Generator[Progress, None, None]:
        self._check_open()
        answers = self._service.ModelStreamInfer(iter([request]), timeout=self._timeout_s, metadata=self._metadata)
        portraits = None
        try:
            # To the stream's end, past the portraits: what has ended isn't cancelled.
            for answer in answers:
                if answer.error_message:
                    raise self._error(_code_of(answer.error_message), answer.error_message)
                progress = self._progress(InferResult(answer.infer_response))
                portraits = progress.portraits
                yield progress
        except grpc.RpcError as error:
            if portraits is None:
                raise self._translated(error) from error
        finally:
            answers.cancel()
        if portraits is None:
            raise ServerError(f"{self._url}: the stream ended without portraits; is this an IC-Portrait Server?")

    def _progress(self, result: InferResult) -> Progress:
        step, total_steps, images = (result.as_numpy(name) for name in ("step", "total_steps", "image"))
        try:
            step, total_steps = int(step[0]), int(total_steps[0])
        except (IndexError, TypeError, ValueError):
            raise ServerError(f"{self._url}: an answer has no step; is this an IC-Portrait Server?") from None
        if result.as_numpy("metadata") is not None:
            return Progress(step, total_steps, portraits=self._portraits(result))
        return Progress(step, total_steps, () if images is None else tuple(images.tolist()))

    def _portraits(self, result: InferResult) -> Portraits:
        images, metadata = result.as_numpy("image"), result.as_numpy("metadata")
        try:
            portraits = Portraits(tuple(images.tolist()), dict(json.loads(metadata[0])))
        except (AttributeError, IndexError, TypeError, ValueError):
            portraits = Portraits((), {})
        if not portraits.images:
            raise ServerError(f"{self._url}: the answer has no portraits; is this an IC-Portrait Server?")
        return portraits

    def _check_open(self) -> None:
        if self._closed:
            raise PortraitError("the client is closed; make a new PortraitClient")

    def _translated(self, error: grpc.RpcError) -> PortraitError:
        return self._error(error.code().name, error.details() or "no reason given")

    def _error(self, code: str, message: str) -> PortraitError:
        if code == "INVALID_ARGUMENT":
            return InvalidRequest(message)
        if code == "CANCELLED":
            return RequestCancelled(message)
        if code == "DEADLINE_EXCEEDED":
            return DeadlineExceeded(f"{self._url}: no answer within {self._timeout_s:g} s; allow more with timeout_s")
        if code == "UNAVAILABLE" or (code == "RESOURCE_EXHAUSTED" and _RETRY_AFTER.search(message)):
            return self._unavailable(message)
        if code in ("UNAUTHENTICATED", "PERMISSION_DENIED"):
            return NotAllowed(f"{self._url}: {message.removeprefix(f'{code}: ')}")
        return ServerError(f"{self._url}: {code}: {message.removeprefix(f'{code}: ')}")

    def _unavailable(self, message: str) -> ServerUnavailable:
        if retry_after := _RETRY_AFTER.search(message):
            return ServerUnavailable(f"{self._url}: {message}", retry_after_ms=int(retry_after[1]))
        if self._is_live():
            return ServerUnavailable(f"{self._url}: {message}")
        return ServerUnavailable(f'{self._url}: no server answers ({message}); "make serve" starts one')

    def _is_live(self) -> bool:
        # UNAVAILABLE is gRPC's word for "nobody there" and the server's for "not now", and nothing but the text tells
        # the two apart. Advice to start a server would be wrong in the second case.
        try:
            self._service.ServerLive(service_pb2.ServerLiveRequest(), timeout=_PROBE_TIMEOUT_S)
        except grpc.RpcError as error:
            return bool(error.code() != grpc.StatusCode.UNAVAILABLE)
        return True


def _raw(spec: InputSpec, value: Any) -> bytes:
    """A tensor's elements as they are sent."""
    array = np.array(spec.elements(value), dtype=triton_to_np_dtype(spec.dtype))
    return bytes(serialize_byte_tensor(array).item() if spec.dtype == "BYTES" else array.tobytes())


def _code_of(text: str) -> str:
    return next((code for pattern, code in _CODES_OF_TEXTS if pattern.search(text)), "INVALID_ARGUMENT")


def _channel_args(url: str) -> list[tuple[str, int]]:
    """GRPC's limits on a message's size lifted for large pictures, and no proxy for a server on this machine."""
    unlimited = -1
    arguments = [("grpc.max_send_message_length", unlimited), ("grpc.max_receive_message_length", unlimited)]
    if url.rpartition(":")[0] in ("localhost", "127.0.0.1", "[::1]"):
        arguments.append(("grpc.enable_http_proxy", 0))
    return arguments
