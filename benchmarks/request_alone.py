"""One request at a time on the whole server: where its milliseconds go.

Every part lies between two marks: readings of the machine's monotonic clock that the server takes, or the engine's own
begin and end. Triton and Python are a row of their own: the ways to and from Triton's models, and the loop outside of
its engines. Nothing is found as what is left, but the way from the caller to the server and back, which begins and
ends with the caller.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import numpy as np
from tritonclient.grpc import InferenceServerClient

from benchmarks.compare import server_counters
from benchmarks.pairs import asker, new_file
from benchmarks.spread import ratio, spread
from icportrait.contract import ENGINES
from icportrait.server import ServerProcess

WARM_UPS = 3
PARTS = {
    "caller_and_door": "from the caller to the pictures' preparation, and from the portrait's file back to the caller",
    "pictures": "decoding, face finding and cropping; encoding the portrait",
    "vae_encoder": "the engine",
    "warping_network": "the engine",
    "unet": "the engine, all steps",
    "vae_decoder": "the engine",
    "triton_and_python": "ways to and from Triton's models, their Python, and the loop outside of its engines",
}
"""The parts of a request's time. Together they are the whole."""


def request_alone(
    server: ServerProcess, pictures: Mapping[str, Any], options: Mapping[str, Any], requests: int, seed: int
) -> dict[str, Any]:
    """Measure requests with new pictures, one after the other.

    Args:
        server: an idle one.
        pictures: pixels, [h, w, 3] uint8, by input.
        options: ``num_inference_steps``, ``guidance_scale``.
        requests: how many are measured.
        seed: of the pictures' noise and the portraits.

    Returns:
        Milliseconds of the whole and of each of ``PARTS``, their shares of the whole's median, and the whole by the
        engines' time.
    """
    rng = np.random.default_rng(seed)
    client = InferenceServerClient(server.grpc_url)
    ask = asker(server.grpc_url, client, options)
    found: dict[str, list[float]] = {name: [] for name in ("whole", *PARTS)}
    try:
        for number in range(-WARM_UPS, requests):
            files = {name: new_file(pixels, rng) for name, pixels in pictures.items()}
            before = server_counters(server.metrics_url)
            began_s = time.perf_counter()
            metadata, _ = ask(files, seed + max(0, number))
            whole_ms = 1000 * (time.perf_counter() - began_s)
            after = server_counters(server.metrics_url)
            if number >= 0:
                vae = {name: _engine_ms(before, after, name) for name in ("vae_encoder", "vae_decoder")}
                for name, value in parts_of(metadata, vae, whole_ms).items():
                    found[name].append(value)
    finally:
        client.close()
    figures = {name: spread(values) for name, values in found.items()}
    whole = figures["whole"]["p50"]
    engines = [sum(times) for times in zip(*(found[name] for name in ENGINES), strict=True)]
    return {
        "options": dict(options),
        "ms": figures,
        "by_engines": ratio(found["whole"], engines),
        "share": {name: round(figures[name]["p50"] / whole, 4) for name in PARTS},
    }


def parts_of(metadata: Mapping[str, Any], vae_ms: Mapping[str, float], whole_ms: float) -> dict[str, float]:
    """Return the milliseconds of each part of a request that ran alone.

    Args:
        metadata: the answer's; docs/api.md has its times.
        vae_ms: the engine's run, for ``vae_encoder`` and ``vae_decoder``.
        whole_ms: from the caller's sending to its receipt.
    """
    stages = metadata["stage_ms"]
    unet_ms = metadata["engine_ms"] - metadata["warp_ms"]
    ways_ms = {
        "to the loop": metadata["encode_ms"] - vae_ms["vae_encoder"],
        "before and after the warping": stages["conditioning"] - metadata["encode_ms"] - metadata["warp_ms"],
        "between steps": stages["denoise"] - unet_ms,
        "to the decoder and back": stages["decode"] - vae_ms["vae_decoder"],
    }
    return {
        "whole": whole_ms,
        "caller_and_door": whole_ms - sum(stages.values()),
        "pictures": stages["preprocess"] + stages["postprocess"],
        "vae_encoder": vae_ms["vae_encoder"],
        "warping_network": metadata["warp_ms"],
        "unet": unet_ms,
        "vae_decoder": vae_ms["vae_decoder"],
        "triton_and_python": sum(ways_ms.values()),
    }


def _engine_ms(before: Mapping[str, float], after: Mapping[str, float], engine: str) -> float:
    name = f'engine_ms_total{{engine="{engine}"}}'
    return after.get(name, 0.0) - before.get(name, 0.0)
