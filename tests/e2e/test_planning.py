"""The capacity planner's measurements: a server's host times, and one load on it and in the simulation."""

from __future__ import annotations

import dataclasses
import json

from benchmarks.load import OK, run_load
from benchmarks.planning.measured import measure_host, profile_json
from benchmarks.planning.profile import ServiceProfile, read_host
from benchmarks.planning.replay import compare, table
from benchmarks.planning.simulation import ServerSettings
from benchmarks.report import conditions_here
from benchmarks.settings import LoadSettings
from icportrait.contract import ENGINES
from icportrait.policy import ServingPolicy
from icportrait.presets import DEMO_128
from icportrait.runtime.latency_table import LatencyTable
from icportrait.server import ServerProcess
from tests.e2e.conftest import SLOW_STEP_MS

STAGES = {"preprocess", "encode", "queue and warp", "denoise", "decode", "postprocess", "beside"}


def test_a_server_is_measured_and_its_load_is_simulated(slow: ServerProcess) -> None:
    times = {name: {1: 1.0} for name in ENGINES} | {"unet": {1: SLOW_STEP_MS}, "vae_decoder": {1: SLOW_STEP_MS / 5}}
    preset = dataclasses.replace(DEMO_128, max_unet_batch=1)
    profile = ServiceProfile.of_table(
        "slow", LatencyTable("test device", times), preset, precision="fp32", origin="measured", host=read_host({})
    )
    host = measure_host(profile, slow, requests=3, steps=2, note="test")
    assert host.prepare_ms > 0
    assert host.outside_ms(1) > 0
    again = measure_host(profile, slow, requests=3, steps=2, note="test")
    assert again.prepare_ms > host.prepare_ms / 5, "what the server keeps of the first measurement takes time again"
    assert read_host(profile_json(profile, host)["host"]) == host

    load = LoadSettings(url=slow.grpc_url, rate_per_s=4, duration_s=4, steps=(1, 3), warm_up_s=0.5, seed=3)
    run = run_load(load)
    settings = ServerSettings(ServingPolicy(slots=1, max_queued_slots=2))
    replay = compare(dataclasses.replace(profile, host=host), run, settings)
    assert [pair.request for pair in replay.pairs] == [outcome.request for outcome in run.outcomes]
    served = [pair for pair in replay.pairs if pair.measured_code == OK]
    assert served
    for pair in served:
        assert set(pair.measured_stages) == set(pair.simulated_stages) == STAGES
        assert pair.simulated_ms >= SLOW_STEP_MS * pair.request.num_inference_steps
    report = {**replay.to_json(), "conditions": conditions_here(load)}
    assert report["requests"] == len(run.outcomes)
    assert len(report["worst"]) == min(10, sum(pair.request.send_s >= 0.5 for pair in replay.pairs))
    assert all(row["cause"] for row in report["worst"])
    assert "the requests that differ most" in table(json.loads(json.dumps(report)) | {"conditions": CONDITIONS})


CONDITIONS = {"arguments": {"profile": "slow", "rate_per_s": 4.0, "duration_s": 4.0}}
