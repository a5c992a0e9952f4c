"""Exceptions of the client.

    PortraitError
      InvalidRequest        the caller's mistake, found here or by the server    INVALID_ARGUMENT
      NotAllowed            an API key is missing or doesn't allow the request   UNAUTHENTICATED, PERMISSION_DENIED
      ServerUnavailable     no server answers, or it takes no request now        UNAVAILABLE
        ServerOverloaded    a server has too much to do, or the key is used up   UNAVAILABLE, RESOURCE_EXHAUSTED
      DeadlineExceeded      no answer within ``timeout_s`` or ``deadline_ms``    DEADLINE_EXCEEDED
      RequestCancelled      the call was cancelled before its answer             CANCELLED
      ServerError           the server failed, or answered what it should not    every other code
        ContractMismatch    the server's inputs and outputs aren't this client's

The right column is the gRPC code that becomes the exception; ``from_status`` is the one place where that happens. The
server's own texts begin with their code, except for INVALID_ARGUMENT. A text without its code is gRPC's own, or a
proxy's: no server has spoken.
"""

from __future__ import annotations

import re

_RETRY_AFTER = re.compile(r"\bretry_after_ms: (\d{1,12})\s*$")
_TOO_MUCH = re.compile(r"\bis full\b|\bare pending\b|\btoo much\b|\btoo many\b|\bdeadline_ms: |\bneed the room\b")
_DEADLINE_PASSED = "UNAVAILABLE: deadline_ms: passed"
_CUT = ("CANCELLED", "INTERNAL", "UNKNOWN")
_CUT_TEXT = re.compile(r"RST_STREAM|[Ss]tream removed|[Ss]ocket closed|GOAWAY|[Cc]onnection reset")


class PortraitError(Exception):
    """Base of all errors this package raises on purpose; its text is fit for a user's eyes.

    >>> try:
    ...     client.generate(profile="no/such.jpg", reference=reference)
    ... except PortraitError as error:
    ...     print(error)
    profile: 'no/such.jpg' can't be read (No such file or directory), expected a picture's path
    """


class InvalidRequest(PortraitError):
    """The request can't be served as it is; the text says what came and what was expected.

    >>> try:
    ...     client.generate(profile=profile, reference=reference, num_inference_steps=500)
    ... except InvalidRequest as error:
    ...     print(error)
    num_inference_steps: 500, expected 1..150
    """


class NotAllowed(PortraitError):
    """The server asks for an API key and got none that it knows, or the key doesn't allow the request.

    >>> server.fail("UNAUTHENTICATED", "UNAUTHENTICATED: no valid API key")
    >>> try:
    ...     client.generate(profile=profile, reference=reference)
    ... except NotAllowed as error:
    ...     print("no valid API key" in str(error))
    True
    """


class ServerUnavailable(PortraitError):
    """No server answers, or none takes the request now; trying again later may work.

    >>> from icportrait_client import PortraitClient
    >>> with PortraitClient("127.0.0.1:1", attempts=1) as nobody:
    ...     try:
    ...         nobody.generate(profile=profile, reference=reference)
    ...     except ServerUnavailable as error:
    ...         print(error.retry_after_ms, error.has_answered)
    None False
    """

    retry_after_ms: int | None
    """Milliseconds from now until the next try, where a server gave them, as with a full queue."""
    has_answered: bool
    """A server said so; False where the connection failed or was cut."""

    def __init__(self, message: str, *, retry_after_ms: int | None = None, has_answered: bool = False) -> None:
        super().__init__(message)
        self.retry_after_ms = retry_after_ms
        self.has_answered = has_answered


class ServerOverloaded(ServerUnavailable):
    """A server has too much to do: its queue is full, or the rate or quota of the API key is used up.

    >>> server.fail("UNAVAILABLE", "UNAVAILABLE: the queue is full; retry_after_ms: 340", times=9)
    >>> try:
    ...     client.generate(profile=profile, reference=reference, timeout_s=0.3)
    ... except ServerOverloaded as error:
    ...     print(error.retry_after_ms)
    340
    """


