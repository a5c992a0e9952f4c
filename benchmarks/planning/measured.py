"""Measurements of a real server, for a profile's host times and for comparisons with the simulation.

The server may run simulated engines: then its engines take a profile's times, and all else is real.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, fields, replace
from pathlib import Path
from statistics import fmean, median
from typing import Any

import numpy as np
from icportrait_client.contract import load_contract
from icportrait_client.errors import PortraitError
from tritonclient.grpc import InferenceServerClient
from tritonclient.utils import InferenceServerException

from benchmarks.compare import mean_between, server_counters
from benchmarks.engines_alone import engines_alone
from benchmarks.load import tensor
from benchmarks.machine import machine
from benchmarks.pairs import new_file, pixels
from benchmarks.planning.profile import Host, PlanningError, ServiceProfile, engines_json
from benchmarks.settings import HEADS
from icportrait.contract import ENGINES, contract_hash
from icportrait.deploy.repository import assemble
from icportrait.manifest import EngineFile, Manifest
from icportrait.policy import CPU_RUNTIMES, SIMULATED, ServingPolicy
from icportrait.runtime.latency_table import LatencyTable
from icportrait.server import Ports, ServerProcess

PICTURE = HEADS.parent / "astronaut.jpg"
_WARM_UP = 4
_LATE_STEPS = 60
_LONGEST_S = 300.0
_PAUSE_S = 0.05
"""Mean pause before a request: between the requests of a light load the processes sleep, and wake more slowly."""
_PER_STEP = ("step_slots", "step_ms", "step_outside_engine_ms")
_PUBLISHED_S = 0.4
"""The server publishes its counters every quarter of a second."""
_SCHEDULER = {"_class_name": "DDIMScheduler", "clip_sample": False, "beta_schedule": "scaled_linear"}


@contextmanager
def simulated_server(
    profile: ServiceProfile, policy: ServingPolicy | None = None, flags: tuple[str, ...] = ()
) -> Iterator[ServerProcess]:
    """Start a real server whose engines take a profile's times, and end it.

    Args:
        profile: its engines' times and its preset.
        policy: the server's settings, but the runtime and the latency table.
        flags: of the server.
    """
    with tempfile.TemporaryDirectory(prefix="icportrait-plan-") as name:
        folder = Path(name)
        (folder / "export").mkdir()
        _manifest(profile).write(folder / "export")
        engines = engines_json(profile.engine_ms)
        (folder / "table.json").write_text(json.dumps({"device": profile.device, "engines": engines}))
        policy = replace(policy or ServingPolicy(), runtime=SIMULATED, latency_table=str(folder / "table.json"))
        assemble(folder / "export", folder / "repository", policy)
        with ServerProcess(folder / "repository", Ports.free(), folder / "server.log", flags=flags) as server:
            yield server


@contextmanager
def real_server(export: Path, policy: ServingPolicy) -> Iterator[ServerProcess]:
    """Start a real server with an export's engines, and end it.

    Args:
        export: written by ``python -m export``.
        policy: the server's settings, its runtime among them.
    """
    with tempfile.TemporaryDirectory(prefix="icportrait-plan-") as name:
        folder = Path(name)
        assemble(export, folder / "repository", policy)
        with ServerProcess(folder / "repository", Ports.free(), folder / "server.log") as server:
            yield server


def measure_engines(export: Path, runtime: str, seconds: float = 1.0) -> ServiceProfile:
    """Measure an export's engines on this machine's CPU, by batch, and return a profile without host times.

    Args:
        export: written by ``python -m export``.
        runtime: one of ``policy.CPU_RUNTIMES``.
        seconds: time for one engine at one batch size.
    """
    manifest, here = Manifest.read(export), machine()
    # Shares of a peak aren't asked for here.
    rows = engines_alone(export, (runtime,), seconds, {"gflops": 1.0, "gb_per_s": 1.0})
    if not rows:
        raise PlanningError(f"runtime {runtime} isn't installed; expected one of {', '.join(CPU_RUNTIMES)}")
    times: dict[str, dict[int, float]] = {name: {} for name in ENGINES}
    for row in rows:
        times[row["engine"]][row["batch"]] = row["ms"]["p50"]
    runtimes = " and ".join(sorted({row["runtime"] for row in rows}))
    return ServiceProfile.of_table(
        f"{runtime}-{manifest.preset.name}",
        LatencyTable(f"{here['cpu']}, {here['instruction_set']}, {here['cores']} cores", times),
        manifest.preset,
        precision=manifest.precision,
        origin="measured",
        host=Host(),
        assumptions=(f"engines by {runtimes}, one at a time; in a server they share the cores with each other",),
    )


def _manifest(profile: ServiceProfile) -> Manifest:
    """Make the manifest of an export without graphs, which a simulated runtime needs none of."""
    return Manifest(
        preset=profile.preset,
        precision="fp32",
        opset=0,
        contract_hash=contract_hash(profile.preset, "fp32"),
        engines={name: EngineFile(f"{name}.onnx", "0" * 64, 0, "fp32") for name in profile.engine_ms},
        scheduler_config=_SCHEDULER,
        defaults={"guidance_scale": 1.0, "num_inference_steps": 20},
        source={"random_weights": 0},
        versions={},
    )


def measure_host(
    profile: ServiceProfile, server: ServerProcess, requests: int = 20, steps: int = 8, note: str = ""
) -> Host:
    """Measure a server's times outside of its engines, by requests that have the server to themselves.

    The first half has new pictures each time, which are decoded and searched for faces; the second has the same again.
    Then as many requests as there are slots run at once, for the loop's own time with full batches. No two requests
    have one seed, and no two measurements a picture: what the server has kept of an earlier one takes no time again.

    Args:
        profile: the times of the server's engines.
        server: with no other callers.
        requests: of each kind.
        steps: of each request.
        note: of the conditions, for the profile.
    """
    rng, picture = np.random.default_rng(), pixels(PICTURE, "profile")
    count = requests + _WARM_UP
    with InferenceServerClient(server.grpc_url) as client:
        new = [_ask(client, new_file(picture, rng), steps, rng) for _ in range(count)][_WARM_UP:]
        file = new_file(picture, rng)
        same = [_ask(client, file, steps, rng) for _ in range(count)][_WARM_UP:]
        alone = _steps_ms(client, server, file, 8 * steps, 1, rng)
        full = _steps_ms(client, server, file, 8 * steps, profile.preset.max_unet_batch, rng)
    engine = profile.engine_ms
    kept_ms = _median(same, "preprocess")
    late_ms = max(0.0, alone["step_ms"] - engine["unet"][1])
    join_ms = _median(same, "queue and warp") - engine["warping_network"][1] - late_ms
    encode_hops_ms = max(0.0, _median(same, "encode") - engine["vae_encoder"][1] - late_ms)
    decode_hops_ms = max(0.0, _median(same, "decode") - engine["vae_decoder"][1] - late_ms)
    here = machine()
    return Host(
        front_ms=_rounded(_median(same, "beside") / 2),
        back_ms=_rounded(_median(same, "beside") / 2),
        prepare_ms=_rounded(_median(new, "preprocess") - kept_ms),
        kept_ms=_rounded(kept_ms),
        to_encoder_ms=_rounded(encode_hops_ms / 2),
        to_loop_ms=_rounded(encode_hops_ms / 2),
        late_ms=_rounded(late_ms),
        join_ms=_rounded(join_ms),
        step_outside_ms={
            max(1, round(each["step_slots"])): _rounded(each["step_outside_engine_ms"]) for each in (alone, full)
        },
        to_decoder_ms=_rounded(decode_hops_ms / 2),
        to_gateway_ms=_rounded(decode_hops_ms / 2),
        encode_ms=_rounded(_median(same, "postprocess")),
        note=note or f"measured on {here['cores']} cores of {here['cpu']}, {here['instruction_set']}",
    )


def measure_late_ms(profile: ServiceProfile, server: ServerProcess, requests: int = 5) -> float:
    """Measure ``Host.late_ms`` alone, in a few seconds: other work on the machine changes it."""
    rng = np.random.default_rng()
    file = new_file(pixels(PICTURE, "profile"), rng)
    with InferenceServerClient(server.grpc_url) as client:
        steps = [_steps_ms(client, server, file, _LATE_STEPS, 1, rng)["step_ms"] for _ in range(requests)]
    return max(0.0, fmean(steps) - profile.engine_ms["unet"][1])


def as_served(profile: ServiceProfile, server: ServerProcess) -> ServiceProfile:
    """Return a profile whose UNet takes the time that real engines take in the server, one row and many.

    The loop keeps an engine's inputs where they are, so that its steps can be shorter than runs of the engine alone.

    Args:
        profile: of real engines, measured alone.
        server: runs these engines, and has no other callers.
    """
    rng, alone_ms = np.random.default_rng(), profile.engine_ms["unet"]
    file = new_file(pixels(PICTURE, "profile"), rng)
    with InferenceServerClient(server.grpc_url) as client:
        found = [_steps_ms(client, server, file, _LATE_STEPS, at_once, rng) for at_once in (1, 2, 4, max(alone_ms))]
    rows = [each["step_slots"] for each in found]
    shares = [
        each["step_ms"] / np.interp(each["step_slots"], list(alone_ms), list(alone_ms.values())) for each in found
    ]
    served_ms = {size: float(np.interp(size, rows, shares)) * each for size, each in alone_ms.items()}
    return replace(profile, engine_ms={**profile.engine_ms, "unet": served_ms})


def mean_host(first: Host, second: Host) -> Host:
    """Return the mean of two measurements of a host."""
    means = {
        each.name: (getattr(first, each.name) + getattr(second, each.name)) / 2
        for each in fields(Host)
        if each.name.endswith("_ms") and each.name != "step_outside_ms"
    }
    rows = {*first.step_outside_ms, *second.step_outside_ms}
    outside_ms = {row: (first.outside_ms(row) + second.outside_ms(row)) / 2 for row in sorted(rows)}
    return replace(first, **means, step_outside_ms=outside_ms)


def mean_profile(first: ServiceProfile, second: ServiceProfile) -> ServiceProfile:
    """Return the mean of two measurements of a server."""
    means = {
        name: {size: (ms + second.engine_ms[name][size]) / 2 for size, ms in times.items()}
        for name, times in first.engine_ms.items()
    }
    return replace(first, engine_ms=means, host=mean_host(first.host, second.host))


def profile_json(profile: ServiceProfile, host: Host) -> dict[str, Any]:
    """Return a profile with other host times as JSON."""
    return {
        "device": profile.device,
        "preset": profile.preset.name,
        "precision": profile.precision,
        "origin": profile.origin,
        "assumptions": list(profile.assumptions),
        "host": host_json(host),
        "engines": engines_json(profile.engine_ms),
    }


def host_json(host: Host) -> dict[str, Any]:
    """Return a host's times as a profile's JSON has them."""
    return asdict(host) | {"step_outside_ms": {str(rows): each for rows, each in host.step_outside_ms.items()}}


def stages_ms(metadata: Mapping[str, Any], whole_ms: float) -> dict[str, float]:
    """Return an answer's milliseconds by stage, in the simulation's terms; ``beside`` is the rest of the whole."""
    stages = metadata["stage_ms"]
    return {
        "preprocess": stages["preprocess"],
        "encode": metadata["encode_ms"],
        "queue and warp": stages["conditioning"] - metadata["encode_ms"],
        "denoise": stages["denoise"],
        "decode": stages["decode"],
        "postprocess": stages["postprocess"],
        "beside": whole_ms - sum(stages.values()),
    }


def _ask(client: Any, file: bytes, steps: int, rng: np.random.Generator) -> dict[str, float]:
    values = {"profile": file, "reference": file, "num_inference_steps": steps, "guidance_scale": 1.0}
    inputs = [tensor(name, value) for name, value in (values | {"seed": _seed(rng)}).items()]
    time.sleep(rng.exponential(_PAUSE_S))
    began_s = time.perf_counter()
    try:
        result = client.infer(load_contract().model, inputs)
    except InferenceServerException as error:
        raise PortraitError(f"a request failed: {error}") from error
    whole_ms = 1000 * (time.perf_counter() - began_s)
    return stages_ms(json.loads(result.as_numpy("metadata")[0]), whole_ms)


def _seed(rng: np.random.Generator) -> int:
    return int(rng.integers(2**31))


def _steps_ms(
    client: Any, server: ServerProcess, file: bytes, steps: int, at_once: int, rng: np.random.Generator
) -> dict[str, float]:
    """Return the means of a step's rows, engine time and time outside, in ms, with some requests at once."""
    time.sleep(_PUBLISHED_S)
    first = server_counters(server.metrics_url)
    values = {"profile": file, "reference": file, "num_inference_steps": steps, "guidance_scale": 1.0}
    inputs = [tensor(name, value) for name, value in values.items()]
    for _ in range(at_once):
        client.async_infer(load_contract().model, [*inputs, tensor("seed", _seed(rng))], lambda *_: None)
    expected, deadline_s = first.get("answers_total", 0.0) + at_once, time.monotonic() + _LONGEST_S
    last = first
    while last.get("answers_total", 0.0) < expected:
        if time.monotonic() > deadline_s:
            raise PlanningError(f"the server did not answer {at_once} requests in {_LONGEST_S:g} s")
        time.sleep(_PUBLISHED_S)
        last = server_counters(server.metrics_url)
    means = {name: mean_between(first, last, name) for name in _PER_STEP}
    if missing := [name for name, mean in means.items() if mean is None]:
        raise PlanningError(f"the server has no {missing[0]}; its log has the cause")
    return {name: float(mean or 0.0) for name, mean in means.items()}


def _median(times: Sequence[Mapping[str, float]], stage: str) -> float:
    return median(each[stage] for each in times)


def _rounded(value: float) -> float:
    return round(max(0.0, value), 3)
