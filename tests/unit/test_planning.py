"""The capacity planner: the server's own policy in virtual time, against arithmetic and queueing theory."""

from __future__ import annotations

import dataclasses
import json
import math
import re
import signal
import tomllib
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.__main__ import main
from benchmarks.load import Answer, LoadRun, Outcome
from benchmarks.planning import planner, simulation, validation
from benchmarks.planning.answer import table, to_json
from benchmarks.planning.bound import BatchService, fit, whole_batches
from benchmarks.planning.computed import GPUS, MEASURED_ON, compute, peak_tflops, write_all
from benchmarks.planning.evaluation import Estimate, Figures, Sample, Scenario, Simulator, run_once, summarise
from benchmarks.planning.measured import mean_profile
from benchmarks.planning.planner import NoPlan, Plan, keeps, least_replicas, plan, total_replicas
from benchmarks.planning.profile import Host, PlanningError, ServiceProfile, read_host
from benchmarks.planning.question import PROFILES, Goal, Question, find_profile, known_profiles, read, read_workload
from benchmarks.planning.replay import Pair, Replay
from benchmarks.planning.replay import simulate as simulate_load
from benchmarks.planning.simulation import OK, Run, ServerSettings, SimulatedServer
from benchmarks.planning.validation import LOADS, Mix, assess, capacity_per_s, crossing, highest_rates, predict, summary
from benchmarks.planning.validation import table as validation_table
from benchmarks.planning.virtual import Device
from benchmarks.planning.workload import Call, Workload, uniform
from benchmarks.schedule import poisson_schedule
from benchmarks.settings import LATENCY_TABLE, ROOT, LoadSettings
from icportrait.phases import row_steps
from icportrait.policy import ServingPolicy
from icportrait.presets import DEMO_128, SD15_512
from icportrait.runtime.latency_table import PEAK_TFLOPS, LatencyTable
from tests.label_slots import run_together, steps_of

RESULTS = ROOT / "benchmarks" / "results"
STEP_MS, WARP_MS, ENCODE_MS, DECODE_MS = 10.0, 3.0, 5.0, 7.0
HOST = Host(
    workers=1,
    front_ms=1,
    prepare_ms=20,
    kept_ms=2,
    to_encoder_ms=0.5,
    to_loop_ms=0.25,
    step_outside_ms={1: 0.5, 3: 1.5},
    to_decoder_ms=0.75,
    to_gateway_ms=1.25,
    encode_ms=4,
    back_ms=1.5,
)


def profile_of(host: Host = HOST, **engines: float) -> ServiceProfile:
    times = {"vae_encoder": ENCODE_MS, "warping_network": WARP_MS, "unet": STEP_MS, "vae_decoder": DECODE_MS, **engines}
    latencies = LatencyTable("NVIDIA test", {name: {1: latency_ms} for name, latency_ms in times.items()})
    return ServiceProfile.of_table("test", latencies, DEMO_128, precision="fp16", origin="computed", host=host)


def call(send_s: float, steps: int = 4, picture: int = 0, **fields: Any) -> Call:
    given = {"rows": 1, "portraits": 1, "priority": 1, "deadline_ms": None, "profile": picture, "reference": picture}
    return Call(send_s, steps, **{**given, **fields})


def simulate(calls: list[Call], profile: ServiceProfile | None = None, **policy: Any) -> Run:
    return SimulatedServer(profile or profile_of(), ServerSettings(ServingPolicy(**policy))).run(calls)


def test_a_request_alone_takes_the_sum_of_its_parts() -> None:
    (passage,) = simulate([call(1.0, steps=4)]).passages
    assert passage.code == OK
    assert passage.stage_ms == pytest.approx(
        {
            "front": 1,
            "preprocess": 2 * (20 + 2),  # one worker, two pictures
            "encode": 0.5 + 2 * ENCODE_MS + 0.25,  # the first picture finds the encoder free, and goes alone
            "queue": 0,
            "warp": WARP_MS,
            "denoise": 4 * (STEP_MS + 0.5),
            "decode": 0.75 + DECODE_MS + 1.25,
            "postprocess": 4,
            "back": 1.5,
        }
    )
    assert 1000 * passage.latency_s == pytest.approx(sum(passage.stage_ms.values()))


def test_pictures_that_return_are_neither_prepared_nor_encoded_again() -> None:
    first, again, other = simulate([call(0), call(1, picture=0), call(2, picture=1)]).passages
    assert first.stage_ms["encode"] == pytest.approx(other.stage_ms["encode"])
    assert again.stage_ms["preprocess"] == pytest.approx(2)
    # The reference's hidden patches are new each time.
    assert again.stage_ms["encode"] == pytest.approx(0.5 + ENCODE_MS + 0.25)
    assert other.stage_ms["preprocess"] == pytest.approx(44)


def test_a_request_joins_between_two_steps_of_another() -> None:
    host = dataclasses.replace(HOST, step_outside_ms={})
    early, late = simulate([call(0, steps=20), call(0.06, steps=2, picture=0)], profile_of(host)).passages
    assert early.joined_s < late.joined_s < late.denoised_s < early.denoised_s
    # Both share each step's time: one waits for a warping, encodings and decodings of the other, and for no step.
    assert late.stage_ms["denoise"] == pytest.approx(2 * STEP_MS, abs=2 * ENCODE_MS)
    whole = simulate([call(0, steps=20), call(0.06, steps=2, picture=0)], profile_of(host), batching="whole").passages
    assert whole[1].joined_s >= whole[0].denoised_s


