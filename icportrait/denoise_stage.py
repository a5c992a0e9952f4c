"""The ensemble's denoising step without Triton: leases, requests on their way through the loop, and their previews.

Answers, previews and progress leave from a thread of their own: the loop doesn't wait for Triton.
"""

from __future__ import annotations

import json
import logging
import queue
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from icportrait.admission import Admission, Demand, Lease, Limits
from icportrait.batching import Batcher
from icportrait.contract import Array
from icportrait.control import Message, Peer
from icportrait.errors import Cancelled, DeadlineMissed, IcPortraitError, Unavailable, to_wire
from icportrait.metrics import Metrics
from icportrait.presets import Preset
from icportrait.request import PortraitRequest
from icportrait.runtime import Slots
from icportrait.sampling import NoiseSchedule
from icportrait.serving import Tensors, bytes_tensor
from icportrait.ticket import CANCELLED, DenoiseJob, DenoiseResult, Ticket

logger = logging.getLogger(__name__)
Answer = Callable[[Tensors | IcPortraitError, bool], None]
"""Takes what to answer with, and whether it is the last answer."""
KEEPS_FAILING = 3
"""So many runs of an engine that fail one after another, and the process is given up."""


@dataclass(eq=False)
class _Entry:
    """A request that a front has a lease for, until the front gives it back."""

    lease: Lease
    peer: Peer
    is_cancelled: bool = False
    denoised_s: float | None = None
    has_unseen_preview: bool = False
    waiting_preview: Callable[[], None] | None = None
    lock: threading.Lock = field(default_factory=threading.Lock)

    def cancel(self) -> None:
        with self.lock:
            self.is_cancelled = True
            if self.lease.ticket:
                self.lease.ticket.cancel()


