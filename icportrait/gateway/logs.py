"""The gateway's own log, as text or JSON, and the access log, a line for each answer."""

from __future__ import annotations

import contextlib
import json
import logging
import queue
import threading
from datetime import UTC, datetime
from logging.handlers import WatchedFileHandler

from icportrait.errors import IcPortraitError
from icportrait.gateway.records import CURRENT, Record, access_line

LEVELS = ("debug", "info", "warning", "error")
FORMATS = ("text", "json")
ON_STANDARD_ERROR = "-"
MOST_LINES = 10_000
"""Lines that may wait for a disk; further ones are lost and counted."""
CLOSE_TIMEOUT_S = 2.0


class TextFormatter(logging.Formatter):
    """Writes a record as a line of text, with the id of the request that it is about."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)s %(name)s: %(message)s")

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802
        request = CURRENT.get()
        return super().formatMessage(record) + (f" [request {request.request_id}]" if request else "")


class JsonFormatter(logging.Formatter):
    """Writes a record as a JSON object on one line, a traceback included."""

    def format(self, record: logging.LogRecord) -> str:
        line = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        if request := CURRENT.get():
            line["request_id"] = request.request_id
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line)


def begin_logs(level: str, form: str) -> None:
    """Send this process's log to standard error.

    Args:
        level: one of ``LEVELS``; other packages' logs have ``info`` at the least.
        form: one of ``FORMATS``.
    """
    handler = logging.StreamHandler()
    handler.setFormatter(JsonFormatter() if form == "json" else TextFormatter())
    number = logging.getLevelNamesMapping()[level.upper()]
    logging.basicConfig(level=max(number, logging.INFO), handlers=[handler], force=True)
    logging.getLogger("icportrait").setLevel(number)


class AccessLog:
    """Writes lines on a thread of its own, because no request may wait for a disk."""

    def __init__(self, place: str) -> None:
        """Begin to write.

        Args:
            place: a file, which is appended to, and opened anew once it was moved away; ``-`` is standard error.

        Raises:
            IcPortraitError: the file can't be opened; names the setting.
        """
        self.lost = 0
        """Lines that couldn't be written."""
        try:
            handler = logging.StreamHandler() if place == ON_STANDARD_ERROR else WatchedFileHandler(place)
        except OSError as error:
            raise IcPortraitError(f"access_log: {place}: {error.strerror}") from error
        handler.handleError = self._lose  # type: ignore[method-assign,assignment]
        self._handler: logging.Handler = handler
        self._lines: queue.Queue[logging.LogRecord | None] = queue.Queue(MOST_LINES)
        self._thread = threading.Thread(target=self._write, name="access-log", daemon=True)
        self._thread.start()

    def add(self, record: Record) -> None:
        """Write a record's line."""
        try:
            self._lines.put_nowait(logging.makeLogRecord({"msg": access_line(record)}))
        except queue.Full:
            self.lost += 1

    def close(self) -> None:
        """Write the lines that wait, within ``CLOSE_TIMEOUT_S``."""
        try:
            self._lines.put(None, timeout=CLOSE_TIMEOUT_S)
        except queue.Full:
            return
        self._thread.join(CLOSE_TIMEOUT_S)

    def _write(self) -> None:
        while line := self._lines.get():
            try:
                self._handler.handle(line)
            except OSError:  # the file was moved away, and can't be opened anew
                self._lose(line)
        with contextlib.suppress(OSError):
            self._handler.close()

    def _lose(self, _: logging.LogRecord) -> None:
        self.lost += 1
