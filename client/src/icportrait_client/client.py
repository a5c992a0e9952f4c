"""The client: one gRPC channel, one call."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from types import TracebackType
from typing import Any

import numpy as np
from tritonclient.grpc import InferenceServerClient, InferInput, InferResult
from tritonclient.utils import InferenceServerException, triton_to_np_dtype

from icportrait_client import DEFAULT_TIMEOUT_S, DEFAULT_URL
from icportrait_client.contract import InputSpec, load_contract
from icportrait_client.errors import (
    DeadlineExceeded,
    InvalidRequest,
    PortraitError,
    RequestCancelled,
    ServerError,
    ServerUnavailable,
)
from icportrait_client.pictures import PictureSource, picture_bytes
from icportrait_client.portraits import Portraits

_PROBE_TIMEOUT_S = 1.0


class PortraitClient:
    """A connection to one IC-Portrait Server.

    Use as a context manager, or call ``close``. The connection is made at the first request and may be shared by
    threads.
    """

    def __init__(self, url: str = DEFAULT_URL, *, timeout_s: float = DEFAULT_TIMEOUT_S) -> None:
        """Prepare the connection.

        Args:
            url: the server's gRPC address, ``host:port``.
            timeout_s: how long one request may take, from sending to the whole answer.

        Raises:
            InvalidRequest: the url or the time isn't of that form.
        """
        if not url or url.lower().startswith(("http:", "https:", "grpc:")):
            raise InvalidRequest(f"url: {url!r}, expected host:port without a scheme, such as {DEFAULT_URL}")
        if not (math.isfinite(timeout_s) and timeout_s > 0):
            raise InvalidRequest(f"timeout_s: {timeout_s:g}, expected a number of seconds above 0")
        self._url = url
        self._timeout_s = timeout_s
        self._contract = load_contract()
        self._triton = InferenceServerClient(url, channel_args=_channel_args(url))
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
        self._triton.close()

    def generate(
        self,
        *,
        profile: PictureSource,
        reference: PictureSource,
        seed: int | None = None,
        num_portraits: int | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        mask_ratio: float | None = None,
        scheduler: str | None = None,
        priority: int | None = None,
        deadline_ms: int | None = None,
        profile_box: Sequence[float] | None = None,
        reference_box: Sequence[float] | None = None,
        output_format: str | None = None,
    ) -> Portraits:
        """The person of ``profile`` in the view and the light of ``reference``.

        What is None isn't sent, and the server's default holds; ``icportrait generate --help`` lists ranges and
        defaults.

        Args:
            profile: who it is.
            reference: the view and the light.
            seed: the same seed with the same pictures and options gives the same portraits.
            num_portraits: how many to draw.
            num_inference_steps: denoising steps.
            guidance_scale: how strongly the pictures guide the result; 1 is without guidance.
            mask_ratio: share of the reference that is hidden from the model.
            scheduler: the sampler.
            priority: the request's class, 0 first.
            deadline_ms: an answer later than this is worth nothing: the server then drops the request.
            profile_box: the profile's crop, x0, y0, x1, y1 as shares of width and height; the server finds one if None.
            reference_box: the reference's crop, likewise.
            output_format: how the portraits are encoded.

        Raises:
            InvalidRequest: a picture or an option can't be served.
            ServerUnavailable: no server answers, or it takes no request now.
            RequestCancelled: the call was cancelled.
            DeadlineExceeded: ``timeout_s`` passed.
            ServerError: the server failed.
        """
        if self._closed:
            raise PortraitError("the client is closed; make a new PortraitClient")
        values = {
            "profile": picture_bytes(profile, "profile"),
            "reference": picture_bytes(reference, "reference"),
            "seed": seed,
            "num_portraits": num_portraits,
            "num_inference_steps": num_inference_steps,
            "guidance_scale": guidance_scale,
            "mask_ratio": mask_ratio,
            "scheduler": scheduler,
            "priority": priority,
            "deadline_ms": deadline_ms,
            "profile_box": profile_box,
            "reference_box": reference_box,
            "output_format": output_format,
        }
        specs = self._contract.inputs
        inputs = [_tensor(specs[name], value) for name, value in values.items() if value is not None]
        try:
            result = self._triton.infer(self._contract.model, inputs, client_timeout=self._timeout_s)
        except InferenceServerException as error:
            raise self._translated(error) from error
        return self._portraits(result)

    def _portraits(self, result: InferResult) -> Portraits:
        images, metadata = result.as_numpy("image"), result.as_numpy("metadata")
        try:
            portraits = Portraits(tuple(images.tolist()), dict(json.loads(metadata[0])))
        except (AttributeError, IndexError, TypeError, ValueError):
            portraits = Portraits((), {})
        if not portraits.images:
            raise ServerError(f"{self._url}: the answer has no portraits; is this an IC-Portrait Server?")
        return portraits

    def _translated(self, error: InferenceServerException) -> PortraitError:
        code, message = str(error.status()).removeprefix("StatusCode."), error.message() or "no reason given"
        if code == "INVALID_ARGUMENT":
            return InvalidRequest(message)
        if code == "CANCELLED":
            return RequestCancelled(message)
        if code == "DEADLINE_EXCEEDED":
            return DeadlineExceeded(f"{self._url}: no answer within {self._timeout_s:g} s; allow more with timeout_s")
        if code == "UNAVAILABLE" and self._answers():
            return ServerUnavailable(f"{self._url}: {message}")
        if code == "UNAVAILABLE":
            return ServerUnavailable(f'{self._url}: no server answers ({message}); "make serve" starts one')
        return ServerError(f"{self._url}: {code}: {message}")

    def _answers(self) -> bool:
        # UNAVAILABLE is gRPC's word for "nobody there" and the server's for "not now", and nothing but the text tells
        # the two apart. Advice to start a server would be wrong in the second case.
        try:
            self._triton.is_server_live(client_timeout=_PROBE_TIMEOUT_S)
        except InferenceServerException as error:
            return bool(error.status() != "StatusCode.UNAVAILABLE")
        return True


def _tensor(spec: InputSpec, value: Any) -> InferInput:
    tensor = InferInput(spec.name, [spec.size], spec.dtype)
    tensor.set_data_from_numpy(np.array(spec.elements(value), dtype=triton_to_np_dtype(spec.dtype)))
    return tensor


def _channel_args(url: str) -> list[tuple[str, int]]:
    """GRPC's limits on a message's size lifted for large pictures, and no proxy for a server on this machine."""
    unlimited = -1
    arguments = [("grpc.max_send_message_length", unlimited), ("grpc.max_receive_message_length", unlimited)]
    if url.rpartition(":")[0] in ("localhost", "127.0.0.1", "[::1]"):
        arguments.append(("grpc.enable_http_proxy", 0))
    return arguments
