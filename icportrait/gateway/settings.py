"""One settings object for the gateway, the loop and Triton: from a file, the environment and flags.

Flags go before the environment (``ICPORTRAIT_GRPC_PORT``), that before the file (``grpc_port = 8001`` in TOML), and
that before the defaults. An error names the setting and where its value came from.
"""

# A setting's default and its help stand in one place, ``_setting``.
# ruff: noqa: RUF009

from __future__ import annotations

import argparse
import dataclasses
import difflib
import functools
import os
import re
import tomllib
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import NoneType
from typing import Any

from icportrait.errors import IcPortraitError
from icportrait.gateway.api import ServerLimits, descriptors_of_door
from icportrait.gateway.logs import FORMATS, LEVELS
from icportrait.gateway.sandbox import MODES

PREFIX = "ICPORTRAIT_"
"""Prefix of the environment's variables. Others that begin so are let pass, because Kubernetes makes some."""
CONFIG_VARIABLE = "ICPORTRAIT_CONFIG"
LIMITS = ServerLimits()
C2PA_ALGORITHMS = ("es256", "es384", "es512", "ps256", "ps384", "ps512", "ed25519")
DEVICE = re.compile(r"0|[1-9]\d{0,2}|(GPU|MIG)-[\w/-]{1,100}", re.ASCII)
"""Names of devices by which CUDA may be told to show no other."""
POLICY = (
    "slots",
    "max_queued_slots",
    "max_queued_bytes",
    "max_pending_requests",
    "engine_threads",
    "cache_bytes",
    "cache_s",
)
"""Settings that a repository has too; where one is given here, it goes before the repository's."""


def _setting(default: Any, text: str, least: float | None = None, most: float | None = None) -> Any:
    return field(default=default, metadata={"help": text, "least": least, "most": most})


