"""The client for threads: an asyncio client on an event loop of its own, in a thread of its own."""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import os
import threading
from collections import deque
from collections.abc import Callable, Coroutine, Generator, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, CancelledError, Future, wait
from types import TracebackType
from typing import TYPE_CHECKING, Any, TypeVar

from icportrait_client import DEFAULT_URL
from icportrait_client.aio import AHEAD, AsyncPortraitClient
from icportrait_client.attempts import Counts
from icportrait_client.errors import PortraitError, RequestCancelled
from icportrait_client.messages import Event, Request
from icportrait_client.options import PortraitOptions, PortraitRequest
from icportrait_client.pictures import PictureSource
from icportrait_client.portraits import Portrait
from icportrait_client.progress import Bar
from icportrait_client.settings import ClientOptions, check_concurrency

if TYPE_CHECKING:
    from typing_extensions import Unpack

Result = TypeVar("Result")


class PortraitHandle:
    """A request under way, of ``PortraitClient.submit``.

    >>> handle = client.submit(profile=profile, reference=reference, seed=7)
    >>> handle.result().metadata.seed
    7
    >>> handle.done
    True
    """

    def __init__(self, future: Future[Portrait]) -> None:
        self._future = future

    @property
    def done(self) -> bool:
        """Tell whether there is a portrait, or an error."""
        return self._future.done()

    def cancel(self) -> None:
        """Cancel the request on the server; ``result`` then raises ``RequestCancelled``."""
        self._future.cancel()

    def result(self) -> Portrait:
        """Wait for the portrait.

        Raises:
            PortraitError: as ``PortraitClient.generate`` does.
        """
        return _result(self._future)


class PortraitClient:
    """Connections to one or several IC-Portrait Servers. Threads may share a client.

    Use as a context manager, or call ``close``. Connections are made at the first request; a client that was made but
    not used before a fork works in each process.

    >>> with PortraitClient(server.address, timeout_s=60) as client:
    ...     portrait = client.generate(profile=profile, reference=reference, seed=7)
    >>> portrait.metadata.seed
    7
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
        self._client = AsyncPortraitClient(servers, **options)
        self._loop = _Loop()
        self._closed = False

    def __enter__(self) -> PortraitClient:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    @property
    def counts(self) -> Counts:
        """Return the numbers of requests, attempts, retries and hedges by now."""
        return self._client.counts

    def close(self) -> None:
        """Close the connections; what is under way is cancelled."""
        self._closed = True
        self._loop.close(self._client.close)

    def generate(
        self,
        *,
        profile: PictureSource,
        reference: PictureSource,
        timeout_s: float | None = None,
        **options: Unpack[PortraitOptions],
    ) -> Portrait:
        """Make portraits of the person of ``profile`` in the view and the light of ``reference``.

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
        return self.submit(profile=profile, reference=reference, timeout_s=timeout_s, **options).result()

    def stream(
        self,
        *,
        profile: PictureSource,
        reference: PictureSource,
        preview_every: int | None = None,
        timeout_s: float | None = None,
        **options: Unpack[PortraitOptions],
    ) -> Generator[Event, None, None]:
        """Make portraits as ``generate`` does, and yield a ``Progress`` or ``Preview`` for each step before them.

        The request is sent when the first event is asked for. Closing the generator cancels the request on the server;
        ``contextlib.closing`` does so however its block is left. A loop that is left closes a generator that nothing
        else refers to. Any number of streams may be open at once.

        Args:
            profile: the person.
            reference: the view and the light.
            preview_every: steps between previews; each preview costs the server a decoding. None or 0 is without.
            timeout_s: for the whole stream; None is the client's.
            options: what ``PortraitOptions`` has.

        Returns:
            A generator of what comes, as it comes. It raises what ``generate`` raises.

        Raises:
            InvalidRequest: a picture or an option can't be served, as far as that is found before sending.
        """
        self._check_open()
        return self._events(self._client.prepare(profile, reference, options, preview_every), timeout_s)

    def submit(
        self,
        *,
        profile: PictureSource,
        reference: PictureSource,
        timeout_s: float | None = None,
        **options: Unpack[PortraitOptions],
    ) -> PortraitHandle:
        """Begin what ``generate`` does, and return at once.

        Returns:
            The request under way.

        Raises:
            InvalidRequest: a picture or an option can't be served, as far as that is found before sending.
        """
        self._check_open()
        request = self._client.prepare(profile, reference, options)
        return PortraitHandle(self._loop.submit(self._client.send(request, timeout_s)))

    def map(
        self,
        requests: Iterable[PortraitRequest],
        *,
        concurrency: int = 8,
        timeout_s: float | None = None,
        progress: bool = False,
    ) -> Iterator[Portrait | PortraitError]:
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
        return self._mapped(requests, concurrency, timeout_s, progress)

    def is_ready(self, timeout_s: float = 1.0) -> bool:
        """Tell whether a server takes requests now."""
        self._check_open()
        return _result(self._loop.submit(self._client.is_ready(timeout_s)))

    def _events(self, request: Request, timeout_s: float | None) -> Generator[Event, None, None]:
        self._check_open()
        events = self._client.events
        opened = _result(self._loop.submit(_called(lambda: events(request, timeout_s))))
        try:
            while (event := _result(self._loop.submit(_next(opened)))) is not None:
                yield event
        finally:
            # Of a client that is closed, nothing is left to be cancelled.
            with contextlib.suppress(RequestCancelled):
                closing = self._loop.submit(_close(opened))
                # The garbage collector may close this generator in the loop's own thread, which can't wait for itself.
                if not self._loop.is_own_thread:
                    _result(closing)

    def _mapped(
        self, requests: Iterable[PortraitRequest], concurrency: int, timeout_s: float | None, progress: bool
    ) -> Iterator[Portrait | PortraitError]:
        bar, source = Bar(requests, progress), iter(requests)
        under_way: deque[Future[Portrait]] = deque()
        is_more = True
        try:
            while is_more or under_way:
                running = sum(not future.done() for future in under_way)
                if is_more and running < concurrency and len(under_way) < AHEAD * concurrency:
                    try:
                        request = next(source)
                    except StopIteration:
                        is_more = False
                        continue
                    under_way.append(self._submitted(request, timeout_s))
                elif under_way[0].done():
                    future = under_way.popleft()
                    bar.advance()
                    try:
                        yield _result(future)
                    except PortraitError as error:
                        yield error
                else:
                    wait([future for future in under_way if not future.done()], return_when=FIRST_COMPLETED)
        finally:
            bar.close()
            for future in under_way:
                future.cancel()

    def _submitted(self, request: PortraitRequest, timeout_s: float | None) -> Future[Portrait]:
        try:
            return self.submit(timeout_s=timeout_s, **request)._future
        except PortraitError as error:
            failed: Future[Portrait] = Future()
            failed.set_exception(error)
            return failed

    def _check_open(self) -> None:
        if self._closed:
            raise PortraitError("the client is closed; make a new one")
        self._loop.start()