class DenoiseStage:
    """The denoising loop as an asynchronous stage, and the loop's end of the fronts' lines."""

    def __init__(
        self,
        slots: Slots,
        schedule: NoiseSchedule,
        preset: Preset,
        mode: str,
        limits: Limits,
        give_up: Callable[[], None] = lambda: None,
    ) -> None:
        """Start the loop.

        Args:
            slots: see ``Batcher``.
            schedule: see ``Batcher``.
            preset: see ``Batcher``.
            mode: see ``Batcher``.
            limits: of the queue.
            give_up: called when the engines keep failing, once all that failed is answered.
        """
        self.metrics = Metrics()
        self._deliveries: queue.SimpleQueue[Callable[[], object] | None] = queue.SimpleQueue()
        self._deliverer = threading.Thread(target=self._deliver, name="deliver", daemon=True)
        self._deliverer.start()
        self._give_up = give_up
        self._batcher = Batcher(slots, schedule, preset, mode, metrics=self.metrics, on_failure=self._on_engine_failure)
        self._admission = Admission(self._batcher.slots, limits, self._batcher.pace, time.monotonic, self.metrics)
        self._entries: dict[str, _Entry] = {}
        for name in ("queued_requests", "queued_slots", "admitted_bytes"):
            self.metrics.gauge(name, lambda name=name: getattr(self._admission, name))  # type: ignore[misc]
        self.metrics.gauge("active_slots", lambda: self._batcher.used_rows)

    def close(self) -> None:
        """Refuse what runs and what waits."""
        self._batcher.close()
        self._deliveries.put(None)
        self._deliverer.join()

    def handle(self, peer: Peer, message: Message) -> None:
        """A front's message; see ``control``."""
        op, key = message["op"], message["key"]
        if op == "lease":
            demand = Demand(**{name: value for name, value in message.items() if name not in ("op", "key")})
            peer.send({"op": "leased", "key": key, "refusal": self._lease(peer, key, demand)})
        elif entry := self._entries.get(key):
            if op == "cancel":
                self._cancel(key, entry)
            elif op == "seen":
                self._preview_was_seen(entry)
            elif op == "release":
                self._release(key, entry, message["stage_ms"])

    def peer_has_gone(self, peer: Peer) -> None:
        """A front has ended: nobody waits for its requests."""
        for key, entry in list(self._entries.items()):
            if entry.peer is peer:
                self._cancel(key, entry)
                del self._entries[key]

    def submit(self, tensors: Mapping[str, Array], answer: Answer) -> None:
        """Queue one request; ``answer`` is called from a thread for answers.

        Raises:
            Cancelled: its caller has gone already.
        """
        preprocess = json.loads(tensors["preprocess_report"][0])
        request = PortraitRequest.from_json(preprocess["request"])
        entry = self._entries.get(request.key)
        if request.key and entry is None:
            raise Cancelled(CANCELLED)
        job = DenoiseJob(request, tensors["profile_latent"], tensors["reference_latent"], tensors["visibility"])

        def deliver(result: DenoiseResult | IcPortraitError, step: int) -> None:
            is_last = step == request.num_inference_steps or isinstance(result, IcPortraitError)

            def send() -> None:
                outcome = result if isinstance(result, IcPortraitError) else self._outputs(result, step, preprocess)
                answer(outcome, is_last)

            self._deliveries.put(send)

        def on_done(result: DenoiseResult | IcPortraitError) -> None:
            if isinstance(result, DeadlineMissed):
                self.metrics.count("deadline_misses_total")
            if entry:
                entry.denoised_s, entry.lease.is_denoised = time.monotonic(), True
                with entry.lock:
                    entry.waiting_preview = None  # nothing may follow the last answer
            deliver(result, request.num_inference_steps)

        def on_step(step: int, result: Callable[[], DenoiseResult]) -> None:
            if step == 1:
                self.metrics.observe("first_step_ms", (time.monotonic_ns() - request.arrived_ns) / 1e6)
            if not entry or not request.is_streamed or step == request.num_inference_steps:
                return
            if request.preview_every and step % request.preview_every == 0:
                preview = result()
                self._show(entry, lambda: deliver(preview, step))
            elif not entry.has_unseen_preview:
                total = request.num_inference_steps
                message = {"op": "step", "key": request.key, "step": step, "total_steps": total}
                self._deliveries.put(lambda: entry.peer.send(message))

        def queue_job() -> Ticket:
            return self._batcher.submit(
                job,
                on_done,
                on_step,
                priority=request.priority,
                deadline_s=request.deadline_s,
                hold_every=request.preview_every,
            )

        if entry is None:
            queue_job()
            return
        self._batcher.pace.arrived(time.monotonic() - entry.lease.demand.arrived_s)
        with entry.lock:
            if entry.is_cancelled:
                raise Cancelled(CANCELLED)
            entry.lease.ticket = queue_job()

    def _deliver(self) -> None:
        while deliver := self._deliveries.get():
            try:
                deliver()
            except Exception:
                logger.exception("an answer could not be delivered")

    def _lease(self, peer: Peer, key: str, demand: Demand) -> str:
        """Nothing, or why not."""
        try:
            self._entries[key] = _Entry(self._admission.lease(key, demand), peer)
        except Unavailable as refusal:
            return to_wire(refusal)
        return ""

    def _cancel(self, key: str, entry: _Entry) -> None:
        if not entry.is_cancelled and entry.denoised_s is None:
            self.metrics.count("cancellations_total")
        entry.cancel()
        self._admission.release(key)

    def _release(self, key: str, entry: _Entry, stage_ms: dict[str, float] | None) -> None:
        del self._entries[key]
        self._admission.release(key)
        if stage_ms is None:
            entry.cancel()  # whatever still runs of it
            return
        now = time.monotonic()
        self.metrics.count("answers_total")
        if now > entry.lease.demand.deadline_s:
            self.metrics.count("deadline_misses_total")
        if entry.denoised_s is not None:
            self._batcher.pace.answered(now - entry.denoised_s)
        for stage, duration_ms in stage_ms.items():
            self.metrics.observe("stage_ms", duration_ms, stage=stage)

    def _show(self, entry: _Entry, deliver: Callable[[], None]) -> None:
        """Send a preview, or hold the request until the one before it was seen: it alone waits for its decoding."""
        with entry.lock:
            if not entry.has_unseen_preview:
                entry.has_unseen_preview = True
            elif entry.lease.ticket:
                entry.waiting_preview = deliver
                entry.lease.ticket.hold()
                return
        self.metrics.count("previews_total")
        deliver()

    def _preview_was_seen(self, entry: _Entry) -> None:
        with entry.lock:
            deliver, entry.waiting_preview = entry.waiting_preview, None
            entry.has_unseen_preview = deliver is not None
            if deliver and entry.lease.ticket:
                self.metrics.count("previews_total")
                deliver()
                entry.lease.ticket.go_on()

    def _on_engine_failure(self, failures: int) -> None:
        if failures >= KEEPS_FAILING:
            # Behind the answers that are on their way.
            self._deliveries.put(self._give_up)

    def _outputs(self, result: DenoiseResult, step: int, preprocess: dict[str, Any]) -> Tensors:
        report = {
            "preprocess": preprocess,
            "step": step,
            "conditioned_ns": result.conditioned_ns,
            "denoised_ns": result.denoised_ns,
            "match_confidence": result.match_confidence,
            "engine": self._batcher.engine_version,
        }
        return {
            "portrait_latent": result.portrait_latent,
            "denoise_report": bytes_tensor(json.dumps(report).encode()),
        }
