"""Keys of the server under the fuzz: one without limits, and one for each way to run into a limit."""

from __future__ import annotations

import hashlib
import random
from dataclasses import dataclass
from pathlib import Path

PRIORITY = 5
"""The only one that the key ``humble`` may ask for."""
LIMITS = {
    "plain": "",
    # One at once, and the next after eleven days.
    "slow": "requests_per_s = 1e-6\nburst = 1",
    "spent": "requests_per_day = 1",
    "humble": f"priorities = [{PRIORITY}]",
}


@dataclass(frozen=True)
class Limited:
    """A request with a key that has a limit, and how it must end."""

    header: tuple[str, str]
    kind: str
    priority: int
    refusal: str
    """``"exhausted"`` or ``"denied"``; an empty text where there is none."""
    names: str = ""
    at_most: int = 0
    """Requests with the key that a run may serve; 0 where all of them may be."""


def limited(rng: random.Random) -> Limited:
    """Draw a key and a request's priority."""
    name, priority = rng.choice(list(LIMITS)[1:]), rng.randrange(10)
    if name == "slow":
        return Limited(bearer(name), "a key's rate", priority, "exhausted", "requests a second; retry_after_ms: ", 1)
    if name == "spent":
        # Two, because another day may begin.
        return Limited(bearer(name), "a key's quota", priority, "exhausted", "requests a day; retry_after_ms: ", 2)
    if priority == PRIORITY:
        return Limited(bearer(name), "a key's priority", priority, "")
    return Limited(bearer(name), "a key's priority", priority, "denied", "priority")


def bearer(name: str) -> tuple[str, str]:
    """Return the header that carries a key."""
    return "authorization", f"Bearer {_key(name)}"


def write(path: Path) -> None:
    """Write a server's file of keys."""
    hashes = {name: hashlib.sha256(_key(name).encode()).hexdigest() for name in LIMITS}
    path.write_text("".join(f'[keys.{name}]\nsha256 = "{hashes[name]}"\n{LIMITS[name]}\n' for name in LIMITS))


def _key(name: str) -> str:
    return f"the-{name}-key-of-the-fuzz"
