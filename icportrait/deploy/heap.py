"""Give back to the machine the memory that a process has freed.

glibc's malloc raises two limits of its own with the largest block that was freed: up to 32 MB it keeps a block in its
heap, and up to 64 MB the heap keeps what is free at its end. So one large message or picture makes a process larger
for ever. A fixed limit keeps a process as small as it was; a block above the limit costs page faults each time.
Threads have up to eight heaps a core, each with free memory of its own; two are enough for threads that mostly wait.
"""

from __future__ import annotations

import ctypes
import gc
from typing import Any

LIMIT_BYTES = 2**17
"""glibc's own first limit, which stays the limit once it is set."""
HEAPS = 2
TRIM_THRESHOLD, MMAP_THRESHOLD, ARENA_MAX = -1, -3, -8
"""Numbers of the limits in malloc.h."""


def environment(runtime: str) -> dict[str, str]:
    """Return variables that fix the limits in tritonserver and in the models' processes.

    Args:
        runtime: the repository's. torch gets none, because it allocates the activations of each operation: a run of
            the demo's UNet has 14,500 page faults then, and 1,100 otherwise. ONNX Runtime has none, OpenVINO 35.
    """
    if runtime == "torch":
        return {}
    limits = dict.fromkeys(("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_"), str(LIMIT_BYTES))
    return limits | {"MALLOC_ARENA_MAX": str(HEAPS)}


def fix_limits() -> None:
    """Keep the limits of this process as they are, and its heaps few."""
    if mallopt := _of_glibc("mallopt"):
        for limit in (TRIM_THRESHOLD, MMAP_THRESHOLD):
            mallopt(limit, LIMIT_BYTES)
        mallopt(ARENA_MAX, HEAPS)


def trim() -> None:
    """Give back what is free in this process now. The limits stay glibc's own."""
    if malloc_trim := _of_glibc("malloc_trim"):
        malloc_trim(0)


def keep_present_objects() -> None:
    """Take all Python objects that there are now for lasting: Python's full collections don't look at them any more.

    Of a process that has imported much, these are nearly all objects, and a look at them stops all threads.
    """
    gc.collect()
    gc.freeze()


def _of_glibc(name: str) -> Any:
    """Return a function of glibc; None where the C library is another."""
    return getattr(ctypes.CDLL(None), name, None)
