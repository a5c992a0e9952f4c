"""The load generator without a server: schedules, what counts as latency, and the arithmetic of its report."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from icportrait_client.errors import InvalidRequest
from PIL import Image
from tritonclient.grpc import service_pb2

from benchmarks.__main__ import main
from benchmarks.calls import LEFT, UNANSWERED, Answer, sender
from benchmarks.load import ClosedLoop, LoadRun, OpenLoop, Outcome, _pictures
from benchmarks.mix import Mix
from benchmarks.report import fell_behind, reason, step_thirds, summarise, table
from benchmarks.schedule import PlannedRequest, poisson_schedule
from benchmarks.settings import LoadSettings
from icportrait.gateway.wire import read_infer_request


def test_a_schedule_is_its_seeds_and_a_longer_one_begins_with_it() -> None:
    settings = LoadSettings(rate_per_s=20, duration_s=10)
    schedule = poisson_schedule(settings)
    assert schedule == poisson_schedule(settings)
    assert poisson_schedule(LoadSettings(rate_per_s=20, duration_s=20))[: len(schedule)] == schedule
    assert poisson_schedule(LoadSettings(rate_per_s=20, duration_s=10, seed=1)) != schedule


def test_moments_and_seeds_stay_while_the_steps_range_changes() -> None:
    one, other = (poisson_schedule(LoadSettings(steps=steps)) for steps in ((5, 30), (1, 2)))
    assert [(each.send_s, each.seed) for each in one] == [(each.send_s, each.seed) for each in other]
    assert [each.num_inference_steps for each in one] != [each.num_inference_steps for each in other]


def test_gaps_are_exponential_and_steps_uniform() -> None:
    schedule = poisson_schedule(LoadSettings(rate_per_s=50, duration_s=200, steps=(3, 6)))
    gaps_s = np.diff([each.send_s for each in schedule])
    # About 10000 gaps: their mean and, as of an exponential, their deviation are within 1 % of 1/50 s, give or take.
    assert gaps_s.min() > 0
    assert gaps_s.mean() == pytest.approx(1 / 50, rel=0.05)
    assert gaps_s.std() == pytest.approx(1 / 50, rel=0.05)
    counts = np.bincount([each.num_inference_steps for each in schedule])
    assert counts[:3].sum() == 0
    assert counts[3:] / len(schedule) == pytest.approx([0.25] * 4, abs=0.03)
    assert len({each.seed for each in schedule}) == len(schedule)


def test_a_schedule_without_a_request_is_refused() -> None:
    with pytest.raises(InvalidRequest, match="no request falls into 1 s at 1e-06/s"):
        poisson_schedule(LoadSettings(rate_per_s=1e-6, duration_s=1, warm_up_s=0))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"rate_per_s": 0}, "rate: 0, expected a number above 0"),
        ({"rate_per_s": float("nan")}, "rate: nan, expected"),
        ({"duration_s": -1}, "duration: -1, expected"),
        ({"timeout_s": 0}, "timeout: 0, expected"),
        ({"warm_up_s": 30}, "warm-up: 30 s, expected 0 or more and less than the duration, 30 s"),
        ({"steps": (0, 5)}, "num_inference_steps: 0, expected 1..150"),
        ({"steps": (5, 151)}, "num_inference_steps: 151, expected 1..150"),
        ({"steps": (6, 5)}, "steps: 6 5, expected the lower number first"),
        ({"guidance_scale": 0.5}, "guidance_scale: 0.5, expected 1.0..20.0"),
        ({"guidance_interval": (0.6, 0.4)}, "guidance_interval: [0.6, 0.4], expected a begin that isn't after its end"),
        ({"guidance_interval": (0.6,)}, "guidance_interval: 1 values, expected 2 numbers"),
        ({"seed": -1}, "seed: -1, expected 0 or more"),
        ({"deadline_ms": 0}, "deadline_ms: 0, expected 1..3600000"),
        ({"priority": 10}, "priority: 10, expected 0..9"),
        ({"reference": ()}, "reference: no picture, expected one or more"),
        ({"burstiness": 0}, "burstiness: 0, expected 0.01 to 1000"),
        ({"burstiness": 1e9}, "burstiness: 1e+09, expected 0.01 to 1000"),
        ({"rate_per_s": 1e9}, "rate: 1e+09/s for 30 s are 3e+10 requests, expected 2000000 at most"),
        ({"duration_s": 1e12}, "duration: 1e+12, expected a number above 0, up to 1e+07"),
        ({"concurrency": 10**9}, "concurrency: 1000000000, expected 1 to 10000"),
        ({"ramp_s": 6}, "ramp: 6 s, expected 0 or more and within the warm-up, 5 s"),
        ({"returning": 1.5}, "returning: 1.5, expected a share from 0 to 1"),
        ({"leaving": -0.1}, "leaving: -0.1, expected a share from 0 to 1"),
        ({"concurrency": 0}, "concurrency: 0, expected 1 to 10000"),
        ({"concurrency": 2, "burstiness": 2}, "leave out burstiness"),
        ({"trace": Path("t.csv"), "concurrency": 2}, "trace: has its own moments; leave out concurrency"),
        ({"guidance_scale": Mix((1.0, 0.5), (1, 1))}, "guidance_scale: 0.5, expected 1.0..20.0"),
        ({"steps_mix": Mix((10, 500), (1, 1))}, "num_inference_steps: 500, expected 1..150"),
    ],
)
def test_settings_that_make_no_sense_are_refused(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidRequest) as refused:
        LoadSettings(**wrong)
    assert message in str(refused.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--steps 9 3", "steps: 9 3, expected the lower number first"),
        ("--deadline-ms 0", "deadline_ms: 0, expected 1..3600000"),
        ("--priority -1", "priority: -1, expected 0..9"),
        ("--priority 0:1 0:2", "priority: 0 0, expected each once"),
        ("--guidance 1:0", "--guidance: 1:0, expected N or N:WEIGHT, with weights above 0"),
        ("--steps few", "--steps: few, expected N or N:WEIGHT, with weights above 0"),
    ],
)
def test_the_command_line_says_what_is_wrong(options: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["load", *options.split()])
    assert ended.value.code == 2
    assert capsys.readouterr().err.splitlines()[-1] == f"python -m benchmarks load: error: {message}"


class Call:
    """A call that ends as it is told to."""

    def __init__(self, code: grpc.StatusCode = grpc.StatusCode.OK, details: str = "", result: bytes = b"") -> None:
        self.code, self.details, self.result = (lambda: code), (lambda: details), (lambda: result)
        self.cancelled = False

    def add_done_callback(self, call: Callable[[Any], None]) -> None:
        call(self)

    def cancel(self) -> None:
        self.cancelled = True


def _value(tensor: np.ndarray) -> Any:
    return tensor.item() if tensor.size == 1 else tuple(tensor.tolist())


class Channel:
    """Keeps what it is given to send, as the server reads it."""

    def __init__(self, call: Call | None = None) -> None:
        self.sent: list[dict[str, Any]] = []
        self.models: list[str] = []
        self._call = call or Call(result=response({"image": b"png", "metadata": b'{"steps": 5}'}))

    def unary_unary(self, method: str) -> Any:
        assert method == "/inference.GRPCInferenceService/ModelInfer"
        return self

    def future(self, message: bytes, timeout: float) -> Call:
        request = read_infer_request(message)
        self.models.append(request.head.model_name)
        self.sent.append({name: _value(tensor) for name, tensor in request.inputs().items()})
        return self._call


def response(outputs: dict[str, bytes]) -> bytes:
    message = service_pb2.ModelInferResponse()
    for name, data in outputs.items():
        message.outputs.add(name=name, datatype="BYTES", shape=[1])
        message.raw_output_contents.append(len(data).to_bytes(4, "little") + data)
    written: bytes = message.SerializeToString()
    return written


PICTURES = {"profile": [b"p0", b"p1"], "reference": [b"r0", b"r1", b"r2"]}


def test_pictures_are_sent_in_turn() -> None:
    channel = Channel()
    send = sender(channel, "ic_portrait", 1.0, PICTURES)
    for request in evenly(5, 1.0):
        send(request, lambda _: None)
    assert [(each["profile"], each["reference"]) for each in channel.sent] == [
        (b"p0", b"r0"),
        (b"p1", b"r1"),
        (b"p0", b"r2"),
        (b"p1", b"r0"),
        (b"p0", b"r1"),
    ]
    assert channel.models == ["ic_portrait"] * 5


def test_a_request_takes_its_own_profile_and_sends_what_it_has() -> None:
    channel = Channel()
    send = sender(channel, "ic_portrait", 1.0, PICTURES, [b"new0", b"new1"])
    send(PlannedRequest(0.0, 5, 7, guidance_scale=1.5, guidance_interval=(0.2, 0.5)), lambda _: None)
    send(PlannedRequest(0.0, 6, 2**31, 1.0, priority=0, deadline_ms=900, profile=1), lambda _: None)
    without, with_all = channel.sent
    assert without == {
        "profile": b"p0",
        "reference": b"r0",
        "seed": 7,
        "num_inference_steps": 5,
        "guidance_scale": 1.5,
        "guidance_interval": pytest.approx((0.2, 0.5)),
    }
    assert with_all["profile"] == b"new1"
    assert "guidance_interval" not in with_all
    assert (with_all["priority"], with_all["deadline_ms"], with_all["seed"]) == (0, 900, 2**31)


def test_of_an_answer_the_metadata_is_kept_and_of_an_error_its_code_and_message() -> None:
    answers: list[Answer] = []
    sender(Channel(), "ic_portrait", 1.0, PICTURES)(evenly(1, 1.0)[0], answers.append)
    refused = Call(grpc.StatusCode.UNAVAILABLE, "the queue is full")
    sender(Channel(refused), "ic_portrait", 1.0, PICTURES)(evenly(1, 1.0)[0], answers.append)
    assert answers == [Answer("OK", metadata=b'{"steps": 5}'), Answer("UNAVAILABLE", "the queue is full")]


def evenly(count: int, gap_s: float) -> list[PlannedRequest]:
    return [PlannedRequest(gap_s * (1 + i), 5, i) for i in range(count)]


def test_latency_counts_from_the_intended_moment_also_when_sending_is_slow() -> None:
    def slow_send(_: PlannedRequest, receive: Callable[[Answer], None]) -> None:
        time.sleep(0.05)
        receive(Answer("OK"))

    loop = OpenLoop(slow_send)
    assert loop.run(evenly(6, 0.01), timeout_s=1) is None
    # Each send takes 50 ms and the next one was due 10 ms after the one before: what waits adds 40 ms at a time.
    for i, outcome in enumerate(loop.outcomes):
        assert outcome.latency_s >= 0.05 + 0.04 * i - 1e-6
        assert outcome.lateness_s >= 0.05 + 0.04 * i - 1e-6


def test_requests_leave_whatever_the_answers_do() -> None:
    """Answer none before the last is sent."""
    waiting: list[Callable[[Answer], None]] = []

    def send(_: PlannedRequest, receive: Callable[[Answer], None]) -> None:
        waiting.append(receive)
        if len(waiting) == 10:
            threading.Thread(target=lambda: [each(Answer("OK")) for each in waiting]).start()

    loop = OpenLoop(send)
    loop.run(evenly(10, 0.02), timeout_s=60)
    assert [each.answer.code for each in loop.outcomes] == ["OK"] * 10


def test_callers_who_leave_cancel_and_are_counted_apart() -> None:
    """Cancel one call under way, and none that was answered before."""
    cancelled: list[int] = []

    def send(request: PlannedRequest, receive: Callable[[Answer], None]) -> Callable[[], None]:
        def cancel() -> None:
            cancelled.append(request.seed)
            receive(Answer("CANCELLED", "by the caller"))

        if request.seed == 0:
            receive(Answer("OK"))
        return cancel

    requests = [replace(each, leaves_after_s=0.02) for each in evenly(2, 0.01)]
    loop = OpenLoop(send)
    assert loop.run(requests, timeout_s=60) is None
    assert cancelled == [1]
    assert [each.answer.code for each in loop.outcomes] == ["OK", LEFT]
    assert loop.outcomes[1].latency_s >= 0.02


def test_a_closed_loop_sends_again_when_a_caller_is_answered() -> None:
    """Answer on another thread, so that callers are the only limit, and end with the twelfth request."""
    under_way, most = set[int](), []

    def send(request: PlannedRequest, receive: Callable[[Answer], None]) -> None:
        if request.seed == 11:
            raise KeyboardInterrupt
        under_way.add(request.seed)
        most.append(len(under_way))

        def answer() -> None:
            under_way.discard(request.seed)
            receive(Answer("OK"))

        threading.Timer(0.02, answer).start()

    loop = ClosedLoop(send)
    assert loop.run(iter(evenly(12, 0.0)), LoadSettings(concurrency=3, duration_s=60)) is not None
    assert max(most) == 3
    assert len(loop.outcomes) == 12
    # A caller's next request counts from its answer.
    answers = {each.answered_s for each in loop.outcomes}
    assert {each.request.send_s for each in loop.outcomes[3:]} <= answers


def test_callers_of_a_closed_loop_begin_one_after_the_other_in_its_ramp() -> None:
    def send(request: PlannedRequest, receive: Callable[[Answer], None]) -> None:
        if request.seed == 3:
            raise KeyboardInterrupt

    settings = LoadSettings(concurrency=4, duration_s=60, warm_up_s=0.2, ramp_s=0.2)
    loop = ClosedLoop(send)
    loop.run(iter(evenly(10, 0.0)), settings)
    assert [round(each.request.send_s, 6) for each in loop.outcomes] == [0.0, 0.05, 0.1, 0.15]
    assert all(each.sent_s >= each.request.send_s for each in loop.outcomes)


def test_ctrl_c_stops_sending_and_later_answers_do_not_count() -> None:
    waiting: list[Callable[[Answer], None]] = []

    def send(request: PlannedRequest, receive: Callable[[Answer], None]) -> None:
        if request.seed == 2:
            raise KeyboardInterrupt
        if request.seed == 0:
            receive(Answer("OK"))
        waiting.append(receive)

    loop = OpenLoop(send)
    interrupted_s = loop.run(evenly(5, 0.01), timeout_s=5)
    assert interrupted_s is not None and interrupted_s >= 0.03
    waiting[1](Answer("CANCELLED"))
    assert [each.answer.code for each in loop.outcomes] == ["OK", UNANSWERED, UNANSWERED]
    assert "3 sent, 1 answered, 0 failed" in loop.progress


def outcome(
    send_s: float, latency_s: float | None, code: str = "OK", steps: int = 5, engine: str = "onnxruntime-1", **more: Any
) -> Outcome:
    metadata = {"stage_ms": {"denoise": 10.0 * steps}, "versions": {"preset": "demo-128", "engine": engine}, **more}
    answer = Answer(code, f"{code} it is", json.dumps(metadata).encode() if code == "OK" else b"")
    return Outcome(
        PlannedRequest(send_s, steps, 0), send_s + 0.002, None if latency_s is None else send_s + latency_s, answer
    )


def made_up_run(outcomes: list[Outcome], **settings: Any) -> LoadRun:
    defaults: dict[str, Any] = {"rate_per_s": 2, "duration_s": 10, "warm_up_s": 2, "steps": (1, 9)}
    for each in outcomes:
        each.request = replace(each.request, deadline_ms=settings.get("deadline_ms"))
    return LoadRun(LoadSettings(**{**defaults, **settings}), len(outcomes), outcomes, None, {"profile": [7]})


def test_the_summary_of_made_up_outcomes() -> None:
    served = [
        outcome(1.0, 9.0, steps=1),  # within the warm-up: only the whole run has it
        outcome(3.0, 0.1, steps=1),
        outcome(4.0, 0.2, steps=3),
        outcome(5.0, 0.3, steps=5),
        outcome(6.0, 0.4, steps=9),
        outcome(8.0, 4.0, steps=8),  # answered when nothing was sent any more
    ]
    refused = [outcome(7.0, 0.01, "UNAVAILABLE"), outcome(7.1, 0.03, "UNAVAILABLE")]
    late = [outcome(7.5, 1.0, "DEADLINE_EXCEEDED")]
    report = summarise(made_up_run([*served, *refused, *late]))
    assert report["requests"] == {"planned": 9, "sent": 9, "ended": 9}
    assert {code: kind["count"] for code, kind in report["outcomes"].items()} == {
        "OK": 6,
        "UNAVAILABLE": 2,
        "DEADLINE_EXCEEDED": 1,
    }
    assert report["outcomes"]["UNAVAILABLE"]["first_message"] == "UNAVAILABLE it is"
    # 9 sent in 10 s; 6 OK between 1.0 s and 12.0 s; 4 OK answers between 2 s and 10 s.
    assert report["rate_per_s"] == {"asked": 2, "offered": 0.9, "achieved": round(6 / 11, 3), "steady": 0.5}
    latency_ms = report["latency_ms"]
    assert (latency_ms["whole run"]["count"], latency_ms["whole run"]["max"]) == (6, 9000)
    # Six samples are the least for a median.
    assert (latency_ms["whole run"]["p50"], latency_ms["whole run"]["p90"]) == (350, None)
    none = dict.fromkeys(("p50", "p90", "p99"))
    needed = {"p50": 6, "p90": 36, "p99": 368}
    assert latency_ms["steady"] == {"count": 5, **none, "max": 4000, "intervals": {}, "needed": needed}
    assert latency_ms["short"] == {"steps": [1, 3], "count": 2, **none, "max": 200}
    assert (latency_ms["long"]["steps"], latency_ms["long"]["count"], latency_ms["long"]["max"]) == ([7, 9], 2, 4000)
    assert (report["refusal_ms"]["count"], report["refusal_ms"]["max"]) == (2, 30)
    assert report["lateness_ms"]["p50"] == pytest.approx(2)
    assert report["stage_ms"] == {"denoise": 50}
    assert report["conditions"]["preset"] == "demo-128"


def test_goodput_counts_answers_within_the_deadline_from_the_intended_moment() -> None:
    outcomes = [
        outcome(1.0, 0.1),  # within the warm-up
        outcome(3.0, 0.2),
        outcome(4.0, 0.5),  # sent 2 ms late, which counts: just in time
        outcome(5.0, 0.501),
        outcome(6.0, 0.01, "UNAVAILABLE"),
        outcome(7.0, None, UNANSWERED),
    ]
    run = made_up_run(outcomes, deadline_ms=500)
    report = summarise(run)
    assert report["goodput"] == {"deadline_ms": 500, "asked": 5, "in_time": 2, "per_s": 0.25, "share": 0.4}
    assert "0.25/s within 500 ms, 40.0% of the 5 asked for" in table(report)
    # At 7.2 s nobody knows yet what became of those that left after 6.7 s.
    stopped = summarise(LoadRun(run.settings, 6, outcomes, 7.2, {"profile": [7]}))["goodput"]
    assert stopped == {"deadline_ms": 500, "asked": 4, "in_time": 2, "per_s": round(2 / 4.7, 3), "share": 0.5}
    # Each request has its own deadline, and callers who left ask for nothing.
    outcomes[3].request = replace(outcomes[3].request, deadline_ms=600)
    outcomes[4].answer = Answer(LEFT)
    mixed = summarise(run)["goodput"]
    assert mixed == {"deadline_ms": [500, 600], "asked": 4, "in_time": 3, "per_s": 0.375, "share": 0.75}
    assert summarise(made_up_run(outcomes))["goodput"] is None


def test_goodput_of_nothing_asked_is_unknown() -> None:
    report = summarise(made_up_run([outcome(1.0, 0.1)], deadline_ms=500))
    assert (report["goodput"]["per_s"], report["goodput"]["share"]) == (0, None)
    assert "- of the 0 asked for" in table(report)


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        (
            "UNAVAILABLE: the queue is full (64 of 64 slots, and 2 more are asked for); retry_after_ms: 340",
            "the queue is full (N of N slots, and N more are asked for)",
        ),
        (
            "UNAVAILABLE: deadline_ms: 900, and it would take about 1,250.5 ms now; allow more time; retry_after_ms: 9",
            "deadline_ms: N, and it would take about N ms now",
        ),
        ("failed to connect to\n  all addresses", "failed to connect to all addresses"),
    ],
)
def test_a_reason_has_no_numbers_and_ends_at_the_first_semicolon(message: str, expected: str) -> None:
    assert reason(Answer("UNAVAILABLE", message)) == expected


def test_refusals_are_counted_by_reason() -> None:
    refused = [outcome(3.0, 0.1, "UNAVAILABLE") for _ in range(3)]
    for each, message in zip(refused, ["full 1; a", "full 2; b", "late"], strict=True):
        each.answer = Answer("UNAVAILABLE", message)
    report = summarise(made_up_run([*refused, outcome(4.0, 0.1), outcome(5.0, 9.0, "DEADLINE_EXCEEDED")]))
    assert list(report["refusals"].items()) == [("full N", 2), ("late", 1)]
    assert "  2       full N" in table(report)


def test_a_report_of_no_answers_has_no_figures_and_still_a_table() -> None:
    report = summarise(made_up_run([outcome(1.0, None, UNANSWERED), outcome(2.0, 0.5, "UNAVAILABLE")]))
    assert report["latency_ms"]["whole run"] == {"count": 0, "p50": None, "p90": None, "p99": None, "max": None}
    assert report["rate_per_s"]["achieved"] == 0
    assert report["simulated"] is None
    assert "UNAVAILABLE it is" in table(report)
    json.dumps(report, allow_nan=False)


@pytest.mark.parametrize(
    ("answer", "simulated"),
    [({}, False), ({"simulated": True}, True), ({"engine": "simulated-h200"}, True)],
    ids=["real", "the metadata says so", "the engine's name says so"],
)
def test_a_simulated_server_is_named_in_the_title(answer: dict[str, Any], simulated: bool) -> None:
    report = summarise(made_up_run([outcome(3.0, 0.1, **answer)]))
    assert report["simulated"] is simulated
    assert ("SIMULATED" in table(report).splitlines()[0]) is simulated


def test_a_generator_that_fell_behind_says_so() -> None:
    assert not fell_behind(9.9, 1000)
    assert fell_behind(10.1, 1000)
    assert not fell_behind(15, 2000)
    assert fell_behind(1.1, 100)
    assert fell_behind(10.1, None)
    assert not fell_behind(None, None)
    slow = outcome(3.0, 0.5)
    assert "did NOT keep up" not in table(summarise(made_up_run([slow])))
    slow.sent_s = 3.4
    assert "did NOT keep up" in table(summarise(made_up_run([slow])))


@pytest.mark.parametrize(
    ("steps", "thirds"),
    [
        ((5, 30), {"short": (5, 12), "long": (23, 30)}),
        ((1, 2), {"short": (1, 1), "long": (2, 2)}),
        ((4, 4), {}),
    ],
)
def test_the_thirds_of_a_steps_range(steps: tuple[int, int], thirds: dict[str, tuple[int, int]]) -> None:
    assert step_thirds(*steps) == thirds


def test_the_quantiles_of_many_requests_have_intervals() -> None:
    """Hold what was asked: a figure with an interval, or the number of samples that one takes."""
    rng = np.random.default_rng(0)
    latencies_s = rng.lognormal(-2, 0.5, 2000)
    outcomes = [outcome(2 + i / 1000, latency_s) for i, latency_s in enumerate(latencies_s)]
    report = summarise(made_up_run(outcomes))
    steady = report["latency_ms"]["steady"]
    assert steady["needed"] == {}
    for name in ("p50", "p90", "p99"):
        low, high = steady["intervals"][name]
        assert low < steady[name] < high
    assert "steady p99, 95 %" in table(report)
    few = summarise(made_up_run(outcomes[:100]))
    assert few["latency_ms"]["steady"]["p99"] is None
    assert few["latency_ms"]["steady"]["needed"] == {"p99": 368}
    assert "not enough samples: 100, an interval takes about 368" in table(few)


def test_the_table_says_how_requests_were_sent() -> None:
    guided = {"guidance_scale": Mix((1.0, 7.5), (3, 1)), "guidance_interval": (0.2, 0.5)}
    mixed = made_up_run([], **guided, burstiness=2, ramp_s=2, leaving=0.1)
    text = table(summarise(mixed))
    assert "guidance 1:3 7.5:1, guidance_interval 0.2..0.5," in text
    assert (
        "open loop, gamma gaps with a coefficient of variation of 2, growing for 2 s; 10% leave within 1000 ms" in text
    )
    closed = made_up_run([], concurrency=8, steps_mix=Mix((10, 20), (1, 1)))
    text = table(summarise(replace(closed, planned=None)))
    assert "steps 10:1 20:1" in text
    assert "closed loop of 8 callers" in text
    assert "asked for" not in text


def test_a_large_picture_is_sent_as_it_is(tmp_path: Path) -> None:
    Image.new("RGB", (3000, 3000)).save(tmp_path / "large.png")
    sent = _pictures(LoadSettings(profile=(tmp_path / "large.png",)))
    assert sent["profile"] == [(tmp_path / "large.png").read_bytes()]


def test_a_picture_that_is_not_there_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["load", "--profile", str(tmp_path / "gone.png")]) == 1
    assert "profile: " in capsys.readouterr().err


def test_a_file_that_can_not_be_written_is_refused_before_the_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for flag in ("--hdr", "--report"):
        assert main(["load", "--url", "localhost:1", flag, str(tmp_path)]) == 1
        assert "is a folder, expected a file to write" in capsys.readouterr().err
