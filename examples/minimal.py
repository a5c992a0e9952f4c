"""A portrait with tritonclient alone: python examples/minimal.py localhost:8001 PROFILE REFERENCE OUT"""

import json
import sys
from pathlib import Path

import numpy as np
import tritonclient.grpc as triton

url, profile, reference, out = sys.argv[1:]
inputs = []
for name, values, kind, dtype in (
    ("profile", [Path(profile).read_bytes()], "BYTES", np.object_),
    ("reference", [Path(reference).read_bytes()], "BYTES", np.object_),
    ("seed", [7], "INT64", np.int64),
):
    inputs.append(triton.InferInput(name, [1], kind))
    inputs[-1].set_data_from_numpy(np.array(values, dtype=dtype))
# An http_proxy of the environment isn't for a server nearby.
options = [("grpc.enable_http_proxy", 0), ("grpc.max_receive_message_length", -1)]
result = triton.InferenceServerClient(url, channel_args=options).infer("ic_portrait", inputs)
Path(out).write_bytes(result.as_numpy("image")[0])
print(json.loads(result.as_numpy("metadata")[0])["stage_ms"])
