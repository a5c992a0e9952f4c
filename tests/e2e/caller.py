"""A caller that knows tritonclient and the public contract, and nothing of this project's code."""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from typing import Any

import numpy as np
import tritonclient.grpc as grpc_client

TYPES = {
    "seed": "INT64",
    "num_portraits": "INT32",
    "num_inference_steps": "INT32",
    "guidance_scale": "FP32",
    "mask_ratio": "FP32",
    "priority": "INT32",
    "deadline_ms": "INT32",
    "profile_box": "FP32",
    "reference_box": "FP32",
}
NUMPY = {"INT64": np.int64, "INT32": np.int32, "FP32": np.float32, "BYTES": np.object_}


def tensors(values: dict[str, Any], module: Any = grpc_client) -> list[Any]:
    """Public inputs as ``InferInput``s of tritonclient's gRPC or HTTP module."""
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
    """One unary call over gRPC: the portraits' bytes and the metadata."""
    with grpc_client.InferenceServerClient(url) as client:
        result = client.infer(model, tensors(values), client_timeout=120)
    return list(result.as_numpy("image")), json.loads(result.as_numpy("metadata")[0])


def generate(url: str, model: str = "ic_portrait", **values: Any) -> tuple[int, dict[str, Any]]:
    """One HTTP ``generate`` call: the status and the JSON answer."""
    request = urllib.request.Request(
        f"http://{url}/v2/models/{model}/generate", json.dumps(values).encode(), {"Content-Type": "application/json"}
    )
    try:
        with urllib.request.urlopen(request, timeout=120) as answer:
            return answer.status, json.loads(answer.read())
    except urllib.error.HTTPError as error:
        with error:
            return error.code, json.loads(error.read())
