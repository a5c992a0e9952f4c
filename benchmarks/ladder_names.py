"""The ladder's rungs: ways to make the same portrait, from the slowest to the whole server."""

from __future__ import annotations

OURS = "gateway"
RUNGS = {
    "recomputing": "torch, eager; the conditioning is computed again at every step",
    "eager": "torch, eager; the conditioning is computed once",
    "compiled": "the same with torch.compile of the UNet, as diffusers advises",
    "onnxruntime": "the same loop over ONNX Runtime's engines, in one process",
    "openvino": "the same loop over OpenVINO's engines, in one process",
    "bls": "tritonserver with one BLS call a step, as in Triton's tutorial",
    "standalone": "tritonserver with the standalone pipeline: our loop, without the gateway",
    OURS: "the whole server: gateway, private tritonserver, our loop",
}
"""The meaning of each rung."""
