"""A server's run: the gateway's doors, the service behind them, and the engine, from start to a clean end."""

from __future__ import annotations

import asyncio
import os
import resource
import signal
from collections.abc import Awaitable, Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from icportrait.deploy import heap
from icportrait.deploy.preflight import check_shared_memory, fit_memory, repository_policy, simulation_note
from icportrait.deploy.triton_server import GPU_DEVICE, TritonServer, clear_leftovers
from icportrait.errors import IcPortraitError
from icportrait.gateway.access import Access
from icportrait.gateway.api import Unread
from icportrait.gateway.c2pa_signing import describe, read_credentials
from icportrait.gateway.certificates import ends_of_certificates
from icportrait.gateway.devices import Devices
from icportrait.gateway.engine import Engine
from icportrait.gateway.grpc_door import GrpcDoor, serve_grpc
from icportrait.gateway.host import EngineHost
from icportrait.gateway.http_door import HttpDoor, serve_http
from icportrait.gateway.kserve import KserveModels
from icportrait.gateway.logs import ON_STANDARD_ERROR, AccessLog, begin_logs
from icportrait.gateway.metrics import MetricsDoor, Sample, by_device, to_text, triton_text
from icportrait.gateway.records import Records
from icportrait.gateway.sandbox import become, filter_wanted
from icportrait.gateway.service import Service
from icportrait.gateway.settings import Settings
from icportrait.gateway.traces import Traces
from icportrait.gateway.workers import Workers
from icportrait.manifest import Manifest
from icportrait.policy import ServingPolicy

Door = TypeVar("Door")
DESCRIPTORS = 2**16
LOOPBACK = ("127.0.0.1", "::1", "localhost")
CLOSE_GRACE_S = 2.0
"""Time for answers on their way to callers, once all requests are answered."""
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


def run(settings: Settings, say: Callable[[str], None]) -> None:
    """Run ``serve`` from start to end.

    Raises:
        IcPortraitError: as ``serve`` does, or there is no room for a file.
    """
    heap.fix_limits()
    begin_logs(settings.log_level, settings.log_format)
    try:
        asyncio.run(serve(settings, say))
    except OSError as error:
        raise IcPortraitError(f"the server can't be run: {error}") from error


async def serve(settings: Settings, say: Callable[[str], None]) -> None:
    """Serve until a signal says stop; then answer what was let in, and end.

    Args:
        settings: of this run.
        say: takes a line for whoever runs the server.

    Raises:
        IcPortraitError: the server can't be started, or its engine ends too often.
    """
    assert settings.repository
    stopped = asyncio.Event()
    for number in STOP_SIGNALS:
        asyncio.get_running_loop().add_signal_handler(number, stopped.set)
    raise_descriptors()
    if not (settings.repository / "denoise").is_dir():
        raise IcPortraitError(
            f"repository: {settings.repository} is none, expected a folder assembled by python -m "
            "icportrait.deploy.repository"
        )
    manifest = Manifest.read(settings.repository / "denoise" / "1")
    policy = repository_policy(settings.repository, settings.policy)
    policy, _ = fit_memory(settings.repository, policy, len(settings.engines))
    if len(settings.engines) > 1:
        # An engine's own check doesn't know of those that start beside it.
        clear_leftovers(say)
        check_shared_memory(settings.repository, policy, len(settings.engines))
    tritons = {device: _triton(settings, policy, device, say) for device in settings.engines}
    preset = manifest.preset
    latent = preset.latent_channels, preset.latent_size, preset.latent_size

    def host_of(device: str | None, triton: TritonServer) -> EngineHost:
        async def connect() -> Engine:
            # So that the server isn't ready before its pictures' processes are.
            await asyncio.shield(starting)
            return await Engine.connect(triton.grpc_address, triton.loop_path, latent)

        ready = _ready_line(settings, device)
        return EngineHost(triton, connect, _say_of(device, say), ready, settings.probe_every_s)

    engines = Devices({device: host_of(device, triton) for device, triton in tritons.items()})
    credentials = await asyncio.to_thread(read_credentials, settings)
    workers = Workers(
        settings.picture_workers,
        settings.picture_cpu_s,
        settings.picture_memory_bytes,
        settings.picture_timeout_s,
        credentials,
        filter_wanted(settings.picture_sandbox),
    )
    service = Service(manifest, policy, settings, engines, workers)
    access, models, unread = Access(settings.api_keys), KserveModels(policy), Unread(settings.limits)
    certificate_ends = ends_of_certificates(settings)
    access_log = AccessLog(settings.access_log) if settings.access_log else None
    traces = Traces(settings.otlp_endpoint, settings.trace_share) if settings.otlp_endpoint else None
    # The traces first, because the access log's line has the trace's id.
    records = Records(*(listener.add for listener in (traces, access_log) if listener))

    def samples() -> Iterable[Sample]:
        yield from _samples(service, engines, workers, unread)
        yield from records.samples()
        for name, end in certificate_ends.items():
            help_text = "Moment from which a certificate isn't valid any more, in seconds since 1970"
            yield "certificate_end_seconds", "gauge", help_text, {"setting": name}, end.timestamp()
        lost = access_log.lost if access_log else 0
        yield "access_lines_lost_total", "counter", "Lines of the access log that couldn't be written", {}, lost

    metrics = MetricsDoor(partial(_metrics_text, tritons, engines, samples))
    doors: list[GrpcDoor | HttpDoor] = []
    try:
        grpc = serve_grpc(service, settings, access, models, unread, records)
        doors.append(await _listen("grpc_port", settings, grpc))
        http = serve_http(service, settings, access, models, unread, records)
        doors.append(await _listen("http_port", settings, http))
        await _listen("metrics_port", settings, metrics.start(settings.metrics_host, settings.metrics_port))
        if settings.user:
            # Files of TLS and of keys are read, and ports are open; no process was started yet.
            log = settings.access_log
            folders = [Path(log).parent] if log and log != ON_STANDARD_ERROR else []
            become(settings.user, [settings.repository], folders)
        if warning := _openness(settings):
            say(warning)
        if credentials:
            say(describe(credentials))
        say(f"starting tritonserver on {settings.repository}")
        if not GPU_DEVICE.exists():
            say("without a GPU, what tritonserver says of CUDA and of pinned memory is no fault")
        starting = asyncio.create_task(workers.start())
        engines.start()
        await starting
        heap.keep_present_objects()
        stop, run_out = asyncio.create_task(stopped.wait()), asyncio.create_task(engines.run_out(say))
        ends: set[asyncio.Future[Any]] = {stop, run_out}
        await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
        stop.cancel()
    finally:
        await service.drain(settings.stop_timeout_s if stopped.is_set() else 0.0)
        await asyncio.gather(*(door.close(CLOSE_GRACE_S) for door in doors), metrics.close())
        await asyncio.gather(engines.stop(), workers.stop())
        for listener in (traces, access_log):
            if listener:
                await asyncio.to_thread(listener.close)
    if not stopped.is_set():
        run_out.result()
    say("stopped")


