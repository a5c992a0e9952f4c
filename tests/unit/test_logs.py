"""The gateway's log and its access log, on real files."""

from __future__ import annotations

import io
import json
import logging
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from icportrait.errors import IcPortraitError
from icportrait.gateway import logs
from icportrait.gateway.logs import AccessLog, JsonFormatter, TextFormatter, begin_logs
from icportrait.gateway.records import CURRENT, Record


@pytest.fixture
def request_() -> Iterator[Record]:
    token = CURRENT.set(record := Record("http", request_id="mine-1", code="200"))
    yield record
    CURRENT.reset(token)


@pytest.fixture
def written() -> Iterator[tuple[logging.Logger, io.StringIO, logging.Handler]]:
    handler = logging.StreamHandler(text := io.StringIO())
    logger = logging.getLogger("icportrait.test")
    logger.propagate = False
    logger.addHandler(handler)
    yield logger, text, handler
    logger.removeHandler(handler)


def test_a_json_line_has_the_requests_id_and_the_traceback(
    request_: Record, written: tuple[logging.Logger, io.StringIO, logging.Handler]
) -> None:
    logger, text, handler = written
    handler.setFormatter(JsonFormatter())
    try:
        raise ValueError("two\nlines")
    except ValueError:
        logger.exception("it %s", "failed")
    (line,) = map(json.loads, text.getvalue().splitlines())
    assert (line["level"], line["logger"], line["message"]) == ("error", "icportrait.test", "it failed")
    assert line["request_id"] == "mine-1" and "ValueError: two" in line["traceback"]


def test_a_line_of_text_has_the_requests_id_where_there_is_one(
    request_: Record, written: tuple[logging.Logger, io.StringIO, logging.Handler]
) -> None:
    logger, text, handler = written
    handler.setFormatter(TextFormatter())
    logger.warning("a")
    CURRENT.set(None)
    logger.warning("b")
    first, second = text.getvalue().splitlines()
    assert first.endswith("WARNING icportrait.test: a [request mine-1]") and second.endswith(": b")


@pytest.mark.parametrize(("level", "ours"), [("debug", True), ("info", False)])
def test_the_level_is_this_projects_and_others_stay_at_info(level: str, ours: bool) -> None:
    root, own = logging.getLogger(), logging.getLogger("icportrait")
    before, handlers = (root.level, own.level), root.handlers[:]
    try:
        begin_logs(level, "json")
        assert own.isEnabledFor(logging.DEBUG) is ours
        assert not logging.getLogger("grpc").isEnabledFor(logging.DEBUG)
    finally:
        root.setLevel(before[0])
        own.setLevel(before[1])
        root.handlers[:] = handlers


def test_a_file_that_was_moved_away_is_opened_anew(tmp_path: Path, request_: Record) -> None:
    log = AccessLog(str(tmp_path / "access.log"))
    log.add(request_)
    while not (tmp_path / "access.log").read_text().endswith("\n"):
        pass
    (tmp_path / "access.log").rename(tmp_path / "access.log.1")
    log.add(request_)
    log.close()
    for name in ("access.log", "access.log.1"):
        (line,) = map(json.loads, (tmp_path / name).read_text().splitlines())
        assert line["request_id"] == "mine-1"
    assert log.lost == 0


def test_what_a_full_disk_does_not_take_is_counted(request_: Record) -> None:
    log = AccessLog("/dev/full")
    for _ in range(3):
        log.add(request_)
    log.close()
    assert log.lost == 3


def test_requests_do_not_wait_for_a_disk_that_hangs(
    tmp_path: Path, request_: Record, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logs, "MOST_LINES", 2)
    log = AccessLog(str(tmp_path / "access.log"))
    hangs, goes_on = threading.Event(), threading.Event()

    def hang(record: logging.LogRecord) -> None:
        hangs.set()
        goes_on.wait(30)

    monkeypatch.setattr(log._handler, "handle", hang)
    log.add(request_)
    assert hangs.wait(30)
    for _ in range(5):
        log.add(request_)
    assert log.lost == 3
    goes_on.set()
    log.close()


def test_a_place_that_can_not_be_written_is_told_by_its_setting(tmp_path: Path) -> None:
    with pytest.raises(IcPortraitError, match=r"^access_log: .*/none/a: No such file or directory$"):
        AccessLog(str(tmp_path / "none" / "a"))