def test_the_device_runs_one_engine_at_a_time() -> None:
    host = dataclasses.replace(HOST, workers=8, encode_ms=0)
    calls = [call(0.01 * index, steps=5, picture=index) for index in range(40)]
    run = simulate(calls, profile_of(host))
    busy_ms = 40 * (2 * ENCODE_MS + DECODE_MS)  # at most, where nothing is batched
    assert all(passage.code == OK for passage in run.passages)
    assert 0 < run.busy["device"] <= 1
    assert run.duration_s < (busy_ms + 40 * (WARP_MS + 5 * 12)) / 1000
    assert run.batches["unet"] > 2


@pytest.mark.parametrize(("portraits", "rate_per_s"), [(8, 1.2), (4, 2.0), (1, 6.5)])
def test_decoding_leaves_a_full_steps_p99_within_twice_its_median(portraits: int, rate_per_s: float) -> None:
    """Serve requests of 5 to 30 steps by the times that were measured on an H200, in full slots."""
    found = full_steps(portraits, rate_per_s)
    assert len(found) > 200
    assert np.percentile(found, 99) <= 2 * np.median(found)


def test_a_whole_batch_decoded_at_once_would_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(simulation, "DECODER_ROWS", 8)
    found = full_steps(8, 1.2)
    assert np.percentile(found, 99) > 2 * np.median(found)


def full_steps(portraits: int, rate_per_s: float) -> list[float]:
    """Return the seconds of each step with 14 rows or more."""
    table = LatencyTable.read(LATENCY_TABLE)
    profile = ServiceProfile.of_table(
        "h200", table, SD15_512, precision="fp16", origin="measured", host=dataclasses.replace(HOST, workers=16)
    )
    server, draw, found, begun = SimulatedServer(profile), np.random.default_rng(0), list[float](), [0.0, 0.0]
    slots, launch, wait = server._slots, server._slots.launch, server._slots.wait

    def timed_launch(canvas: Any, timestep: Any) -> None:
        begun[:] = len(timestep), server.time.now_s
        launch(canvas, timestep)

    def timed_wait() -> None:
        wait()
        if begun[0] >= 14:
            found.append(server.time.now_s - begun[1])

    slots.launch, slots.wait = timed_launch, timed_wait  # type: ignore[method-assign]
    moments = np.cumsum(draw.exponential(1 / rate_per_s, size=400))
    server.run(
        [
            call(float(at_s), int(draw.integers(5, 31)), number, portraits=portraits, rows=portraits)
            for number, at_s in enumerate(moments)
        ]
    )
    return found


def test_a_full_queue_refuses_and_a_deadline_is_forecast_or_missed() -> None:
    together = [call(0.001 * index, steps=50) for index in range(12)]
    codes = Counter(passage.code for passage in simulate(together, slots=1, max_queued_slots=4).passages)
    assert codes == {OK: 5, "queue_slots": 7}
    pending = Counter(passage.code for passage in simulate(together, max_pending_requests=3).passages)
    assert pending == {OK: 3, "pending": 9}
    # Nothing is measured before the first request, so the second is let in, and the third is forecast to be late.
    late = [call(0, steps=50), call(0.3, steps=50, deadline_ms=100), call(3, steps=50, deadline_ms=100)]
    assert [passage.code for passage in simulate(late).passages] == [OK, "deadline", "deadline"]
    missed = simulate([call(0, steps=50, deadline_ms=100)]).passages[0]
    assert (missed.code, missed.latency_s) == ("DEADLINE", pytest.approx(0.1))


def test_classes_go_first_in_the_loop_and_before_the_workers() -> None:
    blocker = call(0, steps=20)
    calls = [blocker, call(0.1, steps=3, picture=1, priority=5), call(0.11, steps=3, picture=2, priority=0)]
    _, low, high = simulate(calls, slots=1).passages
    assert high.denoised_s < low.denoised_s
    prepared = simulate(
        [call(0, picture=1), *(call(0.001, picture=2, priority=p) for p in (5,)), call(0.002, picture=3, priority=0)]
    )
    assert prepared.passages[2].prepared_s < prepared.passages[1].prepared_s


def test_more_portraits_and_guidance_take_rows_of_one_step() -> None:
    (passage,) = simulate([call(0, rows=6, portraits=3, steps=2)]).passages
    assert passage.stage_ms["denoise"] == pytest.approx(2 * (STEP_MS + 1.5))
    assert passage.stage_ms["postprocess"] == pytest.approx(3 * 4)


def test_guidance_takes_rows_at_the_steps_of_its_interval_alone() -> None:
    run = simulate([call(0, rows=6, portraits=3, steps=4, guidance_interval=(0.25, 0.5))])
    assert run.batches["unet"] == pytest.approx((3 + 6 + 3 + 3) / 4)


def test_a_workload_has_the_rows_of_its_guided_steps() -> None:
    workload = Workload(steps={4: 1.0, 20: 1.0}, guided=0.5, guidance_interval=(0.25, 0.75))
    assert workload.mean_rows == pytest.approx(1.25)
    drawn = workload.calls(400, seed=1)
    assert {each.phases for each in drawn if each.steps == 4} == {((4, 1),), ((1, 1), (2, 2), (1, 1))}
    rows = sum(row_steps(each.phases) for each in drawn) / sum(each.steps for each in drawn)
    assert rows == pytest.approx(workload.mean_rows, rel=0.03)
    assert dataclasses.replace(workload, guidance_interval=(0.0, 1.0)).mean_rows == 1.5


