"""A caller that knows tritonclient and the public contract, and nothing of this project's code."""

from __future__ import annotations

import json
import queue
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from typing import Any

import numpy as np
import tritonclient.grpc as grpc_client

TYPES = {
    "seed": "INT64",
    "num_portraits": "INT32",
    "num_inference_steps": "INT32",
    "guidance_scale": "FP32",
    "guidance_interval": "FP32",
    "mask_ratio": "FP32",
    "priority": "INT32",
    "deadline_ms": "INT32",
    "preview_every": "INT32",
    "profile_box": "FP32",
    "reference_box": "FP32",
}
NUMPY = {"INT64": np.int64, "INT32": np.int32, "FP32": np.float32, "BYTES": np.object_}


def tensors(values: dict[str, Any], module: Any = grpc_client) -> list[Any]:
    """Convert public inputs to ``InferInput``s of tritonclient's gRPC or HTTP module."""
    inputs = []
    for name, value in values.items():
        kind = TYPES.get(name, "BYTES")
        values_list = value if isinstance(value, list) else [value]
        array = np.array([v.encode() if isinstance(v, str) else v for v in values_list], dtype=NUMPY[kind])
        tensor = module.InferInput(name, array.shape, kind)
        tensor.set_data_from_numpy(array)
        inputs.append(tensor)
    return inputs


def infer(url: str, model: str = "ic_portrait", **values: Any) -> tuple[list[bytes], dict[str, Any]]:
    """Make one unary call over gRPC, and return the portraits' bytes and the metadata."""
    with grpc_client.InferenceServerClient(url) as client:
        result = client.infer(model, tensors(values), client_timeout=120)
    return list(result.as_numpy("image")), json.loads(result.as_numpy("metadata")[0])


class StreamCall:
    """A request on a gRPC stream of its own."""

    def __init__(self, url: str, **values: Any) -> None:
        self.answers: queue.SimpleQueue[tuple[Any, Any]] = queue.SimpleQueue()
        self.ended = False
        self._client = grpc_client.InferenceServerClient(url)
        self._client.start_stream(lambda result, error: self.answers.put((result, error)))
        self._client.async_stream_infer(
            "ic_portrait_stream", tensors(values), enable_empty_final_response=True, request_id="1"
        )

    def __enter__(self) -> StreamCall:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._client.close()

    def cancel(self) -> None:
        self._client.stop_stream(cancel_requests=True)

    def next(self) -> dict[str, Any]:
        """Return the next answer's outputs; raise an answer that is an error."""
        result, error = self.answers.get(timeout=60)
        if error is not None:
            raise error
        response = result.get_response()
        self.ended = response.parameters["triton_final_response"].bool_param
        return {output.name: result.as_numpy(output.name) for output in response.outputs}

    def __iter__(self) -> Iterator[dict[str, Any]]:
        while not self.ended:
            # The last, which says that no more come, has no outputs.
            if answer := self.next():
                yield answer


def series(url: str, start: str = "icportrait_") -> dict[str, float]:
    """Read a server's metrics endpoint: this project's own series, or the ones that begin otherwise."""
    with urllib.request.urlopen(f"http://{url}/metrics", timeout=10) as answer:
        lines = [line for line in answer.read().decode().splitlines() if line.startswith(start)]
    return {name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines)}


def until_metric(url: str, name: str, value: float) -> None:
    """Wait until a series has a value."""
    end_s = time.monotonic() + 60
    while (found := series(url).get(name)) != value:
        assert time.monotonic() < end_s, f"{name} is {found}, not {value}"
        time.sleep(0.05)


def settled(url: str) -> dict[str, float]:
    """Wait until nothing runs or waits and a server's series stand still; they are published four times a second."""
    end_s = time.monotonic() + 60
    before, now = {}, series(url)
    while now != before or now.get("icportrait_active_slots") or now.get("icportrait_queued_slots"):
        assert time.monotonic() < end_s, f"not settled: {now}"
        time.sleep(0.6)
        before, now = now, series(url)
    return now


def generate(url: str, model: str = "ic_portrait", **values: Any) -> tuple[int, dict[str, Any]]:
    """Make one HTTP ``generate`` call, and return the status and the JSON answer."""
    request = urllib.request.Request(
        f"http://{url}/v2/models/{model}/generate", json.dumps(values).encode(), {"Content-Type": "application/json"}
    )
    try:
        with urllib.request.urlopen(request, timeout=120) as answer:
            return answer.status, json.loads(answer.read())
    except urllib.error.HTTPError as error:
        with error:
            return error.code, json.loads(error.read())
