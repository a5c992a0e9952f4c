"""Python client of the IC-Portrait Server: two pictures go in, portraits come out."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from icportrait_client.errors import (
    ContractMismatch,
    DeadlineExceeded,
    InvalidRequest,
    NotAllowed,
    PortraitError,
    RequestCancelled,
    ServerError,
    ServerOverloaded,
    ServerUnavailable,
)

if TYPE_CHECKING:
    from icportrait_client.aio import AsyncPortraitClient, AsyncPortraitHandle
    from icportrait_client.attempts import Counts
    from icportrait_client.client import PortraitClient, PortraitHandle
    from icportrait_client.options import PortraitOptions, PortraitRequest
    from icportrait_client.pictures import PictureSource
    from icportrait_client.portraits import Crop, Metadata, Portrait, Preview, Progress, Versions
    from icportrait_client.settings import ClientOptions
    from icportrait_client.transport import Tls, Transport

__version__ = "0.2.0"

DEFAULT_URL = "localhost:8001"
DEFAULT_TIMEOUT_S = 120.0

__all__ = [
    "DEFAULT_TIMEOUT_S",
    "DEFAULT_URL",
    "AsyncPortraitClient",
    "AsyncPortraitHandle",
    "ClientOptions",
    "ContractMismatch",
    "Counts",
    "Crop",
    "DeadlineExceeded",
    "InvalidRequest",
    "Metadata",
    "NotAllowed",
    "PictureSource",
    "Portrait",
    "PortraitClient",
    "PortraitError",
    "PortraitHandle",
    "PortraitOptions",
    "PortraitRequest",
    "Preview",
    "Progress",
    "RequestCancelled",
    "ServerError",
    "ServerOverloaded",
    "ServerUnavailable",
    "Tls",
    "Transport",
    "Versions",
    "__version__",
]

# These modules pull in Pillow and gRPC. They are loaded on first use, so that `icportrait --help` is instant.
_LAZY = {
    "AsyncPortraitClient": "aio",
    "AsyncPortraitHandle": "aio",
    "ClientOptions": "settings",
    "Counts": "attempts",
    "Crop": "portraits",
    "Metadata": "portraits",
    "PictureSource": "pictures",
    "Portrait": "portraits",
    "PortraitClient": "client",
    "PortraitHandle": "client",
    "PortraitOptions": "options",
    "PortraitRequest": "options",
    "Preview": "portraits",
    "Progress": "portraits",
    "Tls": "transport",
    "Transport": "transport",
    "Versions": "portraits",
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(f"icportrait_client.{_LAZY[name]}"), name)
