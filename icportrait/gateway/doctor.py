"""``icportrait-server doctor``: look at a machine with the settings of a run, and say what to mend before the run.

Nothing is started and nothing is changed. Each check uses the code that the server itself starts with, where there is
such code, so that a machine that passes is one that the server starts on.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import json
import os
import resource
import shutil
import socket
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from enum import StrEnum
from pathlib import Path

from icportrait.deploy.installation import find_installation
from icportrait.deploy.leftovers import SHM
from icportrait.deploy.libpython import libpython_directory, missing_libpython
from icportrait.deploy.preflight import check_plans, check_shared_memory, find_gpu, fit_memory, repository_policy
from icportrait.errors import IcPortraitError, RuntimeNotAvailable
from icportrait.gateway.access import read_keys
from icportrait.gateway.api import OWN_DESCRIPTORS
from icportrait.gateway.c2pa_signing import read_credentials
from icportrait.gateway.certificates import days_left, ends_of_certificates
from icportrait.gateway.logs import ON_STANDARD_ERROR
from icportrait.gateway.sandbox import can_filter, filter_wanted
from icportrait.gateway.settings import Settings
from icportrait.gateway.tls import server_context
from icportrait.manifest import Manifest
from icportrait.policy import ServingPolicy

LIBRARIES = {
    "grpclib": "grpclib",
    "h2": "h2",
    "httptools": "httptools",
    "multipart": "multipart",
    "numpy": "numpy",
    "pebble": "pebble",
    "pi-heif": "pi_heif",
    "Pillow": "PIL.Image",
    "starlette": "starlette",
    "tritonclient": "tritonclient.grpc",
    "uvicorn": "uvicorn",
}
"""Modules that a server imports, by their distribution."""
OF_RUNTIMES = {
    "onnxruntime": {"onnxruntime": "onnxruntime"},
    "openvino": {"openvino": "openvino"},
    "torch": {"torch": "torch"},
    "tensorrt-rtx": {"cuda-python": "cuda.bindings.runtime"},
    "tensorrt": {"cuda-python": "cuda.bindings.runtime"},
}
DRIVER = Path("/proc/driver/nvidia/version")
LEAST_SHM_BYTES = 2**28
LEAST_TEMPORARY_BYTES = 2**26
SOON_DAYS = 30.0
START_TIMEOUT_S = 60.0


class Outcome(StrEnum):
    GOOD = "good"
    WARNING = "warning"
    FAULT = "fault"
    """The server won't start, or fails its callers."""


@dataclass(frozen=True)
class Finding:
    """The result of a check."""

    check: str
    outcome: Outcome
    text: str


Check = Callable[[Settings, ServingPolicy], Iterator[tuple[Outcome, str]]]


def examine(settings: Settings) -> list[Finding]:
    """Run all checks.

    Args:
        settings: of the run that is to be.
    """
    findings = []
    try:
        repository = settings.repository
        policy = repository_policy(repository, settings.policy) if repository else ServingPolicy()
    except IcPortraitError as error:
        return [Finding("repository", Outcome.FAULT, str(error))]
    for name, check in CHECKS.items():
        try:
            found = list(check(settings, policy))
        except IcPortraitError as error:
            found = [(Outcome.FAULT, str(error))]
        except Exception as error:
            found = [(Outcome.FAULT, f"can't be looked at: {error!r}")]
        findings += [Finding(name, outcome, text) for outcome, text in found]
    return findings


def to_table(findings: list[Finding]) -> str:
    """Write findings as lines for a person."""
    width = max(len(finding.check) for finding in findings)
    lines = [f"{finding.outcome:7}  {finding.check:{width}}  {finding.text}" for finding in findings]
    counts = Counter(finding.outcome for finding in findings)
    found = [f"{counts[each]} {each}{'' if counts[each] == 1 else 's'}" for each in (Outcome.FAULT, Outcome.WARNING)]
    return "\n".join([*lines, ", ".join(found)])


def to_json(findings: list[Finding]) -> str:
    """Write findings for a program."""
    return json.dumps({"is_fit": is_fit(findings), "findings": [asdict(finding) for finding in findings]}, indent=2)


def is_fit(findings: list[Finding]) -> bool:
    """Tell whether a server can be run as asked."""
    return not any(finding.outcome is Outcome.FAULT for finding in findings)


def _python(settings: Settings, policy: ServingPolicy) -> Iterator[tuple[Outcome, str]]:
    version = ".".join(map(str, sys.version_info[:3]))
    if not (3, 11) <= sys.version_info[:2] <= (3, 12):
        yield Outcome.FAULT, f"{version}, expected 3.11 or 3.12"
    elif (folder := libpython_directory()) is None:
        yield Outcome.FAULT, missing_libpython()
    else:
        yield Outcome.GOOD, f"{version}, its shared library in {folder}"