@dataclass(frozen=True)
class Settings:
    """Settings of a server. ``None`` leaves a choice to the repository or to the machine."""

    repository: Path | None = _setting(None, "model repository, assembled by python -m icportrait.deploy.repository")
    host: str = _setting("127.0.0.1", "address to listen on")
    grpc_port: int = _setting(8001, "of gRPC", 1, 65535)
    http_port: int = _setting(8000, "of HTTP", 1, 65535)
    metrics_host: str = _setting("127.0.0.1", "address to listen on for metrics, which need no key")
    metrics_port: int = _setting(8002, "of Prometheus' metrics", 1, 65535)

    user: str | None = _setting(None, "user that a server becomes which root has started, once its ports are open")
    picture_sandbox: str = _setting("auto", "filter of the processes for pictures: auto (where it can be had), on, off")

    api_keys: Path | None = _setting(None, "file of API keys; without one, no key is asked for")
    tls_certificate: Path | None = _setting(None, "PEM file; with it both doors speak TLS only")
    tls_key: Path | None = _setting(None, "PEM file of the certificate's key")
    tls_client_ca: Path | None = _setting(None, "PEM file; with it callers must show a certificate signed by it")

    c2pa_certificate: Path | None = _setting(None, "PEM file; with it every picture gets a C2PA manifest signed by it")
    c2pa_key: Path | None = _setting(None, "PEM file of the certificate's key (PKCS #8, without a password)")
    c2pa_algorithm: str = _setting("es256", f"of the key: {', '.join(C2PA_ALGORITHMS)}")
    c2pa_timestamp_url: str | None = _setting(None, "time-stamp authority (RFC 3161) that is asked for every picture")

    log_level: str = _setting("info", f"least level of the log's lines: {', '.join(LEVELS)}")
    log_format: str = _setting("text", "of the log on standard error: text, or json, an object a line")
    access_log: str | None = _setting(None, "file of a JSON line for each answer; - is standard error")

    otlp_endpoint: str | None = _setting(None, "OpenTelemetry collector that gets traces, as http://127.0.0.1:4317")
    trace_share: float = _setting(1.0, "of requests without traceparent that are traced", 0, 1)

    connections: int = _setting(LIMITS.connections, "at once, of one door", 1)
    message_bytes: int = _setting(LIMITS.message_bytes, "of one request", 1)
    incoming_bytes: int = _setting(LIMITS.incoming_bytes, "of requests that one door is reading", 1)
    header_timeout_s: float = _setting(LIMITS.header_timeout_s, "for a request's header to arrive", 0)
    body_timeout_s: float = _setting(LIMITS.body_timeout_s, "for a request's body to arrive", 0)
    unread_bytes_call: int = _setting(LIMITS.unread_bytes_call, "of answers that a call hasn't read", 1)
    unread_bytes: int = _setting(LIMITS.unread_bytes, "of answers that all calls together haven't read", 1)

    connection_age_s: float | None = _setting(None, "gRPC's callers are then asked to connect anew; open: never", 0.01)

    picture_workers: int | None = _setting(None, "processes that decode and encode pictures; one a core", 1)
    picture_cpu_s: float = _setting(2.0, "seconds of a core that one picture may take", 0)
    picture_memory_bytes: int = _setting(3 * 2**29, "memory that one picture may take", 2**28, 2**40)
    picture_timeout_s: float = _setting(20.0, "for one picture, on a machine that does other things too", 0)
    pictures_kept: int = _setting(128, "prepared pictures that are kept; 0 keeps none", 0)
    pictures_kept_s: float = _setting(600.0, "for how long a prepared picture is kept", 0)

    devices: str | None = _setting(None, "GPUs, an engine on each: numbers as of nvidia-smi, or UUIDs, as 0,1,2,3")
    slots: int | None = _setting(None, "rows of the largest UNet batch", 1)
    max_queued_slots: int | None = _setting(None, "slots that admitted requests may wait for", 0)
    max_queued_bytes: int | None = _setting(None, "of the pictures of all admitted requests", 0)
    max_pending_requests: int | None = _setting(None, "requests held at once, running or waiting", 1)
    engine_threads: int | None = _setting(None, "threads one engine computes with; 0 leaves it to the runtime", 0)
    cache_bytes: int | None = _setting(None, "latents that are kept of encoded pictures; 0 keeps none", 0)

    cache_s: float | None = _setting(None, "for how long latents of encoded pictures are kept", 0)

    ready_timeout_s: float = _setting(900.0, "for the engine to be ready; its first start may compile graphs", 0)
    stop_timeout_s: float = _setting(30.0, "for admitted requests to be answered once the server is to stop", 0)
    probe_every_s: float = _setting(1.0, "the engine is asked so often; two answers missed and it is restarted", 0.01)

    @property
    def limits(self) -> ServerLimits:
        """Return the limits that the doors ask for."""
        limits = {name.name: getattr(self, name.name) for name in dataclasses.fields(ServerLimits)}
        limits["connections"] = min(self.connections, descriptors_of_door(bool(self.tls_certificate)))
        return ServerLimits(**limits)

    @property
    def engines(self) -> tuple[str | None, ...]:
        """Return the device of each engine; None is the device that CUDA finds first, or the CPU."""
        return (None,) if self.devices is None else tuple(name.strip() for name in self.devices.split(","))

    @property
    def policy(self) -> dict[str, str]:
        """Return the parameters that go before the repository's own policy."""
        return {name: str(value) for name in POLICY if (value := getattr(self, name)) is not None}

    def to_toml(self) -> str:
        """Return all settings as a file that gives them back, with open choices as comments."""
        lines = []
        for name, help_text in HELP.items():
            value = getattr(self, name)
            text = (
                f'"{value}"'
                if isinstance(value, str | Path)
                else str(value).lower()
                if isinstance(value, bool)
                else value
            )
            lines.append(f"# {name} =  # {help_text}" if value is None else f"{name} = {text}  # {help_text}")
        return "\n".join(lines) + "\n"


FIELDS = {setting.name: setting for setting in dataclasses.fields(Settings)}
HELP = {name: str(setting.metadata["help"]) for name, setting in FIELDS.items()}


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add a flag for each setting, ``--grpc-port`` for ``grpc_port``, and ``--config`` for the file."""
    parser.add_argument("--config", type=Path, metavar="FILE", help="TOML file of settings")
    for name, setting in FIELDS.items():
        default = "" if setting.default is None else f"; default: {setting.default}"
        parser.add_argument(_flag(name), metavar="VALUE", help=f"{HELP[name]}{default}".replace("%", "%%"))


def read_settings(flags: argparse.Namespace, environment: Mapping[str, str] = os.environ) -> Settings:
    """Read the settings of one run.

    Args:
        flags: parsed by a parser that ``add_flags`` has prepared.
        environment: variables by name.

    Raises:
        IcPortraitError: the file can't be read, or a value isn't what its setting takes; the text names both.
    """
    config = flags.config or (Path(environment[CONFIG_VARIABLE]) if environment.get(CONFIG_VARIABLE) else None)
    values: dict[str, Any] = {}
    for name, value in (_read_file(config) if config else {}).items():
        values[name] = _parse(name, value, f"in {config}")
    for name in FIELDS:
        variable = PREFIX + name.upper()
        if variable in environment:
            values[name] = _parse(name, environment[variable], f"from {variable}")
        if (text := getattr(flags, name, None)) is not None:
            values[name] = _parse(name, text, f"from {_flag(name)}")
    settings = Settings(**values)
    _check(settings)
    return settings


def _read_file(config: Path) -> dict[str, Any]:
    try:
        values = tomllib.loads(config.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise IcPortraitError(f"{str(config)[:300]}: can't be read as TOML ({str(error)[:300]})") from error
    for name in values:
        if name not in FIELDS:
            near = difflib.get_close_matches(name, FIELDS, 1)
            raise IcPortraitError(
                f"{config}: {name[:80]}: no such setting{f'; is {near[0]} meant?' if near else ''} "
                '("icportrait-server config" lists all)'
            )
    return values


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


@functools.cache
def _kinds() -> dict[str, type]:
    """Return each setting's type without ``None``."""
    hints = typing.get_type_hints(Settings)
    return {
        name: next(kind for kind in (typing.get_args(hint) or (hint,)) if kind is not NoneType)
        for name, hint in hints.items()
        if name in FIELDS
    }


