"""Exceptions of the client.

    PortraitError
      InvalidRequest      the caller's mistake, found here or by the server   INVALID_ARGUMENT
      ServerUnavailable   no server answers, or it can't take a request now   UNAVAILABLE
      NotAllowed          an API key is missing or doesn't allow the request  UNAUTHENTICATED, PERMISSION_DENIED
      RequestCancelled    the call was cancelled before its answer            CANCELLED
      DeadlineExceeded    no answer within the client's ``timeout_s``         DEADLINE_EXCEEDED
      ServerError         the server failed, or answered what it should not   every other code

The right column is the gRPC code that becomes the exception. RESOURCE_EXHAUSTED, of a key's rate or quota, with a time
to try again becomes ServerUnavailable.
"""

from __future__ import annotations


class PortraitError(Exception):
    """Base of all errors this package raises on purpose; its text is fit for a user's eyes."""


class InvalidRequest(PortraitError):
    """The request can't be served as it is; the text says what came and what was expected."""


class ServerUnavailable(PortraitError):
    """No server answers at the url, or the one there can't take the request now; trying again later may work."""

    retry_after_ms: int | None
    """When to try again, in ms from now, where the server said so: one whose queue is full does."""

    def __init__(self, message: str, *, retry_after_ms: int | None = None) -> None:
        super().__init__(message)
        self.retry_after_ms = retry_after_ms


class NotAllowed(PortraitError):
    """The server asks for an API key and got none that it knows, or the key doesn't allow the request."""


class RequestCancelled(PortraitError):
    """The call was cancelled before its answer came."""


class DeadlineExceeded(PortraitError):
    """The answer didn't come in time."""


class ServerError(PortraitError):
    """The server failed; the request may be right."""