def test_the_virtual_loop_decides_as_the_threaded_one(monkeypatch: pytest.MonkeyPatch) -> None:
    counts = (5, 3, 8, 2, 4, 7, 1, 6)
    slots, _ = run_together(steps_of(*counts))
    preset = dataclasses.replace(DEMO_128, max_warping_batch=slots.max_jobs)
    profile = dataclasses.replace(profile_of(Host(workers=64), vae_encoder=1e-6), preset=preset)
    profile = dataclasses.replace(
        profile, engine_ms=dict(profile.engine_ms) | {"warping_network": {1: 10, 2: 10, 3: 10}}
    )
    server, steps = SimulatedServer(profile), list[int]()
    server._encoder._device = Device(server.time)
    launch = server._slots.launch
    monkeypatch.setattr(server._slots, "launch", lambda canvas, rows: (steps.append(len(rows)), launch(canvas, rows)))
    # The others come while the first one is warped.
    server.run([call(0.0, 1), *(call(0.002, count, picture=index) for index, count in enumerate(counts, 1))])
    assert steps == slots.steps


def test_the_queue_of_one_slot_is_that_of_a_constant_service() -> None:
    """Compare with Pollaczek and Khinchine: with service D and load r, requests wait r D / (2 (1 - r)) on average."""
    tiny = 1e-6
    profile = profile_of(Host(workers=64), vae_encoder=tiny, warping_network=tiny, vae_decoder=tiny)
    service_s, load = 5 * STEP_MS / 1000, 0.6
    calls = Workload(load / service_s, steps={5: 1.0}).calls(3000, seed=1)
    run = simulate(calls, profile, slots=1, max_queued_slots=10_000, max_pending_requests=10_000, cache_bytes=0)
    waited_s = np.array([passage.latency_s - service_s for passage in run.passages[300:]])
    assert waited_s.mean() == pytest.approx(load * service_s / (2 * (1 - load)), rel=0.1)
    assert run.busy["device"] == pytest.approx(load, rel=0.03)


def test_whole_batches_stay_below_the_bound_of_batch_service() -> None:
    """Compare with the bound of arXiv 1912.06322, which is close."""
    rows = {size: 8.0 + 1.0 * size for size in range(1, 17)}
    profile = dataclasses.replace(
        profile_of(Host(workers=64)),
        preset=dataclasses.replace(DEMO_128, max_warping_batch=16),
        engine_ms={
            "unet": rows,
            **{name: dict.fromkeys(range(1, 17), 1e-6) for name in ("vae_encoder", "vae_decoder", "warping_network")},
        },
    )
    scenario = Scenario(profile, Workload(150.0, steps={4: 1.0}))
    service = whole_batches(scenario)
    assert (service.slope_s, service.fixed_s) == pytest.approx((0.004, 0.032), rel=1e-3)
    for rate in (5.0, 90.0):
        calls = scenario.at(rate).workload.calls(2500, seed=2)
        server = SimulatedServer(profile, ServerSettings(ServingPolicy(batching="whole", cache_bytes=0)))
        # The bound knows one service: the other engines don't wait for steps here.
        server._encoder._device = server._decoder._device = Device(server.time)
        mean_s = np.mean([passage.latency_s for passage in server.run(calls).passages[250:]])
        assert 0.85 * service.mean_latency_s(rate) < mean_s < 1.03 * service.mean_latency_s(rate)


def test_the_bound_by_hand() -> None:
    service = BatchService(0.01, 0.02)
    assert service.mean_latency_s(1e-9) == pytest.approx(0.03)
    assert service.mean_latency_s(100) == math.inf
    x, y = 0.5, 1.0
    expected = min(1.5 * 0.02 / (1 - x) + 0.01 * (x + 2) / (2 * (1 - x**2)), 0.03 / (2 * (1 - x)) * (1 + 2 * y))
    assert service.mean_latency_s(50) == pytest.approx(expected)
    assert service.mean_batch(50) == pytest.approx(2)
    found = fit([(1, 0.03), (2, 0.04), (4, 0.06)])
    assert (found.slope_s, found.fixed_s) == pytest.approx((0.01, 0.02))


def test_a_workload_draws_what_it_says() -> None:
    workload = Workload(
        8.0,
        burstiness=2.0,
        steps={4: 1.0, 20: 3.0},
        guided=0.25,
        portraits={1: 1.0, 2: 1.0},
        deadlines_ms={500: 0.5},
        returning=0.6,
        profiles=10,
        references=3,
    )
    calls = workload.calls(20_000, seed=0)
    gaps = np.diff([each.send_s for each in calls])
    assert gaps.mean() == pytest.approx(1 / 8, rel=0.05)
    assert gaps.var() / gaps.mean() ** 2 == pytest.approx(4.0, rel=0.15)
    assert np.mean([each.steps for each in calls]) == pytest.approx(workload.mean_steps, rel=0.02)
    assert np.mean([each.rows for each in calls]) == pytest.approx(workload.mean_rows, rel=0.02)
    assert np.mean([each.deadline_ms == 500 for each in calls]) == pytest.approx(0.5, abs=0.02)
    assert {each.reference for each in calls} == {0, 1, 2}
    seen: set[int] = set()
    returned = 0
    for each in calls:
        returned += each.profile in seen
        seen.add(each.profile)
    assert returned / len(calls) == pytest.approx(0.6, abs=0.02)
    assert workload.calls(50, seed=0) == calls[:50]
    assert [each.send_s for each in workload.with_steps_scaled(1.2).calls(50, seed=0)] == [
        each.send_s for each in calls[:50]
    ]
    assert workload.with_steps_scaled(1.2).mean_steps == pytest.approx(1.2 * workload.mean_steps)


