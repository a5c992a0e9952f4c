"""IC-Portrait Server: one person's face in another picture's view and light, served by Triton.

This page is the map. docs/architecture.md follows a request through it, step by step.

    server        the command line: ``icportrait-server``
    gateway       the public surface: v2 over gRPC and HTTP, limits, keys, the life of a request
    deploy        from an export to a running tritonserver, which only the gateway can reach
    serving       the models inside of that Triton, leases, and the line between it and the gateway
    loop          the denoising loop: one batch for all requests, which join and leave between any two steps
    runtime       engines behind one protocol: ONNX Runtime, OpenVINO, torch, TensorRT, simulated
    nn            the networks as torch modules
    diffusion     samplers, a step of all rows of a batch, noise, the mask of the reference
    pictures      files to pixels and back, faces

The modules beside them are the vocabulary of all: ``errors``, ``contract`` (every tensor), ``presets`` (every size),
``request`` (the public inputs), ``policy`` (a server's settings, the order of waiting requests), ``manifest`` (an
export), ``metrics`` (what is counted), ``phases`` (the slots that a request takes, step by step), ``pace`` (the time
that steps take).

Imports go down this list only, and tests/unit/test_imports.py holds that.
"""

import os

__version__ = "0.1.0"

# ONNX Runtime 1.31 reports its runs to Microsoft from Linux too, unless this is set before it is imported.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
