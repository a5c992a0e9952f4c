"""The denoising loop under thousands of random events in virtual time; the seed says which.

Jobs arrive, are cancelled, are held and go on, have deadlines and ask for previews, while engines fail and rows become
NaN. Guidance begins and ends on some jobs' way, so that their rows change. Whatever comes, every job is answered once,
with the portraits that it has alone.
"""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import numpy as np
import pytest

from icportrait.errors import Cancelled, DeadlineMissed, IcPortraitError, Unavailable
from icportrait.loop.job import DenoiseResult, Job, State
from icportrait.loop.loop import DenoisingLoop
from icportrait.policy import AGING_S
from icportrait.serving.admission import Admission, Limits
from icportrait.serving.control import Demand
from tests.label_slots import BASE, Entry, LabelSlots, label_loop, labelled, start
from tests.tiny import TINY

KINDS = 48
"""Jobs that differ, and the most that are there at once: a row's label tells whose it is."""
STEP_S = 0.02, 0.05
LONGEST_S = 3 * AGING_S + 15
"""A class 2 job moves up for three times the aging, and then the jobs before it end."""


@dataclass(frozen=True)
class Kind:
    """A job, with the portraits that it gives alone: after each step without noise, and in the end."""

    entry: Entry
    label: float
    hold_every: int
    previews: list[bytes]
    portraits: bytes


@pytest.fixture(scope="module")
def kinds() -> list[Kind]:
    draw, made = random.Random(0), []
    with label_loop(preset=TINY) as (_, loop):
        for index in range(KINDS):
            request = replace(
                BASE,
                seed=index,
                num_inference_steps=draw.randint(1, 9),
                num_portraits=draw.choice((1, 1, 1, 2, 3)),
                guidance_scale=draw.choice((1.0, 4.0)),
                guidance_interval=draw.choice(((0.0, 1.0), (0.0, 0.4), (0.3, 0.7), (0.3, 1.0), (0.6, 1.0))),
                scheduler=draw.choice(("ddim", "dpmpp_2m")),
            )
            entry, previews, ended = labelled(request, index + 1.0, TINY), [], threading.Event()
            results: list[DenoiseResult | IcPortraitError] = []

            def on_done(result: DenoiseResult | IcPortraitError, results=results, ended=ended) -> None:
                results.append(result)
                ended.set()

            def on_step(step: int, result: Callable[[], DenoiseResult], previews=previews) -> None:
                previews.append(result().portrait_latent.tobytes())

            start(loop, entry, on_done, on_step)
            assert ended.wait(60)
            assert isinstance(results[0], DenoiseResult)
            portraits = results[0].portrait_latent.tobytes()
            made.append(Kind(entry, index + 1.0, draw.choice((0, 1, 2)), previews, portraits))
    return made


@dataclass(eq=False)
class Case:
    """A job on its way, and what has happened to it."""

    key: str
    kind: Kind
    priority: int
    deadline_s: float | None
    arrived_s: float
    job: Job | None = None
    outcomes: list[DenoiseResult | IcPortraitError] = field(default_factory=list)
    steps: list[int] = field(default_factory=list)
    is_cancelled: bool = False
    is_held: bool = False
    has_seen_failure: bool = False
    is_nan: bool = False
    ended_s: float = 0.0

    @property
    def has_ended(self) -> bool:
        return len(self.steps) == self.kind.entry.request.num_inference_steps

    @property
    def rows(self) -> int:
        """Return the rows of the step that runs now. A held job has those of the step that comes when it goes on."""
        request, step = self.kind.entry.request, self.job.steps_begun - (self.job.state is State.RUNNING)
        return request.num_portraits * (2 if min(step, request.num_inference_steps - 1) in request.guided_steps else 1)


