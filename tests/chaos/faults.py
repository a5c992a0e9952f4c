"""The faults: each strikes a running server, is mended where the server can't do that itself, and must be over then."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import resource
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path

from icportrait.deploy.leftovers import SHM
from tests.chaos import faulty
from tests.chaos.site import LOST_WORKERS, STARTS, Site
from tests.conftest import ROOT

MOUNTED = "CHAOS_MOUNTED"
"""Set where /dev/shm and the folder of temporary files are small ones of this run's own."""
CLOCK_FILE = "CHAOS_CLOCK"
REFUSED = r"(gRPC|HTTP 503:) UNAVAILABLE: .*retry_after_ms: N"
AWAY = r"(gRPC|HTTP) connection (refused|cut)|(gRPC|HTTP 503:) UNAVAILABLE: .*"
ENDLESS_FOUND_S = 15.0
"""Longest time until a step that never ends is found: ``host.AT_LEAST_S`` and two probes, on a busy machine."""
A_FAILING_TRY_S = 2.0
"""A try to start that began before the fault was mended, and the pause behind it."""


class Recovery(Enum):
    """The way back: the part of the server that is replaced."""

    NONE = "nothing restarts"
    WORKERS = "pictures' processes"
    ENGINE = "tritonserver"
    GATEWAY = "all"
    ANY = "tritonserver or all"


@dataclass(frozen=True)
class State:
    """Parts of a server that a recovery replaces."""

    pid: int
    starts: float
    lost_workers: float
    workers: frozenset[int]

    @classmethod
    def of(cls, site: Site) -> State:
        workers = frozenset(site.server.picture_workers)
        return cls(site.server.process.pid, site.metric(STARTS), site.metric(LOST_WORKERS), workers)


@dataclass(frozen=True)
class Fault:
    """A fault and the recovery from it."""

    name: str
    strike: Callable[[Site], float | None]
    """Let it happen, and mend it. Return when it was mended or found; None counts from the strike."""
    recovery: Recovery
    may_see: str = ""
    """Answers that a caller who doesn't try again may get, as a pattern, beside a portrait."""
    times: int = 3
    pause_s: float = 0.0
    """Seconds beside a start that the recovery may take."""
    logs_traceback: bool = False
    """The log may have one: of the engine's error, or asyncio's for want of descriptors."""
    needs: Callable[[], str] = lambda: ""
    """Return why it can't happen here; an empty text where it can."""
    environment: dict[str, str] = field(default_factory=dict)

    @property
    def engine_restarts(self) -> int:
        return self.times if self.recovery is Recovery.ENGINE else 3 if self.recovery is Recovery.ANY else 0

    def is_over(self, site: Site, before: State) -> bool:
        """Tell whether the parts are replaced that are to be, and the server is ready."""
        now = State.of(site)
        is_other_gateway, engines = now.pid != before.pid, now.starts - before.starts
        over = {
            Recovery.NONE: not is_other_gateway and engines == 0,
            Recovery.WORKERS: now.lost_workers >= before.lost_workers + len(before.workers)
            and len(now.workers) == len(before.workers)
            and not now.workers & before.workers,
            Recovery.ENGINE: not is_other_gateway and engines >= 1,
            Recovery.GATEWAY: is_other_gateway,
            Recovery.ANY: is_other_gateway or engines >= 0,
        }
        return over[self.recovery] and site.is_ready()


def _send(part: str, number: signal.Signals) -> Callable[[Site], None]:
    def strike(site: Site) -> None:
        if part == "pictures":
            for pid in site.server.picture_workers:
                os.kill(pid, number)
        else:
            os.kill(site.server.process.pid if part == "gateway" else site.server.pid_of(part), number)

    return strike


def _stop_gateway_for_a_while(site: Site) -> float:
    os.kill(site.server.process.pid, signal.SIGSTOP)
    time.sleep(3.0)
    os.kill(site.server.process.pid, signal.SIGCONT)
    return time.monotonic()


def _order(engine: str, fault: str) -> Callable[[Site], float]:
    def strike(site: Site) -> float:
        site.order(engine, fault)
        site.until(lambda: not (site.faults / engine).exists())
        if fault == faulty.ENDLESS:
            site.until(lambda: not site.is_ready(), ENDLESS_FOUND_S)
        return time.monotonic()

    return strike


@contextmanager
def _full(folder: Path) -> Iterator[None]:
    """Fill the file system that a folder is on."""
    filler = folder / "filler"
    try:
        with contextlib.suppress(OSError), filler.open("wb", buffering=0) as file:
            while file.write(bytes(2**20)):
                pass
        with contextlib.suppress(OSError), filler.open("ab", buffering=0) as file:
            while file.write(bytes(512)):
                pass
        yield
    finally:
        filler.unlink()