def _libraries(settings: Settings, policy: ServingPolicy) -> Iterator[tuple[Outcome, str]]:
    missing, found = [], []
    wanted = LIBRARIES | OF_RUNTIMES.get(policy.runtime, {}) | ({"c2pa-python": "c2pa"} if settings.c2pa_key else {})
    for distribution, module in wanted.items():
        try:
            importlib.import_module(module)
            found.append(f"{distribution} {importlib.metadata.version(distribution)}")
        except (ImportError, OSError) as error:
            missing.append(f"{distribution} ({error})")
    if missing:
        yield Outcome.FAULT, f'can\'t be imported: {", ".join(missing)}; run "make setup" again'
    else:
        yield Outcome.GOOD, ", ".join(found)


def _tritonserver(settings: Settings, policy: ServingPolicy) -> Iterator[tuple[Outcome, str]]:
    installation = find_installation(policy.runtime)
    command = [str(installation.binary), "--help"]
    try:
        environment = installation.environment()
        ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=START_TIMEOUT_S)
    except (OSError, subprocess.TimeoutExpired) as error:
        yield Outcome.FAULT, f"{installation.binary} can't be run ({error})"
        return
    if "Usage" in ended.stdout + ended.stderr:
        yield Outcome.GOOD, str(installation.binary)
    else:
        lines = (ended.stderr or ended.stdout).strip().splitlines() or [f"status {ended.returncode}"]
        yield Outcome.FAULT, f"{installation.binary} doesn't run: {lines[-1][:300]}"


def _repository(settings: Settings, policy: ServingPolicy) -> Iterator[tuple[Outcome, str]]:
    if settings.repository is None:
        yield Outcome.WARNING, "none is named (--repository): memory, plans and the runtime weren't looked at"
        return
    if not (settings.repository / "denoise").is_dir():
        text = "is none, expected a folder assembled by python -m icportrait.deploy.repository"
        yield Outcome.FAULT, f"{settings.repository} {text}"
        return
    manifest = Manifest.read(settings.repository / "denoise" / "1")
    yield Outcome.GOOD, f"{settings.repository}: {manifest.preset.name}, {manifest.precision}, runtime {policy.runtime}"


def _memory(settings: Settings, policy: ServingPolicy) -> Iterator[tuple[Outcome, str]]:
    if settings.repository:
        fitted, summary = fit_memory(settings.repository, policy, len(settings.engines))
        reduced = (fitted.slots, fitted.rows_at_once) != (policy.slots, policy.rows_at_once)
        yield Outcome.WARNING if reduced else Outcome.GOOD, summary or "its need isn't in the repository's manifest"


def _shared_memory(settings: Settings, policy: ServingPolicy) -> Iterator[tuple[Outcome, str]]:
    free = shutil.disk_usage(SHM).free
    if settings.repository:
        check_shared_memory(settings.repository, policy, len(settings.engines))
    elif free < LEAST_SHM_BYTES:
        yield Outcome.WARNING, f"{_megabytes(free)} left, which is little; of a container, --shm-size allows more"
        return
    yield Outcome.GOOD, f"{_megabytes(free)} left"


def _temporary_folder(settings: Settings, policy: ServingPolicy) -> Iterator[tuple[Outcome, str]]:
    folder = Path(tempfile.gettempdir())
    try:
        with tempfile.TemporaryDirectory(prefix="icportrait-server-run-") as made, socket.socket(socket.AF_UNIX) as own:
            own.bind(str(Path(made) / "backends"))
    except OSError as error:
        yield Outcome.FAULT, f"{folder}: {error.strerror or error}; name another folder with TMPDIR"
        return
    free = shutil.disk_usage(folder).free
    outcome = Outcome.GOOD if free >= LEAST_TEMPORARY_BYTES else Outcome.WARNING
    yield outcome, f"{folder}: {_megabytes(free)} left"


def _descriptors(settings: Settings, policy: ServingPolicy) -> Iterator[tuple[Outcome, str]]:
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = settings.connections * (4 if settings.tls_certificate else 2) + OWN_DESCRIPTORS
    if hard != resource.RLIM_INFINITY and hard < wanted:
        text = f"{hard} are allowed, and {settings.connections} connections a port need {wanted}"
        yield Outcome.WARNING, f"{text}; raise the limit (ulimit -Hn, LimitNOFILE=), or fewer connections will do"
    else:
        yield Outcome.GOOD, "no limit" if hard == resource.RLIM_INFINITY else f"{hard} are allowed"


def _gpu(settings: Settings, policy: ServingPolicy) -> Iterator[tuple[Outcome, str]]:
    for device in settings.engines:
        for outcome, text in _one_gpu(policy, device):
            yield outcome, text if device is None else f"device {device}: {text}"


