"""Cases for the control line between the gateway and the loop: another gateway that writes what it shouldn't."""

from __future__ import annotations

import random
from typing import Any

from icportrait.serving.control import LENGTH, VERSION, frame
from tests.fuzz.cases import Case
from tests.fuzz.corpus import Corpus, mutated

KEYS = ("fuzz-a", "fuzz-b", "", "x" * 64, "x" * 65, "é", None, 1)
NUMBERS: tuple[Any, ...] = (0, 1, 2, 16, 17, -1, 2**16, 2**53, 2**63, 1.5, float("1e308"), "1", None, True, [], {})
HELLO = {"op": "hello", "version": VERSION}


def control(name: str, rng: random.Random, corpus: Corpus, headers: Any) -> Case:
    """Say hello, ask for leases and more, and damage what is sent."""
    said = [HELLO if rng.random() < 0.95 else {"op": "hello", "version": rng.choice(NUMBERS)}]
    said += [_message(rng) for _ in range(rng.randrange(1, 6))]
    sent = [frame(each) for each in said]
    kind = rng.random()
    if kind < 0.3:
        index = rng.randrange(len(sent))
        sent[index] = mutated(rng, sent[index])
    elif kind < 0.4:
        sent.append(LENGTH.pack(rng.choice((0, 2**16 + 1, 2**32 - 1))) + rng.randbytes(20))
    elif kind < 0.45:
        text = b'{"op":' + b"[" * 60_000
        sent.append(LENGTH.pack(len(text)) + text)
    sent.append(frame({"op": "ping", "id": 7}))
    return Case(name, "control", "control line", ("OK", "GONE"), messages=tuple(sent))


def _message(rng: random.Random) -> dict[str, Any]:
    made: dict[str, Any] = {"op": rng.choice(("lease", "cancel", "seen", "release", "ping", "hello", "x", None))}
    if made["op"] == "ping":
        return made | {"id": rng.choice(NUMBERS)}
    made["key"] = rng.choice(KEYS)
    if made["op"] == "release" and rng.random() < 0.5:
        made["stage_ms"] = rng.choice(({"denoise": 1.0}, {"denoise": -1.0}, {"x": 1.0}, [], {"denoise": None}))
    if made["op"] == "lease":
        phases = [[rng.choice((5, *NUMBERS)), 2] for _ in range(rng.choice((1, 1, 1, 0, 3, 4)))]
        made |= {"phases": phases, "priority": 1, "deadline_ms": None, "arrived_s": 1.5, "nbytes": 10}
        for _ in range(rng.randrange(3)):
            made[rng.choice(("phases", "priority", "deadline_ms", "arrived_s", "nbytes"))] = rng.choice(NUMBERS)
    if rng.random() < 0.05:
        made["more"] = 1
    return made