def _disk_full(site: Site) -> float:
    with _full(site.folder):
        _send("tritonserver", signal.SIGKILL)(site)
        time.sleep(1.0)
    return time.monotonic()


def _shm_full(site: Site) -> float:
    with _full(SHM):
        time.sleep(3.0)
    return time.monotonic()


def _shm_full_and_killed(site: Site) -> float:
    with _full(SHM):
        _send("tritonserver", signal.SIGKILL)(site)
        _until_start_fails(site, "/dev/shm has ")
    return time.monotonic()


def _no_descriptors(part: str, kills: bool = False) -> Callable[[Site], float]:
    def strike(site: Site) -> float:
        pid = site.server.process.pid if part == "gateway" else site.server.pid_of(part)
        before = resource.prlimit(pid, resource.RLIMIT_NOFILE)
        resource.prlimit(pid, resource.RLIMIT_NOFILE, (len(list(Path(f"/proc/{pid}/fd").iterdir())), before[1]))
        try:
            if kills:
                _send("tritonserver", signal.SIGKILL)(site)
            time.sleep(1.0 if kills else 3.0)
        finally:
            resource.prlimit(pid, resource.RLIMIT_NOFILE, before)
        return time.monotonic()

    return strike


def _damaged(file: str, damage: Callable[[bytes], bytes | None], says: str, part: str) -> Callable[[Site], float]:
    """Damage a file of the repository and end a part, so that it is read again; mend it once a start has failed."""

    def strike(site: Site) -> float:
        path = site.repository / file
        whole = path.read_bytes()
        damaged = damage(whole)
        path.unlink()
        if damaged is not None:
            path.write_bytes(damaged)
        try:
            _send(part, signal.SIGKILL)(site)
            _until_start_fails(site, says)
        finally:
            path.write_bytes(whole)
        return time.monotonic()

    return strike


def _until_start_fails(site: Site, says: str) -> None:
    """Wait until the server has ended by itself, with status 1 and an error that says why."""
    fails, began = site.ends.count(1), len(site.log())
    site.until(lambda: site.ends.count(1) > fails)
    errors = [line for line in site.log()[began:].splitlines() if line.startswith("error: ")]
    if not any(says in line for line in errors):
        raise AssertionError(f"expected an error with {says!r}, and the server said {errors}")


def _vanish(site: Site) -> float:
    """Kill a process of callers amid their streams, and break connections amid requests."""
    code = f"from tests.chaos.callers import watch; watch({site.url!r}, 16)"
    with subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stderr=subprocess.DEVNULL) as callers:
        with contextlib.ExitStack() as stack:
            halves = [stack.enter_context(_half_sent(site)) for _ in range(50)]
            time.sleep(4.0)
            for half in halves:
                # Closed with a reset, as by a machine that has gone.
                half.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        callers.kill()
    return time.monotonic()


def _crawl(site: Site) -> float:
    """Send requests a byte at a time, and read no answers."""
    with contextlib.ExitStack() as stack:
        slow = [stack.enter_context(_half_sent(site)) for _ in range(50)]
        for _ in range(20):
            for each in slow:
                with contextlib.suppress(OSError):
                    each.send(b"a")
            time.sleep(0.2)
    return time.monotonic()


def _half_sent(site: Site) -> socket.socket:
    half = socket.create_connection((site.http_url.partition(":")[0], site.ports.http))
    half.send(b"POST /v2/models/ic_portrait/generate HTTP/1.1\r\nHost: a\r\nContent-Length: 100000\r\n\r\n{")
    return half


def _jump(site: Site) -> float:
    """Move the wall clock an hour forward and back. Triton's Python backend waits by it, and may end."""
    for offset in ("+3600", "+0"):
        (site.folder / "clock").write_text(offset)
        time.sleep(3.0)
        site.until(site.is_ready)
    return time.monotonic()


def _needs_mounts() -> str:
    return "" if os.environ.get(MOUNTED) else "unshare --mount isn't allowed here; run as root"


def _libfaketime() -> Path | None:
    """Find PyPI's; Debian 12's (0.9.10) fails each ``time.sleep`` where the monotonic clock is left alone."""
    package = importlib.util.find_spec("libfaketime")
    folders = package.submodule_search_locations if package else None
    return next(Path(folders[0]).rglob("libfaketime.so.1"), None) if folders else None


def _needs_libfaketime() -> str:
    return "" if _libfaketime() else "libfaketime couldn't be installed: apt-get install gcc make, then again"


def _needs_gpu() -> str:
    return "it takes a GPU to get that far; without one tests/unit/test_startup.py has the refusals"


