"""The client's streams against a real gRPC server that answers as the streaming model does, without Triton."""

from __future__ import annotations

import gc
import json
import struct
import sys
import threading
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import grpc
import pytest
from icportrait_client import (
    DeadlineExceeded,
    InvalidRequest,
    Metadata,
    Portrait,
    PortraitClient,
    PortraitError,
    Preview,
    Progress,
    RequestCancelled,
    ServerError,
    ServerUnavailable,
)
from icportrait_client.cli import main
from tritonclient.grpc import service_pb2

from tests.unit.test_client import METADATA, PICTURES, FakeTriton, bytes_tensor, serving

FULL = "UNAVAILABLE: the queue is full (64 of 64 slots); retry_after_ms: 340"
WAIT_S = 10


class FakeStreams(FakeTriton):
    """Answers as long as ``release`` is set, and after ``free_steps`` where it isn't."""

    def __init__(self) -> None:
        super().__init__()
        self.images = (b"first", b"second")
        self.steps = 4
        self.free_steps = 1
        self.fails_after: int | None = None
        """The step after which comes ``text``, or ``failure`` where that is set."""
        self.text = ""
        self.lacks: tuple[str, ...] = ()
        """Outputs that no answer has."""
        self.unary_calls = 0
        self.cancelled = threading.Event()
        self.ended = threading.Event()

    def ModelInfer(self, request: Any, context: Any) -> Any:  # noqa: N802 - the service's own name
        self.unary_calls += 1
        return super().ModelInfer(request, context)

    def ModelStreamInfer(self, requests: Iterator[Any], context: Any) -> Iterator[Any]:  # noqa: N802 - likewise
        request = next(requests)
        self.requests.append(request)
        ended: list[bool] = []
        context.add_callback(lambda: (self.ended if ended else self.cancelled).set())
        for step in range(self.steps + 1):
            if step:
                yield self.answer(request, step)
            while step == self.free_steps and not self.release.wait(0.01):
                if not context.is_active():
                    return
            if step == self.fails_after:
                if self.failure:
                    context.abort(*self.failure)
                yield service_pb2.ModelStreamInferResponse(error_message=self.text)
                return
        # As Triton: a stream lasts until its caller has no more requests.
        assert next(requests, None) is None
        ended.append(True)

    def answer(self, request: Any, step: int) -> Any:
        every = self.preview_every(request)
        answer = service_pb2.ModelStreamInferResponse()
        outputs = {"step": (step,), "total_steps": (self.steps,)}
        texts: dict[str, tuple[bytes, ...]] = {}
        if step == self.steps:
            texts = {"image": self.images, "metadata": (self.metadata,)}
        elif every and step % every == 0:
            texts = {"image": tuple(b"%s after %d" % (image, step) for image in self.images)}
        numbers = {name: struct.pack("<i", *values) for name, values in outputs.items()}
        contents = numbers | {name: bytes_tensor(*values) for name, values in texts.items()}
        for name, raw in contents.items():
            if name not in self.lacks:
                datatype, size = ("BYTES", len(texts[name])) if name in texts else ("INT32", 1)
                answer.infer_response.outputs.add(name=name, datatype=datatype, shape=[size])
                answer.infer_response.raw_output_contents.append(raw)
        return answer

    def preview_every(self, request: Any) -> int:
        names = [tensor.name for tensor in request.inputs]
        if "preview_every" not in names:
            return 0
        (every,) = struct.unpack("<i", request.raw_input_contents[names.index("preview_every")])
        return int(every)


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep gRPC from asking a configured proxy for a loopback address."""
    monkeypatch.setenv("no_grpc_proxy", "127.0.0.1")


@pytest.fixture
def triton() -> Iterator[FakeStreams]:
    servicer = FakeStreams()
    with serving(servicer):
        yield servicer


@pytest.fixture
def client(triton: FakeStreams) -> Iterator[PortraitClient]:
    with PortraitClient(triton.url, timeout_s=30, attempts=1) as client:
        yield client


# What comes


def test_every_step_is_told_and_the_last_has_the_portraits(triton: FakeStreams, client: PortraitClient) -> None:
    *steps, portrait = client.stream(**PICTURES)
    assert steps == [Progress(1, 4), Progress(2, 4), Progress(3, 4), Progress(4, 4)]
    assert portrait == Portrait((b"first", b"second"), Metadata.read(METADATA))
    assert triton.requests[0].model_name == "ic_portrait_stream"
    assert list(triton.sent) == ["profile", "reference", "seed"]


def test_previews_come_with_their_steps(triton: FakeStreams, client: PortraitClient) -> None:
    *steps, _ = client.stream(preview_every=2, **PICTURES)
    assert steps == [
        Progress(1, 4),
        Preview(2, 4, (b"first after 2", b"second after 2")),
        Progress(3, 4),
        Progress(4, 4),
    ]
    assert triton.sent["preview_every"] == ("INT32", [1], struct.pack("<i", 2))


def test_an_item_comes_as_soon_as_its_answer(triton: FakeStreams, client: PortraitClient) -> None:
    triton.release.clear()
    with closing(client.stream(**PICTURES)) as answers:
        assert next(answers).step == 1
        triton.release.set()
        *steps, _ = answers
        assert [answer.step for answer in steps] == [2, 3, 4]


def test_options_are_sent_as_by_generate(triton: FakeStreams, client: PortraitClient) -> None:
    options: dict[str, Any] = {"seed": 7, "mask_ratio": 0.5, "scheduler": "ddim", "profile_box": (0, 0, 0.5, 1)}
    client.generate(**PICTURES, **options)
    by_generate = triton.sent
    triton.requests.clear()
    list(client.stream(**PICTURES, **options))
    assert triton.sent == by_generate
    assert len(by_generate) == 6


def test_previews_are_saved_as_portraits_are(tmp_path: Path) -> None:
    assert Preview(1, 2, (b"a",)).save(tmp_path / "a.png") == [tmp_path / "a.png"]
    paths = Preview(1, 2, (b"a", b"b")).save(tmp_path / "b.png")
    assert paths == [tmp_path / "b-1.png", tmp_path / "b-2.png"]
    assert [path.read_bytes() for path in paths] == [b"a", b"b"]


# Mistakes and errors


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"preview_every": 151}, "preview_every: 151, expected 0..150"),
        ({"preview_every": 1.5}, "preview_every: 1.5, expected a whole number of 0..150"),
        ({"seed": -1}, "seed: -1, expected 0.."),
        ({"profile": b""}, "profile: empty"),
    ],
)
def test_a_mistake_is_refused_by_the_call_and_not_sent(
    triton: FakeStreams, client: PortraitClient, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(InvalidRequest) as caught:
        client.stream(**{**PICTURES, **options})
    assert str(caught.value).startswith(message)
    with pytest.raises(TypeError, match="unexpected keyword argument 'encoding'"):
        client.stream(**PICTURES, encoding="base64")  # type: ignore[call-arg]
    assert not triton.requests


@pytest.mark.parametrize("after", [0, 2])
@pytest.mark.parametrize(
    ("text", "error", "message"),
    [
        ("profile: no picture", ServerError, "{url}: UNKNOWN: profile: no picture"),
        ("UNAVAILABLE: stopping", ServerUnavailable, "{url}: UNAVAILABLE: stopping"),
        ("CANCELLED: the caller went away", RequestCancelled, "{url}: the caller went away"),
        ("INTERNAL: its log has the cause", ServerError, "{url}: INTERNAL: its log has the cause"),
        ("Request for unknown model: 'm' is not found", ServerError, "{url}: UNKNOWN: Request for unknown model"),
        ("Server is stopping, scheduler for model has stopped", ServerError, "{url}: UNKNOWN: Server is stopping"),
    ],
)
def test_texts_of_errors_become_exceptions(
    triton: FakeStreams, client: PortraitClient, text: str, error: type[PortraitError], message: str, after: int
) -> None:
    triton.text, triton.fails_after = text, after
    answers = client.stream(**PICTURES)
    assert [next(answers).step for _ in range(after)] == list(range(1, after + 1))
    with pytest.raises(PortraitError) as caught:
        next(answers)
    assert type(caught.value) is error
    assert str(caught.value).startswith(message.format(url=triton.url))


@pytest.mark.parametrize("after", [0, 2])
@pytest.mark.parametrize(
    ("code", "error", "message"),
    [
        ("INVALID_ARGUMENT", InvalidRequest, "what is said"),
        ("UNAVAILABLE", ServerUnavailable, '{url}: no server answers (what is said); "make serve" starts one'),
        ("CANCELLED", RequestCancelled, "{url}: what is said"),
        ("INTERNAL", ServerError, "{url}: INTERNAL: what is said"),
        ("NOT_FOUND", ServerError, "{url}: NOT_FOUND: what is said"),
    ],
)
def test_codes_become_exceptions(
    triton: FakeStreams, client: PortraitClient, code: str, error: type[PortraitError], message: str, after: int
) -> None:
    triton.failure, triton.fails_after = (grpc.StatusCode[code], "what is said"), after
    with pytest.raises(PortraitError) as caught:
        list(client.stream(**PICTURES))
    assert type(caught.value) is error
    assert str(caught.value) == message.format(url=triton.url)


def test_a_full_server_says_when_to_try_again(triton: FakeStreams, client: PortraitClient) -> None:
    triton.text, triton.fails_after = FULL, 0
    with pytest.raises(ServerUnavailable) as caught:
        next(client.stream(**PICTURES))
    assert caught.value.retry_after_ms == 340
    assert str(caught.value) == f"{triton.url}: {FULL}"


def test_no_server() -> None:
    with (
        PortraitClient("127.0.0.1:1", attempts=1) as client,
        pytest.raises(ServerUnavailable, match="no server answers") as caught,
    ):
        next(client.stream(**PICTURES))
    assert caught.value.retry_after_ms is None


def test_time_is_counted_to_the_last_answer(triton: FakeStreams) -> None:
    triton.release.clear()
    with PortraitClient(triton.url, timeout_s=0.5) as client:
        answers = client.stream(**PICTURES)
        assert next(answers).step == 1
        with pytest.raises(DeadlineExceeded, match=r"no answer within 0\.5 s; allow more with timeout_s$"):
            next(answers)
    assert triton.cancelled.wait(WAIT_S)


def test_a_stream_that_ends_without_portraits_is_an_error(triton: FakeStreams, client: PortraitClient) -> None:
    triton.steps, triton.lacks = 3, ("metadata",)
    answers = client.stream(**PICTURES)
    assert [next(answers).step for _ in range(3)] == [1, 2, 3]
    with pytest.raises(ServerError, match="the stream ended without portraits"):
        next(answers)


@pytest.mark.parametrize(
    ("lacks", "message"),
    [("step", "an answer has no step"), ("total_steps", "an answer has no step"), ("image", "has no portraits")],
)
def test_an_answer_that_is_none_of_ours(triton: FakeStreams, client: PortraitClient, lacks: str, message: str) -> None:
    triton.lacks = (lacks,)
    with pytest.raises(ServerError, match=message):
        list(client.stream(**PICTURES))


def test_an_end_that_fails_takes_no_portraits_away(triton: FakeStreams, client: PortraitClient) -> None:
    triton.failure, triton.fails_after = (grpc.StatusCode.UNAVAILABLE, "the connection broke"), 4
    assert isinstance(list(client.stream(**PICTURES))[-1], Portrait)


# Leaving early


def leave_by_break(client: PortraitClient) -> None:
    for _ in client.stream(**PICTURES):
        break


def leave_by_closing(client: PortraitClient) -> None:
    with closing(client.stream(**PICTURES)) as answers:
        next(answers)


def leave_by_interrupt(client: PortraitClient) -> None:
    with pytest.raises(KeyboardInterrupt), closing(client.stream(**PICTURES)) as answers:
        for _ in answers:
            raise KeyboardInterrupt


@pytest.mark.parametrize("leave", [leave_by_break, leave_by_closing, leave_by_interrupt])
def test_leaving_early_cancels_on_the_server(triton: FakeStreams, client: PortraitClient, leave: Any) -> None:
    triton.release.clear()
    leave(client)
    gc.collect()
    assert triton.cancelled.wait(WAIT_S)


def test_one_left_early_disturbs_no_other(triton: FakeStreams, client: PortraitClient) -> None:
    triton.release.clear()
    kept, left = client.stream(**PICTURES), client.stream(**PICTURES)
    assert (next(kept).step, next(left).step) == (1, 1)
    left.close()
    assert triton.cancelled.wait(WAIT_S)
    triton.release.set()
    *steps, _ = kept
    assert [answer.step for answer in steps] == [2, 3, 4]


def test_what_has_ended_is_not_cancelled(triton: FakeStreams, client: PortraitClient) -> None:
    triton.free_steps = triton.steps
    triton.release.clear()
    for answer in client.stream(**PICTURES):
        if isinstance(answer, Portrait):
            # The server takes its time to end the stream.
            threading.Timer(0.2, triton.release.set).start()
    assert triton.ended.wait(WAIT_S)
    assert not triton.cancelled.is_set()


def test_nothing_is_sent_before_the_first_item(triton: FakeStreams, client: PortraitClient) -> None:
    client.stream(**PICTURES).close()
    list(client.stream(**PICTURES))
    assert len(triton.requests) == 1


def test_closing_the_client_cancels(triton: FakeStreams) -> None:
    triton.release.clear()
    with PortraitClient(triton.url) as client:
        answers, later = client.stream(**PICTURES), client.stream(**PICTURES)
        next(answers)
    with pytest.raises(RequestCancelled):
        next(answers)
    assert triton.cancelled.wait(WAIT_S)
    with pytest.raises(PortraitError, match="the client is closed"):
        next(later)
    with pytest.raises(PortraitError, match="the client is closed"):
        client.stream(**PICTURES)


# The command


@pytest.fixture
def command(triton: FakeStreams, tmp_path: Path) -> list[str]:
    """Return the command up to OUT, which is ``out.png`` in ``tmp_path``."""
    (tmp_path / "in.jpg").write_bytes(PICTURES["profile"])
    pictures = [f"--{name}={tmp_path / 'in.jpg'}" for name in ("profile", "reference")]
    return ["generate", *pictures, "--url", triton.url, "-o", str(tmp_path / "out.png")]


def written(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*.png"))}


def test_without_a_flag_the_call_is_unary(triton: FakeStreams, command: list[str]) -> None:
    assert main(command) == 0
    assert (triton.unary_calls, triton.requests[0].model_name) == (1, "ic_portrait")


def test_progress_is_lines_in_a_log(
    triton: FakeStreams, command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    triton.steps = 10
    assert main([*command, "--progress", "--json"]) == 0
    out, err = capsys.readouterr()
    assert err.splitlines() == [*(f"step  {step} of 10" for step in range(1, 10)), "step 10 of 10"]
    paths = [str(tmp_path / f"out-{number}.png") for number in (1, 2)]
    assert json.loads(out) == {"files": paths, **METADATA}
    assert written(tmp_path) == {"out-1.png": b"first", "out-2.png": b"second"}
    assert not triton.unary_calls


def test_progress_is_one_line_on_a_terminal(
    command: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    assert main([*command, "--progress"]) == 0
    assert capsys.readouterr().err == "".join(
        f"[{'#' * 6 * step:24}] step {step} of 4" + ("\n" if step == 4 else "\r") for step in range(1, 5)
    )


def test_the_latest_preview_lies_beside_the_output(
    triton: FakeStreams, command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    triton.images = (b"only",)
    triton.steps = 5
    assert main([*command, "--preview-every", "2"]) == 0
    assert not capsys.readouterr().err
    assert written(tmp_path) == {"out.png": b"only", "out-preview.png": b"only after 4"}


def test_several_previews_are_numbered(command: list[str], tmp_path: Path) -> None:
    assert main([*command, "--preview-every", "3"]) == 0
    assert written(tmp_path) == {
        "out-1.png": b"first",
        "out-2.png": b"second",
        "out-preview-1.png": b"first after 3",
        "out-preview-2.png": b"second after 3",
    }


def test_a_range_is_the_contracts(triton: FakeStreams, command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*command, "--preview-every", "151"]) == 1
    assert capsys.readouterr().err == "error: preview_every: 151, expected 0..150\n"
    with pytest.raises(SystemExit):
        main([*command, "--preview-every", "some"])
    assert not triton.requests


def test_an_error_on_the_way_is_one_line_and_no_output(
    triton: FakeStreams, command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    triton.text, triton.fails_after = FULL, 1
    assert main([*command, "--progress"]) == 1
    assert capsys.readouterr().err == f"step 1 of 4\nerror: {triton.url}: {FULL}\n"
    assert not written(tmp_path)


def test_an_interrupt_cancels_on_the_server(
    triton: FakeStreams, command: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    triton.release.clear()
    monkeypatch.setattr(Preview, "save", interrupted)
    assert main([*command, "--preview-every", "1"]) == 130
    assert capsys.readouterr().err == "error: interrupted\n"
    assert triton.cancelled.wait(WAIT_S)
