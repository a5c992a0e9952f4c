"""Traces of a real server, exported over OTLP to a collector: OpenTelemetry's own service, served by grpcio."""

from __future__ import annotations

import json
import queue
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest
import tritonclient.grpc as grpc_client
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc
from tritonclient.utils import InferenceServerException

from icportrait.server import HOST
from tests.e2e.caller import tensors
from tests.e2e.conftest import simulated_repository
from tests.e2e.supervised import supervised
from tests.e2e.test_gateway import form

TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
OTHER = "1af7651916cd43dd8448eb211c80319c"
ENGINE = {"vae_encoder", "warping", "vae_decoder"}
LOOP = {"queue", "steps"}


class Collector(trace_service_pb2_grpc.TraceServiceServicer):
    """Takes spans as a collector does."""

    def __init__(self) -> None:
        self.requests: queue.SimpleQueue[Any] = queue.SimpleQueue()

    def Export(self, request: Any, context: Any) -> Any:  # noqa: N802
        self.requests.put(request)
        return trace_service_pb2.ExportTraceServiceResponse()

    def spans(self) -> list[tuple[str, Any]]:
        """List all spans that have come, with their scopes."""
        requests = [self.requests.get() for _ in range(self.requests.qsize())]
        return [
            (scope.scope.name, span)
            for request in requests
            for resource in request.resource_spans
            for scope in resource.scope_spans
            for span in scope.spans
        ]


@contextmanager
def collecting() -> Iterator[tuple[Collector, str]]:
    server, collector = grpc.server(ThreadPoolExecutor(1)), Collector()
    trace_service_pb2_grpc.add_TraceServiceServicer_to_server(collector, server)
    port = server.add_insecure_port(f"{HOST}:0")
    server.start()
    try:
        yield collector, f"http://{HOST}:{port}"
    finally:
        server.stop(0).wait()


def test_a_trace_follows_a_request_through_gateway_loop_and_engines(tmp_path: Path, pictures: dict[str, bytes]) -> None:
    repository = simulated_repository(tmp_path, {"unet": 5})
    with collecting() as (collector, endpoint):
        flags = (f"--otlp-endpoint={endpoint}", f"--access-log={tmp_path / 'access.log'}")
        with (
            supervised(repository, tmp_path, flags=flags) as server,
            grpc_client.InferenceServerClient(server.url) as client,
        ):
            values = {**pictures, "num_inference_steps": 3}
            client.infer("ic_portrait", tensors(values), headers={"traceparent": f"00-{TRACE}-{PARENT}-01"})
            # The caller says that this one isn't traced.
            client.infer("ic_portrait", tensors(values), headers={"traceparent": f"00-{OTHER}-{PARENT}-00"})
            with pytest.raises(InferenceServerException):
                client.infer("ic_portrait", tensors({**pictures, "num_inference_steps": 100, "deadline_ms": 100}))
            body, kind = form(pictures)
            request = urllib.request.Request(
                f"http://{HOST}:{server.ports.http}/v1/portraits", body, {"Content-Type": kind}
            )
            with urllib.request.urlopen(request, timeout=60) as answer:
                assert answer.read()
        spans = collector.spans()
    by_trace: dict[str, list[tuple[str, Any]]] = {}
    for scope, span in spans:
        by_trace.setdefault(span.trace_id.hex(), []).append((scope, span))
    assert OTHER not in by_trace and len(by_trace) == 3

    scopes = {span.name: scope for scope, span in by_trace[TRACE]}
    assert {name for name, scope in scopes.items() if scope == "icportrait.engine"} == ENGINE
    assert {name for name, scope in scopes.items() if scope == "icportrait.loop"} == LOOP
    found = {span.name: span for _, span in by_trace[TRACE]}
    assert set(found) - ENGINE - LOOP == {"ModelInfer", "lease", "prepare", "pipeline", "files"}
    root, pipeline = found["ModelInfer"], found["pipeline"]
    assert root.parent_span_id.hex() == PARENT
    for name, span in found.items():
        if name in ENGINE | LOOP:
            above = pipeline
        elif name == "ModelInfer":
            continue
        else:
            above = root
        assert span.parent_span_id == above.span_id, name
        assert above.start_time_unix_nano <= span.start_time_unix_nano <= span.end_time_unix_nano, name
        assert span.end_time_unix_nano <= above.end_time_unix_nano, name
    steps = {attribute.key: attribute.value for attribute in found["steps"].attributes}
    assert steps["steps"].int_value == 3 and steps["engine_ms"].double_value > 0
    assert found["steps"].end_time_unix_nano - found["steps"].start_time_unix_nano >= 15e6, "three steps of 5 ms"

    roots = {span.name: span for spans in by_trace.values() for _, span in spans if not span.parent_span_id}
    assert set(roots) == {"ModelInfer", "POST /v1/portraits"}
    assert roots["ModelInfer"].status.code == 2 and "deadline_ms" in roots["ModelInfer"].status.message
    lines = [json.loads(line) for line in (tmp_path / "access.log").read_text().splitlines()]
    assert {line["trace_id"] for line in lines} == {*by_trace, OTHER}
