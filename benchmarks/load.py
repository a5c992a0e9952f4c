"""An open-loop load generator: requests leave at moments drawn beforehand, whatever the answers do.

A generator that waits for an answer before it sends again slows down with the server, and never sees the queue that it
would have met (coordinated omission). Here every request leaves at its own moment (``benchmarks.schedule``), and its
latency counts from the moment it was meant to leave.

Calls are futures of one gRPC channel. On 2 cores, 120 KB a request and 100 requests a second they cost 1.2 ms of CPU
each, as much as ``grpc.aio``; one channel was no limit there.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import cycle
from typing import Any

import numpy as np
from icportrait_client.contract import load_contract
from icportrait_client.errors import ServerUnavailable
from icportrait_client.pictures import picture_bytes
from tritonclient.grpc import InferenceServerClient, InferInput, InferResult
from tritonclient.utils import InferenceServerException, triton_to_np_dtype

from benchmarks.schedule import PlannedRequest, poisson_schedule
from benchmarks.settings import LoadSettings

OK = "OK"
UNANSWERED = "UNANSWERED"
"""Of what was under way when the run was interrupted; no gRPC code."""

_LEAD_S = 0.1
_PROBE_TIMEOUT_S = 5.0
_PROGRESS_S = 5.0
_GRACE_S = 5.0
"""How long after its deadline gRPC may take to report a call."""


@dataclass(frozen=True)
class Answer:
    """What came back for one request."""

    code: str
    """gRPC's, such as OK or UNAVAILABLE."""
    message: str = ""
    metadata: bytes = b""
    """The server's JSON; read after the run, so that reading it delays no request."""


@dataclass
class Outcome:
    """What became of one request that was sent. Times count from the run's start."""

    request: PlannedRequest
    sent_s: float
    """When gRPC had it."""
    answered_s: float | None = None
    """When the call ended, also by its deadline."""
    answer: Answer = Answer(UNANSWERED)

    @property
    def lateness_s(self) -> float:
        return self.sent_s - self.request.send_s

    @property
    def latency_s(self) -> float:
        """From the intended sending, not from the real one; NaN where no answer came."""
        return float("nan") if self.answered_s is None else self.answered_s - self.request.send_s


@dataclass(frozen=True)
class LoadRun:
    """A run as it went."""

    settings: LoadSettings
    planned: int
    outcomes: Sequence[Outcome]
    interrupted_s: float | None = None
    """When Ctrl-C ended it, from the run's start."""
    picture_bytes: dict[str, list[int]] = field(default_factory=dict)


Send = Callable[[PlannedRequest, Callable[[Answer], None]], None]
"""Sends one request without waiting, and has the second argument called once with its answer, on any thread."""


class OpenLoop:
    """Sends a schedule and keeps what becomes of it."""

    def __init__(self, send: Send) -> None:
        """Take the way to send; ``run`` begins."""
        self.outcomes: list[Outcome] = []
        self._send = send
        self._start_s = 0.0
        self._unanswered = 0
        self._ended = False
        self._answered = threading.Condition()

    def run(self, schedule: Sequence[PlannedRequest], timeout_s: float) -> float | None:
        """Send every request at its moment, then wait until the last one is answered.

        Returns:
            When Ctrl-C ended it, None if nothing did.
        """
        self._start_s = time.perf_counter() + _LEAD_S
        try:
            for request in schedule:
                # Never less than none: what is late leaves at once.
                time.sleep(max(0.0, request.send_s - self._now_s()))
                self._send_one(request)
            with self._answered:
                self._answered.wait_for(lambda: self._unanswered == 0, timeout_s + _GRACE_S)
        except KeyboardInterrupt:
            return self._now_s()
        finally:
            with self._answered:
                self._ended = True
        return None

    @property
    def progress(self) -> str:
        """Counts by now, as a line."""
        codes = [outcome.answer.code for outcome in self.outcomes[:] if outcome.answered_s is not None]
        served = codes.count(OK)
        return f"{self._now_s():5.0f} s: {len(self.outcomes)} sent, {served} answered, {len(codes) - served} failed"

    def _send_one(self, request: PlannedRequest) -> None:
        outcome = Outcome(request, self._now_s())
        with self._answered:
            self._unanswered += 1
        self.outcomes.append(outcome)
        self._send(request, lambda answer: self._receive(outcome, answer))
        outcome.sent_s = self._now_s()

    def _receive(self, outcome: Outcome, answer: Answer) -> None:
        answered_s = self._now_s()
        with self._answered:
            # Closing the channel cancels what is under way; that is no answer of the server's.
            if not self._ended:
                outcome.answered_s, outcome.answer = answered_s, answer
                self._unanswered -= 1
                self._answered.notify()

    def _now_s(self) -> float:
        return time.perf_counter() - self._start_s


