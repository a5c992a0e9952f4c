"""The gateway's side of the denoising stage, and the stage on slots without engines."""

from __future__ import annotations

import base64
import json
import queue
import select
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np

from icportrait.contract import bytes_tensor
from icportrait.errors import IcPortraitError, from_wire
from icportrait.presets import DEMO_128
from icportrait.request import PortraitRequest
from icportrait.serving.admission import Limits
from icportrait.serving.control import LENGTH, Asked, Demand, Peer, parse
from icportrait.serving.denoise import DenoiseStage
from tests.label_slots import SCHEDULE, LabelSlots, labelled

Answers = queue.SimpleQueue[Any]


@contextmanager
def open_stage(
    slots_limit: int = 64, give_up: Callable[[], None] = lambda: None, mode: str = "in-flight", **options: Any
) -> Iterator[tuple[LabelSlots, DenoiseStage]]:
    slots = LabelSlots()
    stage = DenoiseStage(slots, SCHEDULE, DEMO_128, mode, Limits(slots_limit, 10**6), give_up, **options)
    try:
        yield slots, stage
    finally:
        slots.open()
        if stage._deliverer.is_alive():
            stage.close()


class Front:
    """Leases requests of a stage and submits them, as the gateway and the ensemble would."""

    nbytes = 10
    """Bytes of a request's pictures."""

    def __init__(self, stage: DenoiseStage) -> None:
        self._stage = stage
        self._messages, theirs = socket.socketpair()
        self.peer = Peer(theirs)
        self._theirs = theirs
        self._told: list[dict[str, Any]] = []

    def __enter__(self) -> Front:
        return self

    def __exit__(self, *_: object) -> None:
        self.peer.close()
        self._messages.close()
        self._theirs.close()

    def say(self, op: str, key: str, **fields: Any) -> None:
        message = parse(json.dumps({"op": op, "key": key, **fields}).encode())
        assert isinstance(message, Asked)
        self._stage.handle(self.peer, message)

    def ask(
        self, key: str, request: PortraitRequest, nbytes: int = nbytes, replayed: bool = False
    ) -> IcPortraitError | None:
        """Ask for a lease; the refusal where there is one."""
        demand = Demand(
            request.phases,
            request.priority,
            request.deadline_ms,
            (request.arrived_ns or time.monotonic_ns()) / 1e9,
            nbytes,
        )
        self.say("lease", key, **demand.to_message(), replayed=replayed)
        while (reply := self._next())["op"] != "leased":
            self._told.append(reply)
        assert reply["key"] == key
        refusal = from_wire(reply["refusal"])
        assert refusal or reply["refusal"] == ""
        return refusal

    def lease(self, key: str, request: PortraitRequest, nbytes: int = nbytes) -> None:
        assert self.ask(key, request, nbytes) is None

    def release(self, key: str, stage_ms: dict[str, float] | None = None) -> None:
        self.say("release", key, stage_ms=stage_ms)

    def message(self) -> dict[str, Any]:
        """Return the next message."""
        return self._told.pop(0) if self._told else self._next()

    def messages(self) -> list[dict[str, Any]]:
        """Return the messages that were said and not taken yet."""
        while select.select([self._messages], [], [], 0.05)[0]:
            self._told.append(self._next())
        found, self._told = self._told, []
        return found

    def _next(self) -> dict[str, Any]:
        assert select.select([self._messages], [], [], 10)[0], "nothing was said"
        (length,) = LENGTH.unpack(self._messages.recv(LENGTH.size, socket.MSG_WAITALL))
        message: dict[str, Any] = json.loads(self._messages.recv(length, socket.MSG_WAITALL))
        if message["op"] == "preview":
            latent = np.frombuffer(base64.b64decode(message["latent"]), np.float32)
            message["latent"] = latent.reshape(-1, DEMO_128.latent_channels, *2 * [DEMO_128.latent_size])
        return message

    def submit(
        self,
        key: str,
        request: PortraitRequest,
        /,
        label: float = 1.0,
        on_answer: Callable[[Any], None] | None = None,
        **changed: Any,
    ) -> Answers:
        """Submit what encoding would give, tensors ``changed`` where that is said, and collect what is answered."""
        answers: Answers = queue.SimpleQueue()

        def answer(outcome: Any) -> None:
            answers.put(outcome)
            if on_answer:
                on_answer(outcome)

        request = replace(request, key=key, arrived_ns=request.arrived_ns or time.monotonic_ns())
        tensors = {**vars(labelled(request, label)), "request": bytes_tensor(request.to_json()), **changed}
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
    end_s = time.monotonic() + 60  # a busy machine may be slow
    while not holds():
        assert time.monotonic() < end_s, "in vain"
        time.sleep(0.001)