class DeadlineExceeded(PortraitError, TimeoutError):
    """The answer didn't come within ``timeout_s``, or the request's ``deadline_ms`` passed.

    >>> server.delay_s = 5
    >>> try:
    ...     client.generate(profile=profile, reference=reference, timeout_s=0.1)
    ... except DeadlineExceeded as error:
    ...     print(str(error).partition(": ")[2])
    no answer within 0.1 s; allow more with timeout_s
    """


class RequestCancelled(PortraitError):
    """The call was cancelled before its answer came.

    >>> server.delay_s = 5
    >>> handle = client.submit(profile=profile, reference=reference)
    >>> handle.cancel()
    >>> try:
    ...     handle.result()
    ... except RequestCancelled as error:
    ...     print(error)
    the request was cancelled
    """


class ServerError(PortraitError):
    """The server failed, or answered something that isn't an answer; the request may be right.

    >>> server.fail("INTERNAL", "INTERNAL: the server failed; its log says how")
    >>> try:
    ...     client.generate(profile=profile, reference=reference)
    ... except ServerError as error:
    ...     print(str(error).partition(": ")[2])
    INTERNAL: the server failed; its log says how
    """


class ContractMismatch(ServerError):
    """The server's models have other inputs or outputs than this version of the client; checked on first use.

    >>> from icportrait_client import PortraitClient
    >>> from icportrait_client.testing import FakePortraitServer
    >>> with FakePortraitServer(lacks="mask_ratio") as older, PortraitClient(older.address) as client:
    ...     try:
    ...         client.generate(profile=profile, reference=reference)
    ...     except ContractMismatch as error:
    ...         print(str(error).partition(": ")[2])
    the server has no input mask_ratio; install the client of the server's version
    """


def from_status(code: str, text: str, address: str, timeout_s: float) -> PortraitError:
    """Return the exception for the end of a call.

    Args:
        code: the name of a gRPC status code.
        text: its details, the server's or gRPC's own.
        address: the server's.
        timeout_s: how long the caller was willing to wait.
    """
    retry_after = int(found[1]) if (found := _RETRY_AFTER.search(text)) else None
    has_answered = text.startswith(f"{code}: ")
    own = text.removeprefix(f"{code}: ") or "no reason given"
    if code == "INVALID_ARGUMENT":
        return InvalidRequest(own)
    if code in ("UNAUTHENTICATED", "PERMISSION_DENIED"):
        return NotAllowed(f"{address}: {own}")
    if code == "DEADLINE_EXCEEDED":
        return too_late(address, timeout_s)
    if text.startswith(_DEADLINE_PASSED):
        return DeadlineExceeded(f"{address}: {own}")
    if code == "RESOURCE_EXHAUSTED" and retry_after is not None:
        return ServerOverloaded(f"{address}: {text}", retry_after_ms=retry_after, has_answered=True)
    if code in _CUT and not has_answered and _CUT_TEXT.search(text):
        return ServerUnavailable(f"{address}: the connection was cut ({own})")
    if code == "UNAVAILABLE":
        if not has_answered and retry_after is None:
            return ServerUnavailable(f'{address}: no server answers ({own}); "make serve" starts one')
        kind = ServerOverloaded if _TOO_MUCH.search(text) else ServerUnavailable
        return kind(f"{address}: {text}", retry_after_ms=retry_after, has_answered=True)
    if code == "CANCELLED":
        return RequestCancelled(f"{address}: {own}")
    return ServerError(f"{address}: {code}: {own}")


def too_late(address: str, timeout_s: float) -> DeadlineExceeded:
    """Return the exception for an answer that didn't come in time."""
    return DeadlineExceeded(f"{address}: no answer within {timeout_s:g} s; allow more with timeout_s")
