"""Cases for the control line between the gateway and the loop: another gateway that also writes what it shouldn't."""

from __future__ import annotations

import json
import random
from typing import Any

from icportrait.metrics import STAGES
from icportrait.serving.control import LENGTH, MAX_ASKED_BYTES, VERSION, frame
from tests.fuzz.cases import GONE, WAITS, Case
from tests.fuzz.corpus import Corpus, mutated

KEYS = ("fuzz-a", "fuzz-b", "x" * 64, "é")
"""Each line uses the same ones, so that several ask for and give back the lease of one key."""
WRONG_KEYS = ("", "x" * 65, None, 1, [], {})
NUMBERS: tuple[Any, ...] = (-1, 2**63, 1.5, float("1e308"), "1", None, True, [], {})
"""Each is wrong wherever a count is expected."""
HELLO = {"op": "hello", "version": VERSION}
LAST = {"op": "ping", "id": 7}
COUNTS = ("priority", "nbytes")


def control(name: str, rng: random.Random, corpus: Corpus, headers: Any) -> Case:
    """Say hello, ask for leases and more, and a ping at last; of three lines, one has a wrong message in it."""
    said = [frame(HELLO), *(frame(_right(rng)) for _ in range(rng.randrange(1, 9)))]
    kind = rng.random()
    expects: tuple[str, ...] = ("OK",)
    if kind < 0.35:
        said.insert(rng.randrange(1, len(said) + 1), _wrong(rng))
        expects = (GONE,)
    elif kind < 0.4:
        said[0] = frame(rng.choice(({"op": "hello", "version": VERSION + 1}, {"op": "hello"}, LAST)))
        expects = (GONE,)
    elif kind < 0.6:
        index = rng.randrange(len(said))
        said[index] = mutated(rng, said[index])
        expects = ("OK", GONE, WAITS)
    return Case(name, "control", "control line", expects, messages=(*said, frame(LAST)))


def leases(case: Case) -> int:
    """Return how many leases a right line asks for."""
    return sum(b'"op": "lease"' in message for message in case.messages)


def _right(rng: random.Random) -> dict[str, Any]:
    op = rng.choice(("lease", "lease", "lease", "cancel", "seen", "release", "ping"))
    if op == "ping":
        return {"op": op, "id": rng.choice((0, 1, 2**53))}
    made: dict[str, Any] = {"op": op, "key": rng.choice(KEYS)}
    if op == "release" and rng.random() < 0.5:
        made["stage_ms"] = {stage: rng.choice((0.0, 1.5, 1e9)) for stage in rng.sample(STAGES, 2)}
    if op == "lease":
        # Small, because other callers' requests wait behind it.
        made["phases"] = [[rng.choice((1, 150, 4096)), rng.choice((1, 2))] for _ in range(rng.randrange(1, 4))]
        made |= {"priority": rng.randrange(10), "nbytes": 10, "arrived_s": rng.choice((0.0, 1.5))}
        made["deadline_ms"] = rng.choice((None, None, 0, 1))
        made |= rng.choice(({}, {"replayed": True}, {"replayed": False}))
    return made


def _wrong(rng: random.Random) -> bytes:
    """Return a message after which the loop must close the line."""
    kind = rng.randrange(7)
    if kind == 0:
        return LENGTH.pack(rng.choice((MAX_ASKED_BYTES + 1, 2**32 - 1))) + rng.randbytes(20)
    if kind == 1:
        text = rng.choice(
            (b'{"op":' + b"[" * 60_000, b"", b"\xff", b"[]", b"null", b'{"op": "ping", "id": NaN}', b"{}")
        )
        return LENGTH.pack(len(text)) + text
    made = _right(rng)
    if kind == 2:
        made["more"] = rng.choice((1, None, "x" * 1000))
    elif kind == 3:
        made = rng.choice((HELLO, {**made, "op": rng.choice(("x", "", "leased", "LEASE", None, 1, []))}))
    elif kind == 4 and made["op"] != "ping":
        made["key"] = rng.choice(WRONG_KEYS)
    elif kind == 5:
        made = {"op": "release", "key": "fuzz-a", "stage_ms": rng.choice(({"denoise": -1.0}, {"x": 1.0}, [], 1))}
    else:
        number = rng.choice(NUMBERS)
        phases = rng.choice((number, [[number, 1]], [[1, number]], [[1, 1], [0, 1]], [[1]], [], [[1, 1]] * 4))
        made = {"op": "lease", "key": "fuzz-a", "phases": [[1, 1]], "priority": 1, "deadline_ms": None}
        made |= {"arrived_s": 1.5, "nbytes": 1} | rng.choice(({"phases": phases}, {rng.choice(COUNTS): number}))
    # Not ``frame``, because a wrong number may be one that JSON doesn't have.
    text = json.dumps(made).encode()
    return LENGTH.pack(len(text)) + text