def _parse(name: str, value: Any, where: str) -> Any:
    """Parse a value of a file, or text, in its setting's type and range."""
    kind, limits = _kinds()[name], FIELDS[name].metadata
    words = {int: "a whole number", float: "a number", str: "text", Path: "a path"}
    try:
        if isinstance(value, bool) or (not isinstance(value, str) and kind in (str, Path)) or value == "":
            raise ValueError
        parsed = kind(value)
        if isinstance(value, float) and parsed != value:
            raise ValueError
    except (ValueError, TypeError, OverflowError) as error:
        raise IcPortraitError(f"{name}: {_short(value)} {where}, expected {words[kind]}") from error
    least, most = limits["least"], limits["most"]
    if (least is not None and not parsed >= least) or (most is not None and not parsed <= most):
        expected = f"{least} or more" if most is None else f"{least}..{most}"
        raise IcPortraitError(f"{name}: {_short(parsed)} {where}, expected {expected}")
    return parsed


def _short(value: Any) -> str:
    try:
        return repr(value)[:80]
    except (ValueError, RecursionError):
        return f"{type(value).__name__} of too many digits or levels"


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # a name that is too long, for one
        return False


def _check(settings: Settings) -> None:
    """Refuse settings that don't fit together."""
    ports = [settings.grpc_port, settings.http_port, settings.metrics_port]
    if len(set(ports)) < len(ports):
        raise IcPortraitError(f"grpc_port, http_port, metrics_port: {ports}, expected three different ports")
    if bool(settings.tls_certificate) != bool(settings.tls_key):
        raise IcPortraitError("tls_certificate, tls_key: only one is given, expected both or neither")
    if settings.tls_client_ca and not settings.tls_certificate:
        raise IcPortraitError("tls_client_ca: given without tls_certificate, expected both")
    if bool(settings.c2pa_certificate) != bool(settings.c2pa_key):
        raise IcPortraitError("c2pa_certificate, c2pa_key: only one is given, expected both or neither")
    if settings.devices is not None:
        names = settings.engines
        if len(set(names)) < len(names) or not all(name and DEVICE.fullmatch(name) for name in names):
            expected = "numbers or UUIDs, each once, as in 0,1,2,3"
            raise IcPortraitError(f"devices: {_short(settings.devices)}, expected {expected}")
    if settings.c2pa_algorithm not in C2PA_ALGORITHMS:
        raise IcPortraitError(
            f"c2pa_algorithm: {_short(settings.c2pa_algorithm)}, expected {', '.join(C2PA_ALGORITHMS)}"
        )
    if settings.c2pa_timestamp_url and not settings.c2pa_timestamp_url.startswith(("http://", "https://")):
        raise IcPortraitError(
            f"c2pa_timestamp_url: {_short(settings.c2pa_timestamp_url)}, expected http:// or https://"
        )
    if settings.c2pa_timestamp_url and not settings.c2pa_certificate:
        raise IcPortraitError("c2pa_timestamp_url: given without c2pa_certificate, expected both")
    if settings.otlp_endpoint and not settings.otlp_endpoint.startswith(("http://", "https://")):
        raise IcPortraitError(f"otlp_endpoint: {_short(settings.otlp_endpoint)}, expected http:// or https://")
    for name, allowed in (("log_level", LEVELS), ("log_format", FORMATS), ("picture_sandbox", MODES)):
        if getattr(settings, name) not in allowed:
            raise IcPortraitError(f"{name}: {_short(getattr(settings, name))}, expected {' or '.join(allowed)}")
    for name in ("api_keys", "tls_certificate", "tls_key", "tls_client_ca", "c2pa_certificate", "c2pa_key"):
        path = getattr(settings, name)
        if path and not _is_file(path):
            raise IcPortraitError(f"{name}: {str(path)[:300]} isn't a file that can be read")
