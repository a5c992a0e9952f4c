"""The fuzz's own checks: each finds the fault that it is for."""

from __future__ import annotations

import json
import random
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tritonclient.grpc import service_pb2

from icportrait.pictures.imaging import encode_picture
from tests.fuzz.callers import Answer
from tests.fuzz.cases import Case
from tests.fuzz.grpc_cases import HEALTH, INFER, STREAM, method
from tests.fuzz.judge import Judge
from tests.fuzz.watch import SHARED, Memory, Watched, growth

SIDE = 16
PICTURE = encode_picture(np.zeros((SIDE, SIDE, 3), np.uint8), "png")
OTHER = encode_picture(np.ones((SIDE, SIDE, 3), np.uint8), "png")
UNARY = Case("0-0", "grpc", "a good request", ("OK",), INFER, portraits=1, output_format="png", seeds=(7,))
STREAMED = Case("0-1", "grpc", "a stream", ("OK",), STREAM, messages=(b"0", b"1"), verdicts=("good", "wrong"),
                seeds=(7, None))  # fmt: skip
LATE = "UNAVAILABLE: deadline_ms: 10 have passed"


def made(*images: bytes, request_id: str = "", **metadata: Any) -> Any:
    """Make a gRPC answer, with metadata that are right where the test gives no others."""
    answer = service_pb2.ModelInferResponse(id=request_id)
    told = json.dumps({"seed": 7, "num_portraits": len(images), **metadata}).encode()
    for name, elements in {"image": images, "metadata": (told,)}.items():
        answer.outputs.add(name=name, datatype="BYTES", shape=[len(elements)])
        answer.raw_output_contents.append(b"".join(len(each).to_bytes(4, "little") + each for each in elements))
    return answer


def streamed(request_id: str, answer: Any = None, refusal: str = "") -> bytes:
    answer = answer or service_pb2.ModelInferResponse()
    answer.id, answer.parameters["triton_final_response"].bool_param = request_id, True
    return bytes(service_pb2.ModelStreamInferResponse(infer_response=answer, error_message=refusal).SerializeToString())


def faults(case: Case, *bodies: bytes, code: str = "OK", text: str = "", judge: Judge | None = None) -> str:
    return "; ".join((judge or Judge(SIDE)).faults(case, Answer(code, text, list(bodies))))


def test_a_right_answer_has_no_fault() -> None:
    assert not faults(UNARY, made(PICTURE).SerializeToString())
    assert not faults(STREAMED, streamed("0", made(PICTURE)), streamed("1", refusal="seed: -7, expected 0.."))


@pytest.mark.parametrize(
    ("answer", "fault"),
    [
        (made(), "without a picture"),
        (made(PICTURE, PICTURE), "2 portraits, expected 1"),
        (made(PICTURE, num_portraits=2), "the metadata say 2"),
        (made(PICTURE, seed=8), "expected seed 7"),
        (made(encode_picture(np.zeros((8, 8, 3), np.uint8), "png")), "of (8, 8) pixels"),
        (made(encode_picture(np.zeros((SIDE, SIDE, 3), np.uint8), "webp")), "is a webp"),
        (made(PICTURE.replace(b"trainedAlgorithmicMedia", b"trainedAlgorithmicMedium")), "isn't marked|can't be read"),
        (made(PICTURE[:-40]), "can't be read"),
    ],
)
def test_a_wrong_portrait_is_found(answer: Any, fault: str) -> None:
    assert any(each in faults(UNARY, answer.SerializeToString()) for each in fault.split("|"))


def test_an_answer_that_comes_again_with_other_bytes_is_found() -> None:
    judge, case = Judge(SIDE), Case("0-2", "grpc", "the same again", ("OK",), INFER, same_as="seed 0")
    assert not faults(case, made(PICTURE).SerializeToString(), judge=judge)
    assert "other bytes" in faults(case, made(OTHER).SerializeToString(), judge=judge)


@pytest.mark.parametrize(
    ("code", "text", "fault"),
    [
        ("INTERNAL", "the server failed", "answered INTERNAL"),
        ("INVALID_ARGUMENT", "", "says nothing"),
        ("INVALID_ARGUMENT", "steps: 0", "doesn't name 'seed'"),
        ("INVALID_ARGUMENT", "seed: ValueError('x')", "the server's inside"),
        ("INVALID_ARGUMENT", "seed: " + "x" * 800, "of 806 characters"),
    ],
)
def test_a_wrong_refusal_is_found(code: str, text: str, fault: str) -> None:
    case = Case("0-3", "grpc", "a wrong option", ("INVALID_ARGUMENT",), INFER, names="seed")
    assert fault in faults(case, code=code, text=text)


