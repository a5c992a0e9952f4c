"""A load generator with an open and a closed loop.

An open loop sends requests at moments drawn beforehand, whatever the answers do. A generator that waits for an answer
before it sends again slows down with the server, and never sees the queue that it would have met (coordinated
omission). So every request of an open loop leaves at its own moment (``benchmarks.schedule``), and its latency counts
from the moment it was meant to leave. A closed loop has a number of callers that each send as soon as they are
answered: it measures throughput, and how long a caller waits who waits anyway.
"""

from __future__ import annotations

import heapq
import math
import os
import queue
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import grpc
import numpy as np
from icportrait_client.contract import load_contract
from icportrait_client.errors import ServerUnavailable
from icportrait_client.pictures import picture_bytes
from tritonclient.grpc import InferInput, service_pb2, service_pb2_grpc
from tritonclient.utils import triton_to_np_dtype

from benchmarks.calls import LEFT, NO_ANSWER, OK, Answer, Cancel, Send, sender
from benchmarks.pictures import new_pictures
from benchmarks.schedule import PlannedRequest, endless, schedule_of
from benchmarks.settings import LoadSettings

# A picture of any size may go, and no proxy is to be measured.
_CHANNEL = [
    ("grpc.max_send_message_length", -1),
    ("grpc.max_receive_message_length", -1),
    ("grpc.enable_http_proxy", 0),
]
_PRIORITY = -10
"""Niceness of the thread that sends: it takes little time, but needs it at once."""
_LEAD_S = 0.1
_PROBE_TIMEOUT_S = 5.0
_PLAIN_PROGRESS_S = 5.0
_LIVE_PROGRESS_S = 0.25
_GRACE_S = 5.0
"""Seconds after its deadline that gRPC may take to report a call."""


@dataclass
class Outcome:
    """The outcome of one request that was sent. Times count from the run's start."""

    request: PlannedRequest
    sent_s: float
    """Time at which gRPC had the request."""
    answered_s: float | None = None
    """End of the call, also by its deadline."""
    answer: Answer = NO_ANSWER
    left: bool = False
    """True once the caller has cancelled."""

    @property
    def lateness_s(self) -> float:
        return self.sent_s - self.request.send_s

    @property
    def latency_s(self) -> float:
        """Return the time from the intended sending, not from the real one; NaN where no answer came."""
        return float("nan") if self.answered_s is None else self.answered_s - self.request.send_s


@dataclass(frozen=True)
class LoadRun:
    """A run as it went."""

    settings: LoadSettings
    planned: int | None
    """Requests of the schedule; None of a closed loop."""
    outcomes: Sequence[Outcome]
    interrupted_s: float | None = None
    """Time at which Ctrl-C ended the run, from the run's start."""
    picture_bytes: dict[str, list[int]] = field(default_factory=dict)


