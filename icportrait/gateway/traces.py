"""Spans of requests, sent to an OpenTelemetry collector over OTLP. Nothing of it is imported where no collector is set.

A request's spans are made when its answer has gone, from the times that its record has. The loop's times are in the
report of ``denoise``, and all processes of a machine share the clock that they are of. So a request costs the loop
nothing, traced or not (ADR 0019).
"""

from __future__ import annotations

import json
import time
from typing import Any

from icportrait.errors import IcPortraitError
from icportrait.gateway.records import Record

PIPELINE = "pipeline"
SCOPES = {"queue": "icportrait.loop", "steps": "icportrait.loop"} | dict.fromkeys(
    ("vae_encoder", "warping", "vae_decoder"), "icportrait.engine"
)
"""Scopes of the phases within the pipeline; the others are the gateway's."""
FAULTS = frozenset({"UNKNOWN", "DEADLINE_EXCEEDED", "UNIMPLEMENTED", "INTERNAL", "UNAVAILABLE", "DATA_LOSS"})
"""gRPC's statuses that OpenTelemetry's conventions call an error of the server; of HTTP, 5xx are."""
OF_STEPS = ("steps", "engine_ms", "rows_shared")
QUEUED_SPANS = 8192


class Traces:
    """Sends records as spans, on a thread of its own."""

    def __init__(self, endpoint: str, share: float) -> None:
        """Prepare the exporter. A collector that isn't there delays nothing; its spans are lost.

        Args:
            endpoint: of the collector's gRPC, such as ``http://127.0.0.1:4317``; ``https`` takes TLS.
            share: of the requests without a ``traceparent`` that are traced, 0 to 1. Callers decide about the others.

        Raises:
            IcPortraitError: OpenTelemetry isn't installed.
        """
        try:
            from opentelemetry import propagate, trace
            from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
            from opentelemetry.sdk.resources import Resource
            from opentelemetry.sdk.trace import TracerProvider
            from opentelemetry.sdk.trace.export import BatchSpanProcessor
            from opentelemetry.sdk.trace.sampling import ParentBasedTraceIdRatio
        except ImportError as error:
            raise IcPortraitError(
                f"otlp_endpoint: needs OpenTelemetry ({error}); pip install 'icportrait[tracing]'"
            ) from error
        resource = Resource.create({"service.name": "icportrait"})
        self._provider = TracerProvider(
            sampler=ParentBasedTraceIdRatio(share), resource=resource, shutdown_on_exit=False
        )
        exporter = OTLPSpanExporter(endpoint=endpoint, insecure=endpoint.startswith("http://"))
        self._provider.add_span_processor(BatchSpanProcessor(exporter, max_queue_size=QUEUED_SPANS))
        self._trace, self._extract = trace, propagate.extract
        names = ("icportrait.gateway", *SCOPES.values())
        self._tracers = {name: self._provider.get_tracer(name) for name in names}

    def add(self, record: Record) -> None:
        """Send a request for portraits as spans, and note the trace's id in its record."""
        if not record.makes_portraits:
            return
        trace, since_1970_ns = self._trace, time.time_ns() - time.monotonic_ns()
        # A context of its own: what the task's own context has is another request's.
        parent = self._extract({"traceparent": record.traceparent} if record.traceparent else {}, trace.Context())
        root = self._tracers["icportrait.gateway"].start_span(
            record.method,
            parent,
            trace.SpanKind.SERVER,
            _attributes(record),
            start_time=record.began_ns + since_1970_ns,
        )
        if root.is_recording():
            record.trace_id = trace.format_trace_id(root.get_span_context().trace_id)
            if record.code in FAULTS or record.code.startswith("5"):
                root.set_status(trace.Status(trace.StatusCode.ERROR, record.error))
            self._add_phases(record, trace.set_span_in_context(root), since_1970_ns)
        root.end(record.ended_ns + since_1970_ns)

    def close(self) -> None:
        """Send the spans that wait. Blocks, for as long as the exporter takes to give up: for a thread."""
        self._provider.shutdown()

    def _add_phases(self, record: Record, below_root: Any, since_1970_ns: int) -> None:
        metadata = json.loads(record.metadata or b"{}")
        below_pipeline = below_root
        # The pipeline's own phase ends after its parts, and a span is begun before the spans below it.
        for name, began_ns, ended_ns in sorted(record.phases, key=lambda phase: phase[0] != PIPELINE):
            tracer = self._tracers[SCOPES.get(name, "icportrait.gateway")]
            attributes = {key: metadata[key] for key in OF_STEPS if key in metadata} if name == "steps" else {}
            below = below_pipeline if name in SCOPES else below_root
            span = tracer.start_span(name, below, attributes=attributes, start_time=began_ns + since_1970_ns)
            if name == PIPELINE:
                below_pipeline = self._trace.set_span_in_context(span)
            span.end(ended_ns + since_1970_ns)


def _attributes(record: Record) -> dict[str, Any]:
    return {
        "network.protocol.name": record.door,
        "client.address": record.peer,
        "icportrait.code": record.code,
        "icportrait.request_id": record.request_id,
        "icportrait.key": record.key,
        "icportrait.portraits": record.portraits,
        "icportrait.row_steps": record.row_steps,
    }
