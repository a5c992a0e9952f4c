"""The machine that a figure was measured on: its CPU's instruction set decides more than its clock does."""

from __future__ import annotations

import os
import platform
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np

CPUINFO = Path("/proc/cpuinfo")
LEVELS = (
    ("AMX with bf16", {"amx_bf16"}),
    ("AVX-512 with bf16", {"avx512f", "avx512_bf16"}),
    ("AVX-512", {"avx512f"}),
    ("AVX2", {"avx2"}),
)
"""An instruction set's name, and the kernel's flags that it takes, the best first."""


def machine() -> dict[str, Any]:
    """Return the CPU's name, its instruction set, the cores that this process may use, and the memory."""
    fields = cpu_fields(CPUINFO.read_text(encoding="utf-8") if CPUINFO.is_file() else "")
    return {
        "cpu": fields.get("model name", platform.processor() or platform.machine()),
        "instruction_set": instruction_set(fields.get("flags", "")),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gb": round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 1e9, 1),
    }


def cpu_fields(text: str) -> dict[str, str]:
    """Read the first processor's fields of a ``/proc/cpuinfo``."""
    lines = (line.partition(":") for line in text.partition("\n\n")[0].splitlines())
    return {name.strip(): value.strip() for name, _, value in lines}


def instruction_set(flags: str) -> str:
    """Name the best of ``LEVELS`` that the kernel's flags have, else the machine's architecture."""
    found = set(flags.split())
    return next((name for name, needed in LEVELS if needed <= found), platform.machine())


def measured_peak(seconds: float = 0.5) -> dict[str, float]:
    """Measure what all cores can do at once: a float32 matrix product by torch, and a copy by NumPy.

    Args:
        seconds: time for each of both.

    Returns:
        ``gflops``, two operations a multiplication, and ``gb_per_s``, bytes read plus bytes written: the best run of
        each.
    """
    import torch

    side = 1536
    left, right = torch.rand(side, side), torch.rand(side, side)
    source = np.ones(2**24, np.float32)
    target = np.empty_like(source)
    product_s = _best_s(lambda: torch.mm(left, right), seconds)
    copy_s = _best_s(lambda: np.copyto(target, source), seconds)
    return {"gflops": round(2 * side**3 / product_s / 1e9, 1), "gb_per_s": round(2 * source.nbytes / copy_s / 1e9, 1)}


def over_the_floor(rows: Sequence[Mapping[str, Any]]) -> str:
    """Write what a reader must know where engines were faster than their floors; empty where none was."""
    if not (over := sum(row["share_of_floor"] > 1 for row in rows)):
        return ""
    return (
        f"{over} of {len(rows)} shares are over 100 %, which can't be: the peak was measured while the machine did"
        " something else, or the engine computes in less than float32. No share of this run counts; measure again."
    )


def _best_s(run: Callable[[], object], seconds: float) -> float:
    run()
    best, until_s = float("inf"), perf_counter() + seconds
    while (began_s := perf_counter()) < until_s:
        run()
        best = min(best, perf_counter() - began_s)
    return best