@pytest.mark.parametrize(("balancer", "variation"), [("random", 1.0), ("round-robin", 0.25)])
def test_a_replica_gets_its_part_of_all_requests(balancer: str, variation: float) -> None:
    gaps = np.diff([each.send_s for each in Workload(8.0).calls(8000, seed=3, replicas=4, balancer=balancer)])
    assert gaps.mean() == pytest.approx(0.5, rel=0.05)
    # Every n-th of a Poisson process: gaps are sums of n.
    assert gaps.var() / gaps.mean() ** 2 == pytest.approx(variation, rel=0.1)


def test_estimates_have_students_intervals_and_unanswered_requests_take_for_ever() -> None:
    def sample(values: list[float]) -> Sample:
        return Sample(np.array(values), {OK: len(values)}, {"device": 0.5}, {}, {}, len(values))

    scenario = Scenario(profile_of(), Workload())
    figures = summarise(scenario, [sample([10.0] * 100), sample([20.0] * 100), sample([30.0] * 100)], 20.0)
    # Student's quantile 0.95 for 2 degrees is 2.920, and the standard error is 10 / sqrt(3).
    assert (figures.p50_ms.value, figures.p50_ms.high) == pytest.approx((20.0, 20 + 2.92 * 10 / math.sqrt(3)))
    assert figures.goodput.value == pytest.approx(2 / 3)
    broken = summarise(scenario, [sample([10.0] * 97 + [math.inf] * 3), sample([10.0] * 100)], 20.0)
    assert (broken.p99_ms.value, broken.p99_ms.high) == (math.inf, math.inf)
    assert broken.p50_ms.value == 10
    assert broken.answered.value == pytest.approx(0.985)
    assert not keeps(Goal(p99_ms=1e9), broken)
    assert keeps(Goal(p99_ms=1e9), figures)
    assert not keeps(Goal(p99_ms=1e9, goodput=0.9, within_ms=20), figures)


@pytest.mark.parametrize(
    ("needed", "spare", "zones", "survive", "total"),
    [(5, 0, 1, False, 5), (5, 1, 1, False, 6), (5, 0, 3, True, 9), (6, 0, 3, True, 9), (5, 0, 2, True, 10)],
)
def test_redundancy(needed: int, spare: int, zones: int, survive: bool, total: int) -> None:
    assert total_replicas(needed, spare, zones, survive) == total
    if survive:
        assert total - total // zones >= needed


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, size in (("SEARCH", (3, 120)), ("FINAL", (3, 150)), ("CURVE", (2, 80))):
        monkeypatch.setattr(planner, name, size)


def question(rate: float = 40.0, goal: Goal | None = None, **fields: Any) -> Question:
    workload = Workload(rate, steps=uniform(4, 8), hourly=tuple(rate * (1 + hour) / 24 for hour in range(24)))
    return Question(workload, goal or Goal(p99_ms=400), [profile_of()], {"test": 2.0}, "EUR", **fields)


def test_a_plan_keeps_its_goal_with_the_fewest_replicas(short: None) -> None:
    asked = question(spare=1)
    with Simulator(processes=1) as simulator:
        (answer,) = plan(asked, simulator)
        assert isinstance(answer, Plan)
        fewer = dataclasses.replace(answer.figures.scenario, replicas=max(1, answer.replicas - 2))
        (worse,) = simulator.evaluate([fewer], 3, 150, 400)
    assert answer.replicas >= least_replicas(answer.figures.scenario)
    assert keeps(asked.goal, answer.figures)
    assert not keeps(asked.goal, worse)
    assert answer.total == answer.replicas + 1
    assert answer.cost_an_hour == 2.0 * answer.total
    assert answer.images_an_hour == pytest.approx(3600 * 40, rel=0.02)
    busy = [figures.busy["device"] for _, figures in answer.knee]
    assert busy == sorted(busy)
    assert answer.knee[-1][1].p50_ms.value > answer.knee[0][1].p50_ms.value
    slower = {change.name: change for change in answer.changes if change.factor > 1}
    faster = {change.name: change for change in answer.changes if change.factor < 1}
    for name in ("rate", "steps", "engine time"):
        assert slower[name].figures.p50_ms.value > faster[name].figures.p50_ms.value
    at_planned = dict(answer.knee)[1.0]
    assert at_planned.p99_ms.value == pytest.approx(answer.figures.p99_ms.value)
    assert at_planned.p50_ms.value == pytest.approx(answer.figures.p50_ms.value)
    assert answer.day[-1] == answer.total
    assert min(answer.day) == answer.day[0] < answer.total
    text = table(asked, [answer], simulator.requests, 1.0)
    for part in (
        f"{answer.replicas} replicas, and 1 for redundancy",
        "EUR an hour",
        "breaks first",
        "engine time x 1.2",
    ):
        assert part in text
    report = to_json(asked, [answer], simulator.requests, 1.0)
    assert json.loads(json.dumps(report, allow_nan=False))["answers"][0]["replicas"] == answer.replicas
    assert len(report["answers"][0]["knee"]) == len(planner.KNEE)


