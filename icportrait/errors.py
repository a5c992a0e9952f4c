"""Exceptions and their way across processes.

    IcPortraitError
      InvalidRequest        the caller's mistake                      INVALID_ARG
        ContractError       a tensor breaks its specification         INVALID_ARG
      Unavailable           the server can't take the request now     UNAVAILABLE
        DeadlineMissed      it took the request, and ran out of time  UNAVAILABLE
      Cancelled             the caller went away                      CANCELLED
      Unauthenticated       no API key, or none of the server's       UNAUTHENTICATED
      PermissionDenied      the API key doesn't allow it              PERMISSION_DENIED
      TooMuch               over the key's rate or quota, or a limit  RESOURCE_EXHAUSTED
      NotFound              there is no such model                    NOT_FOUND
      Unsupported           the protocol has it, this server doesn't  UNIMPLEMENTED
      CheckpointError       a checkpoint can't be read or adapted     INTERNAL
      VerificationError     an exported graph differs from torch      INTERNAL
      RuntimeNotAvailable   an engine runtime isn't installed         INTERNAL
      PlanError             an engine plan isn't what it should be    INTERNAL
      LatencyTableError     a simulated device's latencies are wrong  INTERNAL
      NotEnoughMemory       a server would need more than there is    INTERNAL
      NotEnoughDisk         what is to be written has no room         INTERNAL

Triton turns every error code into INTERNAL when it crosses an ensemble or a BLS call. ``to_wire`` therefore puts the
code into the message and ``from_wire`` finds it again behind whatever Triton wrote before it.
"""

from __future__ import annotations

import re

MOST_CHARACTERS = 4000
"""Characters of an error's text; what is longer is cut."""


class IcPortraitError(Exception):
    """Base of all errors this package raises on purpose; its text is a line, fit for a caller's eyes."""

    code = "INTERNAL"

    def __str__(self) -> str:
        """Return the text, cut and with escapes for what isn't printable: it may quote anything that others wrote."""
        text = super().__str__()[:MOST_CHARACTERS]
        return text if text.isprintable() else "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


class InvalidRequest(IcPortraitError):
    """The caller sent something that can't be served; the text says what came and what was expected."""

    code = "INVALID_ARG"


class ContractError(InvalidRequest):
    """A tensor's name, type, rank or size breaks its specification."""


class Unavailable(IcPortraitError):
    """The server can't take the request now; trying again later may work."""

    code = "UNAVAILABLE"


class DeadlineMissed(Unavailable):
    """The request's ``deadline_ms`` passed while it waited or ran, or couldn't be kept any more."""


class Cancelled(IcPortraitError):
    """The caller cancelled."""

    code = "CANCELLED"


class Unauthenticated(IcPortraitError):
    """The call has no API key, or one that the server doesn't know."""

    code = "UNAUTHENTICATED"


class PermissionDenied(IcPortraitError):
    """The caller's API key doesn't allow what was asked for."""

    code = "PERMISSION_DENIED"


class TooMuch(IcPortraitError):
    """A limit of the gateway, or of the caller's API key, was passed."""

    code = "RESOURCE_EXHAUSTED"


class NotFound(IcPortraitError):
    """The caller named a model that isn't served."""

    code = "NOT_FOUND"


class Unsupported(IcPortraitError):
    """The protocol has what was asked for; this server doesn't offer it."""

    code = "UNIMPLEMENTED"


class CheckpointError(IcPortraitError):
    """A checkpoint directory is incomplete, unsafe or of another geometry."""


class VerificationError(IcPortraitError):
    """An exported graph doesn't do what the torch module does."""


class RuntimeNotAvailable(IcPortraitError):
    """The asked-for engine runtime isn't installed on this machine."""


class PlanError(IcPortraitError):
    """A TensorRT plan was changed, or was built for something else than what is to load it."""


class LatencyTableError(IcPortraitError):
    """A simulated device's latency table can't be read or isn't one."""


class NotEnoughMemory(IcPortraitError):
    """A server would need more memory than there is here; the text has both numbers."""


class NotEnoughDisk(IcPortraitError):
    """A disk is full, or would be before all is written; the text has both numbers."""


DEADLINE_PASSED = ("deadline_ms: passed", "deadline_ms: too near")
"""Beginnings of a ``DeadlineMissed``'s text, because only the text goes over a wire."""
_BY_CODE: dict[str, type[IcPortraitError]] = {
    "INVALID_ARG": InvalidRequest,
    "UNAVAILABLE": Unavailable,
    "CANCELLED": Cancelled,
    "INTERNAL": IcPortraitError,
}
_WIRE = re.compile(r"\[(INVALID_ARG|UNAVAILABLE|CANCELLED|INTERNAL)\] (.*)", re.DOTALL)


def to_wire(error: IcPortraitError) -> str:
    """Return a text that keeps the error's code through Triton: ``[CODE] message``."""
    return f"[{error.code}] {error}"


def to_caller(error: IcPortraitError) -> str:
    """Return the text a caller gets.

    The text of an error that isn't the caller's own mistake says its code, because HTTP ``generate`` answers every
    error with status 400.
    """
    return str(error) if isinstance(error, InvalidRequest) else f"{error.code}: {error}"


def from_wire(text: str) -> IcPortraitError | None:
    """Find in ``text``, behind any prefix, the error that ``to_wire`` wrote. Return None where there is none."""
    match = _WIRE.search(text)
    if match and match[1] == DeadlineMissed.code and match[2].startswith(DEADLINE_PASSED):
        return DeadlineMissed(match[2])
    return _BY_CODE[match[1]](match[2]) if match else None