class _Loop:
    """An event loop in a thread, from its first use until it is closed."""

    def __init__(self) -> None:
        # Reentrant, because the garbage collector may close a stream, which submits, wherever a thread is.
        self._lock = threading.RLock()
        self._is_ended = False
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None
        self._pid = 0

    def start(self) -> None:
        """Start the thread, if it isn't there yet.

        Raises:
            PortraitError: it has ended, or is another process's, from before a fork.
        """
        with self._lock:
            if self._is_ended:
                raise PortraitError("the client is closed; make a new one")
            if self._loop is None:
                self._pid = os.getpid()
                self._loop = asyncio.new_event_loop()
                self._thread = threading.Thread(target=self._run, name="icportrait-client", daemon=True)
                self._thread.start()
                atexit.register(self.stop)
            elif self._pid != os.getpid():
                raise PortraitError(
                    "the client was used before this process was forked; make a new one in each process"
                )

    def submit(self, coroutine: Coroutine[Any, Any, Result]) -> Future[Result]:
        assert self._loop
        # A coroutine that comes after the loop's end would never run, and its caller would wait for ever.
        with self._lock:
            if not self._is_ended:
                return asyncio.run_coroutine_threadsafe(coroutine, self._loop)
        coroutine.close()
        raise RequestCancelled("the client was closed")

    def close(self, closing: Callable[[], Coroutine[Any, Any, None]]) -> None:
        """Run a last coroutine, and end the thread."""
        if self._loop and self._pid == os.getpid():
            # Another thread may close it meanwhile.
            with contextlib.suppress(RequestCancelled):
                _result(self.submit(closing()))
        self.stop()

    def stop(self) -> None:
        """End the thread; what still runs there is cancelled."""
        atexit.unregister(self.stop)
        with self._lock:
            is_first, self._is_ended = not self._is_ended, True
        if self._loop and self._thread and self._pid == os.getpid():
            if is_first:
                self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join()

    @property
    def is_own_thread(self) -> bool:
        return threading.current_thread() is self._thread

    def _run(self) -> None:
        assert self._loop
        asyncio.set_event_loop(self._loop)
        try:
            self._loop.run_forever()
            left = asyncio.all_tasks(self._loop)
            for task in left:
                task.cancel()
            self._loop.run_until_complete(asyncio.gather(*left, return_exceptions=True))
            self._loop.run_until_complete(self._loop.shutdown_asyncgens())
        finally:
            self._loop.close()


def _result(future: Future[Result]) -> Result:
    try:
        return future.result()
    except CancelledError:
        raise RequestCancelled("the request was cancelled") from None
    except BaseException:
        # Ctrl-C in this thread ends the request, too.
        future.cancel()
        raise


async def _called(function: Callable[[], Result]) -> Result:
    return function()


async def _close(events: Any) -> None:
    # After Ctrl-C the step that was waited for is still being cancelled, and a generator that runs can't be closed.
    while events.ag_running:
        await asyncio.sleep(0)
    await events.aclose()


async def _next(events: Any) -> Event | None:
    event: Event | None = await anext(events, None)
    return event
