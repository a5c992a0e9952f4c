"""A run: cases from a seed against a server, with a line of progress, findings in files, and a table at the end."""

from __future__ import annotations

import asyncio
import random
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TextIO

from icportrait.presets import Preset
from tests.e2e.caller import settled
from tests.fuzz import control_cases, grpc_cases, http_cases
from tests.fuzz.callers import Answer, Callers
from tests.fuzz.cases import Case, is_case
from tests.fuzz.corpus import Corpus
from tests.fuzz.judge import Judge
from tests.fuzz.watch import Memory, Watched, growth, resting

HANGS_AFTER_S = 60.0
MAX_FINDINGS = 200
LINE_EVERY_S = 5.0
TENTHS = 10
BURSTS = 3
"""Times that all callers ask for eight portraits at once, before the rest."""
COMPARED_FROM = 20_000
"""Requests of the shortest run whose memory is judged: in the tenth of a shorter one little is warm."""


@dataclass(frozen=True)
class Plan:
    """Requests that are sent, and their server."""

    seed: int
    requests: int
    grpc_url: str
    http_url: str
    headers: tuple[tuple[str, str], ...] = ()
    """Headers of every request: its API key."""
    callers: int = 16
    corpus: Path | None = None
    run_folder: Path | None = None
    """Folder of the server's temporary files; with it the control line is fuzzed too."""
    metrics_url: str = ""
    """With it each tenth ends with a look whether any request's lease was left behind."""
    findings: Path = Path("build/fuzz/findings")
    checks_memory: bool = True


@dataclass
class Outcome:
    """Result of a run."""

    answers: Counter[tuple[str, str]] = field(default_factory=Counter)
    kinds: Counter[tuple[str, str]] = field(default_factory=Counter)
    findings: list[str] = field(default_factory=list)
    slowest: tuple[float, str, str] = (0.0, "", "")
    pictures: int = 0
    memory: list[list[Memory]] = field(default_factory=list)
    """After each tenth."""
    took_s: float = 0.0


class Cases:
    """Makes the case of a number, from the seed and the number alone."""

    def __init__(self, plan: Plan) -> None:
        self.corpus = Corpus(plan.seed, plan.corpus)
        self._plan = plan
        self._doors = [(grpc_cases.MAKERS, 55), (http_cases.MAKERS, 44)]
        if plan.run_folder:
            self._doors.append((((control_cases.control, 1),), 1))
        self._given: list[Case] = []
        if plan.corpus:
            files = sorted(path for path in plan.corpus.rglob("*.json") if is_case(path))
            self._given = [Case.read(path) for path in files]

    def make(self, number: int) -> Case:
        """Make a case; a corpus's own are the first."""
        if number < len(self._given):
            return self._given[number]
        name = f"{self._plan.seed}-{number}"
        rng = random.Random(name)
        makers = rng.choices([each for each, _ in self._doors], [weight for _, weight in self._doors])[0]
        maker = rng.choices([each for each, _ in makers], [weight for _, weight in makers])[0]
        return maker(name, rng, self.corpus, self._plan.headers)

    def largest(self) -> Case:
        """Make a case that takes as many slots as a request may."""
        return grpc_cases.largest(f"{self._plan.seed}-largest", self.corpus, self._plan.headers)


