"""The servers of a client: their addresses, what each last said, and the choice of the next one."""

from __future__ import annotations

import asyncio
import itertools
import random
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from icportrait_client.errors import InvalidRequest, ServerUnavailable
from icportrait_client.portraits import Metadata

Balance = Literal["least-loaded", "round-robin"]

BELIEVED_S = 10.0
"""Seconds for which a server's speed is believed: one that was slow gets another chance then."""
HELD_S = 1.0
"""Seconds for which a server that couldn't be reached is passed over, where nothing else says that it is back."""
_SCHEMES = ("https://", "grpcs://", "grpc://", "dns:///")
_HOST_PORT = re.compile(r"\[[0-9A-Fa-f:.]+\]:\d{1,5}|[^\s:/\[\]]+:\d{1,5}|unix:\S+")


@dataclass(eq=False)
class Server:
    """A server, and what is known of it. Times are of the event loop's clock."""

    address: str
    in_flight: int = 0
    """Attempts of this client."""
    is_ready: bool = True
    """True when it was asked last, or answered, or wasn't asked yet."""
    is_checked: bool = False
    """The server's contract is this client's."""
    numerics_id: str | None = None
    """Id in its last answer; forgotten when it can't be reached, because another version may come back."""
    step_ms: float | None = None
    """Time that its last answer took for each of its steps, waiting included."""
    told_at_s: float = 0.0
    held_until_s: float = 0.0
    """Asked not to be tried until then."""

    def said(self, metadata: Metadata, now_s: float) -> None:
        """Note what an answer says of its server."""
        self.is_ready = True
        self.numerics_id = metadata.numerics_id
        self.step_ms = metadata.total_ms / max(metadata.steps, 1)
        self.told_at_s = now_s

    def failed(self, error: ServerUnavailable, now_s: float) -> None:
        """Note that the server took no request; it is passed over while another one may."""
        if error.has_answered:
            self.held_until_s = now_s + (error.retry_after_ms or 0) / 1e3
        else:
            self.is_ready = self.is_checked = False
            self.numerics_id = self.step_ms = None
            self.held_until_s = now_s + HELD_S

    def takes(self, now_s: float) -> bool:
        """Tell whether a request may well be taken now."""
        return self.is_ready and now_s >= self.held_until_s


class Servers:
    """The servers of a client, and the choice among them."""

    def __init__(self, addresses: Iterable[str], balance: Balance = "least-loaded") -> None:
        self.all = [Server(address) for address in addresses]
        self._balance = balance
        self._turn = itertools.count(random.randrange(1024))

    def replace(self, addresses: Iterable[str]) -> None:
        """Take other addresses; what is known of an address that stays is kept."""
        known = {server.address: server for server in self.all}
        self.all = [known.get(address) or Server(address) for address in addresses]

    def choose(
        self,
        now_s: float,
        without: Sequence[Server] = (),
        numerics_id: str | None = None,
        balance: Balance | None = None,
    ) -> Server | None:
        """Choose a server for a request, of those that take one before those that may not.

        Args:
            now_s: by the event loop's clock.
            without: servers that this request was at already; tried again only where there is no other.
            numerics_id: ask only servers whose answers have this one.
            balance: in place of the client's.

        Returns:
            The server; None where none has the ``numerics_id``.
        """
        candidates = [server for server in self.all if numerics_id is None or server.numerics_id == numerics_id]
        if not candidates:
            return None
        turn = next(self._turn)
        fresh = [server for server in candidates if server not in without]
        takers = [server for server in fresh if server.takes(now_s)]
        takers = takers or [server for server in candidates if server.takes(now_s)] or fresh or candidates
        takers = takers[turn % len(takers) :] + takers[: turn % len(takers)]
        if (balance or self._balance) == "round-robin":
            return takers[0]
        speeds = {server: self._step_ms(server, now_s) for server in takers}
        # One that has said nothing yet is taken for as quick as the quickest.
        best = min((speed for speed in speeds.values() if speed is not None), default=1.0)
        return min(takers, key=lambda server: (server.in_flight + 1) * (speeds[server] or best))

    def another_takes(self, now_s: float, tried: Sequence[Server]) -> bool:
        """Tell whether a server that wasn't tried may well take a request now."""
        return any(server.takes(now_s) for server in self.all if server not in tried)

    @staticmethod
    def _step_ms(server: Server, now_s: float) -> float | None:
        return server.step_ms if now_s < server.told_at_s + BELIEVED_S else None


@dataclass(frozen=True)
class Addresses:
    """The addresses that a caller named."""

    named: tuple[str, ...]
    """``host:port``; one name where it is to be resolved."""
    is_resolved: bool = False
    """Ask the name service for all servers behind the one name, again and again."""
    is_tls: bool = False

    @property
    def host(self) -> str:
        """Return the first address's host."""
        return self.named[0].rpartition(":")[0]

    async def resolve(self) -> list[str]:
        """Return the addresses to connect to.

        Raises:
            ServerUnavailable: the name isn't known.
        """
        if not self.is_resolved:
            return list(self.named)
        host, _, port = self.named[0].rpartition(":")
        try:
            found = await asyncio.get_running_loop().getaddrinfo(host.strip("[]"), int(port), type=1)
        except (OSError, UnicodeError) as error:  # UnicodeError: a label that is empty or too long
            raise ServerUnavailable(f"{self.named[0]}: no such name ({error})") from None
        hosts = dict.fromkeys(str(address[0]) for *_, address in found)
        return [f"[{each}]:{port}" if ":" in each else f"{each}:{port}" for each in hosts]


def read_addresses(servers: str | Sequence[str]) -> Addresses:
    """Read ``host:port``, ``https://host:port``, ``dns:///name:port``, or several of the first two.

    Raises:
        InvalidRequest: an address isn't of that form.
    """
    texts = [servers] if isinstance(servers, str) else list(servers or ())
    if not texts:
        raise InvalidRequest("servers: none, expected at least one host:port")
    schemes, named = set(), []
    for text in texts:
        if not isinstance(text, str):
            raise InvalidRequest(f"servers: {text!r}, expected a text such as localhost:8001")
        scheme = next((each for each in _SCHEMES if text.lower().startswith(each)), "")
        address = text[len(scheme) :].rstrip("/")
        if scheme == "https://" and ":" not in address.rpartition("]")[2]:
            address += ":443"
        if not _HOST_PORT.fullmatch(address):
            raise InvalidRequest(
                f"url: {text!r}, expected host:port of gRPC, such as localhost:8001 or https://portraits.example.org:8001"
            )
        schemes.add(scheme)
        named.append(address)
    secure = {scheme in ("https://", "grpcs://") for scheme in schemes}
    if len(secure) > 1 or ("dns:///" in schemes and len(texts) > 1):
        raise InvalidRequest("servers: expected addresses that all speak TLS or all don't, or one dns:/// name")
    return Addresses(tuple(dict.fromkeys(named)), "dns:///" in schemes, secure == {True})
