"""The public models: check a request, take a lease for it, run the ensemble for it, restore error codes.

A front keeps Triton's response senders and answers later, so that one instance holds many requests at once. What Triton
doesn't carry, cancels and progress, goes over the line to the denoising loop (``control``).
"""

from __future__ import annotations

import json
import logging
import secrets
import time
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from threading import BoundedSemaphore, Event, Lock, Thread
from typing import Any

import numpy as np

from icportrait.admission import Demand
from icportrait.contract import ENSEMBLE
from icportrait.control import NO_LOOP, LoopLine
from icportrait.errors import IcPortraitError, InvalidRequest, Unavailable, from_wire
from icportrait.request import OUTPUTS
from icportrait.serving import FrontStage, Tensors
from icportrait.triton_backend import ModelContext, answer_with, attempt

logger = logging.getLogger(__name__)
STREAM_GRACE_S = 0.1
"""Tritonserver 2.51 crashes where a stream is answered in the moment of its cancel, once in about a thousand times. It
didn't in six thousand with half of this between the two.
"""

KEPT_S = 2.0
"""Tritonserver 2.51 forgets a BLS call's responses on a thread of its own. If that is the last to hold them, it frees
their arrays without Python's lock, and the process crashes: once in some hundred calls, where 32 run at once.
"""


class _Call:
    """One caller who waits. Once the last answer is given, Triton's sender may not be touched any more."""

    def __init__(self, sender: Any) -> None:
        self.key = secrets.token_hex(16)
        self._sender, self._answer = sender, answer_with(sender, restore_code=True)
        self.is_cancelled = self._is_answered = False
        self._lock = Lock()

    def send(self, outcome: Tensors | IcPortraitError, is_last: bool = True) -> None:
        """Answer, unless the last answer was given already."""
        with self._lock:
            if self._is_answered or (self.is_cancelled and not is_last):
                return
            self._is_answered = is_last
            self._answer(outcome, is_last)

    def is_newly_cancelled(self) -> bool:
        """Whether the caller has gone since this was asked last."""
        with self._lock:
            if self._is_answered or self.is_cancelled:
                return False
            self.is_cancelled = bool(self._sender.is_cancelled())
            return self.is_cancelled


