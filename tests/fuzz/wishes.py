"""Wishes of callers, good or wrong, whatever the door: public inputs by name."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from typing import Any

from icportrait.request import INPUTS
from tests.fuzz.corpus import HEAVY, Corpus

FIELDS = {each.name: each for each in INPUTS}
OPTIONS = [each.name for each in INPUTS if not each.required]
PORTRAIT_SEEDS = 5
"""Seeds of the requests that come again and again, whose bytes are compared."""


@dataclass
class Wish:
    """Inputs, and what is right to answer."""

    values: dict[str, Any]
    kind: str
    verdict: str = "good"
    """``good``; ``wrong``, a refusal; ``either``; ``deadline``, a portrait or too late."""
    names: str = ""
    same_as: str = ""
    drop: set[str] = field(default_factory=set)

    @property
    def seed(self) -> int | None:
        return self.values.get("seed")

    @property
    def portraits(self) -> int:
        return int(self.values.get("num_portraits", 1))

    @property
    def output_format(self) -> str:
        return str(self.values.get("output_format", "png"))


def wish(rng: random.Random, corpus: Corpus) -> Wish:
    """Draw a request."""
    share = rng.random()
    if share < 0.08:
        return again(rng, corpus)
    if share < 0.14:
        return good(rng, corpus)
    if share < 0.50:
        return wrong_option(rng, corpus)
    if share < 0.68:
        return damaged(rng, corpus)
    if share < 0.90:
        return hostile(rng, corpus)
    if share < 0.93:
        return late(rng, corpus)
    return missing(rng, corpus)


def plain(rng: random.Random, corpus: Corpus) -> dict[str, Any]:
    """Return the inputs of a quick request; of a few pictures the crops are kept, so that they cost little."""
    first, second = (list(corpus.good)[rng.randrange(3)] for _ in range(2))
    return {
        "profile": corpus.good[first],
        "reference": corpus.good[second],
        "num_inference_steps": 1,
        "guidance_scale": 1.0,
    }


def again(rng: random.Random, corpus: Corpus) -> Wish:
    """Ask for a portrait that others ask for too: its bytes are the same each time."""
    seed = rng.randrange(PORTRAIT_SEEDS)
    names = list(corpus.good)
    values = {
        "profile": corpus.good[names[0]],
        "reference": corpus.good[names[1 + seed % 2]],
        "seed": seed,
        "num_inference_steps": 1 + seed % 3,
        "guidance_scale": (1.0, 2.5)[seed % 2],
        "num_portraits": 1 + seed % 2,
    }
    return Wish(values, "the same again", same_as=f"seed {seed}")


def good(rng: random.Random, corpus: Corpus) -> Wish:
    """Draw any good request."""
    values = plain(rng, corpus)
    if rng.random() < 0.5:
        values |= {rng.choice(("profile", "reference")): corpus.pick(rng)}
    choices: dict[str, Any] = {
        "seed": lambda: rng.choice((0, 1, 2**31, 2**63 - 1, rng.getrandbits(63))),
        "num_portraits": lambda: rng.choice((1, 1, 2, 8)),
        "num_inference_steps": lambda: rng.choice((1, 2, 3, 7)),
        "guidance_scale": lambda: rng.choice((1.0, 1.5, 20.0)),
        "guidance_interval": lambda: sorted((rng.random(), rng.random())),
        "mask_ratio": lambda: rng.choice((0.0, 0.5, 0.98)),
        "scheduler": lambda: rng.choice(FIELDS["scheduler"].choices),
        "priority": lambda: rng.randrange(10),
        "deadline_ms": lambda: 3_600_000,
        "profile_box": lambda: rng.choice(([0.0, 0.0, 1.0, 1.0], [0.0, 0.0, 1.0, 1.0])),
        "output_format": lambda: rng.choice(FIELDS["output_format"].choices),
    }
    for name in rng.sample(list(choices), rng.randrange(5)):
        values[name] = choices[name]()
    return Wish(values, "a good request")


def wrong_option(rng: random.Random, corpus: Corpus) -> Wish:
    """Draw a request with one option out of its range, or none of its choices."""
    name = rng.choice(OPTIONS)
    each = FIELDS[name]
    values = plain(rng, corpus)
    if each.choices:
        letters = rng.choice(("", "DDIM", "jpg", each.choices[0] + "\0", "é" * 30, "a" * 255, "' or 1=1", "\x01\x7f"))
        values[name] = letters
    elif each.size > 1:
        wrong = rng.choice((-0.1, 1.1, 1e38, float("nan"), float("inf")))
        box = [0.0, 0.0, 1.0, 1.0]
        box[rng.randrange(4)] = wrong
        values[name] = rng.choice((box, [0.5, 0.5, 0.5, 0.5], [0.9, 0.0, 0.1, 1.0], [0.0, 0.0, 1e-6, 1.0]))
    elif each.dtype.triton == "FP32":
        values[name] = rng.choice((-1.0, 1e38, -1e38, float("nan"), float("inf"), float("-inf"), 20.001))
    else:
        low, high = each.minimum or 0, each.maximum or 0
        values[name] = rng.choice((int(low) - 1, -(2**31), int(high) + 1 if name != "seed" else -7))
    if name == "preview_every" and rng.random() < 0.3:
        values[name] = 151
    return Wish(values, "a wrong option", "wrong", names=name)


def damaged(rng: random.Random, corpus: Corpus) -> Wish:
    """Draw a request with a damaged picture."""
    name = rng.choice(("profile", "reference"))
    values = plain(rng, corpus) | {name: corpus.damaged(rng)}
    return Wish(values, "a damaged picture", "either", names=name)


def hostile(rng: random.Random, corpus: Corpus) -> Wish:
    """Draw a request with a file that is no picture, or one made to harm."""
    name = rng.choice(("profile", "reference"))
    data = rng.choice(HEAVY)(rng, corpus.small(rng)) if rng.random() < 0.005 else corpus.hostile(rng)
    return Wish(plain(rng, corpus) | {name: data}, "a hostile picture", "wrong", names=name)


def late(rng: random.Random, corpus: Corpus) -> Wish:
    """Draw a request that is in a hurry."""
    values = plain(rng, corpus) | {"deadline_ms": rng.choice((1, 2, 10, 40)), "num_inference_steps": 5}
    return Wish(values, "a deadline", "deadline")


def missing(rng: random.Random, corpus: Corpus) -> Wish:
    """Draw a request without a picture, or with an input that there isn't."""
    values = plain(rng, corpus)
    if rng.random() < 0.5:
        name = rng.choice(("profile", "reference"))
        del values[name]
        return Wish(values, "a missing picture", "wrong", names=name)
    name = rng.choice(("prompt", "Seed", "seed ", "__class__", "é", "x" * 300))
    values[name] = rng.choice((1, "text"))
    return Wish(values, "an unknown input", "wrong", names=name[:20])