def _one_gpu(policy: ServingPolicy, device: str | None) -> Iterator[tuple[Outcome, str]]:
    driver = DRIVER.read_text().splitlines()[0].split(":")[-1].strip() if DRIVER.is_file() else "no NVIDIA driver"
    try:
        gpu = find_gpu(device)
    except (RuntimeNotAvailable, ImportError) as error:
        if policy.uses_plans:
            yield Outcome.FAULT, f"{error}; {driver}"
        elif policy.runtime == "torch" and DRIVER.is_file():
            yield Outcome.WARNING, f"{error}; {driver}; torch computes on the processor then"
        else:
            yield Outcome.GOOD, f"none, and runtime {policy.runtime} needs none; {driver}"
    else:
        about = f"{gpu.name}, {_megabytes(gpu.total_bytes)}, CUDA {gpu.driver_cuda_version}"
        mode = f"compute mode {gpu.compute_mode}, MPS {'on' if gpu.has_mps else 'off'}"
        yield Outcome.GOOD, f"{about}, {mode}; {driver}"
        uses_gpu = policy.uses_plans or policy.runtime == "torch"
        if uses_gpu and gpu.compute_mode.startswith("exclusive") and not gpu.has_mps:
            yield (
                Outcome.FAULT,
                f"compute mode {gpu.compute_mode} lets one process have the GPU, and three models need it; "
                'set "nvidia-smi -c DEFAULT", or start MPS',
            )


def _plans(settings: Settings, policy: ServingPolicy) -> Iterator[tuple[Outcome, str]]:
    if settings.repository and policy.uses_plans:
        for device in settings.engines:
            check_plans(settings.repository, policy.runtime, find_installation(policy.runtime), device)
        yield Outcome.GOOD, "all are of this TensorRT, this GPU and this export"


def _ports(settings: Settings, policy: ServingPolicy) -> Iterator[tuple[Outcome, str]]:
    free = []
    for name, host in (
        ("grpc_port", settings.host),
        ("http_port", settings.host),
        ("metrics_port", settings.metrics_host),
    ):
        port = getattr(settings, name)
        try:
            (family, *_, address), *_ = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
            with socket.socket(family) as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                probe.bind(address)
                probe.listen()
        except (OSError, UnicodeError) as error:
            reason = getattr(error, "strerror", None) or str(error)
            yield Outcome.FAULT, f"{name}: {host}:{port}: {reason}; end what listens there, or choose another"
        else:
            free.append(f"{host}:{port}")
    if free:
        yield Outcome.GOOD, f"{', '.join(free)} can be listened at"


def _certificates(settings: Settings, policy: ServingPolicy) -> Iterator[tuple[Outcome, str]]:
    ends = ends_of_certificates(settings)
    for name, end in ends.items():
        left = days_left(end)
        text = f"{name}: {getattr(settings, name)}: valid until {end:%Y-%m-%d %H:%M} UTC"
        if left <= 0:
            yield Outcome.FAULT, f"{text}, which has passed; get a new one"
        else:
            soon = left < SOON_DAYS
            yield (
                Outcome.WARNING if soon else Outcome.GOOD,
                f"{text}, {left:.0f} days" + ("; get a new one and restart" if soon else ""),
            )
    server_context(settings, ["h2"])
    if "c2pa_certificate" in ends and days_left(ends["c2pa_certificate"]) > 0:
        read_credentials(settings)


def _keys(settings: Settings, policy: ServingPolicy) -> Iterator[tuple[Outcome, str]]:
    if settings.api_keys:
        yield Outcome.GOOD, f"{settings.api_keys}: {len(read_keys(settings.api_keys))} keys"


def _access_log(settings: Settings, policy: ServingPolicy) -> Iterator[tuple[Outcome, str]]:
    if settings.access_log and settings.access_log != ON_STANDARD_ERROR:
        place = Path(settings.access_log)
        if not os.access(place if place.exists() else place.parent, os.W_OK):
            yield Outcome.FAULT, f"{place} can't be written"
        else:
            yield Outcome.GOOD, f"{place}: {_megabytes(shutil.disk_usage(place.parent).free)} left"


def _sandbox(settings: Settings, policy: ServingPolicy) -> Iterator[tuple[Outcome, str]]:
    if filter_wanted(settings.picture_sandbox):
        yield Outcome.GOOD, "pictures' processes have no network, start no programs and write no files"
    else:
        yield Outcome.WARNING, f"pictures' processes aren't filtered: {can_filter() or 'picture_sandbox is off'}"


def _user(settings: Settings, policy: ServingPolicy) -> Iterator[tuple[Outcome, str]]:
    if os.geteuid() == 0 and not settings.user:
        yield Outcome.WARNING, "this is root; name a user that the server becomes (--user), or start it as one"
    elif os.geteuid() == 0:
        yield Outcome.GOOD, f"root, which becomes {settings.user}"
    else:
        yield Outcome.GOOD, f"number {os.geteuid()}"


def _megabytes(count: int) -> str:
    return f"{count / 2**20:.0f} MB"


CHECKS: dict[str, Check] = {
    "python": _python,
    "libraries": _libraries,
    "tritonserver": _tritonserver,
    "repository": _repository,
    "memory": _memory,
    str(SHM): _shared_memory,
    "temporary folder": _temporary_folder,
    "descriptors": _descriptors,
    "gpu": _gpu,
    "plans": _plans,
    "ports": _ports,
    "certificates": _certificates,
    "api keys": _keys,
    "access log": _access_log,
    "sandbox": _sandbox,
    "user": _user,
}
