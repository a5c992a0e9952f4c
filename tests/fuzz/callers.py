"""Send cases over real sockets, and note all that comes back."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from urllib.parse import unquote

import grpc
import h11
import hpack
from hyperframe.exceptions import HyperframeError
from hyperframe.frame import DataFrame, Frame, GoAwayFrame, HeadersFrame, RstStreamFrame

from icportrait.serving.control import LENGTH, frame
from tests.fuzz.cases import GONE, WAITS, Case
from tests.fuzz.control_cases import HELLO, LAST

CHANNELS = 8
NO_LIMIT = [
    ("grpc.max_receive_message_length", -1),
    ("grpc.max_send_message_length", -1),
    ("grpc.enable_http_proxy", 0),
]
LINE_TIMEOUT_S = 30.0


@dataclass
class Answer:
    """Answer as a caller got it."""

    code: str
    """gRPC's code, HTTP's status, ``GONE`` or ``WAITS``; a control line's pong is ``OK``."""
    text: str = ""
    """Text of a refusal."""
    bodies: list[bytes] = field(default_factory=list)
    """Messages, or one body."""
    headers: dict[str, str] = field(default_factory=dict)
    faults: list[str] = field(default_factory=list)
    """Faults that no case may bring about, such as a second answer."""


class Callers:
    """Connections to one server."""

    def __init__(self, grpc_url: str, http_url: str, control_path: Callable[[], Path | None]) -> None:
        self._grpc, self._http, self._control_path = grpc_url, http_url, control_path
        self._channels: list[grpc.aio.Channel] = []
        self._sent = 0

    async def __aenter__(self) -> Callers:
        options = [*NO_LIMIT, ("grpc.use_local_subchannel_pool", 1)]
        self._channels = [grpc.aio.insecure_channel(self._grpc, options) for _ in range(CHANNELS)]
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await asyncio.gather(*(channel.close() for channel in self._channels))

    async def send(self, case: Case) -> Answer:
        """Send a case, and wait for its answer."""
        doors = {"grpc": self._call, "frames": self._frames, "http": self._request, "control": self._control}
        return await doors[case.door](case)

    # gRPC.

    async def _call(self, case: Case) -> Answer:
        self._sent += 1
        channel, answer = self._channels[self._sent % CHANNELS], Answer("OK")
        options = {
            "metadata": case.headers,
            "timeout": case.timeout_s,
            "compression": grpc.Compression.Gzip if case.compression else None,
        }
        is_stream = case.path.endswith("/ModelStreamInfer")
        try:
            if is_stream:
                call = channel.stream_stream(case.path)(_each(case.messages), **options)
            else:
                call = channel.unary_unary(case.path)(case.messages[0], **options)
        except (ValueError, TypeError) as error:
            answer.faults.append(f"the library refuses to send it: {error}")
            return answer
        leaving = (
            asyncio.get_running_loop().call_later(case.leaves_after_s, call.cancel)
            if case.leaves_after_s is not None
            else None
        )
        try:
            if is_stream:
                async for message in call:
                    answer.bodies.append(message)
            else:
                answer.bodies.append(await call)
        except grpc.aio.AioRpcError as error:
            answer.code, answer.text = error.code().name, error.details() or ""
        except asyncio.CancelledError:
            if leaving is None:
                raise
            answer.code = GONE
        finally:
            if leaving:
                leaving.cancel()
        if case.leaves_after_s is not None and answer.code == "CANCELLED":
            answer.code = GONE
        return answer

    async def _frames(self, case: Case) -> Answer:
        host, _, port = self._grpc.rpartition(":")
        reader, writer = await asyncio.open_connection(host, int(port))
        answer, decoder, data = Answer(GONE), hpack.Decoder(), b""
        ends, body = 0, b""
        try:
            with contextlib.suppress(OSError):
                for piece in case.messages:
                    writer.write(piece)
                    await writer.drain()
            with contextlib.suppress(OSError, asyncio.IncompleteReadError, TimeoutError):
                # A broken stream may leave a connection open, and nothing more comes.
                async with asyncio.timeout(8):
                    while not ends:
                        head = await reader.readexactly(9)
                        frame, length = Frame.parse_frame_header(memoryview(head))
                        data = await reader.readexactly(length)
                        frame.parse_body(memoryview(data))
                        if isinstance(frame, GoAwayFrame) or (
                            isinstance(frame, RstStreamFrame) and frame.stream_id == 1
                        ):
                            break
                        if isinstance(frame, HeadersFrame):
                            pairs = {_str(name): _str(value) for name, value in decoder.decode(frame.data)}
                            if frame.stream_id == 1:
                                answer.headers |= pairs
                                ends += "END_STREAM" in frame.flags
                        if isinstance(frame, DataFrame) and frame.stream_id == 1:
                            body += frame.data
        except (HyperframeError, hpack.HPACKError) as error:
            answer.faults.append(f"the answer is no HTTP/2: {error!r}")
        finally:
            await _end(writer)
        if ends and "grpc-status" in answer.headers:
            answer.code = _CODES.get(answer.headers["grpc-status"], "?")
            answer.text = unquote(answer.headers.get("grpc-message", ""))
            answer.bodies = [body[5:]] if body else []
        return answer

    # HTTP.

    async def _request(self, case: Case) -> Answer:
        host, _, port = self._http.rpartition(":")
        reader, writer = await asyncio.open_connection(host, int(port))
        answer, client = Answer(GONE), h11.Connection(h11.CLIENT)
        # h11 wants the request before it reads an answer. A HEAD's answer has no body, whatever its length says.
        method = "HEAD" if case.messages[0].startswith(b"HEAD ") else "POST"
        client.send(h11.Request(method=method, target="/", headers=[("host", "x"), ("content-length", "0")]))
        client.send(h11.EndOfMessage())
        sending = asyncio.create_task(_write(writer, case.messages))
        try:
            async with asyncio.timeout(case.leaves_after_s):
                await self._read(reader, client, answer)
        except TimeoutError:
            answer.code = GONE  # the caller has left within the answer
        except h11.RemoteProtocolError as error:
            if "receive data when" not in str(error) and answer.code == GONE and client.their_state is not h11.IDLE:
                answer.faults.append(f"the answer is no HTTP: {error}")
        finally:
            sending.cancel()
            await asyncio.gather(sending, return_exceptions=True)
            await _end(writer)
        if answer.code not in ("200", GONE):
            answer.text = _error(answer)
        return answer

    async def _read(self, reader: asyncio.StreamReader, client: h11.Connection, answer: Answer) -> None:
        body = bytearray()
        while True:
            event = client.next_event()
            if event is h11.NEED_DATA:
                try:
                    data = await reader.read(1 << 16)
                except OSError:
                    data = b""
                if not data:
                    return
                client.receive_data(data)
            elif isinstance(event, h11.Response):
                answer.code = str(event.status_code)
                answer.headers = {name.decode(): value.decode("latin-1") for name, value in event.headers}
            elif isinstance(event, h11.Data):
                body += event.data
            elif isinstance(event, h11.EndOfMessage):
                answer.bodies = [bytes(body)]
                return
            elif event in (h11.PAUSED,) or isinstance(event, h11.ConnectionClosed):
                return

    # The control line.

    async def _control(self, case: Case) -> Answer:
        path = self._control_path()
        if path is None:
            return Answer(GONE, faults=["there is no control line"])
        # A message whose length was changed leaves the loop waiting for the rest.
        answer = await self._line(path, case.messages, 2.0 if WAITS in case.expects else LINE_TIMEOUT_S)
        other = await self._line(path, tuple(map(frame, (HELLO, LAST))), LINE_TIMEOUT_S)
        answer.faults += [f"another line: {fault}" for fault in other.faults]
        if other.code != "OK":
            answer.faults.append(f"another line ended with {other.code}")
        return answer

    async def _line(self, path: Path, messages: tuple[bytes, ...], timeout_s: float) -> Answer:
        """Send a line's messages, the last a ping, and read what the loop says until its pong or the line's end."""
        answer = Answer(GONE)
        try:
            reader, writer = await asyncio.open_unix_connection(str(path))
        except OSError as error:
            answer.faults.append(f"the control line can't be connected to: {error}")
            return answer
        try:
            with contextlib.suppress(OSError):
                writer.writelines(messages)
                await writer.drain()
            with contextlib.suppress(OSError, asyncio.IncompleteReadError):
                async with asyncio.timeout(timeout_s):
                    while answer.code != "OK":
                        (length,) = LENGTH.unpack(await reader.readexactly(LENGTH.size))
                        answer.bodies.append(await reader.readexactly(length))
                        said = json.loads(answer.bodies[-1])
                        if said.get("op") not in ("hello", "leased", "pong"):
                            answer.faults.append(f"the loop said {str(said)[:200]}")
                        if (said.get("op"), said.get("id")) == ("pong", LAST["id"]):
                            answer.code = "OK"
        except TimeoutError:
            answer.code = WAITS
        finally:
            await _end(writer)
        return answer


async def _each(messages: tuple[bytes, ...]):  # type: ignore[no-untyped-def]
    for message in messages:
        yield message


async def _write(writer: asyncio.StreamWriter, pieces: tuple[bytes, ...]) -> None:
    with contextlib.suppress(OSError):
        for piece in pieces:
            writer.write(piece)
            await writer.drain()
            if len(pieces) > 1:
                await asyncio.sleep(0.005)


async def _end(writer: asyncio.StreamWriter) -> None:
    writer.transport.abort()
    with contextlib.suppress(OSError):
        await writer.wait_closed()


def _error(answer: Answer) -> str:
    body = b"".join(answer.bodies)
    try:
        text = json.loads(body)["error"]
        assert isinstance(text, str)
    except (ValueError, KeyError, TypeError, AssertionError):
        # A HEAD has no body to say it in.
        if body:
            answer.faults.append(f"a refusal's body isn't one error: {body[:200]!r}")
        return ""
    return text


def _str(text: str | bytes) -> str:
    return text.decode("latin-1") if isinstance(text, bytes) else text


_CODES = {str(code.value[0]): code.name for code in grpc.StatusCode}