class World(LabelSlots):
    """Engines that take virtual time. While one runs, other things happen."""

    def __init__(self, seed: int, kinds: list[Kind]) -> None:
        super().__init__()
        self.draw, self.kinds, self.now_s, self.runs_done = random.Random(seed), kinds, 0.0, 0
        self.loop: DenoisingLoop | None = None
        self.admission: Admission | None = None
        self.live: dict[float, Case] = {}
        self.done: list[Case] = []
        self.refused = 0
        self.rows_of_jobs: set[tuple[float, int]] = set()
        self.is_over = False
        self.lock = threading.RLock()

    def clock(self) -> float:
        return self.now_s

    def condition(self, jobs, rows):
        confidences = super().condition(jobs, rows)
        self.pass_time()
        return confidences

    def predict(self, canvas_latent, timestep):
        used = self.labels[: len(timestep)]
        assert np.isfinite(used).all(), "a row in use has lost what it was given"
        found = {label: int((used == label).sum()) for label in set(used) - {0.0}}
        requests = {label: self.kinds[int(label) - 1].entry.request for label in found}
        assert found == {label: request.num_portraits for label, request in requests.items()}
        rows = [self.live[label].rows for label in found]
        assert len(used) == sum(rows) <= self.rows, "there are rows that nobody has"
        self.rows_of_jobs |= set(zip(found, rows, strict=True))
        noise_pred = super().predict(canvas_latent, timestep)
        if self.draw.random() < 0.02:
            row = self.draw.randrange(len(used))
            # The row of a job that is held, or has ended and waits for its batch, is computed for nothing.
            case = self.live.get(used[row])
            if case and case.job.state is State.RUNNING and not case.has_ended:
                case.is_nan = True
                noise_pred[row] = np.nan
        self.pass_time()
        return noise_pred

    def pass_time(self) -> None:
        """Let things happen while an engine runs."""
        with self.lock:
            self.runs_done += 1
            self.now_s += self.draw.uniform(*STEP_S)
            for _ in range(self.draw.choice((0, 0, 0, 1, 1, 2, 4))):
                self.arrive()
            cases = list(self.live.values())
            if cases and self.draw.random() < 0.05:
                self.cancel(self.draw.choice(cases))
            for case in cases:
                if case.is_held and self.draw.random() < 0.3:
                    self.go_on(case)
            if self.draw.random() < 0.008:
                for case in cases:
                    case.has_seen_failure = True
                raise RuntimeError("the device is lost")

    def arrive(self) -> None:
        free = [kind for kind in self.kinds if kind.label not in self.live]
        if self.is_over or not free:
            return
        kind = self.draw.choice(free)
        request = kind.entry.request
        deadline_s = self.now_s + self.draw.uniform(0.05, 3.0) if self.draw.random() < 0.2 else None
        case = Case(
            str(self.draw.random()), kind, self.draw.choice((0, 0, 0, 0, 1, 2)), deadline_s, arrived_s=self.now_s
        )
        deadline_ms = None if deadline_s is None else round(1000 * (deadline_s - self.now_s))
        demand = Demand(request.phases, case.priority, deadline_ms, self.now_s, nbytes=1)
        assert self.loop and self.admission
        try:
            lease = self.admission.lease(case.key, demand)
        except Unavailable:
            self.refused += 1
            return
        self.live[kind.label] = case

        def on_done(result: DenoiseResult | IcPortraitError) -> None:
            with self.lock:
                case.outcomes.append(result)
                case.ended_s = self.now_s
                if self.live.pop(kind.label, None):
                    self.done.append(case)
                lease.denoised_s = self.now_s
                self.admission.release(case.key)

        def on_step(step: int, result: Callable[[], DenoiseResult]) -> None:
            with self.lock:
                assert not case.outcomes, "a step was reported after the answer"
                case.steps.append(step)
                if step == 1 or self.draw.random() < 0.2:
                    assert result().portrait_latent.tobytes() == kind.previews[step - 1]
                if kind.hold_every and step % kind.hold_every == 0 and self.draw.random() < 0.3:
                    case.is_held = True
                    case.job.hold()

        case.job = lease.job = start(
            self.loop,
            kind.entry,
            on_done,
            on_step,
            priority=case.priority,
            deadline_s=np.inf if deadline_s is None else deadline_s,
            hold_every=kind.hold_every,
        )

    def cancel(self, case: Case) -> None:
        case.is_cancelled = True
        if case.job:
            case.job.cancel()

    def go_on(self, case: Case) -> None:
        case.is_held = False
        case.job.go_on()

    def go_on_by_itself(self, runs: int) -> None:
        """Let the engines run so often. Where the loop has nothing to do, a job arrives, or a held one goes on."""
        before, since_s = -1, time.monotonic()
        while self.runs_done < runs or self.live:
            time.sleep(0.002)
            with self.lock:
                self.is_over = self.runs_done >= runs
                if self.runs_done == before:
                    assert time.monotonic() < since_s + 60, "the loop stands still"
                    self.now_s += STEP_S[1]
                    self.arrive()
                    for case in list(self.live.values()):
                        if case.is_held:
                            self.go_on(case)
                else:
                    before, since_s = self.runs_done, time.monotonic()


@pytest.mark.parametrize(
    ("mode", "runs", "seed"),
    [("in-flight", 1500, 1), ("in-flight", 800, 2), ("whole", 800, 3), ("whole-leave-early", 800, 4)],
)
def test_whatever_happens_every_job_is_answered_once_with_the_portraits_that_it_has_alone(
    mode: str, runs: int, seed: int, kinds: list[Kind], caplog: pytest.LogCaptureFixture
) -> None:
    world = World(seed, kinds)
    with label_loop(mode, world, TINY, clock=world.clock) as (_, loop):
        world.loop = loop
        world.admission = Admission(world.rows, Limits(slots=80, nbytes=10**9), loop.pace, world.clock)
        world.go_on_by_itself(runs)
        assert (world.admission.queued_requests, world.admission.admitted_bytes) == (0, 0), "a lease is left"
        assert loop.used_rows == 0
    assert "AssertionError" not in caplog.text  # which a callback's caller logs
    assert len(world.done) > runs // 8
    for case in world.done:
        assert len(case.outcomes) == 1
        check_outcome(case)
        assert case.steps == list(range(1, len(case.steps) + 1))
        assert case.ended_s - case.arrived_s < LONGEST_S
    kinds_of_end = {type(case.outcomes[0]) for case in world.done}
    assert {DenoiseResult, Cancelled, DeadlineMissed, IcPortraitError} <= kinds_of_end, "too little has happened"
    labels = [label for label, _ in world.rows_of_jobs]
    assert len(labels) - len(set(labels)) > 5, "too few jobs have changed their rows"


def check_outcome(case: Case) -> None:
    outcome = case.outcomes[0]
    if isinstance(outcome, DenoiseResult):
        assert not case.is_nan
        assert case.has_ended
        assert outcome.portrait_latent.tobytes() == case.kind.portraits
    elif isinstance(outcome, Cancelled):
        assert case.is_cancelled
    elif isinstance(outcome, DeadlineMissed):
        assert case.deadline_s is not None
    elif "NaN" in str(outcome):
        assert case.is_nan
    else:
        assert case.has_seen_failure, str(outcome)
