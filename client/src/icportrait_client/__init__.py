"""Python client of the IC-Portrait Server: two pictures go in, portraits come out."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from icportrait_client.errors import (
    DeadlineExceeded,
    InvalidRequest,
    NotAllowed,
    PortraitError,
    RequestCancelled,
    ServerError,
    ServerUnavailable,
)

if TYPE_CHECKING:
    from icportrait_client.client import PortraitClient
    from icportrait_client.options import PortraitOptions
    from icportrait_client.pictures import PictureSource
    from icportrait_client.portraits import Portraits, Progress

__version__ = "0.1.0"

DEFAULT_URL = "localhost:8001"
DEFAULT_TIMEOUT_S = 120.0

__all__ = [
    "DEFAULT_TIMEOUT_S",
    "DEFAULT_URL",
    "DeadlineExceeded",
    "InvalidRequest",
    "NotAllowed",
    "PictureSource",
    "PortraitClient",
    "PortraitError",
    "PortraitOptions",
    "Portraits",
    "Progress",
    "RequestCancelled",
    "ServerError",
    "ServerUnavailable",
    "__version__",
]

# These modules pull in NumPy, Pillow and gRPC. They are loaded on first use, so that `icportrait --help` is instant.
_LAZY = {
    "PictureSource": "icportrait_client.pictures",
    "PortraitClient": "icportrait_client.client",
    "PortraitOptions": "icportrait_client.options",
    "Portraits": "icportrait_client.portraits",
    "Progress": "icportrait_client.portraits",
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_LAZY[name]), name)
