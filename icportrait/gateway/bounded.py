"""Runs what decodes and encodes pictures, in a process that a bad picture may end."""

from __future__ import annotations

import os
import resource
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import icportrait.pictures.prepare  # noqa: F401  (what a picture needs)
from icportrait.deploy import heap
from icportrait.gateway import c2pa_signing
from icportrait.gateway.sandbox import begin_filter
from icportrait.pictures import finder

Result = TypeVar("Result")
OVER_TIME = signal.SIGPROF
"""Ends a process whose picture takes too much time, wherever in a decoder it is."""


def begin(credentials: c2pa_signing.Credentials | None = None, is_filtered: bool = False) -> None:
    """Load what the first picture would wait for, and give up what no picture needs.

    Args:
        credentials: what portraits are signed with; None where they aren't.
        is_filtered: see ``sandbox.begin_filter``.
    """
    finder.load()
    c2pa_signing.begin(credentials)
    if is_filtered:
        begin_filter(needs_network=credentials is not None and credentials.timestamp_url is not None)


def bounded(function: Callable[..., Result], cpu_s: float, memory_bytes: int, *arguments: Any) -> Result:
    """Run ``function(*arguments)`` within bounds of its own, whatever came before it in this process.

    Args:
        function: what to do.
        cpu_s: of a core; where it takes more, ``OVER_TIME`` ends the process.
        memory_bytes: of address space beyond what the process has; where it takes more, it gets a MemoryError.
        arguments: the function's.
    """
    has_bytes = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    _, most = resource.getrlimit(resource.RLIMIT_AS)
    allowed = has_bytes + memory_bytes
    resource.setrlimit(resource.RLIMIT_AS, (allowed if most == resource.RLIM_INFINITY else min(allowed, most), most))
    signal.setitimer(signal.ITIMER_PROF, cpu_s)
    try:
        return function(*arguments)
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)


def rest(_: bytes) -> None:
    """Give back the memory that pictures have freed in this process."""
    heap.trim()
