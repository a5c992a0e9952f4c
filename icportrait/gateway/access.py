"""API keys: who may call, how often, and with which priorities.

The file is TOML; ``new_key`` makes a key and its section. A server keeps and compares hashes, so that neither the file
nor a log tells a key:

    [keys.studio]
    sha256 = "9f86d0..."          # of the key; it is sent as "authorization: Bearer KEY"
    priorities = [1, 2]           # classes it may ask for; all where this is absent
    requests_per_s = 5.0          # over time; no limit where this is absent
    burst = 10                    # at once, after a pause; as many as in a second where this is absent
    requests_per_day = 10000      # of UTC; no limit where this is absent
"""

from __future__ import annotations

import hashlib
import hmac
import logging
import math
import re
import secrets
import time
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from icportrait.errors import IcPortraitError, TooMuch, Unauthenticated
from icportrait.gateway.api import Caller

logger = logging.getLogger(__name__)

HEADER = "authorization"
"""Header of HTTP and of gRPC; its value is ``Bearer KEY``."""
LOOK_AGAIN_S = 1.0
"""Seconds between two looks whether the file has changed."""
DAY_S = 86_400
MOST = 10**9
"""Largest rate, quota and burst of a key, other than infinite ones: a day's count at ten thousand a second.

The smallest rate and quota are 1 by this: the wait for the next request is still a number.
"""


@dataclass(frozen=True)
class ApiKey:
    """A section of the file."""

    name: str
    sha256: str
    priorities: frozenset[int] | None = None
    requests_per_s: float = math.inf
    burst: int = 0
    """0 is as many as come in a second, at least one."""
    requests_per_day: float = math.inf

    def __post_init__(self) -> None:
        where = f"keys.{self.name[:80]}"
        if not (isinstance(self.sha256, str) and re.fullmatch("[0-9a-f]{64}", self.sha256)):
            raise IcPortraitError(f"{where}.sha256: expected 64 hexadecimal digits")
        if self.priorities is not None and not all(type(each) is int and 0 <= each <= 9 for each in self.priorities):
            found = str(sorted(self.priorities, key=str))[:80]
            raise IcPortraitError(f"{where}.priorities: {found}, expected some of 0..9")
        for name in ("requests_per_s", "requests_per_day"):
            value = getattr(self, name)
            if type(value) not in (int, float) or not (1 / MOST <= value <= MOST or value == math.inf):
                expected = f"a number over 0: {1 / MOST:g} to {MOST}, or inf"
                raise IcPortraitError(f"{where}.{name}: {repr(value)[:80]}, expected {expected}")
        if type(self.burst) is not int or not 0 <= self.burst <= MOST:
            raise IcPortraitError(f"{where}.burst: {repr(self.burst)[:80]}, expected a whole number of 0..{MOST}")

    @property
    def at_once(self) -> float:
        return self.burst or max(self.requests_per_s, 1.0)


class Access:
    """The keys that callers may use. Without a file every caller may send as many requests as the queue takes."""

    def __init__(
        self,
        path: Path | None = None,
        clock: Callable[[], float] = time.monotonic,
        day_clock: Callable[[], float] = time.time,
    ) -> None:
        """Read the file.

        Args:
            path: of the keys, None where none is asked for.
            clock: seconds, for rates and for looking at the file.
            day_clock: seconds since 1970, for quotas.

        Raises:
            IcPortraitError: the file can't be read or isn't of that form; names the setting.
        """
        self._path, self._clock, self._day_clock = path, clock, day_clock
        self._keys: tuple[tuple[bytes, ApiKey], ...] = ()
        self._used: dict[str, _Used] = {}
        self._seen: tuple[int, ...] | None = None
        self._told = ""
        self._looked_s = clock()
        if path is not None:
            self._seen, self._keys = _stamp(path), _by_hash(read_keys(path))

    def identify(self, header_value: str | None, peer: str) -> Caller:
        """Find the caller of a request, without counting it as a request.

        Args:
            header_value: of ``authorization``, None where there is none.
            peer: the caller's address, for the log.

        Raises:
            Unauthenticated: a key is asked for, and this is none.
        """
        key = self._find(header_value, peer)
        return Caller(name=key.name, priorities=key.priorities) if key else Caller()

    def enter(self, header_value: str | None, peer: str) -> Caller:
        """Let a request in.

        Args:
            header_value: of ``authorization``, None where there is none.
            peer: the caller's address, for the log.

        Raises:
            Unauthenticated: a key is asked for, and this is none.
            TooMuch: the key's rate or quota is used up; says when to try again.
        """
        caller = self.identify(header_value, peer)
        self.count(caller)
        return caller

    def count(self, caller: Caller) -> None:
        """Count a request of a caller that was just identified.

        Raises:
            TooMuch: the key's rate or quota is used up; says when to try again.
        """
        for _, key in self._keys:
            if key.name == caller.name:
                used = self._used.setdefault(key.name, _Used(key.at_once, self._clock()))
                used.count(key, self._clock(), self._day_clock())

    def _find(self, header_value: str | None, peer: str) -> ApiKey | None:
        if self._path is None:
            return None
        self._look_again()
        scheme, _, sent = (header_value or "").partition(" ")
        digest = hashlib.sha256(sent.strip().encode(errors="replace")).digest()
        found = None
        # All are compared, so that the time tells nothing of which it is.
        for known, key in self._keys:
            if hmac.compare_digest(known, digest):
                found = key
        if found is None or scheme.lower() != "bearer":
            logger.debug("a call from %s has no valid API key", peer)
            raise Unauthenticated(f'no valid API key; send one as "{HEADER}: Bearer KEY"')
        return found

    def _look_again(self) -> None:
        """Read the file again if it has changed. A file that can't be read leaves the keys as they were."""
        now_s = self._clock()
        if self._path is None or now_s - self._looked_s < LOOK_AGAIN_S:
            return
        self._looked_s = now_s
        if (stamp := _stamp(self._path)) == self._seen:
            self._told = ""
            return
        try:
            self._keys = _by_hash(read_keys(self._path))
        except IcPortraitError as error:  # it may pass, as where descriptors are short: the file is read again
            if str(error) != self._told:
                logger.warning("%s; the keys read before it still count", error)
            self._told = str(error)
        else:
            self._seen, self._told = stamp, ""
            logger.info("%s: %d keys", self._path, len(self._keys))


