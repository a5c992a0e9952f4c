"""A stream's previews and progress: what a request waits for, and that no other does."""

from __future__ import annotations

import queue
import threading
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from icportrait.errors import Cancelled, DeadlineMissed
from icportrait.request import PortraitRequest
from tests.label_slots import BASE, alone, label_loop, labelled, submit
from tests.stage_front import Front, metric, open_stage, until

STREAM = replace(BASE, num_inference_steps=10, is_streamed=True)
PREVIEWED = replace(STREAM, preview_every=3)


def steps_said(front: Front) -> list[int]:
    """Return the steps that came of ``a``; a preview's step is negative."""
    messages = front.messages()
    assert all((message["key"], message["total_steps"]) == ("a", 10) for message in messages)
    return [message["step"] if message["op"] == "step" else -message["step"] for message in messages]


def run(front: Front, request: PortraitRequest, label: float = 1.0) -> queue.SimpleQueue[Any]:
    front.lease("a", request)
    return front.submit("a", request, label)


def next_preview(front: Front) -> dict[str, Any]:
    """Return the next preview; skip the steps on the way to it."""
    while (message := front.message())["op"] != "preview":
        assert message["op"] == "step"
    return message


def expected_previews(request: PortraitRequest, label: float) -> dict[int, np.ndarray]:
    """Return what the loop says that every step amounts to."""
    found: dict[int, np.ndarray] = {}
    with label_loop() as (_, loop):
        submit(
            loop,
            labelled(request, label),
            lambda step, result: found.setdefault(step, result().portrait_latent),
        ).result(60)
    return found


def test_a_stream_is_told_of_every_step_but_the_last() -> None:
    with open_stage() as (_, stage), Front(stage) as front:
        run(front, STREAM).get(timeout=10)
        assert steps_said(front) == list(range(1, 10))
        front.release("a", {})


def test_who_does_not_stream_is_told_of_none() -> None:
    with open_stage() as (_, stage), Front(stage) as front:
        run(front, replace(PREVIEWED, is_streamed=False)).get(timeout=10)
        assert steps_said(front) == [] and metric(stage, "previews_total") == 0


def test_every_third_step_is_a_preview_and_the_request_waits_until_the_one_before_is_seen() -> None:
    """Check that this request alone waits: a later one goes by. Steps are told whether or not a preview was seen."""
    previews = expected_previews(PREVIEWED, 2.0)
    with open_stage() as (slots, stage), Front(stage) as front:
        answers = run(front, PREVIEWED, 2.0)
        for seen, step in enumerate((3, 6, 9)):
            preview = next_preview(front)
            assert preview["step"] == step
            assert np.array_equal(preview["latent"], previews[step])
            assert metric(stage, "previews_total") == seen + 1
            if step < 9:
                until(lambda: slots.steps.count(1) == 3 * (seen + 2))  # noqa: B023 - at the next preview
                other = replace(BASE, seed=step)
                front.lease("b", other)
                outputs = front.submit("b", other, 5.0).get(timeout=10)
                assert np.array_equal(outputs["portrait_latent"], alone(labelled(other, 5.0)))
                front.release("b", {})
                assert slots.steps.count(1) == 3 * (seen + 2) and answers.empty()
                assert steps_said(front) == [step + 1, step + 2]
                front.say("seen", "a")
        outputs = answers.get(timeout=10)
        assert np.array_equal(outputs["portrait_latent"], alone(labelled(PREVIEWED, 2.0)))
        front.say("seen", "a")
        front.release("a", {})
        assert steps_said(front) == [] and metric(stage, "previews_total") == 3


def test_the_last_step_is_the_answer_and_no_preview() -> None:
    with open_stage() as (_, stage), Front(stage) as front:
        run(front, replace(PREVIEWED, preview_every=5)).get(timeout=10)
        assert steps_said(front) == [1, 2, 3, 4, -5, 6, 7, 8, 9] and metric(stage, "previews_total") == 1


def test_steps_and_previews_come_in_order_and_none_is_left_out_however_late_previews_are_seen() -> None:
    with open_stage() as (_, stage), Front(stage) as front:
        answers = run(front, PREVIEWED)
        said = []
        while len(said) < 9:
            message = front.message()
            said.append(message["step"] if message["op"] == "step" else -message["step"])
            if message["op"] == "preview":
                # It is decoded and sent meanwhile; the loop could go many steps.
                threading.Timer(0.01, front.say, ["seen", "a"]).start()
        answers.get(timeout=10)
        assert said == [1, 2, -3, 4, 5, -6, 7, 8, -9]


def test_two_streams_wait_each_for_its_own_preview() -> None:
    with open_stage() as (_, stage), Front(stage) as front:
        answers = {}
        for key in "ab":
            front.lease(key, PREVIEWED)
            answers[key] = front.submit(key, PREVIEWED)

        def previews(key: str, *steps: int) -> None:
            shown = {(message["key"], message["step"]) for message in (next_preview(front) for _ in steps)}
            assert shown == {(key, step) for step in steps}

        assert {next_preview(front)["key"] for _ in range(2)} == {"a", "b"}
        for step in (6, 9):
            front.say("seen", "b")
            previews("b", step)
        answers["b"].get(timeout=10)
        assert answers["a"].empty()
        for step in (6, 9):
            front.say("seen", "a")
            previews("a", step)
        answers["a"].get(timeout=10)


@pytest.mark.parametrize("ends", ["cancel", "deadline", "release"])
def test_nothing_follows_the_last_answer_of_a_request_that_was_held(ends: str) -> None:
    """End the request when its next preview is ready. A caller who sees the one before then asks for no more."""
    with open_stage() as (slots, stage), Front(stage) as front:
        request = front.arrived_now(replace(PREVIEWED, deadline_ms=60_000 if ends == "deadline" else None))
        answers = run(front, request)
        assert next_preview(front)["step"] == 3
        until(lambda: len(slots.steps) == 6)
        if ends == "cancel":
            front.say("cancel", "a")
        elif ends == "release":
            front.release("a")
        else:
            stage._loop._clock = lambda: request.deadline_s
        outcome = answers.get(timeout=10)
        assert isinstance(outcome, DeadlineMissed if ends == "deadline" else Cancelled)
        assert steps_said(front) == [4, 5]
        front.say("seen", "a")
        assert steps_said(front) == [] and metric(stage, "previews_total") == 1
        assert len(slots.steps) == 6
        front.release("a")