class Run:
    """One run against a server that is ready."""

    def __init__(self, plan: Plan, preset: Preset, watched: Watched, out: TextIO = sys.stderr) -> None:
        self.plan, self.watched, self.outcome = plan, watched, Outcome()
        self.cases, self.judge = Cases(plan), Judge(preset.image_size)
        self._out, self._shown_s, self._began_s = out, 0.0, 0.0
        self._done = 0

    async def all(self) -> Outcome:
        """Send every case of the plan, a tenth at a time."""
        self._began_s = time.monotonic()
        folder = self.plan.run_folder
        async with Callers(
            self.plan.grpc_url, self.plan.http_url, lambda: self.watched.control_path(folder) if folder else None
        ) as callers:
            if self.plan.checks_memory:
                # The loop touches a slot's memory when the slot is first used, and the highest are used last.
                for case in [self.cases.largest()] * BURSTS:
                    await asyncio.gather(*(self._send(callers, case) for _ in range(self.plan.callers)))
            for tenth in range(TENTHS):
                numbers = iter(range(*(self.plan.requests * part // TENTHS for part in (tenth, tenth + 1))))
                await asyncio.gather(*(self._call(callers, numbers) for _ in range(self.plan.callers)))
                if self.plan.metrics_url:
                    for fault in await asyncio.to_thread(_left_behind, self.plan.metrics_url):
                        self._found(fault)
                if self.plan.checks_memory:
                    self.outcome.memory.append(await resting(self.watched))
                for fault in [*self.watched.log_faults(), *self.watched.ended()]:
                    self._found(fault)
        self.outcome.took_s = time.monotonic() - self._began_s
        self.outcome.pictures = self.judge.pictures
        if self.plan.checks_memory and self.plan.requests >= COMPARED_FROM:
            for now, like, is_more in growth(self.outcome.memory[0], self.outcome.memory[-1]):
                if is_more:
                    before = f"{like.nbytes / 1e6:.1f} MB" if like else "nothing"
                    self._found(f"memory of {now.part} ({now.pid}): {now.nbytes / 1e6:.1f} MB; {before} after a tenth")
        return self.outcome

    async def one(self, callers: Callers, case: Case) -> tuple[Answer | None, list[str]]:
        """Send a case, and judge its answer."""
        began_s = time.monotonic()
        try:
            async with asyncio.timeout(HANGS_AFTER_S):
                answer = await callers.send(case)
        except TimeoutError:
            return None, [f"no answer within {HANGS_AFTER_S:.0f} s"]
        except Exception as error:
            return None, [f"the caller failed: {error!r}"]
        took_s = time.monotonic() - began_s
        if took_s > self.outcome.slowest[0]:
            self.outcome.slowest = took_s, case.name, case.kind
        return answer, self.judge.faults(case, answer)

    async def _call(self, callers: Callers, numbers: Iterator[int]) -> None:
        for number in numbers:
            if len(self.outcome.findings) >= MAX_FINDINGS:
                return
            await self._send(callers, self.cases.make(number))
            self._done += 1
            self._show()

    async def _send(self, callers: Callers, case: Case) -> None:
        answer, faults = await self.one(callers, case)
        code = answer.code if answer else "none"
        self.outcome.answers[case.door, code] += 1
        self.outcome.kinds[case.kind, code] += 1
        if self.outcome.answers.total() % 20 == 0:
            faults += self.watched.log_faults()
        if faults:
            path = self.plan.findings / f"{case.name}.json"
            replay = f"make fuzz REPLAY={path}"
            case.write(path, faults=faults, replay=replay, answer=repr(answer)[:4000])
            self._found(f"{case.name} ({case.door}, {case.kind}): {'; '.join(faults)[:700]}\n    {replay}")

    def _found(self, text: str) -> None:
        self.outcome.findings.append(text)
        print(f"\nFINDING {text}", file=self._out, flush=True)

    def _show(self) -> None:
        now_s = time.monotonic()
        if now_s - self._shown_s < (1.0 if self._out.isatty() else LINE_EVERY_S):
            return
        self._shown_s = now_s
        rate = self._done / (now_s - self._began_s)
        left_s = (self.plan.requests - self._done) / rate
        line = (
            f"{self._done:,} of {self.plan.requests:,} requests, {rate:.0f} a second, {left_s:.0f} s left, "
            f"{self.judge.pictures:,} pictures, {len(self.outcome.findings)} findings"
        )
        print(line, end="\r" if self._out.isatty() else "\n", file=self._out, flush=True)


def _left_behind(metrics_url: str) -> list[str]:
    """Wait until nothing runs, and name the series that say that a lease is held still."""
    now = settled(metrics_url)
    names = ("icportrait_queued_requests", "icportrait_admitted_bytes")
    return [f"{name} is {now[name]:g} with no request under way" for name in names if now[name]]


def table(outcome: Outcome) -> str:
    """Return the end's table."""
    total = sum(outcome.answers.values())
    lines = [
        "",
        f"{total:,} requests in {outcome.took_s:.0f} s, {total / max(outcome.took_s, 1e-9):.1f} a second; "
        f"{outcome.pictures:,} good pictures; slowest answer {outcome.slowest[0]:.2f} s "
        f"({outcome.slowest[1]}, {outcome.slowest[2]})",
        "",
        "door      answer               requests",
    ]
    lines += [f"{door:9} {code:20} {count:8,}" for (door, code), count in sorted(outcome.answers.items())]
    lines += ["", "kind                 answer               requests"]
    lines += [f"{kind:20} {code:20} {count:8,}" for (kind, code), count in sorted(outcome.kinds.items())]
    if outcome.memory:
        lines += ["", "own memory, MB           pid    after a tenth      now   change   after each tenth"]
        for now, like, is_more in growth(outcome.memory[0], outcome.memory[-1]):
            before = like.nbytes if like else now.nbytes
            each = " ".join(
                f"{next((one.nbytes for one in reading if one.pid == now.pid), 0) / 1e6:.0f}"
                for reading in outcome.memory
            )
            lines.append(
                f"{now.part:20} {now.pid:7} {before / 1e6:16.1f} {now.nbytes / 1e6:8.1f} "
                f"{now.nbytes / before - 1:+8.1%}   {each}{'   too much' if is_more else ''}"
            )
    lines += ["", f"{len(outcome.findings)} findings", *outcome.findings[:20]]
    return "\n".join(lines)
