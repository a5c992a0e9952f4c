"""Two servers side by side: each request goes to both, one after the other, and what is told is the ratio of its times.

A machine that others use changes its speed from minute to minute. Two answers to one request lie within a second of
each other, so that their ratio tells servers apart where medians of separate runs don't. Every request has new
pictures, so that nothing is answered from a cache, and which server is asked first changes from request to request.
"""

from __future__ import annotations

import io
import json
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from icportrait_client.contract import load_contract
from icportrait_client.errors import PortraitError, ServerUnavailable
from icportrait_client.pictures import picture_bytes
from PIL import Image
from tritonclient.grpc import InferenceServerClient, InferInput
from tritonclient.utils import InferenceServerException

from benchmarks.load import tensor
from benchmarks.report import conditions_here
from benchmarks.settings import PairsSettings
from benchmarks.spread import ratio, ratio_text
from icportrait.contract import STANDALONE_ENSEMBLE

WARM_UP = 5
_NOISE_PX = 16
Ask = Callable[[Mapping[str, bytes], int], tuple[dict[str, Any], bytes]]
"""Returns the metadata and the file of the portrait of two pictures and a seed."""


def run_pairs(settings: PairsSettings) -> dict[str, Any]:
    """Ask two servers for the same portraits.

    Raises:
        InvalidRequest: a picture can't be read.
        PortraitError: a server isn't there, or refuses a request.
    """
    rng = np.random.default_rng(settings.seed)
    pictures = {name: pixels(getattr(settings, name), name) for name in ("profile", "reference")}
    options = {"num_inference_steps": settings.num_inference_steps} if settings.num_inference_steps else {}
    clients = [InferenceServerClient(url) for url in settings.urls]
    asks = [asker(url, client, options) for url, client in zip(settings.urls, clients, strict=True)]
    rounds: list[dict[str, Any]] = []
    for number in range(settings.rounds):
        times: list[list[dict[str, float]]] = [[], []]
        for request in range(-WARM_UP if number == 0 else 0, settings.requests):
            files = {name: new_file(pixels, rng) for name, pixels in pictures.items()}
            for which in (0, 1) if request % 2 else (1, 0):
                began_s = time.perf_counter()
                stages = asks[which](files, settings.requests * number + max(0, request))[0]["stage_ms"]
                times[which].append(stages | {"whole": 1000 * (time.perf_counter() - began_s)})
        rounds.append(_figures([each[-settings.requests :] for each in times]))
        print(f"round {number + 1} of {settings.rounds}: {_ratio(rounds[-1])}", file=sys.stderr, flush=True)
    for client in clients:
        client.close()
    return {
        "ratio_median_of_rounds": round(median(each["ratio"]["median"] for each in rounds), 4),
        "rounds": rounds,
        "conditions": {**conditions_here(settings), "warm_up_requests": WARM_UP},
    }


def asker(url: str, client: Any, options: Mapping[str, Any]) -> Ask:
    """Return the function that asks a server: a gateway, or a Triton with the standalone pipeline.

    Args:
        url: the server's, for messages.
        client: a ``tritonclient.grpc.InferenceServerClient`` of it.
        options: the request's, beside its pictures and seed.

    Raises:
        ServerUnavailable: the server isn't there, or isn't ready.
    """
    try:
        if not client.is_server_ready():
            raise ServerUnavailable(f"{url}: the server isn't ready")
        is_standalone = client.is_model_ready(STANDALONE_ENSEMBLE)
    except InferenceServerException as error:
        raise ServerUnavailable(f'{url}: no server answers; "make serve" starts one') from error

    def ask(files: Mapping[str, bytes], seed: int) -> tuple[dict[str, Any], bytes]:
        if is_standalone:
            request = InferInput("request", [1], "BYTES")
            request.set_data_from_numpy(np.array([json.dumps({**options, "seed": seed}).encode()], object))
            inputs = [*(tensor(name, data) for name, data in files.items()), request]
        else:
            inputs = [tensor(name, value) for name, value in {**files, **options, "seed": seed}.items()]
        try:
            result = client.infer(STANDALONE_ENSEMBLE if is_standalone else load_contract().model, inputs)
        except InferenceServerException as error:
            raise PortraitError(f"a request failed: {error}") from error
        return json.loads(result.as_numpy("metadata")[0]), result.as_numpy("image")[0]

    return ask


def pixels(path: Path, name: str) -> Any:
    """Read a picture's pixels, [h, w, 3] uint8."""
    return np.asarray(Image.open(io.BytesIO(picture_bytes(path, name))).convert("RGB"))


def new_file(pixels: Any, rng: np.random.Generator) -> bytes:
    """Encode the picture as a JPEG that was never sent before: a corner of it is noise."""
    pixels = pixels.copy()
    pixels[:_NOISE_PX, :_NOISE_PX] = rng.integers(0, 256, pixels[:_NOISE_PX, :_NOISE_PX].shape)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", quality=90)
    return file.getvalue()


def _figures(times: list[list[dict[str, float]]]) -> dict[str, Any]:
    """Return both servers' medians by stage, and the ratio of the second's to the first's with its 95 % interval."""
    first, second = ([each["whole"] for each in server] for server in times)
    return {
        "ratio": ratio(second, first),
        "median_ms": [
            {name: round(median(each[name] for each in server), 2) for name in server[0]}
            | {"beside_stages": round(median(2 * each["whole"] - sum(each.values()) for each in server), 2)}
            for server in times
        ],
    }


def _ratio(figures: dict[str, Any]) -> str:
    return f"second to first {ratio_text(figures['ratio'])}"


def table(report: dict[str, Any]) -> str:
    """Write the figures of ``run_pairs`` as lines for a reader."""
    arguments = report["conditions"]["arguments"]
    lines = [
        f"first {arguments['first']}, second {arguments['second']}; {arguments['rounds']} rounds of"
        f" {arguments['requests']} requests, each asked of both; medians in ms"
    ]
    names = list(report["rounds"][0]["median_ms"][0])
    lines.append("".join(f"{name:>15}" for name in ["", *names]))
    for which, label in enumerate(("first", "second")):
        medians = [median(each["median_ms"][which][name] for each in report["rounds"]) for name in names]
        lines.append(f"{label:>15}" + "".join(f"{value:15.2f}" for value in medians))
    lines += [f"round {number}: {_ratio(each)}" for number, each in enumerate(report["rounds"], 1)]
    return "\n".join([*lines, f"median of the rounds: {report['ratio_median_of_rounds']:.3f}"])
