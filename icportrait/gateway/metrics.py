"""Prometheus' metrics: what Triton and the loop count, from Triton's own endpoint, and what the gateway counts."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable, Iterable, Mapping
from pathlib import Path

logger = logging.getLogger(__name__)
HEADER_BYTES = 8192
HEADER_TIMEOUT_S = 10.0
TRITON_TIMEOUT_S = 2.0
CONNECTIONS = 32
PREFIX = "icportrait_gateway_"
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
Sample = tuple[str, str, str, dict[str, str], float]
"""A metric's name without the prefix, kind, description, labels and value."""


def to_text(samples: Iterable[Sample]) -> str:
    """Write samples in Prometheus' text format; samples of one metric stand together."""
    lines, before = [], ""
    for name, kind, description, labels, value in samples:
        if name != before:
            lines += [f"# HELP {PREFIX}{name} {description}", f"# TYPE {PREFIX}{name} {kind}"]
        before = name
        inner = ",".join(f'{label}="{_escaped(text)}"' for label, text in labels.items())
        lines.append(f"{PREFIX}{name}{f'{{{inner}}}' if inner else ''} {_number(value)}")
    return "\n".join(lines) + "\n"


def _number(value: float) -> str:
    """Write a value with all its digits, because a counter of bytes has many."""
    return str(int(value)) if value == int(value) else repr(value)


def _escaped(text: str) -> str:
    """Write a label's value as Prometheus reads it, because the name of a key may have any character."""
    return text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")


def by_device(texts: Mapping[str | None, str]) -> str:
    """Join the texts of several devices' Tritons: each sample gets the label ``device``. That of None stays as it is.

    Samples of one metric stand together, as Prometheus asks for.
    """
    if None in texts:
        return texts[None]
    metrics: dict[str, dict[str, None]] = {}
    for device, text in texts.items():
        lines: dict[str, None] = {}
        for line in text.splitlines():
            if line.startswith("# HELP "):
                lines = metrics.setdefault(line, {})
            elif line.startswith("#"):
                lines[line] = None
            else:
                name, brace, rest = line.partition("{")
                name, _, value = (name, "", rest) if brace else line.partition(" ")
                lines[f'{name}{{device="{device}"' + (f",{value}" if brace else f"}} {value}")] = None
    return "".join(f"{line}\n" for head, lines in metrics.items() for line in (head, *lines))


async def triton_text(path: Path) -> str:
    """Read Triton's metrics endpoint, a Unix socket; return nothing where it doesn't answer."""
    try:
        async with asyncio.timeout(TRITON_TIMEOUT_S):
            reader, writer = await asyncio.open_unix_connection(path)
            with contextlib.closing(writer):
                writer.write(b"GET /metrics HTTP/1.0\r\n\r\n")
                answer = await reader.read()
    except (OSError, TimeoutError):
        return ""
    header, _, body = answer.partition(b"\r\n\r\n")
    return body.decode(errors="replace") if b" 200 " in header.partition(b"\r\n")[0] else ""


class MetricsDoor:
    """``GET /metrics`` over HTTP, one answer a connection."""

    def __init__(self, text: Callable[[], Awaitable[str]]) -> None:
        """Prepare.

        Args:
            text: gives the body.
        """
        self._text = text
        self._server: asyncio.Server | None = None
        self._open: dict[asyncio.StreamWriter, None] = {}

    async def start(self, host: str, port: int) -> None:
        """Begin to listen.

        Raises:
            OSError: the address can't be listened on.
        """
        self._server = await asyncio.start_server(self._serve, host, port, limit=HEADER_BYTES)

    async def close(self) -> None:
        """Stop listening."""
        if self._server:
            self._server.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if len(self._open) >= CONNECTIONS:
            longest = next(iter(self._open))
            del self._open[longest]
            longest.transport.abort()
        self._open[writer] = None
        try:
            async with asyncio.timeout(HEADER_TIMEOUT_S):
                header = await reader.readuntil(b"\r\n\r\n")
                method, path, *_ = header.split(b" ", 2)
                found = method == b"GET" and path.partition(b"?")[0] == b"/metrics"
                body = (await self._text() if found else "only GET /metrics\n").encode()
                status = "200 OK" if found else "404 Not Found"
                head = f"HTTP/1.1 {status}\r\nContent-Type: {CONTENT_TYPE}\r\nContent-Length: {len(body)}\r\n"
                writer.write(head.encode() + b"Connection: close\r\n\r\n" + body)
                await writer.drain()
        except (OSError, EOFError, ValueError, TimeoutError, asyncio.LimitOverrunError):
            pass
        finally:
            self._open.pop(writer, None)
            writer.close()