class Loop:
    """The part of both loops that sends requests and keeps what becomes of them."""

    def __init__(self, send: Send) -> None:
        """Take the way to send."""
        self.outcomes: list[Outcome] = []
        self._send = send
        self._start_s = 0.0
        self._unanswered = 0
        self._counts = {True: 0, False: 0}
        """Answers so far, by whether they are OK."""
        self._ended = False
        self._answered = threading.Condition()
        self._leaves: list[tuple[float, int, Outcome, Cancel]] = []
        """A heap of the callers that will leave: when, and an order among equal times."""

    @property
    def progress(self) -> str:
        """Return the counts by now, as a line."""
        served, failed = self._counts[True], self._counts[False]
        return f"{self._now_s():5.0f} s: {len(self.outcomes)} sent, {served} answered, {failed} failed"

    def _send_one(self, request: PlannedRequest) -> None:
        outcome = Outcome(request, self._now_s())
        with self._answered:
            self._unanswered += 1
        self.outcomes.append(outcome)
        cancel = self._send(request, lambda answer: self._receive(outcome, answer))
        outcome.sent_s = self._now_s()
        if request.leaves_after_s is not None and cancel is not None:
            leaves_s = outcome.sent_s + request.leaves_after_s
            heapq.heappush(self._leaves, (leaves_s, len(self.outcomes), outcome, cancel))

    def _receive(self, outcome: Outcome, answer: Answer) -> None:
        answered_s = self._now_s()
        with self._answered:
            # Closing the channel cancels what is under way; that is no answer of the server's.
            if self._ended:
                return
            if outcome.left and answer.code == "CANCELLED":
                answer = Answer(LEFT)
            outcome.answered_s, outcome.answer = answered_s, answer
            self._unanswered -= 1
            self._counts[answer.code == OK] += 1
            self._answered.notify()
        self._freed(answered_s)

    def _freed(self, now_s: float) -> None:
        """Note that a caller was answered; an open loop doesn't."""

    def _let_leave(self) -> float:
        """Cancel the calls whose caller leaves by now, and return when the next one does."""
        while self._leaves and self._leaves[0][0] <= self._now_s():
            _, _, outcome, cancel = heapq.heappop(self._leaves)
            if outcome.answered_s is None:
                outcome.left = True
                cancel()
        return self._leaves[0][0] if self._leaves else math.inf

    def _finish(self, timeout_s: float) -> None:
        """Wait until the last request is answered."""
        until_s = self._now_s() + timeout_s + _GRACE_S
        is_done = False
        while not is_done and self._now_s() < until_s:
            next_s = min(until_s, self._let_leave())
            with self._answered:
                is_done = self._answered.wait_for(lambda: self._unanswered == 0, max(0.0, next_s - self._now_s()))

    def _end(self) -> None:
        with self._answered:
            self._ended = True

    def _now_s(self) -> float:
        return time.perf_counter() - self._start_s


class OpenLoop(Loop):
    """Sends a schedule and keeps what becomes of it."""

    def run(self, schedule: Sequence[PlannedRequest], timeout_s: float) -> float | None:
        """Send every request at its moment, then wait until the last one is answered.

        Returns:
            When Ctrl-C ended it, None if nothing did.
        """
        self._start_s = time.perf_counter() + _LEAD_S
        try:
            for request in schedule:
                while (next_s := self._let_leave()) < request.send_s:
                    time.sleep(max(0.0, next_s - self._now_s()))
                # Never less than none: what is late leaves at once.
                time.sleep(max(0.0, request.send_s - self._now_s()))
                self._send_one(request)
            self._finish(timeout_s)
        except KeyboardInterrupt:
            return self._now_s()
        finally:
            self._end()
        return None


class ClosedLoop(Loop):
    """A number of callers that each send again as soon as they are answered."""

    def __init__(self, send: Send) -> None:
        """Take the way to send."""
        super().__init__(send)
        self._free: queue.SimpleQueue[float] = queue.SimpleQueue()
        """Moments at which callers were answered."""

    def run(self, requests: Iterator[PlannedRequest], settings: LoadSettings) -> float | None:
        """Let ``settings.concurrency`` callers send for ``settings.duration_s``, then wait for the last answers.

        A request is meant to leave when its caller was answered, so that the generator's own delay counts.

        Returns:
            When Ctrl-C ended it, None if nothing did.
        """
        assert settings.concurrency is not None
        begins = deque(settings.ramp_s * caller / settings.concurrency for caller in range(settings.concurrency))
        self._start_s = time.perf_counter() + _LEAD_S
        try:
            while (now_s := self._now_s()) < settings.duration_s:
                if begins and begins[0] <= now_s:
                    self._send_one(replace(next(requests), send_s=begins.popleft()))
                    continue
                next_s = min(self._let_leave(), settings.duration_s, begins[0] if begins else math.inf)
                try:
                    free_s = self._free.get(timeout=max(0.0, next_s - now_s))
                except queue.Empty:
                    continue
                if free_s < settings.duration_s:
                    self._send_one(replace(next(requests), send_s=free_s))
            self._finish(settings.timeout_s)
        except KeyboardInterrupt:
            return self._now_s()
        finally:
            self._end()
        return None

    def _freed(self, now_s: float) -> None:
        self._free.put(now_s)