class _Used:
    """The part of a key's rate and quota that was used."""

    def __init__(self, tokens: float, now_s: float) -> None:
        self._tokens, self._since_s = tokens, now_s
        self._day, self._today = 0, 0

    def count(self, key: ApiKey, now_s: float, day_s: float) -> None:
        day = int(day_s // DAY_S)
        if day != self._day:
            self._day, self._today = day, 0
        if self._today >= key.requests_per_day:
            wait_ms = math.ceil(((day + 1) * DAY_S - day_s) * 1000)
            allowed = f"{key.requests_per_day:g} requests a day"
            raise TooMuch(f"key {key.name!r} allows {allowed}; retry_after_ms: {wait_ms}")
        if math.isfinite(key.requests_per_s):
            self._tokens = min(self._tokens + (now_s - self._since_s) * key.requests_per_s, key.at_once)
            self._since_s = now_s
            if self._tokens < 1.0:
                wait_ms = math.ceil((1.0 - self._tokens) / key.requests_per_s * 1000)
                allowed = f"{key.requests_per_s:g} requests a second"
                raise TooMuch(f"key {key.name!r} allows {allowed}; retry_after_ms: {wait_ms}")
            self._tokens -= 1.0
        self._today += 1


def read_keys(path: Path) -> list[ApiKey]:
    """Read the keys of a file.

    Raises:
        IcPortraitError: the file can't be read or isn't of that form; names the setting.
    """
    try:
        content = tomllib.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise IcPortraitError(f"{str(path)[:300]}: {str(error)[:300]}") from error
    if unknown := sorted(set(content) - {"keys"}):
        raise IcPortraitError(f"{path}: {unknown[0][:80]}: no such setting, expected keys")
    sections = content.get("keys")
    if not isinstance(sections, dict) or not sections:
        raise IcPortraitError(f"{path}: keys: expected a section [keys.NAME] for each key")
    try:
        keys = [_key(name, section) for name, section in sections.items()]
    except (IcPortraitError, ValueError, RecursionError) as error:  # what has too many digits or levels to be named
        raise IcPortraitError(f"{path}: {error}") from error
    first: dict[str, ApiKey] = {}
    for key in keys:
        if (other := first.setdefault(key.sha256, key)) is not key:
            raise IcPortraitError(
                f"{path}: keys.{key.name[:80]}.sha256: it is that of keys.{other.name[:80]} too, and a call with this "
                "key could be either's; make another one (icportrait-server key NAME)"
            )
    return keys


def new_key(name: str) -> tuple[str, str]:
    """Make a key.

    Returns:
        The key, which is written nowhere, and the section of the file for it.

    Raises:
        IcPortraitError: the name can't be a section's.
    """
    if not re.fullmatch(r"[\w-]{1,64}", name, re.ASCII):
        raise IcPortraitError(f"key: {name[:80]!r}, expected a name of letters, digits, _ and -")
    key = secrets.token_urlsafe(32)
    return key, f'[keys.{name}]\nsha256 = "{hashlib.sha256(key.encode()).hexdigest()}"\n'


def _key(name: str, section: Any) -> ApiKey:
    known = [field.name for field in fields(ApiKey) if field.name != "name"]
    where = f"keys.{name[:80]}"
    if not isinstance(section, Mapping):
        raise IcPortraitError(f"{where}: expected a section [{where}]")
    if unknown := sorted(set(section) - set(known)):
        raise IcPortraitError(f"{where}.{unknown[0][:80]}: no such setting, expected some of {', '.join(known)}")
    values = {"sha256": "", **section}
    if "priorities" in values:
        if not isinstance(values["priorities"], list):
            raise IcPortraitError(f"{where}.priorities: expected a list, such as [1, 2]")
        try:
            values["priorities"] = frozenset(values["priorities"])
        except TypeError:
            raise IcPortraitError(f"{where}.priorities: expected some of 0..9") from None
    return ApiKey(name=name, **values)


def _by_hash(keys: list[ApiKey]) -> tuple[tuple[bytes, ApiKey], ...]:
    return tuple((bytes.fromhex(key.sha256), key) for key in keys)


def _stamp(path: Path) -> tuple[int, ...] | None:
    """Return what changes when a file does; None for one that can't be looked at."""
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_mtime_ns, status.st_ctime_ns, status.st_ino, status.st_size
