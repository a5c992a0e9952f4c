"""A stream's previews and progress: what a request waits for, and that no other does."""

from __future__ import annotations

import queue
import threading
import time
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from icportrait.control import Message, Peer
from icportrait.errors import Cancelled, DeadlineMissed
from icportrait.request import PortraitRequest
from tests.label_slots import BASE, alone, label_batcher, labelled, submit
from tests.stage_front import Front, metric, open_stage, until

STREAM = replace(BASE, num_inference_steps=10, is_streamed=True)
PREVIEWED = replace(STREAM, preview_every=3)


def steps_said(front: Front) -> list[int]:
    messages = front.messages()
    assert all((message["op"], message["key"], message["total_steps"]) == ("step", "a", 10) for message in messages)
    return [message["step"] for message in messages]


def run(front: Front, request: PortraitRequest, label: float = 1.0) -> queue.SimpleQueue[tuple[Any, bool]]:
    front.lease("a", request)
    return front.submit("a", request, label)


def expected_previews(request: PortraitRequest, label: float) -> dict[int, np.ndarray]:
    """What the loop says that every step amounts to."""
    found: dict[int, np.ndarray] = {}
    with label_batcher() as (_, batcher):
        submit(
            batcher,
            labelled(request, label),
            lambda step, result: found.setdefault(step, result().portrait_latent),
        ).result(60)
    return found


def test_a_stream_is_told_of_every_step_but_the_last() -> None:
    with open_stage() as (_, stage), Front(stage) as front:
        assert run(front, STREAM).get(timeout=10)[1]
        assert steps_said(front) == list(range(1, 10))
        front.release("a", {})


def test_who_does_not_stream_is_told_of_none() -> None:
    with open_stage() as (_, stage), Front(stage) as front:
        assert run(front, replace(PREVIEWED, is_streamed=False)).get(timeout=10)[1]
        assert steps_said(front) == [] and metric(stage, "previews_total") == 0


def test_every_third_step_is_a_preview_and_the_request_waits_until_the_one_before_is_seen() -> None:
    """It alone: another that came later goes by."""
    previews = expected_previews(PREVIEWED, 2.0)
    with open_stage() as (slots, stage), Front(stage) as front:
        answers = run(front, PREVIEWED, 2.0)
        for seen, step in enumerate((3, 6, 9)):
            outputs, is_last = answers.get(timeout=10)
            assert not is_last and front.report(outputs)["step"] == step
            assert np.array_equal(outputs["portrait_latent"], previews[step])
            assert metric(stage, "previews_total") == seen + 1
            if step < 9:
                until(lambda: slots.steps.count(1) == 3 * (seen + 2))  # noqa: B023 - at the next preview
                other = replace(BASE, seed=step)
                front.lease("b", other)
                outputs, is_last = front.submit("b", other, 5.0).get(timeout=10)
                assert is_last and np.array_equal(outputs["portrait_latent"], alone(labelled(other, 5.0)))
                front.release("b", {})
                assert slots.steps.count(1) == 3 * (seen + 2) and answers.empty()
                front.say("seen", "a")
        outputs, is_last = answers.get(timeout=10)
        assert is_last and front.report(outputs)["step"] == 10
        assert np.array_equal(outputs["portrait_latent"], alone(labelled(PREVIEWED, 2.0)))
        front.say("seen", "a")
        front.release("a", {})
        assert answers.empty() and metric(stage, "previews_total") == 3


def test_the_last_step_is_the_answer_and_no_preview() -> None:
    with open_stage() as (_, stage), Front(stage) as front:
        answers = run(front, replace(PREVIEWED, preview_every=5))
        steps = [front.report(answers.get(timeout=10)[0])["step"] for _ in range(2)]
        assert steps == [5, 10] and metric(stage, "previews_total") == 1


def test_steps_and_previews_come_in_order_however_soon_previews_are_seen() -> None:
    """While a preview is on its way to the caller, no later step is told: it would overtake the preview."""
    said: list[int] = []

    class Said(Peer):
        def send(self, message: Message) -> bool:
            if message["op"] == "step":
                said.append(message["step"])
            return super().send(message)

    with open_stage() as (_, stage), Front(stage) as front:
        front.peer = Said(front._theirs)

        def see(step: int) -> None:
            said.append(-step)
            front.say("seen", "a")

        def on_answer(outcome: Any, is_last: bool) -> None:
            said.append(front.report(outcome)["step"])
            if not is_last:
                # It is on its way to the caller meanwhile; the loop could go many steps.
                threading.Timer(0.01, see, [said[-1]]).start()

        front.lease("a", PREVIEWED)
        front.submit("a", PREVIEWED, on_answer=on_answer)
        until(lambda: {10, -9} <= set(said))
    # The portraits wait for nobody: whoever decodes them keeps them behind the last preview.
    said.remove(-9)
    steps = list(map(abs, said))
    assert steps == sorted(steps) and [step for step in said if step < 0] == [-3, -6]
    for step, following in ((3, -3), (6, -6), (9, 10)):
        assert said[said.index(step) + 1] == following


def test_two_streams_wait_each_for_its_own_preview() -> None:
    with open_stage() as (_, stage), Front(stage) as front:
        answers = {}
        for key in "ab":
            front.lease(key, PREVIEWED)
            answers[key] = front.submit(key, PREVIEWED)
        for key in "ab":
            assert front.report(answers[key].get(timeout=10)[0])["step"] == 3
        for step in (6, 9, 10):
            front.say("seen", "b")
            assert front.report(answers["b"].get(timeout=10)[0])["step"] == step
        assert answers["a"].empty()
        for step in (6, 9, 10):
            front.say("seen", "a")
            assert front.report(answers["a"].get(timeout=10)[0])["step"] == step


@pytest.mark.parametrize("ends", ["cancel", "deadline", "release"])
def test_nothing_follows_the_last_answer_of_a_request_that_was_held(ends: str) -> None:
    """Its next preview was ready when it ended: whoever sees the one before it asks for none any more."""
    with open_stage() as (slots, stage), Front(stage) as front:
        request = front.arrived_now(replace(PREVIEWED, deadline_ms=60_000 if ends == "deadline" else None))
        answers = run(front, request)
        assert front.report(answers.get(timeout=10)[0])["step"] == 3
        until(lambda: len(slots.steps) == 6)
        if ends == "cancel":
            front.say("cancel", "a")
        elif ends == "release":
            front.release("a")
        else:
            stage._batcher._clock = lambda: request.deadline_s
        outcome, is_last = answers.get(timeout=10)
        assert isinstance(outcome, DeadlineMissed if ends == "deadline" else Cancelled) and is_last
        front.say("seen", "a")
        time.sleep(0.02)
        assert answers.empty() and metric(stage, "previews_total") == 1
        assert len(slots.steps) == 6
        front.release("a")