def run_load(settings: LoadSettings, show_progress: bool = False) -> LoadRun:
    """Put one load on a server and wait for its answers.

    Args:
        settings: the load.
        show_progress: a line on standard error: live on a terminal, every 5 s elsewhere.

    Raises:
        InvalidRequest: a picture or the trace can't be read, or the schedule is empty.
        ServerUnavailable: no server answers, or its model isn't ready.
    """
    schedule: Sequence[PlannedRequest] | None = None
    if settings.concurrency is None:
        schedule, settings = schedule_of(settings)
    pictures = _pictures(settings)
    sizes = {name: [len(data) for data in each] for name, each in pictures.items()}
    with grpc.insecure_channel(settings.url, options=_CHANNEL) as channel:
        _check_ready(channel, settings)
        profiles = _profiles(schedule or (), settings, pictures["profile"][0])
        send = sender(channel, settings.model, settings.timeout_s, pictures, profiles)
        if schedule is None:
            closed = ClosedLoop(send)
            with _progress(closed, show_progress), _prompt():
                interrupted_s = closed.run(endless(settings), settings)
            return LoadRun(settings, None, closed.outcomes, interrupted_s, sizes)
        opened = OpenLoop(send)
        with _progress(opened, show_progress), _prompt():
            interrupted_s = opened.run(schedule, settings.timeout_s)
        return LoadRun(settings, len(schedule), opened.outcomes, interrupted_s, sizes)


def _pictures(settings: LoadSettings) -> dict[str, list[bytes]]:
    """Read the pictures. They go as they are, also where a client would shrink them: decoding is a part of the load."""
    return {
        name: [picture_bytes(file, name, shrink=False) for file in getattr(settings, name)]
        for name in ("profile", "reference")
    }


@contextmanager
def _prompt() -> Iterator[None]:
    """Let this thread go before others of the machine, where the system allows it (to root and to CAP_SYS_NICE)."""
    before = os.getpriority(os.PRIO_PROCESS, 0)
    try:
        os.setpriority(os.PRIO_PROCESS, 0, _PRIORITY)
    except PermissionError:
        yield
        return
    try:
        yield
    finally:
        os.setpriority(os.PRIO_PROCESS, 0, before)


def _profiles(schedule: Sequence[PlannedRequest], settings: LoadSettings, picture: bytes) -> list[bytes]:
    """Make the profiles that requests number, all before the run: 1 to 10 ms each."""
    count = max((request.profile for request in schedule if request.profile is not None), default=-1) + 1
    return new_pictures(picture, count, settings.seed)


@contextmanager
def _progress(loop: Loop, show: bool) -> Iterator[None]:
    """Show the counts while a loop runs: a live line on a terminal, else a line every 5 s."""
    if not show:
        yield
    elif sys.stderr.isatty():
        from rich.console import Console

        with Console(stderr=True).status("") as status:
            yield from _repeated(lambda: status.update(loop.progress), _LIVE_PROGRESS_S)
    else:
        yield from _repeated(lambda: print(loop.progress, file=sys.stderr, flush=True), _PLAIN_PROGRESS_S)


def _repeated(show: Callable[[], None], every_s: float) -> Iterator[None]:
    """Call ``show`` on a thread of its own until the generator goes on."""
    stop = threading.Event()

    def run() -> None:
        while not stop.wait(every_s):
            show()

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def _check_ready(channel: Any, settings: LoadSettings) -> None:
    stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
    try:
        stub.ServerLive(service_pb2.ServerLiveRequest(), timeout=_PROBE_TIMEOUT_S)  # which also makes the connection
    except grpc.RpcError as error:
        raise ServerUnavailable(f'{settings.url}: no server answers; "make serve" starts one') from error
    try:
        asked = service_pb2.ModelReadyRequest(name=settings.model)
        ready = stub.ModelReady(asked, timeout=_PROBE_TIMEOUT_S).ready
    except grpc.RpcError:
        ready = False
    if not ready:
        raise ServerUnavailable(f"{settings.url}: model {settings.model!r} isn't ready there")


def tensor(name: str, value: Any) -> InferInput:
    """Make a public input of the contract."""
    spec = load_contract().inputs[name]
    tensor = InferInput(name, [spec.size], spec.dtype)
    tensor.set_data_from_numpy(np.array([value], dtype=triton_to_np_dtype(spec.dtype)))
    return tensor
