"""The pipeline's denoising step without Triton: leases, requests on their way through the loop, and their previews.

Answers, previews and progress leave from a thread of their own: the loop doesn't wait for Triton.
"""

from __future__ import annotations

import base64
import json
import logging
import math
import queue
import secrets
import threading
import time
from collections.abc import Callable, Mapping

import numpy as np

from icportrait.contract import Array, Tensors, bytes_tensor, stage_specs
from icportrait.diffusion.sampling import NoiseSchedule
from icportrait.errors import Cancelled, DeadlineMissed, IcPortraitError, Unavailable, to_wire
from icportrait.loop.job import CANCELLED, DenoiseResult, Job
from icportrait.loop.loop import DenoisingLoop
from icportrait.metrics import Metrics
from icportrait.policy import KEEPS_FAILING
from icportrait.presets import Preset
from icportrait.request import PortraitRequest
from icportrait.runtime import Slots
from icportrait.runtime.cuda import is_lost
from icportrait.serving.admission import Admission, Lease, Limits
from icportrait.serving.control import Asked, Cancel, Demand, LeaseAsked, Peer, Ping, Reply, Seen

logger = logging.getLogger(__name__)
Answer = Callable[[Tensors | IcPortraitError], None]
"""Takes what to answer with; called once."""


class DenoiseStage:
    """The denoising loop as an asynchronous stage, and what it says on the control line."""

    def __init__(
        self,
        slots: Slots,
        schedule: NoiseSchedule,
        preset: Preset,
        mode: str,
        limits: Limits,
        give_up: Callable[[], None] = lambda: None,
        is_standalone: bool = False,
        numerics_id: str | None = None,
    ) -> None:
        """Start the loop.

        Args:
            slots: see ``DenoisingLoop``.
            schedule: see ``DenoisingLoop``.
            preset: see ``DenoisingLoop``.
            mode: see ``DenoisingLoop``.
            limits: of the queue.
            give_up: called when the engines keep failing, or the GPU's context has ended, once all that failed is
                answered.
            is_standalone: requests come without a lease, and get theirs as they arrive.
            numerics_id: equal where equal requests give equal bytes; None where they may not.
        """
        self._spec = stage_specs(preset)["denoise"]
        self._is_standalone, self._numerics_id = is_standalone, numerics_id
        self.metrics = Metrics()
        self._deliveries: queue.SimpleQueue[Callable[[], object] | None] = queue.SimpleQueue()
        self._deliverer = threading.Thread(target=self._deliver, name="deliver", daemon=True)
        self._deliverer.start()
        self._give_up = give_up
        self._loop = DenoisingLoop(
            slots, schedule, preset, mode, metrics=self.metrics, on_failure=self._on_engine_failure
        )
        for rows, seconds in slots.step_s.items():
            self._loop.pace.stepped(rows, seconds)
        self._admission = Admission(self._loop.rows, limits, self._loop.pace, time.monotonic, self.metrics)
        self._leases: dict[str, Lease] = {}
        for name in ("queued_requests", "queued_slots", "admitted_bytes"):
            self.metrics.gauge(name, lambda name=name: getattr(self._admission, name))  # type: ignore[misc]
        self.metrics.gauge("active_slots", lambda: self._loop.used_rows)

    def close(self) -> None:
        """Refuse what runs and what waits."""
        self._loop.close()
        self._deliveries.put(None)
        self._deliverer.join()

    def handle(self, peer: Peer, message: Asked) -> None:
        """Do what the gateway asks for; see ``control``."""
        if isinstance(message, Ping):
            peer.send(self._pong(message.id))
        elif isinstance(message, LeaseAsked):
            peer.send({"op": "leased", "key": message.key, "refusal": self._lease(peer, message)})
        elif (lease := self._leases.get(message.key)) and lease.peer is peer:
            if isinstance(message, Cancel):
                self._cancel(lease)
            elif isinstance(message, Seen):
                self._preview_was_seen(lease)
            else:
                self._release(lease, message.stage_ms)

    def peer_has_gone(self, peer: Peer) -> None:
        """Cancel and forget the requests of a gateway that has ended, because nobody waits for them."""
        for key, lease in list(self._leases.items()):
            if lease.peer is peer:
                self._cancel(lease)
                self._leases.pop(key, None)

    def submit(self, tensors: Mapping[str, Array], answer: Answer) -> None:
        """Queue one request; ``answer`` is called once, from a thread for answers.

        Args:
            tensors: ``contract.stage_specs``' inputs of ``denoise``.
            answer: takes the outputs, or the error.

        Raises:
            Cancelled: it has no lease, or none any more.
            Unavailable: it is standalone, and the queue is full.
            IcPortraitError: the pipeline has made something of it that it should not have.
        """
        request = self._check(tensors)
        if self._is_standalone:
            lease = self._lease_standalone(request)
            try:
                self._submit(request, lease, tensors, answer)
            except Exception:
                self._admission.release(lease.key)  # because no answer will
                raise
            return
        if (leased := self._leases.get(request.key)) is None:
            raise Cancelled(CANCELLED)
        _check_lease(request, leased)
        self._submit(request, leased, tensors, answer)

    def _submit(self, request: PortraitRequest, lease: Lease, tensors: Mapping[str, Array], answer: Answer) -> None:
        arrived_ns = time.monotonic_ns()

        def on_done(result: DenoiseResult | IcPortraitError) -> None:
            if isinstance(result, DeadlineMissed):
                self._count_missed(lease)
            lease.denoised_s = time.monotonic()
            with lease.lock:
                lease.waiting_preview = None  # nothing may follow the last answer
            self._deliveries.put(lambda: self._answer(lease, answer, result, arrived_ns))

        def on_step(step: int, result: Callable[[], DenoiseResult]) -> None:
            if step == 1:
                self.metrics.observe("first_step_ms", (time.monotonic_ns() - request.arrived_ns) / 1e6)
            if not request.is_streamed or step == request.num_inference_steps or lease.peer is None:
                return
            if request.preview_every and step % request.preview_every == 0:
                self._show(lease, self._preview(lease.peer, request, step, result().portrait_latent))
            else:
                message = {"op": "step", "key": request.key, "step": step, "total_steps": request.num_inference_steps}
                self._tell(lease.peer, message)

        with lease.lock:
            if lease.is_cancelled or lease.job:
                raise Cancelled(CANCELLED)
            job = Job(
                request,
                tensors["profile_latent"],
                tensors["reference_latent"],
                tensors["visibility"],
                on_done,
                on_step,
                priority=request.priority,
                deadline_s=request.deadline_s,
                hold_every=request.preview_every if request.is_streamed else 0,
            )
            self._loop.submit(job)
            lease.job = job
        self._loop.pace.arrived(time.monotonic() - lease.demand.arrived_s)

    def _check(self, tensors: Mapping[str, Array]) -> PortraitRequest:
        """Return the request, once every tensor of it is known to be what it should be."""
        try:
            self._spec.check_inputs(tensors)
            request = PortraitRequest.from_json(tensors["request"][0])
        except IcPortraitError as error:
            # The caller's own request was checked long ago.
            raise IcPortraitError(f"denoise: {error}") from error
        if request.arrived_ns > time.monotonic_ns():
            raise IcPortraitError(f"denoise: arrived_ns: {request.arrived_ns} is in the future")
        for name in ("profile_latent", "reference_latent", "visibility"):
            if not np.isfinite(tensors[name]).all():
                raise IcPortraitError(f"denoise: {name} has NaN or Inf in it")
        return request

    def _lease_standalone(self, request: PortraitRequest) -> Lease:
        demand = Demand(
            request.phases,
            request.priority,
            request.deadline_ms,
            request.arrived_ns / 1e9,
            nbytes=0,
        )
        key = secrets.token_hex(16)
        return self._admission.lease(key, demand)

    def _pong(self, number: int) -> Reply:
        since_s, expected_s = self._loop.standstill()
        return {
            "op": "pong",
            "id": number,
            "step_age_ms": round(1000 * since_s, 3),
            "expected_ms": round(1000 * expected_s, 3),
            "busy": since_s > 0,
        }

    def _deliver(self) -> None:
        while deliver := self._deliveries.get():
            try:
                deliver()
            except Exception:
                logger.exception("an answer could not be delivered")

    def _lease(self, peer: Peer, asked: LeaseAsked) -> str:
        """Grant a lease: return an empty text, or the reason of the refusal."""
        try:
            admit = self._admission.grant if asked.replayed else self._admission.lease
            lease = admit(asked.key, asked.demand, peer)
        except Unavailable as refusal:
            return to_wire(refusal)
        if before := self._leases.get(asked.key):
            before.cancel()  # of a connection whose end isn't known yet
        self._leases[asked.key] = lease
        return ""

    def _cancel(self, lease: Lease) -> None:
        if not lease.is_cancelled and lease.denoised_s is None:
            self.metrics.count("cancellations_total")
        lease.cancel()
        self._admission.release(lease.key)

    def _release(self, lease: Lease, stage_ms: Mapping[str, float] | None) -> None:
        self._leases.pop(lease.key, None)
        self._admission.release(lease.key)
        now = time.monotonic()
        if now > lease.demand.deadline_s:
            self._count_missed(lease)
        if stage_ms is None:
            lease.cancel()  # whatever still runs of it
            return
        self.metrics.count("answers_total")
        if lease.denoised_s is not None:
            self._loop.pace.answered(now - lease.denoised_s)
        for stage, duration_ms in stage_ms.items():
            self.metrics.observe("stage_ms", duration_ms, stage=stage)

    def _count_missed(self, lease: Lease) -> None:
        if not lease.has_missed_deadline:
            lease.has_missed_deadline = True
            self.metrics.count("deadline_misses_total")

    def _answer(self, lease: Lease, answer: Answer, result: DenoiseResult | IcPortraitError, arrived_ns: int) -> None:
        try:
            answer(result if isinstance(result, IcPortraitError) else self._outputs(result, arrived_ns))
        finally:
            if self._is_standalone:
                self._release(lease, None if isinstance(result, IcPortraitError) else {})

    def _tell(self, peer: Peer, message: Reply) -> None:
        self._deliveries.put(lambda: peer.send(message))

    def _preview(self, peer: Peer, request: PortraitRequest, step: int, latent: Array) -> Callable[[], None]:
        """Return a function that sends a preview."""

        def send() -> None:
            peer.send(
                {
                    "op": "preview",
                    "key": request.key,
                    "step": step,
                    "total_steps": request.num_inference_steps,
                    "latent": base64.b64encode(latent.astype(np.float32).tobytes()).decode(),
                }
            )

        return lambda: self._deliveries.put(send)

    def _show(self, lease: Lease, deliver: Callable[[], None]) -> None:
        """Send a preview, or hold the request until the one before it was seen: it alone waits for its decoding."""
        with lease.lock:
            if not lease.has_unseen_preview:
                lease.has_unseen_preview = True
            elif lease.job:
                lease.waiting_preview = deliver
                lease.job.hold()
                return
        self.metrics.count("previews_total")
        deliver()

    def _preview_was_seen(self, lease: Lease) -> None:
        with lease.lock:
            deliver, lease.waiting_preview = lease.waiting_preview, None
            lease.has_unseen_preview = deliver is not None
            if deliver and lease.job:
                self.metrics.count("previews_total")
                deliver()
                lease.job.go_on()

    def _on_engine_failure(self, failures: int) -> None:
        if failures >= KEEPS_FAILING or is_lost():
            # Behind the answers that are on their way.
            self._deliveries.put(self._give_up)

    def _outputs(self, result: DenoiseResult, arrived_ns: int) -> Tensors:
        account = result.account
        report = {
            "arrived_ns": arrived_ns,
            "joined_ns": account.joined_ns,
            "conditioned_ns": account.conditioned_ns,
            "denoised_ns": account.denoised_ns,
            # No JSON has NaN.
            "match_confidence": account.match_confidence if math.isfinite(account.match_confidence) else None,
            "engine": self._loop.engine_version,
            "numerics_id": self._numerics_id,
            "warp_ms": round(account.warp_ms, 3),
            "rows_shared": round(account.rows_shared, 2),
            "engine_ms": round(account.engine_ms, 3),
        }
        return {
            "portrait_latent": result.portrait_latent,
            "denoise_report": bytes_tensor(json.dumps(report, allow_nan=False).encode()),
        }


def _check_lease(request: PortraitRequest, lease: Lease) -> None:
    if request.phases != lease.demand.phases:
        raise IcPortraitError(
            f"denoise: steps and rows are {request.phases}, and were {lease.demand.phases} when the lease was asked for"
        )