def _triton(settings: Settings, policy: ServingPolicy, device: str | None, say: Callable[[str], None]) -> TritonServer:
    """Return the Triton of a device, not started yet; ``policy`` has what each may take where there are several."""
    assert settings.repository
    overrides = settings.policy
    if device is not None:
        overrides |= {"slots": str(policy.slots), "rows_at_once": str(policy.rows_at_once)}
    return TritonServer(
        settings.repository,
        ready_timeout_s=settings.ready_timeout_s,
        say=_say_of(device, say),
        overrides=overrides,
        device=device,
    )


def _say_of(device: str | None, say: Callable[[str], None]) -> Callable[[str], None]:
    """Return a function that says a line of a device's engine; a line that begins with ready names its device."""
    return say if device is None else lambda line: say(line if line.startswith("ready") else f"device {device}: {line}")


def raise_descriptors() -> None:
    """Let this process and its children have as many descriptors as they may, up to ``DESCRIPTORS``."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = DESCRIPTORS if hard == resource.RLIM_INFINITY else min(hard, DESCRIPTORS)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def _ready_line(settings: Settings, device: str | None = None) -> str:
    assert settings.repository
    note = simulation_note(settings.repository)
    ports = ", ".join(
        f"{name} {_address(settings, port)}"
        for name, port in (("gRPC", "grpc_port"), ("HTTP", "http_port"), ("metrics", "metrics_port"))
    )
    return "; ".join([f"ready: {ports}", *([note] if note else []), *([f"device {device}"] if device else [])])


async def _listen(name: str, settings: Settings, opening: Awaitable[Door]) -> Door:
    """Open a door, or say which setting is in the way."""
    try:
        return await opening
    except OSError as error:
        reason = os.strerror(error.errno) if error.errno and error.errno > 0 else error.strerror
        raise IcPortraitError(f"{name}: {_address(settings, name)}: {reason}") from error
    except ValueError as error:  # a name that can't be encoded as one
        raise IcPortraitError(
            f"{name}: {_address(settings, name)}: its host is neither a name nor an address"
        ) from error


def _address(settings: Settings, port: str) -> str:
    host = settings.metrics_host if port == "metrics_port" else settings.host
    return f"{f'[{host}]' if ':' in host else host}:{getattr(settings, port)}"


def _openness(settings: Settings) -> str | None:
    """Return the operator's warning about a door that other machines reach; None where there is nothing to say."""
    if settings.host in LOOPBACK:
        return None
    missing = [
        text
        for text, setting in (
            ("anyone who reaches it may ask for portraits (api_keys)", settings.api_keys or settings.tls_client_ca),
            ("pictures and keys travel unencrypted (tls_certificate)", settings.tls_certificate),
        )
        if not setting
    ]
    return f"warning: it listens on {settings.host}, and {' and '.join(missing)}" if missing else None


async def _metrics_text(
    tritons: Mapping[str | None, TritonServer], engines: Devices, samples: Callable[[], Iterable[Sample]]
) -> str:
    up = [device for device, host in engines.hosts.items() if host.up]
    texts = await asyncio.gather(*(triton_text(tritons[device].metrics_path) for device in up))
    return by_device(dict(zip(up, texts, strict=True))) + to_text(samples())


def _samples(service: Service, engines: Devices, workers: Workers, unread: Unread) -> Iterable[Sample]:
    for model, statistics in service.statistics.items():
        for outcome in ("succeeded", "failed"):
            labels = {"model": model, "outcome": outcome}
            yield "requests_total", "counter", "Requests by how they ended", labels, getattr(statistics, outcome)
    yield "ready", "gauge", "Whether requests are taken", {}, service.is_ready
    yield "pending_requests", "gauge", "Requests on their way", {}, service.pending
    yield "unread_bytes", "gauge", "Answers that callers haven't read", {}, unread.nbytes
    by_device = [({"device": device} if device else {}, host) for device, host in engines.hosts.items()]
    for labels, host in by_device:
        yield "engine_ready", "gauge", "Whether the engine takes requests", labels, host.up is not None
    for labels, host in by_device:
        yield "engine_starts_total", "counter", "How often the engine was started", labels, host.starts
    yield "replays_total", "counter", "Requests that were asked of another engine anew", {}, service.replays
    yield "picture_workers_lost_total", "counter", "Pictures' processes that had to be replaced", {}, workers.lost
