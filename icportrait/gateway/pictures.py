"""How a process begins that decodes and encodes pictures, which a bad picture may end."""

from __future__ import annotations

import resource

import icportrait.prepared  # noqa: F401  (what a picture needs)
from icportrait import faces


def begin(memory_bytes: int) -> None:
    """Bound this process's address space, and load what the first picture would wait for."""
    _, most = resource.getrlimit(resource.RLIMIT_AS)
    if most != resource.RLIM_INFINITY:
        memory_bytes = min(memory_bytes, most)
    resource.setrlimit(resource.RLIMIT_AS, (memory_bytes, most))
    faces._finder()