def run_load(settings: LoadSettings, show_progress: bool = False) -> LoadRun:
    """Put one load on a server and wait for its answers.

    Args:
        settings: the load.
        show_progress: a line on standard error every 5 s.

    Raises:
        InvalidRequest: a picture can't be read, or the schedule is empty.
        ServerUnavailable: no server answers, or its model isn't ready.
    """
    schedule = poisson_schedule(settings)
    pictures = {
        name: [picture_bytes(file, name) for file in getattr(settings, name)] for name in ("profile", "reference")
    }
    # A picture of any size may go, and no proxy is to be measured.
    arguments = [(f"grpc.max_{way}_message_length", -1) for way in ("send", "receive")]
    with InferenceServerClient(settings.url, channel_args=[*arguments, ("grpc.enable_http_proxy", 0)]) as client:
        _check_ready(client, settings)
        loop = OpenLoop(_triton_send(client, settings, pictures))
        stop = threading.Event()
        reporter = threading.Thread(target=_report, args=(loop, stop), daemon=True)
        if show_progress:
            reporter.start()
        try:
            interrupted_s = loop.run(schedule, settings.timeout_s)
        finally:
            stop.set()
    sizes = {name: [len(data) for data in each] for name, each in pictures.items()}
    return LoadRun(settings, len(schedule), loop.outcomes, interrupted_s, sizes)


def _report(loop: OpenLoop, stop: threading.Event) -> None:
    while not stop.wait(_PROGRESS_S):
        print(loop.progress, file=sys.stderr, flush=True)


def _check_ready(client: Any, settings: LoadSettings) -> None:
    try:
        client.is_server_live(client_timeout=_PROBE_TIMEOUT_S)  # which also makes the connection
    except InferenceServerException as error:
        raise ServerUnavailable(f'{settings.url}: no server answers; "make serve" starts one') from error
    try:
        ready = client.is_model_ready(settings.model, client_timeout=_PROBE_TIMEOUT_S)
    except InferenceServerException:
        ready = False
    if not ready:
        raise ServerUnavailable(f"{settings.url}: model {settings.model!r} isn't ready there")


def in_turn(given: Mapping[str, Sequence[Any]]) -> Iterator[list[Any]]:
    """One of each name's, for a request after the other; who has fewer begins again earlier."""
    return map(list, zip(*map(cycle, given.values()), strict=True))


def _triton_send(client: Any, settings: LoadSettings, pictures: Mapping[str, Sequence[bytes]]) -> Send:
    # What requests share is put into tensors once.
    pairs = in_turn({name: [tensor(name, data) for data in each] for name, each in pictures.items()})
    shared = [tensor(name, value) for name, value in settings.options.items()]

    def send(request: PlannedRequest, receive: Callable[[Answer], None]) -> None:
        own = [tensor("seed", request.seed), tensor("num_inference_steps", request.num_inference_steps)]
        client.async_infer(
            settings.model,
            [*next(pairs), *shared, *own],
            callback=lambda result, error: receive(_answer(result, error)),
            client_timeout=settings.timeout_s,
        )

    return send


def _answer(result: InferResult | None, error: InferenceServerException | None) -> Answer:
    if error is not None:
        return Answer(str(error.status()).removeprefix("StatusCode."), error.message() or "no reason given")
    assert result is not None
    return Answer(OK, metadata=bytes(result.as_numpy("metadata")[0]))


def tensor(name: str, value: Any) -> InferInput:
    """A public input of the contract."""
    spec = load_contract().inputs[name]
    tensor = InferInput(name, [spec.size], spec.dtype)
    tensor.set_data_from_numpy(np.array([value], dtype=triton_to_np_dtype(spec.dtype)))
    return tensor