def test_no_plan_where_a_request_alone_takes_longer(short: None) -> None:
    asked = question(goal=Goal(p99_ms=50))
    with Simulator(processes=1) as simulator:
        (answer,) = plan(asked, simulator)
    assert isinstance(answer, NoPlan)
    assert "has a server to itself" in table(asked, [answer], simulator.requests, 1.0)
    assert to_json(asked, [answer], 1, 1.0)["answers"][0]["replicas"] is None


def test_headroom_plans_for_a_higher_rate(short: None) -> None:
    with Simulator(processes=1) as simulator:
        plain, roomy = (plan(question(headroom=share), simulator)[0] for share in (0.0, 0.5))
    assert isinstance(plain, Plan) and isinstance(roomy, Plan)
    assert roomy.replicas > plain.replicas
    assert roomy.figures.scenario.workload.rate_per_s == pytest.approx(60)
    assert roomy.normal.scenario.workload.rate_per_s == pytest.approx(40)


def test_a_simulation_is_the_same_again() -> None:
    scenario = Scenario(profile_of(), Workload(20.0, returning=0.5), 2, "round-robin")
    first, again = (run_once(scenario, 100, seed=5) for _ in range(2))
    assert first.latency_ms.tolist() == again.latency_ms.tolist()


def test_the_command_answers_a_file_and_its_flags(
    short: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mine.json").write_text(json.dumps(profile_json()))
    file = tmp_path / "question.toml"
    file.write_text(
        """
        [workload]
        rate_per_s = 5
        steps = { from = 4, to = 8 }
        [slo]
        p99_ms = 900
        [fleet]
        profiles = ["mine.json"]
        zones = 3
        survive_zone = true
        [prices]
        currency = "USD"
        L4 = 0.8
        [server]
        slots = 8
        """
    )
    assert main(["plan", str(file), "--rate", "30", "--processes", "1", "--json"]) == 0
    output = capsys.readouterr()
    report = json.loads(output.out)
    answer = report["answers"][0]
    assert report["question"]["rate_per_s"] == 30
    assert answer["total"] % 3 == 0
    assert answer["cost_an_hour"] == pytest.approx(0.8 * answer["total"])
    assert "replicas, p99" in output.err


def profile_json(**fields: Any) -> dict[str, Any]:
    engines = {"vae_encoder": 5, "warping_network": 50, "unet": 30, "vae_decoder": 7}
    return {
        "device": "NVIDIA L4",
        "preset": "demo-128",
        "precision": "fp16",
        "origin": "computed",
        "host": {"workers": 4, "prepare_ms": 5, "step_outside_ms": {"1": 0.5}},
        "engines": {name: {"1": latency_ms} for name, latency_ms in engines.items()},
        **fields,
    }


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"origin": "guessed"}, "origin is 'guessed', expected one of measured, computed"),
        ({"preset": None}, "preset is None, expected one of demo-128, sd15-512"),
        ({"host": {"prepare": 3}}, "host: 'prepare' is unknown, expected some of workers, front_ms"),
        ({"host": {"prepare_ms": -1}}, "host: prepare_ms is -1, expected milliseconds"),
        ({"host": {"workers": 0}}, "host: workers is 0, expected a whole number from 1"),
        ({"host": {"step_outside_ms": {"x": 1}}}, "host: step_outside_ms is"),
        ({"engines": {}}, "engines is empty, expected an object with"),
        ({"preset": []}, "preset is [], expected one of demo-128, sd15-512"),
        ({"host": {"prepare_ms": 10**400}}, "host: prepare_ms is 1000"),
    ],
)
def test_a_wrong_profile_is_named(
    fields: dict[str, Any], text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "profile.json"
    path.write_text(json.dumps(profile_json(**fields)))
    assert main(["plan", "--rate", "3", "--p99-ms", "100", "--profiles", str(path)]) == 1
    error = capsys.readouterr().err
    assert text in error
    assert str(path) in error


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("[workload]\nrate = 3", "workload: 'rate' is unknown, expected some of rate_per_s"),
        ("[workload]\nrate_per_s = 0", "workload: rate_per_s: 0.0, expected requests a second, more than 0"),
        ('[workload]\nrate_per_s = "x"', "workload: rate_per_s is 'x', expected a number"),
        ("[workload]\nsteps = { 500 = 1 }", "workload: steps: 500, expected a number from 1 to 150"),
        ("[workload]\nsteps = { from = 9, to = 3 }", "steps is from 9 to 3, expected the lower whole number first"),
        ("[workload]\nguidance_interval = 0.5", "guidance_interval is 0.5, expected [begin, end]"),
        ("[workload]\nguidance_interval = [0.5, 'x']", "guidance_interval is 'x', expected a number"),
        ("[workload]\nguidance_interval = [0.5, 0.2]", "guidance_interval: end: 0.2, expected a share from 0.5 to 1"),
        ("[workload]\nhourly = [1, 2]", "hourly is [1, 2], expected a list of 24 rates"),
        ("[workload]\ndeadlines_ms = { 100 = 0.7, 200 = 0.6 }", "deadlines_ms: shares sum to 1.3"),
        ("[slo]\np99_ms = -1", "slo: p99_ms is -1, expected milliseconds above 0"),
        ("[slo]\np95_ms = 10", "slo: 'p95_ms' is unknown, expected some of p99_ms, goodput, within_ms"),
        ("[fleet]\nspare = -1", "fleet: spare is -1, expected a whole number from 0"),
        ("[fleet]\nsurvive_zone = true", "survive_zone with zones = 1, expected 2 zones or more"),
        ('[fleet]\nbalancer = "best"', "balancer is 'best', expected one of random, round-robin"),
        ("[prices]\nH200 = -2", "prices: H200 is -2"),
        ("[server]\nslotz = 3", "server: 'slotz' is unknown, expected some of slots"),
        ("[server]\nslots = 0", "server: slots, rows_at_once: 0"),
        ("[tariff]\nx = 1", "'tariff' is unknown, expected some of workload"),
        ("[workload", "can't be read as TOML"),
        ("[workload]\nburstiness = 1e-200", "burstiness: 1e-200, expected a coefficient of variation, 0.01 to 1000"),
        (f"[workload]\nrate_per_s = 1{400 * '0'}", "rate_per_s: inf, expected requests a second"),
        (f"[workload]\nsteps = {{ 1{400 * '0'} = 1 }}", "expected a number from 1 to 150"),
        ("[workload]\nsteps = { 5 = 1e308, 6 = 1e308 }", "weight of 5: 1e+308, expected a weight from 0 to 1e+09"),
        (f"[workload]\nreferences = 1{30 * '0'}", "expected a number from 0 to 1000000000"),
        (f"[workload]\nrate_per_s = 9\nhourly = {[1] * 24}", "has rate_per_s and hourly, expected one of them"),
        ("[workload]\nrate_per_s = 1e6", "replicas of l4-sd15-512-fp16 or more, expected 10,000 at most"),
        ("[server]\nslots = 2.5", "server: slots is 2.5, expected a whole number"),
        ("[server]\ncache_s = inf", "server: cache_s is inf, expected 0 or more"),
        ('[server]\nbatching = ["whole"]', "server: batching is ['whole'], expected one of in-flight"),
        ('[fleet]\nsurvive_zone = "no"\nzones = 3', "survive_zone is 'no', expected true or false"),
        ("[fleet]\nspare = 1_000_000_000", "spare is 1000000000, expected a whole number from 0 to 10000"),
    ],
)
def test_a_wrong_question_is_named(
    text: str, expected: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "question.toml"
    file.write_text(text)
    flags = [] if "[slo]" in text else ["--p99-ms", "100"]
    assert main(["plan", str(file), *flags, "--profiles", "l4-sd15-512-fp16"]) == 1
    assert expected in capsys.readouterr().err


def test_a_goal_a_profile_and_rows_that_do_not_fit_are_named(capsys: pytest.CaptureFixture[str]) -> None:
    for flags, text in (
        (["--profiles", "l4-sd15-512-fp16"], "slo: empty, expected p99_ms"),
        (["--p99-ms", "9"], "fleet: no profile, expected some of a100-sd15-512-fp16"),
        (["--p99-ms", "9", "--profiles", "h20-sd15-512-fp16"], "did you mean h200-sd15-512-fp16?"),
        (["--goodput", "0.9", "--profiles", "l4-sd15-512-fp16"], "goodput has no within_ms"),
    ):
        assert main(["plan", *flags]) == 1
        assert text in capsys.readouterr().err
    with pytest.raises(PlanningError, match="takes 16 rows, and test has 4 slots"):
        planner.check_size(
            dataclasses.replace(
                question(),
                workload=Workload(portraits={8: 1.0}, guided=0.5),
                settings=ServerSettings(ServingPolicy(slots=4)),
            )
        )


@pytest.mark.parametrize(
    ("command", "text"),
    [
        ("plan --seed -1", "seed: -1, expected 0 to"),
        ("plan --processes 0", "processes: 0, expected 1 to 256"),
        ("profile --requests 0", "requests: 0, expected 1 to 1000"),
        ("replay --duration 5", "duration: 5, expected 10 to"),
        ("replay --rate nan", "rate: nan, expected a number above 0"),
        ("validate --duration nan", "duration: nan, expected 20 to"),
    ],
)
def test_a_wrong_flag_is_named_before_anything_runs(
    command: str, text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main(command.split())
    assert text in capsys.readouterr().err


def test_a_rate_as_a_flag_goes_before_the_files_hours(tmp_path: Path) -> None:
    file = tmp_path / "question.toml"
    file.write_text(f"[workload]\nhourly = {[1] * 24}\n[slo]\np99_ms = 900\n[fleet]\nprofiles = ['l4-sd15-512-fp16']")
    assert read(file, {}).workload.hourly == (1.0,) * 24
    workload = read(file, {"rate_per_s": 30.0}).workload
    assert (workload.rate_per_s, workload.hourly) == (30, ())


def test_a_price_is_found_whatever_its_case_and_may_be_0(short: None) -> None:
    asked = dataclasses.replace(question(), prices={"TEST": 0})
    assert asked.price(profile_of()) == 0
    with Simulator(processes=1) as simulator:
        (answer,) = plan(asked, simulator)
    assert isinstance(answer, Plan)
    assert ", for nothing" in table(asked, [answer], 1, 1.0)
    unpriced = dataclasses.replace(answer, hour_price=dataclasses.replace(asked, prices={"H20": 2}).price(profile_of()))
    assert "no price was given for NVIDIA test" in table(asked, [unpriced], 1, 1.0)


def test_a_run_that_is_under_way_counts_until_now() -> None:
    """Send the last request while the device and the worker have just begun: neither is busy for more than the time."""
    run = simulate([call(0), call(0.010, picture=1)])
    assert 0 < run.busy["workers"] <= 1
    host = dataclasses.replace(HOST, prepare_ms=0, kept_ms=0, front_ms=0)
    run = simulate([call(0), call(0.002, picture=1)], profile_of(host))
    assert 0 < run.busy["device"] <= 1


def test_figures_of_few_runs_are_scaled_and_stay_in_order() -> None:
    def figures(p50_ms: float, p99_ms: float) -> Figures:
        both = (Estimate(each, each - 1, each + 1) for each in (p50_ms, p99_ms))
        whole = Estimate(1.0, 1.0, 1.0)
        return Figures(Scenario(profile_of(), Workload()), 1, *both, whole, whole, 1.0, {}, {}, {}, {}, np.array([]))

    (found,) = planner.like(figures(90, 100), figures(80, 200), [figures(100, 120)])
    assert (found.p50_ms.value, found.p99_ms.value) == pytest.approx((112.5, 112.5))
    # Some requests of the longer runs had no portrait, or the shorter ones took no time: neither tells anything.
    for longer, shorter in ((figures(90, math.inf), figures(90, 100)), (figures(90, 100), figures(90, 0))):
        assert planner.like(longer, shorter, [figures(50, 60)])[0].p99_ms.value == 60


def test_a_comparison_without_answers_and_pairs_that_both_refused_are_told() -> None:
    request = poisson_schedule(LoadSettings())[-1]
    refused = Pair(request, 1.0, 2.0, "UNAVAILABLE", "UNAVAILABLE", {}, {"encode": 1.0})
    assert refused.cause == "measured UNAVAILABLE, simulated UNAVAILABLE"
    with pytest.raises(PlanningError, match="no request after the first 5 s was answered by both"):
        Replay(LoadSettings(), [refused], 0.0).to_json()


def test_processes_of_a_simulation_leave_ctrl_c_to_their_parent() -> None:
    with Simulator(processes=2) as simulator:
        assert simulator._pool
        assert simulator._pool.submit(signal.getsignal, signal.SIGINT).result(60) == signal.SIG_IGN


def test_the_committed_profiles_are_the_computed_ones(tmp_path: Path) -> None:
    host = json.loads((PROFILES / "h200-sd15-512-fp16.json").read_text())["host"]
    written = write_all(LATENCY_TABLE, tmp_path, host)
    assert {path.stem for path in written} <= set(known_profiles())
    for path in written:
        assert path.read_text() == (PROFILES / path.name).read_text()
        profile = find_profile(path.stem, Path())
        assert profile.origin == ("measured" if path.stem == "h200-sd15-512-fp16" else "computed")
        assert profile.assumptions


@pytest.mark.parametrize(
    ("instructions", "precision", "runtime"),
    [("avx2", "fp32", "onnxruntime"), ("avx512", "fp32", "onnxruntime"), ("avx512-bf16", "fp16", "openvino")],
)
def test_a_report_of_latency_becomes_a_profile(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], instructions: str, precision: str, runtime: str
) -> None:
    report, out = RESULTS / f"latency-demo-128-{instructions}.json", tmp_path / "made" / "cpu.json"
    assert main(["profile", "--latency", str(report), "--runtime", runtime, "--out", str(out)]) == 0
    assert "written" in capsys.readouterr().out
    assert out.read_text() == (PROFILES / f"cpu-{instructions}-demo-128-{precision}.json").read_text()
    profile = ServiceProfile.read(out)
    rows = [row for row in json.loads(report.read_text())["engines"] if row["runtime"].startswith(runtime)]
    assert all(profile.engine_ms[row["engine"]][row["batch"]] == row["ms"]["p50"] for row in rows)
    assert profile.host.outside_ms(1) > 0
    for arguments, text in (
        (["--latency", str(report), "--runtime", "openvino"], None),
        (
            ["--latency", str(PROFILES / "cpu-avx2-demo-128-fp32.json")],
            "isn't a report of python -m benchmarks latency",
        ),
    ):
        assert main(["profile", *arguments, "--out", str(out)]) == (1 if text else 0)
        assert (text or "") in capsys.readouterr().err


def test_computed_times_go_with_the_peak() -> None:
    latencies = LatencyTable.read(LATENCY_TABLE)
    same = compute(GPUS[MEASURED_ON], "fp16", latencies, "sd15-512")
    assert {name: {int(rows): each for rows, each in points.items()} for name, points in same.items()} == (
        latencies.latency_ms
    )
    assert compute(GPUS["L4"], "fp16", latencies, "sd15-512")["unet"]["1"] == pytest.approx(
        11.822 * 989 / 121, rel=1e-3
    )
    fp8 = compute(GPUS["H100"], "fp8", latencies, "sd15-512")
    assert fp8["vae_decoder"] == same["vae_decoder"]
    assert 0.5 < fp8["unet"]["16"] / same["unet"]["16"] < 1
    assert {name: gpu.fp16_tflops for name, gpu in GPUS.items()} == {name: PEAK_TFLOPS[name] for name in GPUS}
    with pytest.raises(PlanningError, match="A100 has no fp8; expected fp16"):
        peak_tflops(GPUS["A100"], "fp8")


def test_the_loops_own_time_is_linear_between_rows_and_level_beyond() -> None:
    host = read_host({"step_outside_ms": {"2": 1.0, "10": 3.0}})
    assert [host.outside_ms(rows) for rows in (1, 2, 6, 10, 16)] == pytest.approx([1, 1, 2, 3, 3])
    assert Host().outside_ms(4) == 0


def test_a_validation_compares_the_same_arrivals_and_lists_misses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(validation, "RUNS", 3)
    mix, profile = Mix("test", "test", (2, 4)), profile_of()
    assert capacity_per_s(profile, mix) > 20
    rows = []
    for load in LOADS:
        settings = LoadSettings(rate_per_s=20 * load, duration_s=15, steps=mix.steps, warm_up_s=2)
        schedule = poisson_schedule(settings)
        passages = simulate_load(profile, settings, schedule, ServerSettings())
        outcomes = []
        for request, passage in zip(schedule, passages, strict=True):
            late_s = 0.3 if load == LOADS[-1] else 0.0
            stages = {"preprocess": 1.0, "conditioning": 9.0, "denoise": 20.0, "decode": 5.0, "postprocess": 1.0}
            metadata = json.dumps({"stage_ms": stages, "encode_ms": 4.0}).encode()
            answered_s = request.send_s + passage.latency_s + late_s
            outcomes.append(Outcome(request, request.send_s, answered_s, Answer("OK", metadata=metadata)))
        rows.append(assess(mix, load, (profile, profile), LoadRun(settings, len(schedule), outcomes)))
    assert [row["p50"]["error"] for row in rows[:-1]] == [0, 0]
    assert [row["p99"]["error"] for row in rows[:-1]] == [0, 0]
    assert rows[-1]["p50"]["error"] < -0.1
    highest = highest_rates(mix, rows[:-1])
    assert highest["error"] == 0
    found = summary(rows, [highest])
    assert (found["p50_error"]["median"], found["p50_error"]["of"]) == (0, len(LOADS))
    assert found["p50_error"]["worst"] == -rows[-1]["p50"]["error"]
    assert found["intervals_cover"] >= 0.5
    assert any("p50" in miss for miss in found["misses"])
    text = validation_table({"scenarios": rows, "highest_rates": [highest], "summary": found})
    assert "miss: test at 0.55: p50" in text


def test_a_p99_with_a_wide_interval_is_not_judged() -> None:
    figure = {"measured_ms": 500.0, "simulated_ms": 400.0, "error": -0.2, "covered": True, "is_wide": True}
    p50, p99 = {**figure, "error": 0.05}, {**figure, "error": -0.4, "interval_ms": [300.0, 700.0]}
    stages = {"stage_ms": {"queue": {"measured": 9.0, "simulated": 5.0}}}
    row = {"mix": "test", "load": 0.4, "rate_per_s": 4.0, "p50": p50, "p99": p99, "replay": stages}
    judged = {**row, "load": 0.25, "p99": {**p99, "error": -0.3, "is_wide": False}}
    found = summary([row, judged], [])
    assert found["p99_error"] == {"median": 0.3, "worst": 0.3, "of": 1}
    assert found["abstain"] == ["test at 0.4: p99 -40.0%; an interval of 300 to 700 ms"]
    assert [miss[:24] for miss in found["misses"]] == ["test at 0.25: p99 -30.0%"]
    text = validation_table({"scenarios": [row, judged], "highest_rates": [], "summary": found})
    assert "too wide to judge: test at 0.4" in text


def test_a_server_that_grew_slower_has_the_mean_of_its_times_and_an_interval_of_both() -> None:
    before = profile_of()
    slower = {name: {size: 1.5 * ms for size, ms in times.items()} for name, times in before.engine_ms.items()}
    after = dataclasses.replace(
        before, engine_ms=slower, host=dataclasses.replace(before.host, front_ms=before.host.front_ms + 2)
    )
    mean = mean_profile(before, after)
    assert mean.host.front_ms == before.host.front_ms + 1
    assert mean.engine_ms["unet"][4] == pytest.approx(1.25 * before.engine_ms["unet"][4])
    settings = LoadSettings(rate_per_s=5, duration_s=8, steps=(2, 4), warm_up_s=2)
    found = predict((before, after), settings, ServerSettings())["p50"]
    assert found[1::2].min() > found[::2].max()


def test_the_highest_rate_is_between_the_loads() -> None:
    assert crossing([1, 2, 4], [100, 200, 800], 400) == pytest.approx(3)
    assert crossing([1, 2], [100, 200], 300) is None


def test_an_estimate_becomes_json_without_infinities() -> None:
    assert Estimate(1.0, 0.5, math.inf).to_json() == {"value": 1.0, "low": 0.5, "high": None}
    assert read(None, {"rate_per_s": 2.0, "p99_ms": 5.0, "profiles": ("l4-sd15-512-fp16",)}).workload.rate_per_s == 2.0


def test_the_documented_question_is_one(tmp_path: Path) -> None:
    (block,) = re.findall(r"```toml\n(.*?)```", (ROOT / "docs" / "capacity.md").read_text(), re.DOTALL)
    (tmp_path / "question.toml").write_text(block)
    assert len(read(tmp_path / "question.toml", {}).profiles) == 2
    found = tomllib.loads(block)
    assert read_workload(found["workload"]).mean_rows > 1
    tables = {
        name: [each.name for each in dataclasses.fields(of)] for name, of in (("workload", Workload), ("slo", Goal))
    }
    assert set(found["workload"]) | {"hourly"} == set(tables["workload"])
    assert set(found["slo"]) | {"within_ms"} == set(tables["slo"])
