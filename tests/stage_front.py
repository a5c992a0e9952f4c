"""A front's side of the denoising stage, and the stage on slots without engines."""

from __future__ import annotations

import json
import queue
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from multiprocessing import Pipe
from typing import Any

from icportrait.admission import Demand, Limits
from icportrait.control import Peer
from icportrait.denoise_stage import DenoiseStage
from icportrait.errors import IcPortraitError, from_wire
from icportrait.presets import DEMO_128
from icportrait.request import PortraitRequest
from icportrait.serving import bytes_tensor
from tests.label_slots import SCHEDULE, LabelSlots, labelled

Answers = queue.SimpleQueue[tuple[Any, bool]]


@contextmanager
def open_stage(
    slots_limit: int = 64, give_up: Callable[[], None] = lambda: None, mode: str = "in-flight"
) -> Iterator[tuple[LabelSlots, DenoiseStage]]:
    slots = LabelSlots()
    stage = DenoiseStage(slots, SCHEDULE, DEMO_128, mode, Limits(slots_limit, 10**6), give_up)
    try:
        yield slots, stage
    finally:
        slots.open()
        if stage._deliverer.is_alive():
            stage.close()


class Front:
    """Leases requests of a stage and submits them, as a front and the ensemble would."""

    nbytes = 10
    """Of a request's pictures."""

    def __init__(self, stage: DenoiseStage) -> None:
        self._stage = stage
        self._messages, theirs = Pipe()
        self.peer = Peer(theirs)
        self._theirs = theirs
        self._steps: list[dict[str, Any]] = []

    def __enter__(self) -> Front:
        return self

    def __exit__(self, *_: object) -> None:
        self._messages.close()
        self._theirs.close()

    def say(self, op: str, key: str, **fields: Any) -> None:
        self._stage.handle(self.peer, {"op": op, "key": key, **fields})

    def ask(self, key: str, request: PortraitRequest, nbytes: int = nbytes) -> IcPortraitError | None:
        """Ask for a lease; the refusal where there is one."""
        demand = Demand(
            request.rows,
            request.num_inference_steps,
            request.priority,
            request.deadline_ms,
            (request.arrived_ns or time.monotonic_ns()) / 1e9,
            nbytes,
        )
        self.say("lease", key, **json.loads(json.dumps(demand.to_message())))
        while (reply := self.message())["op"] == "step":
            self._steps.append(reply)
        assert (reply["op"], reply["key"]) == ("leased", key)
        refusal = from_wire(reply["refusal"])
        assert refusal or reply["refusal"] == ""
        return refusal

    def lease(self, key: str, request: PortraitRequest, nbytes: int = nbytes) -> None:
        assert self.ask(key, request, nbytes) is None

    def release(self, key: str, stage_ms: dict[str, float] | None = None) -> None:
        self.say("release", key, stage_ms=stage_ms)

    def message(self) -> dict[str, Any]:
        assert self._messages.poll(10), "nothing was said"
        return json.loads(self._messages.recv_bytes())

    def messages(self) -> list[dict[str, Any]]:
        """What was said and not taken yet."""
        while self._messages.poll(0):
            self._steps.append(self.message())
        found, self._steps = self._steps, []
        return found

    def submit(
        self, key: str, request: PortraitRequest, label: float = 1.0, on_answer: Callable[..., None] | None = None
    ) -> Answers:
        """Submit what preprocessing and encoding would give, and collect what is answered."""
        answers: Answers = queue.SimpleQueue()

        def answer(outcome: Any, is_last: bool) -> None:
            answers.put((outcome, is_last))
            if on_answer:
                on_answer(outcome, is_last)

        request = replace(request, key=key, arrived_ns=request.arrived_ns or time.monotonic_ns())
        report = {"request": request.to_json().decode(), "crops": {"profile": 1}, "ended_ns": time.monotonic_ns()}
        tensors = {**labelled(request, label).inputs, "preprocess_report": bytes_tensor(json.dumps(report).encode())}
        self._stage.submit(tensors, answer)
        return answers

    @staticmethod
    def arrived_now(request: PortraitRequest) -> PortraitRequest:
        return replace(request, arrived_ns=time.monotonic_ns())

    @staticmethod
    def is_past(request: PortraitRequest) -> bool:
        return time.monotonic() > request.deadline_s

    @staticmethod
    def report(outputs: Any) -> dict[str, Any]:
        return json.loads(outputs["denoise_report"][0])

    @staticmethod
    def in_thread(target: Callable[[], None]) -> threading.Thread:
        thread = threading.Thread(target=target)
        thread.start()
        return thread


def metric(stage: DenoiseStage, name: str, /, **labels: str) -> float:
    return stage.metrics.series()[name, tuple(labels.items())][1]


def until(holds: Callable[[], bool]) -> None:
    end_s = time.monotonic() + 10
    while not holds():
        assert time.monotonic() < end_s, "in vain"
        time.sleep(0.001)
