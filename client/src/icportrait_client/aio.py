"""The client for asyncio."""

from __future__ import annotations

import asyncio
import os
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterable, AsyncIterator, Iterable, Sequence
from contextlib import aclosing
from types import TracebackType
from typing import TYPE_CHECKING

from icportrait_client import DEFAULT_URL
from icportrait_client.attempts import Counts
from icportrait_client.errors import PortraitError, RequestCancelled
from icportrait_client.messages import Event, Request, build_request
from icportrait_client.options import PortraitOptions, PortraitRequest
from icportrait_client.pictures import PictureSource, picture_bytes
from icportrait_client.portraits import Portrait
from icportrait_client.progress import Bar
from icportrait_client.settings import ClientOptions, check_concurrency, check_seconds, read_settings

if TYPE_CHECKING:
    from typing_extensions import Unpack

AHEAD = 8
"""Answers, in units of ``concurrency``, that ``map`` holds while an earlier one is on its way."""


class AsyncPortraitHandle:
    """A request under way, of ``AsyncPortraitClient.submit``.

    >>> import asyncio
    >>> from icportrait_client import AsyncPortraitClient
    >>> async def main():
    ...     async with AsyncPortraitClient(server.address) as client:
    ...         handle = client.submit(profile=profile, reference=reference, seed=7)
    ...         return (await handle.result()).metadata.seed, handle.done
    >>> asyncio.run(main())
    (7, True)
    """

    def __init__(self, task: asyncio.Task[Portrait]) -> None:
        self._task = task

    @property
    def done(self) -> bool:
        """Tell whether there is a portrait, or an error."""
        return self._task.done()

    def cancel(self) -> None:
        """Cancel the request on the server; ``result`` then raises ``RequestCancelled``."""
        self._task.cancel()

    async def result(self) -> Portrait:
        """Wait for the portrait. Cancelling this doesn't cancel the request.

        Raises:
            PortraitError: as ``AsyncPortraitClient.generate`` does.
        """
        await asyncio.wait([self._task])
        if self._task.cancelled():
            raise RequestCancelled("the request was cancelled")
        return self._task.result()