@pytest.mark.parametrize(
    ("first", "second", "fault"),
    [
        (streamed("0", service_pb2.ModelInferResponse()), None, "without a picture"),
        (streamed("0", made(PICTURE, seed=8)), None, "expected seed 7"),
        (streamed("0", refusal=LATE), None, "expected OK"),
        (None, streamed("1", made(PICTURE)), "was served"),
        (None, streamed("1", refusal="RESOURCE_EXHAUSTED: the queue is full"), "expected INVALID_ARGUMENT"),
        (None, streamed("1", refusal=LATE), "expected INVALID_ARGUMENT"),
        (None, streamed("0", made(PICTURE)), "after its end"),
        (None, b"", "1 ends for 2 requests"),
    ],
)
def test_a_wrong_answer_on_a_stream_is_found(first: bytes | None, second: bytes | None, fault: str) -> None:
    right = streamed("0", made(PICTURE)), streamed("1", refusal="seed: -7, expected 0..")
    bodies = [first or right[0], right[1] if second is None else second]
    assert fault in faults(STREAMED, *filter(None, bodies))


def test_a_deadline_ends_with_its_own_refusal_only() -> None:
    case = Case("0-4", "grpc", "a stream", ("OK",), STREAM, messages=(b"",), verdicts=("deadline",), seeds=(None,))
    assert not faults(case, streamed("0", refusal=LATE))
    assert "expected" in faults(case, streamed("0", refusal="UNAVAILABLE: the queue is full"))


def test_a_right_call_of_a_small_method_must_be_answered() -> None:
    cases = [method(str(number), random.Random(number), None, ()) for number in range(400)]  # type: ignore[arg-type]
    answered = {case.path for case in cases if case.expects == ("OK",)}
    assert HEALTH in answered and len(answered) == 8


@pytest.fixture
def watched(tmp_path: Path) -> Iterator[tuple[Watched, subprocess.Popen[bytes], Path]]:
    (log := tmp_path / "log").write_text("2026-01-01 ERROR before\n")
    with subprocess.Popen(["sleep", "600"]) as process:
        try:
            yield Watched(process.pid, log), process, log
        finally:
            process.kill()


def test_a_process_that_has_ended_is_found_though_nobody_waited_for_it(
    watched: tuple[Watched, subprocess.Popen[bytes], Path],
) -> None:
    server, process, _ = watched
    assert server.ended() == []
    process.kill()
    while not (found := server.ended()):
        pass
    assert found == [f"process {process.pid} (gateway) has ended"]


@pytest.mark.parametrize(
    ("line", "is_fault"),
    [
        ("E1127 05:11:06.1 9 infer_handler.cc:70] failed", True),
        ("2026-01-01 ERROR icportrait.gateway.engine: portrait_pipeline failed", True),
        ("ERROR icportrait.gateway.engine: a message isn't what it should be; the control line is closed", True),
        ("ERROR icportrait.serving.control: a message on the control line isn't what it should be", False),
        ("2026-01-01 INFO icportrait: E1127 is no error", False),
    ],
)
def test_a_line_of_the_log_is_a_fault_or_not(
    watched: tuple[Watched, subprocess.Popen[bytes], Path], line: str, is_fault: bool
) -> None:
    server, _, log = watched
    with log.open("a") as file:
        file.write(line + "\n")
    assert bool(server.log_faults()) == is_fault


def test_a_process_that_grows_is_found_and_one_that_is_new() -> None:
    before = [Memory("gateway", 1, 100_000), Memory("pictures", 2, 50_000), Memory("pictures", 3, 60_000)]
    after = [Memory("gateway", 1, 103_001), Memory("pictures", 4, 61_800), Memory("denoise", 5, 1)]
    assert [is_more for _, _, is_more in growth(before, after)] == [True, False, True]
    assert not any(is_more for _, _, is_more in growth(before, before))


@pytest.mark.parametrize(("grown_bytes", "is_more"), [(3 << 20, False), (4 << 20, True)])
def test_shared_memory_may_grow_by_a_step_for_each_model(grown_bytes: int, is_more: bool) -> None:
    before, after = [Memory(SHARED, 0, 5 << 20)], [Memory(SHARED, 0, (5 << 20) + grown_bytes)]
    assert growth(before, after) == [(after[0], before[0], is_more)]


def test_shared_memory_is_read_apart_from_a_processs_own() -> None:
    code = """
import mmap, sys
with open(sys.argv[1], "r+b") as file, mmap.mmap(file.fileno(), 0) as shared:
    shared[:] = bytes(1 << 23)
    input("written")
"""
    with tempfile.NamedTemporaryFile(dir=SHARED) as region:
        region.truncate(1 << 23)
        command = [sys.executable, "-S", "-c", code, region.name]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
            assert process.stdout and process.stdout.read(1)
            read = {each.part: each.nbytes for each in Watched(process.pid, None).memory()}
            process.kill()
    assert read[SHARED] == 1 << 23 and 1 << 20 < read["gateway"] < 1 << 24