class FrontModel:
    """A public model; ``is_stream`` says whether its callers get progress and previews before the portraits."""

    is_stream = False

    def initialize(self, args: dict[str, str]) -> None:
        self.context = ModelContext(args)
        limit = self.context.policy.max_pending_requests
        self._places = BoundedSemaphore(limit)
        self._threads = ThreadPoolExecutor(limit, thread_name_prefix="front")
        self._check = FrontStage(self.context.manifest, self.context.policy, self.is_stream)
        self._calls: dict[str, _Call] = {}
        self._line = LoopLine(self.context.directory, self._report_step, self._fail_all)
        # When they ended, and responses.
        self._kept: deque[tuple[float, Any]] = deque()
        self._stopping = Event()
        self._watcher = Thread(target=self._watch, name="cancelled", daemon=True)
        self._watcher.start()

    def execute(self, requests: list[Any]) -> None:
        for request in requests:
            call = _Call(request.get_response_sender())
            refused = attempt(self.context.name, lambda: self._admit(call, request))  # noqa: B023
            if isinstance(refused, IcPortraitError):
                call.send(refused)

    def finalize(self) -> None:
        self._threads.shutdown()
        self._stopping.set()
        self._watcher.join()
        self._line.close()

    def _admit(self, call: _Call, request: Any) -> None:
        """Check a request, take a place for it and ask for a lease; the loop's reply decides how it goes on.

        Raises:
            InvalidRequest: it can't be served.
            Unavailable: there is no place.
        """
        checked, tensors = self._check(self._public_inputs(request), call.key)
        if not self._places.acquire(blocking=False):
            limit = self.context.policy.max_pending_requests
            raise Unavailable(f"{limit} requests are pending, which is this server's limit; try again later")
        demand = Demand(
            rows=checked.rows,
            steps=checked.num_inference_steps,
            priority=checked.priority,
            deadline_ms=checked.deadline_ms,
            arrived_s=checked.arrived_ns / 1e9,
            nbytes=sum(len(tensors[name][0]) for name in ("profile", "reference")),
        )
        self._calls[call.key] = call

        def go_on(refusal: IcPortraitError | None) -> None:
            # From a thread of the pool: the line's own is waited for by others.
            if refusal:
                self._threads.submit(self._end, call, refusal)
            else:
                self._threads.submit(self._serve, call, tensors)

        self._line.lease(call.key, demand.to_message(), go_on)

    def _public_inputs(self, request: Any) -> Tensors:
        try:
            parameters = json.loads(request.parameters() or "{}")
        except ValueError as error:
            raise InvalidRequest(f"the request's parameters are no UTF-8 text ({error.__class__.__name__})") from error
        # HTTP generate turns a JSON member that names no input into a parameter: unknown inputs hide there.
        unknown = {name: np.array([value]) for name, value in parameters.items()}
        return unknown | self.context.inputs(request)

    def _serve(self, call: _Call, tensors: Tensors) -> None:
        outcome = attempt(self.context.name, lambda: self._run_pipeline(call, tensors))
        if self.is_stream and call.is_cancelled:
            time.sleep(STREAM_GRACE_S)
        self._end(call, outcome)
        stage_ms = None if isinstance(outcome, IcPortraitError) else json.loads(outcome["metadata"][0])["stage_ms"]
        self._line.release(call.key, stage_ms)

    def _end(self, call: _Call, outcome: Tensors | IcPortraitError) -> None:
        try:
            call.send(outcome)
        finally:
            del self._calls[call.key]
            self._places.release()

    def _run_pipeline(self, call: _Call, inputs: Tensors) -> Tensors:
        import triton_python_backend_utils as pb_utils

        names = [name for name, _, _ in OUTPUTS]
        request = pb_utils.InferenceRequest(
            model_name=ENSEMBLE,
            requested_output_names=names,
            inputs=[pb_utils.Tensor(name, array) for name, array in inputs.items()],
        )
        portraits: Tensors | None = None
        error: Exception = RuntimeError("the pipeline ended without an answer")
        responses = request.exec(decoupled=True)
        for response in responses:
            if response.has_error():
                error = _pipeline_error(response.error().message())
            if not response.output_tensors():
                continue
            outputs = {name: pb_utils.get_output_tensor_by_name(response, name).as_numpy() for name in names}
            if outputs["step"] == outputs["total_steps"]:
                portraits = outputs
            else:
                del outputs["metadata"]
                call.send(outputs, is_last=False)
                self._line.seen(call.key)
        self._kept.append((time.monotonic(), responses))
        if portraits is None:
            raise error
        return portraits

    def _report_step(self, key: str, step: int, total_steps: int) -> None:
        if call := self._calls.get(key):
            counts = {"step": step, "total_steps": total_steps}
            call.send({name: np.array([count], np.int32) for name, count in counts.items()}, is_last=False)

    def _fail_all(self) -> None:
        """The loop's process has ended; what Triton still does for its requests may never end."""
        for call in list(self._calls.values()):
            call.send(Unavailable(NO_LOOP))

    def _watch(self) -> None:
        """Look which callers have gone. Each look asks Triton's process, so more requests are looked at less often."""
        while not self._stopping.wait(0.01 + 0.001 * len(self._calls)):
            self._line.expire_leases()
            while self._kept and self._kept[0][0] < time.monotonic() - KEPT_S:
                self._kept.popleft()
            for key, call in list(self._calls.items()):
                try:
                    if call.is_newly_cancelled():
                        self._line.cancel(key)
                except Exception:
                    logger.exception("whether a caller has gone could not be asked")


def _pipeline_error(message: str) -> Exception:
    """A stage's own error, or what Triton says while it stops or has lost a stage's process."""
    if any(sign in message for sign in ("is stopping", "is not ready", "not healthy")):
        return Unavailable("the server is stopping or has lost a part; try again later")
    return from_wire(message) or RuntimeError(message)
