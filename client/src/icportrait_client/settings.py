"""The arguments that both clients take, checked and put together."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypedDict

from icportrait_client import DEFAULT_TIMEOUT_S
from icportrait_client.attempts import Attempts, Policy
from icportrait_client.errors import InvalidRequest
from icportrait_client.servers import Addresses, Balance, Servers, read_addresses
from icportrait_client.transport import KEEPALIVE_S, PROFILE_HEADER, GrpcTransport, Tls, Transport

_HEADER = re.compile(r"[0-9a-z_.-]+")
_HEADER_VALUE = re.compile(r"[ -~]*")
_KEY = re.compile(r"[!-~]+")


class ClientOptions(TypedDict, total=False):
    """The keyword arguments of ``PortraitClient`` and ``AsyncPortraitClient``.

    >>> from icportrait_client import PortraitClient
    >>> options: ClientOptions = {"timeout_s": 60, "attempts": 3, "headers": {"x-team": "studio"}}
    >>> with PortraitClient(server.address, **options) as client:
    ...     client.generate(profile=profile, reference=reference).metadata.steps
    20
    >>> server.calls[-1].headers["x-team"]
    'studio'
    """

    timeout_s: float
    """Seconds that one request may take, from sending to the whole answer, over all attempts; 120 by default."""
    api_key: str | None
    """Sent as ``authorization: Bearer KEY``."""
    headers: Mapping[str, str] | None
    """Metadata of every call."""
    sticky: bool
    """Send a hash of the profile's picture as ``x-profile``, by which a proxy sends it to the server that knows it."""
    tls: bool | str | os.PathLike[str] | Tls
    """True speaks TLS; a PEM file does so where the server's certificate is signed by an authority of your own; ``Tls``
    for a certificate of the client's own. An address of ``https://`` is TLS by itself."""
    attempts: int
    """Most attempts of a request; 5 by default, and 1 tries nothing again."""
    balance: Balance
    """``least-loaded``, by what each server's last answer says, or ``round-robin``."""
    hedge_after_ms: float | None
    """Ask a second server when the first hasn't answered by then; see also ``hedge_percentile``."""
    hedge_percentile: float | None
    """Hedge when a request takes longer than this percentile of this client's last 200."""
    any_numerics: bool
    """Let a hedge, or a stream that goes on, be answered by a server that rounds otherwise."""
    shrink: bool
    """Send pictures that are larger than the server makes use of smaller; True by default."""
    use_proxy: bool
    """Reach servers by the proxy that the environment names; False by default."""
    keepalive_s: float
    """Seconds of silence after which a connection with requests under way is tested."""
    transport: Transport | None
    """Sends the messages in place of gRPC. The arguments of ``OF_GRPC`` can't be given beside it."""


OF_GRPC = ("api_key", "headers", "sticky", "tls", "use_proxy", "keepalive_s")
"""Arguments that are for the client's own gRPC connections alone."""


@dataclass(frozen=True)
class Settings:
    """A client's arguments."""

    attempts: Attempts
    timeout_s: float
    shrink: bool


def read_settings(servers: str | Sequence[str], options: ClientOptions) -> Settings:
    """Check a client's arguments. Nothing is connected yet.

    Raises:
        InvalidRequest: an argument isn't of its form; its text names it.
        TypeError: there is no such argument.
    """
    if unknown := options.keys() - ClientOptions.__annotations__:
        raise TypeError(f"got an unexpected keyword argument {min(unknown)!r}")
    addresses = read_addresses(servers)
    policy = Policy(
        attempts=options.get("attempts", Policy.attempts),
        hedge_after_ms=options.get("hedge_after_ms"),
        hedge_percentile=options.get("hedge_percentile"),
        any_numerics=options.get("any_numerics", False),
    )
    balance = options.get("balance", "least-loaded")
    if balance not in ("least-loaded", "round-robin"):
        raise InvalidRequest(f"balance: {balance!r}, expected least-loaded or round-robin")
    if transport := options.get("transport"):
        if unused := [name for name in OF_GRPC if name in options]:
            raise InvalidRequest(f"{unused[0]}: is for gRPC; leave it out, or give it to the transport")
    else:
        transport = grpc_transport(addresses, options)
    known = Servers(() if addresses.is_resolved else addresses.named, balance)
    timeout_s = check_seconds("timeout_s", options.get("timeout_s", DEFAULT_TIMEOUT_S))
    return Settings(Attempts(transport, addresses, known, policy), timeout_s, options.get("shrink", True))


def grpc_transport(addresses: Addresses, options: ClientOptions) -> GrpcTransport:
    """Prepare the connections that a client's arguments ask for.

    Raises:
        InvalidRequest: an argument isn't of its form, or a certificate can't be read.
    """
    tls = options.get("tls", False)
    if addresses.is_tls:
        tls = tls or True
    headers, sticky = options.get("headers") or {}, options.get("sticky", False)
    if sticky and PROFILE_HEADER in headers:
        raise InvalidRequest(f"sticky: headers has an {PROFILE_HEADER} already, expected one of the two")
    return GrpcTransport(
        metadata=_headers(headers, options.get("api_key")),
        sticky=sticky,
        tls=_tls(tls),
        server_name=addresses.host if addresses.is_resolved else None,
        use_proxy=options.get("use_proxy", False),
        keepalive_s=check_seconds("keepalive_s", options.get("keepalive_s", KEEPALIVE_S)),
    )


def check_seconds(name: str, value: float) -> float:
    """Return the value.

    Raises:
        InvalidRequest: it isn't a number above 0.
    """
    if not (math.isfinite(value) and value > 0):
        raise InvalidRequest(f"{name}: {value:g}, expected a number of seconds above 0")
    return value


def check_concurrency(value: int) -> None:
    """Refuse less than one request at once.

    Raises:
        InvalidRequest: it is less.
    """
    if value < 1:
        raise InvalidRequest(f"concurrency: {value}, expected 1 or more")


def _headers(headers: Mapping[str, str], api_key: str | None) -> list[tuple[str, str]]:
    for name, value in headers.items():
        if not _HEADER.fullmatch(name) or name.startswith("grpc-") or name.endswith("-bin"):
            raise InvalidRequest(f"headers: {name!r}, expected a name of lower-case letters, digits, '_', '.' and '-'")
        if not _HEADER_VALUE.fullmatch(value):
            raise InvalidRequest(f"headers: {name}: has a character that no header has, such as a new line")
    pairs = list(headers.items())
    if api_key is not None:
        if not _KEY.fullmatch(api_key):
            raise InvalidRequest("api_key: has a character that no key has, such as a space")
        if "authorization" in headers:
            raise InvalidRequest("api_key: headers has an authorization already, expected one of the two")
        pairs.append(("authorization", f"Bearer {api_key}"))
    return pairs


def _tls(tls: bool | str | os.PathLike[str] | Tls) -> Tls | None:
    if not tls:
        return None
    if isinstance(tls, Tls):
        return tls
    return Tls() if tls is True else Tls(authority=tls)