class AsyncPortraitClient:
    """Connections to one or several IC-Portrait Servers, for one event loop.

    Use as a context manager, or ``await close()``. Connections are made at the first request.

    >>> import asyncio
    >>> async def main():
    ...     async with AsyncPortraitClient(server.address) as client:
    ...         portrait = await client.generate(profile=profile, reference=reference, seed=7)
    ...         return portrait.image.size
    >>> asyncio.run(main())
    (64, 64)
    """

    def __init__(self, servers: str | Sequence[str] = DEFAULT_URL, **options: Unpack[ClientOptions]) -> None:
        """Prepare the connections.

        Args:
            servers: ``host:port`` of gRPC, ``https://host:port``, several of them, or ``dns:///name:port`` for all
                servers behind a name.
            options: what ``ClientOptions`` has.

        Raises:
            InvalidRequest: an argument isn't of its form, or a certificate can't be read.
        """
        self._settings = read_settings(servers, options)
        self._attempts = self._settings.attempts
        self._loop: asyncio.AbstractEventLoop | None = None
        self._pid = 0
        self._closed = False
        self._tasks: set[asyncio.Task[Portrait]] = set()

    async def __aenter__(self) -> AsyncPortraitClient:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.close()

    @property
    def counts(self) -> Counts:
        """Return the numbers of requests, attempts, retries and hedges by now."""
        return self._attempts.counts

    async def close(self) -> None:
        """Close the connections; what is under way is cancelled."""
        self._closed = True
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self._loop:
            await self._attempts.close()

    async def generate(
        self,
        *,
        profile: PictureSource,
        reference: PictureSource,
        timeout_s: float | None = None,
        **options: Unpack[PortraitOptions],
    ) -> Portrait:
        """Make portraits of the person of ``profile`` in the view and the light of ``reference``.

        Cancelling the task cancels the request on the server.

        Args:
            profile: the person.
            reference: the view and the light.
            timeout_s: for this request, over all attempts; None is the client's.
            options: what ``PortraitOptions`` has.

        Raises:
            InvalidRequest: a picture or an option can't be served.
            ServerUnavailable: no server answers, or none takes a request now.
            NotAllowed: the server asks for an API key, or the key doesn't allow the request.
            DeadlineExceeded: ``timeout_s`` or ``deadline_ms`` passed.
            RequestCancelled: the server, or the closing of the client, cancelled the call.
            ServerError: the server failed, or is of another version.
        """
        self._check_open()
        request = await asyncio.to_thread(self.prepare, profile, reference, options)
        return await self.send(request, timeout_s)

    async def stream(
        self,
        *,
        profile: PictureSource,
        reference: PictureSource,
        preview_every: int | None = None,
        timeout_s: float | None = None,
        **options: Unpack[PortraitOptions],
    ) -> AsyncGenerator[Event, None]:
        """Make portraits as ``generate`` does, and yield a ``Progress`` or ``Preview`` for each step before them.

        The request is sent when the first event is asked for. Closing the generator cancels the request on the server;
        ``contextlib.aclosing`` does so however its block is left.

        Args:
            profile: the person.
            reference: the view and the light.
            preview_every: steps between previews; each preview costs the server a decoding. None or 0 is without.
            timeout_s: for the whole stream; None is the client's.
            options: what ``PortraitOptions`` has.

        Raises:
            PortraitError: as ``generate`` does.
        """
        self._check_open()
        request = await asyncio.to_thread(self.prepare, profile, reference, options, preview_every)
        async with aclosing(self.events(request, timeout_s)) as events:
            async for event in events:
                yield event

    def submit(
        self,
        *,
        profile: PictureSource,
        reference: PictureSource,
        timeout_s: float | None = None,
        **options: Unpack[PortraitOptions],
    ) -> AsyncPortraitHandle:
        """Begin what ``generate`` does, and go on meanwhile.

        Returns:
            The request under way. Errors, those of its arguments too, come with its result.
        """
        self._check_open()
        generating = self.generate(profile=profile, reference=reference, timeout_s=timeout_s, **options)
        task = asyncio.get_running_loop().create_task(generating)
        self._tasks.add(task)
        task.add_done_callback(self._forget)
        return AsyncPortraitHandle(task)

    async def map(
        self,
        requests: Iterable[PortraitRequest] | AsyncIterable[PortraitRequest],
        *,
        concurrency: int = 8,
        timeout_s: float | None = None,
        progress: bool = False,
    ) -> AsyncGenerator[Portrait | PortraitError, None]:
        """Make many portraits, several at once, and yield them in the order of their requests.

        Requests are taken as they can be sent, so that an endless or a slow iterable is fine.

        Args:
            requests: the keyword arguments of ``generate``, one mapping each.
            concurrency: requests under way at once.
            timeout_s: for each request; None is the client's.
            progress: show on standard error how many are answered.

        Returns:
            For each request its portrait, or the error that ``generate`` would have raised.
        """
        check_concurrency(concurrency)
        bar, source = Bar(requests, progress), _iterated(requests)
        under_way: deque[asyncio.Task[Portrait]] = deque()
        is_more = True
        try:
            while is_more or under_way:
                running = sum(not task.done() for task in under_way)
                if is_more and running < concurrency and len(under_way) < AHEAD * concurrency:
                    try:
                        request = await anext(source)
                    except StopAsyncIteration:
                        is_more = False
                        continue
                    under_way.append(self.submit(timeout_s=timeout_s, **request)._task)
                elif under_way and under_way[0].done():
                    task = under_way.popleft()
                    bar.advance()
                    try:
                        yield await AsyncPortraitHandle(task).result()
                    except PortraitError as error:
                        yield error
                else:
                    # Of one that has ended nothing is to be waited for.
                    await asyncio.wait(
                        [task for task in under_way if not task.done()], return_when=asyncio.FIRST_COMPLETED
                    )
        finally:
            bar.close()
            for task in under_way:
                task.cancel()

    async def is_ready(self, timeout_s: float = 1.0) -> bool:
        """Tell whether a server takes requests now."""
        self._check_open()
        return await self._attempts.any_ready(timeout_s)

    def prepare(
        self,
        profile: PictureSource,
        reference: PictureSource,
        options: PortraitOptions,
        preview_every: int | None = None,
    ) -> Request:
        """Read the pictures and check the options, without a server; takes a while for large pictures."""
        pictures = {"profile": profile, "reference": reference}
        data = [picture_bytes(source, name, shrink=self._settings.shrink) for name, source in pictures.items()]
        return build_request(data[0], data[1], options, preview_every)

    async def send(self, request: Request, timeout_s: float | None) -> Portrait:
        """Send what ``prepare`` made."""
        self._check_open()
        return await self._attempts.generate(request, self._timeout_s(timeout_s))

    def events(self, request: Request, timeout_s: float | None) -> AsyncGenerator[Event, None]:
        """Send what ``prepare`` made, as a stream."""
        self._check_open()
        return self._attempts.stream(request, self._timeout_s(timeout_s))

    def _timeout_s(self, timeout_s: float | None) -> float:
        return self._settings.timeout_s if timeout_s is None else check_seconds("timeout_s", timeout_s)

    def _forget(self, task: asyncio.Task[Portrait]) -> None:
        self._tasks.discard(task)
        if not task.cancelled():
            task.exception()  # or asyncio complains where nobody asks for the result

    def _check_open(self) -> None:
        if self._closed:
            raise PortraitError("the client is closed; make a new one")
        loop, pid = asyncio.get_running_loop(), os.getpid()
        if self._loop is None:
            self._loop, self._pid = loop, pid
        elif self._pid != pid:
            raise PortraitError("the client was used before this process was forked; make a new one in each process")
        elif self._loop is not loop:
            raise PortraitError("the client belongs to another event loop; make a new one in each")


async def _iterated(
    requests: Iterable[PortraitRequest] | AsyncIterable[PortraitRequest],
) -> AsyncIterator[PortraitRequest]:
    if isinstance(requests, AsyncIterable):
        async for request in requests:
            yield request
    else:
        for request in requests:
            yield request