def _faketime() -> dict[str, str]:
    monotonic = {"DONT_FAKE_MONOTONIC": "1", "FAKETIME_DONT_FAKE_MONOTONIC": "1"}
    return {"LD_PRELOAD": str(_libfaketime() or ""), "FAKETIME_NO_CACHE": "1", CLOCK_FILE: "1", **monotonic}


def _flipped(data: bytes) -> bytes:
    return data[:-1] + bytes([data[-1] ^ 1])


KILL, STOP = signal.SIGKILL, signal.SIGSTOP
UNET = "denoise/1/unet.onnx"
ENDINGS = [
    Fault(f"{part} {number.name}", _send(part, number), Recovery.ENGINE, REFUSED)
    for part in ("tritonserver", "denoise", "vae_encoder", "vae_decoder")
    for number in (KILL, STOP)
]
FAULTS = [
    *ENDINGS,
    Fault("a step never ends", _order("unet", faulty.ENDLESS), Recovery.ENGINE, REFUSED, times=2, logs_traceback=True),
    Fault("UNet: error", _order("unet", faulty.ERROR), Recovery.NONE, logs_traceback=True),
    Fault("UNet: NaN", _order("unet", faulty.NAN), Recovery.NONE, logs_traceback=True),
    Fault("VAE encoder: error", _order("vae_encoder", faulty.ERROR), Recovery.NONE, logs_traceback=True),
    Fault("VAE encoder: NaN", _order("vae_encoder", faulty.NAN), Recovery.NONE, logs_traceback=True),
    Fault("VAE decoder: error", _order("vae_decoder", faulty.ERROR), Recovery.NONE, logs_traceback=True),
    Fault("pictures' processes SIGKILL", _send("pictures", KILL), Recovery.WORKERS),
    Fault("pictures' processes SIGSTOP", _send("pictures", STOP), Recovery.WORKERS),
    Fault("gateway SIGSTOP for 3 s", _stop_gateway_for_a_while, Recovery.NONE, times=1),
    Fault("callers vanish", _vanish, Recovery.NONE, REFUSED, times=1),
    Fault("callers crawl", _crawl, Recovery.NONE, REFUSED, times=1),
    Fault("gateway: no descriptors", _no_descriptors("gateway"), Recovery.NONE, AWAY, times=1, logs_traceback=True),
    Fault("tritonserver: no descriptors", _no_descriptors("tritonserver"), Recovery.NONE, AWAY, times=1),
    Fault("/dev/shm full", _shm_full, Recovery.ANY, AWAY, 1, A_FAILING_TRY_S, needs=_needs_mounts),
    Fault("gateway SIGKILL", _send("gateway", KILL), Recovery.GATEWAY, AWAY),
    *(
        Fault(
            f"{file}: {what}, gateway SIGKILL",
            _damaged(file, damage, says, "gateway"),
            Recovery.GATEWAY,
            AWAY,
            1,
            A_FAILING_TRY_S,
        )
        for file, what, damage, says in (
            (UNET, "missing", lambda _: None, "unet.onnx is missing"),
            (UNET, "cut short", lambda data: data[: len(data) // 2], "unet.onnx: hash is"),
            (UNET, "a bit flipped", _flipped, "unet.onnx: hash is"),
            ("denoise/1/manifest.json", "cut short", lambda data: data[:100], "not a manifest of this version"),
        )
    ),
    Fault(
        f"{UNET}: cut short, tritonserver SIGKILL",
        _damaged(UNET, lambda data: data[:100], "unet.onnx: hash is", "tritonserver"),
        Recovery.GATEWAY,
        AWAY,
        1,
        A_FAILING_TRY_S,
    ),
    Fault("a plan is missing or damaged", _send("gateway", KILL), Recovery.GATEWAY, needs=_needs_gpu),
    Fault(
        "disk full, tritonserver SIGKILL",
        _disk_full,
        Recovery.ANY,
        AWAY,
        1,
        A_FAILING_TRY_S,
        needs=_needs_mounts,
    ),
    Fault(
        "no descriptors, tritonserver SIGKILL",
        _no_descriptors("gateway", kills=True),
        Recovery.ANY,
        AWAY,
        1,
        A_FAILING_TRY_S,
        logs_traceback=True,
    ),
    Fault(
        "/dev/shm full, tritonserver SIGKILL",
        _shm_full_and_killed,
        Recovery.GATEWAY,
        AWAY,
        1,
        A_FAILING_TRY_S,
        needs=_needs_mounts,
    ),
    Fault("clock jumps", _jump, Recovery.ANY, REFUSED, times=1, needs=_needs_libfaketime, environment=_faketime()),
]
SHORT = ("UNet: error", "UNet: NaN", "gateway: no descriptors", f"{UNET}: a bit flipped, gateway SIGKILL")
